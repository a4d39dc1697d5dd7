"""The one training loop, and the start of a run around it."""

import contextlib
import dataclasses
import functools
import pathlib
import secrets
from collections.abc import Callable, Sequence

import jax
import numpy as np

from euroflax import evaluation, sharding
from euroflax.accelerators import accelerator_of, estimated_joules
from euroflax.checkpoint import Checkpoints
from euroflax.data.ledger import ledger
from euroflax.data.loader import Rows, batches
from euroflax.data.prepare import Prepared
from euroflax.data.skipping import Range, batch_stop, next_position
from euroflax.data.tokenizer import Tokenizer
from euroflax.experiment import Experiment, ExperimentError, Interrupted, RunFailed, Span, to_json
from euroflax.huggingface import Folder
from euroflax.processes import agree, from_first, gather_json
from euroflax.training.clock import Clock
from euroflax.training.energy import Energy, Reading, combine
from euroflax.training.guard import BadStretch
from euroflax.training.job import Display, Job
from euroflax.training.meter import Meter
from euroflax.training.optimizer import about_longer
from euroflax.training.record import Record, differences, now
from euroflax.training.samples import write_samples
from euroflax.training.saving import Saver
from euroflax.training.step import (
    NO_ROW,
    Step,
    TrainState,
    abstract_state,
    compile_step,
    init_state,
    skip,
    skipped_ranges,
)
from euroflax.training.stop import Stop
from euroflax.training.tracking import Tracking

_MORE_STEPS = 3
"""That a wish to stop waits for one which is applied, and can be saved."""


def train(
    declared: Experiment,
    prepared: Prepared,
    weights: Callable[[], Folder] | None,
    run_dir: pathlib.Path,
    display: Display,
    stop: Stop,
    clock: Clock,
    track: Sequence[str] = (),
) -> dict:
    """Trains from the latest checkpoint, or from the beginning, to the end; returns the parameters.

    The beginning is what `weights` opens where it is given, and random otherwise. Metrics are shown by the trackers
    `track` too.

    Raises:
        ExperimentError: the run folder, the mesh or the data does not fit the experiment.
        Interrupted: `stop` was requested; the state is saved.
    """
    mesh = sharding.make_mesh(declared)
    assert isinstance(mesh, jax.sharding.Mesh)
    record = Record(run_dir, declared, writes=jax.process_index() == 0)
    energy = Energy(device.local_hardware_id for device in jax.local_devices() if device.platform == "gpu")
    with contextlib.closing(record), contextlib.closing(energy), jax.set_mesh(mesh):
        guard = declared.training.guard
        return_steps = guard.max_returns * guard.window_steps or None  # a later return may go back from an earlier one
        with stop.at_once():
            checkpoints = Checkpoints(run_dir / "checkpoints", declared.checkpoint, display.note, return_steps)
        with contextlib.closing(checkpoints):
            job = Job(declared, prepared, weights, mesh, record, checkpoints, display, stop, clock, energy)
            with contextlib.closing(_tracking(job, track)):
                return _run(job).params


def _tracking(job: Job, names: Sequence[str]) -> Tracking:
    run_id = job.record.manifest.setdefault("tracking_id", secrets.token_hex(4))
    tracking = Tracking(
        names if jax.process_index() == 0 else (), job.declared, job.record.path, run_id, job.display.note
    )
    job.record.on_line = tracking.log
    return tracking


def check_facts(declared: Experiment, tokenizer: Tokenizer, path: pathlib.Path, facts: dict) -> None:
    """Refuses a checkpoint of another experiment or tokenizer.

    Raises:
        ExperimentError: a field differs that may not, or the tokenizer does.
    """
    if facts["tokenizer"] != tokenizer.fingerprint:
        raise ExperimentError(
            f"run folder={path}: the tokenizer changed since the run began; put the data back or start another run"
        )
    if faults := differences(facts["experiment"], to_json(declared), path):
        raise ExperimentError(*faults)


def _run(job: Job) -> TrainState:
    state, shardings = _first_state(job)
    state = skip(state, _ranges_on_record(job, state))
    step, position = int(state.step), int(state.position)
    rows = Rows(job.declared, job.prepared, job.prepared.withdrawals(position)).without(skipped_ranges(state))
    job.record.begin(_session(job), job.prepared, rows.order, position)
    _note_read(job, rows, position)
    job.record.cut_back(step, begins=True)
    job.record.write_manifest()
    if job.record.missing_steps > 0:
        job.display.note(f"metrics.jsonl lacks {job.record.missing_steps} of the {step} steps until here")
    session = job.record.manifest["sessions"][-1]
    if position >= job.declared.total_rows:
        job.display.note(f"run {job.declared.name} is complete: {step} steps")
    elif step:
        job.display.note(f"goes on after step {step} of run {job.declared.name}")
    if (earlier := job.checkpoints.latest_facts) is not None:
        before = earlier["experiment"]["training"]["tokens"]
        for text in about_longer(job.declared, before, job.declared.tokens_at(position)):
            job.display.note(text)
    steps: dict[int, Step] = {}
    job.clock.turn("other")
    try:
        while True:
            try:
                state = _loop(job, rows, state, shardings, steps)
                break
            except BadStretch as error:  # which holds the state: it must be gone before another one is read
                bad, why = error.rows, str(error)
            del state
            state, rows = _go_back(job, rows, bad, why, shardings)
        if job.declared.evaluation.sample_tokens:
            with job.clock.on("evaluate"):
                _sample(job, state)
        return state
    finally:
        if position >= job.declared.total_rows and not session["steps"]:
            job.record.forget_session()  # a complete run typed again
        else:
            _note_session(job, session.get("position", position))


def _ranges_on_record(job: Job, state: TrainState) -> list[Range]:
    """The ranges of rows that the run has gone back to skip, also where nothing was saved since."""
    most = state.skipped_ranges_PQ.shape[0]
    told = [tuple(entry["rows"]) for entry in job.record.manifest.get("returns", [])]
    ranges = sorted({*skipped_ranges(state), *(rows for rows in told if rows[1] > int(state.position))})[:most]
    padded = np.full((most, 2), NO_ROW, np.int64)
    padded[: len(ranges)] = np.array(ranges, np.int64).reshape(-1, 2)
    return [(start, stop) for start, stop in from_first(padded).tolist() if start != NO_ROW]


def _go_back(job: Job, rows: Rows, bad: Range, why: str, shardings: TrainState) -> tuple[TrainState, Rows]:
    """The state of the checkpoint before a stretch of rows, and the rows without that stretch.

    Raises:
        RunFailed: the run may not go back, or there is nowhere to go back to or nothing to go on with.
    """
    most, kept = job.declared.training.guard.max_returns, job.checkpoints.settle()
    if len(rows.skipped) >= most:
        used = f"; the run has gone back {most} times (training.guard.max_returns)" if most else ""
        raise RunFailed(f"{why}; {kept}{used}")
    if bad[1] >= job.declared.total_rows:
        raise RunFailed(f"{why}; {kept}; these are the last rows of the run, and nothing is left to go on with")
    with job.clock.on("restart"):
        if not job.checkpoints.go_back(bad[0]):
            raise RunFailed(f"{why}; {kept}; none is from before row {bad[0]}, to go back to")
        state, _ = _first_state(job)
        state = skip(state, [*rows.skipped, bad])
    step = int(state.step)
    job.clock.lose(job.record.cut_back(step))
    job.record.manifest.setdefault("returns", []).append({"at": now(), "step": step, "rows": bad, "why": why})
    position = int(state.position)
    # As a start from there would have them: what a block list withdrew since is not read once more.
    rows = Rows(job.declared, job.prepared, job.prepared.withdrawals(position)).without(skipped_ranges(state))
    job.record.keep_order(rows.order)
    _note_read(job, rows, position)
    _note_session(job, position)
    job.display.note(
        f"{why}; goes back to step {step} and on without rows {bad[0]} to {bad[1] - 1}, return {len(rows.skipped)} of "
        f"{most}"
    )
    return state, rows


def _note_session(job: Job, position: int, readings: list[Reading] | None = None) -> None:
    """Brings the manifest up to date: the session's end so far."""
    session = job.record.manifest["sessions"][-1]
    session |= {"to": now(), "position": position, "seconds": job.clock.read()}
    kind = accelerator_of(session["device_kind"])
    seconds = session["devices"] * sum(session["seconds"].values())
    session["energy_estimate_joules"] = estimated_joules(kind, seconds)
    readings = [job.energy.read()] if readings is None and jax.process_count() == 1 else readings
    if readings is not None:
        on_accelerator = jax.default_backend() != "cpu"
        session["energy_joules"], session["energy_boundary"] = combine(readings, on_accelerator)
    job.record.write_manifest()


def _readings(job: Job) -> list[Reading]:
    """What each process of the job has measured: all of them must ask."""
    mine = dataclasses.asdict(job.energy.read())
    return [Reading(**theirs) for theirs in gather_json(mine)]


def _note_read(job: Job, rows: Rows, position: int) -> None:
    """Brings the ledger of the manifest up to date: what was read until a position."""
    if jax.process_index() == 0:
        found = ledger(job.declared, rows.order, position, rows.skipped)
        entries = [dataclasses.asdict(entry) for entry in found]
        job.record.manifest["skipped_ranges"] = list(rows.skipped)
        job.record.manifest["ledger"] = {"position": position, "entries": entries}


def _first_state(job: Job) -> tuple[TrainState, TrainState]:
    """The state to begin with, placed on the mesh, and the shardings of its leaves."""
    abstract = abstract_state(job.declared, job.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if job.checkpoints.latest is None:
        with job.stop.at_once():
            state = jax.jit(functools.partial(init_state, job.declared), out_shardings=shardings)()
            jax.block_until_ready(state)
        if job.weights is not None:
            folder = job.weights()
            state = state.replace(params=folder.place(job.declared.model, abstract.params))
            digests = folder.digests() if jax.process_index() == 0 else {}
            job.record.manifest["continue_from"] = {"path": job.declared.continue_from, "files": digests}
        return state, shardings
    check = functools.partial(check_facts, job.declared, job.prepared.tokenizer, job.record.path)
    with job.stop.at_once():
        return job.checkpoints.restore(abstract, check), shardings


def _loop(job: Job, rows: Rows, state: TrainState, shardings: TrainState, steps: dict[int, Step]) -> TrainState:
    declared = job.declared
    step, position = int(state.step), int(state.position)
    if step == 0 or position >= declared.total_rows or _is_due(step, declared.evaluation.every_steps):
        with job.stop.at_once():
            _evaluate(job, state, step)
    mine = functools.cache(functools.partial(sharding.local_rows, job.mesh))
    meter, saver = Meter(job, step, position, rows.skipped), Saver(job)
    loader = batches(declared, rows, position, mine)
    saved, due, more = step, False, 0

    def save(*, wait: bool, patient: bool = True) -> bool:
        _note_read(job, rows, position)
        begun = saver.save(step, state, _facts(job, rows, step, position), last=wait, patient=patient)
        _note_session(job, position, _readings(job))
        return begun

    while position < declared.total_rows:
        span = declared.span_at(position)
        try:
            with job.clock.on("data"):
                batch = sharding.place_batch(next(loader), job.mesh, mine(span.batch_rows), span.batch_rows)
        except (ExperimentError, Interrupted):  # what was learnt until here is sound
            meter.flush()
            if jax.process_count() == 1 and step > saved and not meter.skipped:
                save(wait=True)
            raise
        nothing_to_lose = step == saved and not job.checkpoints.has_begun
        state, metrics = _step(job, steps, span, shardings, nothing_to_lose, (state, batch))
        step, position = step + 1, next_position(batch_stop(span, position, rows.skipped), rows.skipped)
        with job.clock.on("step"):
            stopping = meter.dispatched(metrics)
        last = position >= declared.total_rows
        evaluates = last or _is_due(step, declared.evaluation.every_steps)
        due = due or saver.has_failed() or _is_due(step, declared.checkpoint.every_steps)
        wanted = last or stopping or (due and saver.is_ready())
        if wanted or evaluates:
            with job.clock.on("step"):
                stopping = meter.flush() or stopping
        stopping = stopping or (evaluates and not _evaluate_whole(job, state, step))
        # Behind a step that was not applied the state may be ruined: a save waits, and pushes no good one out.
        saves = last or ((stopping or wanted) and not meter.skipped)
        if saves:
            due = False
            saved = step if save(wait=last or stopping, patient=not stopping) else saved
        if stopping and not saves and more < _MORE_STEPS:
            more += 1
        elif stopping:
            saver.finish()
            raise Interrupted(_stopped(job, step, saves))
        if saves or evaluates:
            meter.resume()
        if job.stop.deadline is not None:
            job.stop.reserve_seconds = saver.reserve_seconds(state) + 2 * meter.step_seconds
    return state


def _stopped(job: Job, step: int, saved: bool) -> str:
    kept = "is saved; the same command goes on from there"
    lost = "was not applied and is not saved; the same command goes on from the last checkpoint"
    return f"stopped by {job.stop.reason or 'another process'} after step {step}, which {kept if saved else lost}"


def _step(
    job: Job,
    steps: dict[int, Step],
    span: Span,
    shardings: TrainState,
    nothing_to_lose: bool,
    given: tuple[TrainState, dict],
) -> tuple[TrainState, dict]:
    """Takes a step of a stage; the first one compiles it."""
    if span.number in steps:
        with job.clock.on("step"):
            return steps[span.number](*given)
    if nothing_to_lose:
        _go_on(job, "the start")
    steps.clear()
    steps[span.number] = compile_step(job.declared, span, shardings)
    with job.clock.on("compile"), job.stop.at_once() if nothing_to_lose else contextlib.nullcontext():
        return steps[span.number](*given)


def _is_due(step: int, every: int) -> bool:
    return step > 0 and step % every == 0


def _evaluate(job: Job, state: TrainState, step: int) -> None:
    """Evaluates unless the figures are there.

    Raises:
        Interrupted: a wish to stop cut it short; nothing of it is recorded.
    """
    if agree(jax.process_index() == 0 and job.record.evaluated(step)):
        return

    def proceed(done: int, total: int) -> None:
        _go_on(job, f"the evaluation after step {step}")
        job.display.progress("evaluate", done, total)

    with job.clock.on("evaluate"):
        figures = evaluation.bits_per_byte(job.declared, job.prepared, state.params, job.mesh, proceed)
    if figures:
        job.record.append([{"step": step, "eval": figures}])
        job.display.evaluation(step, figures)


def _evaluate_whole(job: Job, state: TrainState, step: int) -> bool:
    """Evaluates, and returns whether no wish to stop has cut it short."""
    try:
        _evaluate(job, state, step)
    except Interrupted:
        return False
    return True


def _sample(job: Job, state: TrainState) -> None:
    """Keeps what the finished model writes, unless it is there."""
    step = int(state.step)
    if not agree(jax.process_index() == 0 and job.record.sampled(step)):
        proceed = functools.partial(_go_on, job, "the samples of the finished model")
        write_samples(job.declared, job.prepared, state.params, job.record, step, proceed)


def _go_on(job: Job, doing: str) -> None:
    """Goes on unless any process wishes to stop.

    Raises:
        Interrupted: one does.
    """
    if agree(job.stop.reason is not None):
        by = job.stop.reason or "another process"
        raise Interrupted(f"stopped by {by} in {doing}; the same command goes on from there")


def _facts(job: Job, rows: Rows, step: int, position: int) -> dict:
    return {
        "experiment": to_json(job.declared),
        "mixture": rows.order.to_json(),
        "withdrawn": [withdrawal.summary() for withdrawal in rows.order.withdrawals],
        "ledger": job.record.manifest.get("ledger"),
        "tokenizer": job.prepared.tokenizer.fingerprint,
        "step": step,
        "position": position,
        "skipped_ranges": [list(skipped) for skipped in rows.skipped],
    }


def _session(job: Job) -> dict:
    return {
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "mesh": dict(job.mesh.shape),
    }
