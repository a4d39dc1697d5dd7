"""The one training loop, and the start of a run around it."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax

from euroflax import evaluation, sharding
from euroflax.checkpoint import Checkpoints
from euroflax.data.ledger import ledger
from euroflax.data.loader import Rows, batches
from euroflax.data.prepare import Prepared
from euroflax.data.tokenizer import Tokenizer
from euroflax.experiment import Experiment, ExperimentError, Interrupted, to_json
from euroflax.huggingface import Folder
from euroflax.training.clock import Clock
from euroflax.training.job import Display, Job, agree
from euroflax.training.meter import Meter
from euroflax.training.record import Record, differences, now
from euroflax.training.samples import write_samples
from euroflax.training.step import Step, TrainState, abstract_state, compile_step, init_state
from euroflax.training.stop import Stop


def train(
    declared: Experiment,
    prepared: Prepared,
    weights: Callable[[], Folder] | None,
    run_dir: pathlib.Path,
    display: Display,
    stop: Stop,
    clock: Clock,
) -> dict:
    """Trains from the latest checkpoint, or from the beginning, to the end; returns the parameters.

    The beginning is what `weights` opens where it is given, and random otherwise.

    Raises:
        ExperimentError: the run folder, the mesh or the data does not fit the experiment.
        Interrupted: `stop` was requested; the state is saved.
    """
    mesh = sharding.make_mesh(declared)
    assert isinstance(mesh, jax.sharding.Mesh)
    record = Record(run_dir, declared, writes=jax.process_index() == 0)
    with contextlib.closing(record), jax.set_mesh(mesh):
        checkpoints = Checkpoints(run_dir / "checkpoints", declared.checkpoint, display.note)
        with contextlib.closing(checkpoints):
            return _run(Job(declared, prepared, weights, mesh, record, checkpoints, display, stop, clock)).params


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
    with job.clock.on("restore"):
        state, shardings = _first_state(job)
    step, position = int(state.step), int(state.position)
    rows = Rows(job.declared, job.prepared, job.prepared.withdrawals(position))
    job.record.begin(_session(job), job.prepared, rows.order, position)
    _note_read(job, rows, position)
    job.record.write_manifest()
    job.record.cut_back(step)
    session = job.record.manifest["sessions"][-1]
    if position >= job.declared.total_rows:
        job.display.note(f"run {job.declared.name} is complete: {step} steps")
    elif step:
        job.display.note(f"goes on after step {step} of run {job.declared.name}")
    try:
        state = _loop(job, rows, state, shardings)
        if job.declared.evaluation.sample_tokens:
            with job.clock.on("sample"):
                _sample(job, state)
        return state
    finally:
        _note_session(job, session.get("position", position))


def _note_session(job: Job, position: int) -> None:
    """Brings the manifest up to date: the session's end so far."""
    session = job.record.manifest["sessions"][-1]
    session |= {"to": now(), "position": position, "seconds": job.clock.read()}
    job.record.write_manifest()


def _note_read(job: Job, rows: Rows, position: int) -> None:
    """Brings the ledger of the manifest up to date: what was read until a position."""
    if jax.process_index() == 0:
        entries = [dataclasses.asdict(entry) for entry in ledger(job.declared, rows.order, position)]
        job.record.manifest["ledger"] = {"position": position, "entries": entries}


def _first_state(job: Job) -> tuple[TrainState, TrainState]:
    """The state to begin with, placed on the mesh, and the shardings of its leaves."""
    abstract = abstract_state(job.declared, job.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if job.checkpoints.latest is None:
        state = jax.jit(functools.partial(init_state, job.declared), out_shardings=shardings)()
        if job.weights is not None:
            folder = job.weights()
            state = state.replace(params=folder.place(job.declared.model, abstract.params))
            digests = folder.digests() if jax.process_index() == 0 else {}
            job.record.manifest["continue_from"] = {"path": job.declared.continue_from, "files": digests}
        return state, shardings
    state = job.checkpoints.restore(
        abstract, functools.partial(check_facts, job.declared, job.prepared.tokenizer, job.record.path)
    )
    return state, shardings


def _loop(job: Job, rows: Rows, state: TrainState, shardings: TrainState) -> TrainState:
    declared = job.declared
    step, position = int(state.step), int(state.position)
    ended = position >= declared.total_rows
    if step == 0 or ended or _is_due(step, declared.evaluation.every_steps):
        _evaluate(job, state, step)
    mine = functools.cache(functools.partial(sharding.local_rows, job.mesh))
    meter = Meter(job, step, position)
    loader = batches(declared, rows, position, mine)
    steps: dict[int, Step] = {}
    due = False
    while position < declared.total_rows:
        span = declared.span_at(position)
        with job.clock.on("data"):
            batch = sharding.place_batch(next(loader), job.mesh, mine(span.batch_rows), span.batch_rows)
        doing = "step" if span.number in steps else "compile"
        if span.number not in steps:
            steps = {span.number: compile_step(declared, span, shardings)}
        with job.clock.on(doing):
            state, metrics = steps[span.number](state, batch)
        step, position = step + 1, min(position + span.batch_rows, span.stop_row)
        with job.clock.on("step"):
            stopping = meter.dispatched(metrics)
        last = position >= declared.total_rows
        evaluates = last or _is_due(step, declared.evaluation.every_steps)
        due = due or _is_due(step, declared.checkpoint.every_steps)
        if last or stopping or evaluates or due:
            with job.clock.on("step"):
                stopping = meter.flush() or stopping
        try:
            if evaluates and not stopping:
                _evaluate(job, state, step)
        except Interrupted:
            stopping = True
        # Behind a step that was not applied the state may be ruined: a save waits, and pushes no good one out.
        saves = last or ((stopping or due) and not meter.skipped)
        if saves:
            due = False
            with job.clock.on("save"):
                _note_read(job, rows, position)
                job.checkpoints.save(step, state, _facts(job, rows, step, position))
            _note_session(job, position)
        if stopping:
            job.checkpoints.wait()
            kept = (
                "is saved; the same command goes on from there"
                if saves
                else ("was not applied and is not saved; the same command goes on from the last checkpoint")
            )
            raise Interrupted(f"stopped after step {step}, which {kept}")
        if saves or evaluates:
            meter.resume()
    with job.clock.on("save"):
        job.checkpoints.wait()
    return state


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
        if agree(job.stop.reason is not None):
            raise Interrupted(f"stopped in the evaluation after step {step}; the same command goes on from there")
        job.display.progress("evaluate", done, total)

    with job.clock.on("evaluate"):
        figures = evaluation.bits_per_byte(job.declared, job.prepared, state.params, job.mesh, proceed)
    if figures:
        job.record.append([{"step": step, "eval": figures}])
        job.display.evaluation(step, figures)


def _sample(job: Job, state: TrainState) -> None:
    """Keeps what the finished model writes, unless it is there."""
    step = int(state.step)
    if not agree(jax.process_index() == 0 and job.record.sampled(step)):
        write_samples(job.declared, job.prepared, state.params, job.record, step)


def _facts(job: Job, rows: Rows, step: int, position: int) -> dict:
    return {
        "experiment": to_json(job.declared),
        "mixture": rows.order.to_json(),
        "withdrawn": [withdrawal.summary() for withdrawal in rows.order.withdrawals],
        "ledger": job.record.manifest.get("ledger"),
        "tokenizer": job.prepared.tokenizer.fingerprint,
        "step": step,
        "position": position,
        "skipped_ranges": [],
    }


def _session(job: Job) -> dict:
    return {
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "mesh": dict(job.mesh.shape),
    }
