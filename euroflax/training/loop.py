"""The one training loop, and the start of a run around it."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from euroflax import devices, evaluation, model, sharding
from euroflax.checkpoint import Checkpoints
from euroflax.data.loader import Rows, batches
from euroflax.data.prepare import Prepared
from euroflax.data.tokenizer import Tokenizer
from euroflax.experiment import Experiment, ExperimentError, Interrupted, RunFailed, to_json
from euroflax.huggingface import Folder
from euroflax.training.clock import Clock
from euroflax.training.record import Record, differences, now
from euroflax.training.samples import write_samples
from euroflax.training.step import TrainState, abstract_state, init_state, train_step
from euroflax.training.stop import Stop

Step = Callable[[TrainState, dict], tuple[TrainState, dict]]


class Display(Protocol):
    """What the loop tells of itself; the command line draws it, a notebook may pass its own."""

    def note(self, text: str) -> None:
        """A sentence for the user."""

    def progress(self, task: str, done: int, total: int) -> None:
        """Some of a task is done."""

    def step(self, metrics: dict, total_tokens: int) -> None:
        """A step is complete."""

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """An evaluation is complete."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same in one start of a run."""

    declared: Experiment
    prepared: Prepared
    weights: Callable[[], Folder] | None
    rows: Rows
    mesh: jax.sharding.Mesh
    record: Record
    checkpoints: Checkpoints
    display: Display
    stop: Stop
    clock: Clock


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
            rows = Rows(declared, prepared)
            return _run(_Job(declared, prepared, weights, rows, mesh, record, checkpoints, display, stop, clock)).params


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


def _run(job: _Job) -> TrainState:
    with job.clock.on("restore"):
        state, shardings = _first_state(job)
    step, position = int(state.step), int(state.position)
    job.record.begin(_session(job), job.prepared, job.rows.mixture.to_json())
    job.record.cut_back(step)
    session = job.record.manifest["sessions"][-1]
    if position >= job.declared.total_rows:
        job.display.note(f"run {job.declared.name} is complete: {step} steps")
    elif step:
        job.display.note(f"goes on after step {step} of run {job.declared.name}")
    try:
        state = _loop(job, state, shardings)
        if job.declared.evaluation.sample_tokens:
            with job.clock.on("sample"):
                _sample(job, state)
        return state
    finally:
        _note_session(job, session.get("position", position))


def _note_session(job: _Job, position: int) -> None:
    """Brings the manifest up to date: the session's end so far, and the mixture as read."""
    session = job.record.manifest["sessions"][-1]
    session |= {"to": now(), "position": position, "seconds": job.clock.read()}
    drawn = job.rows.mixture.drawn(position)
    job.record.manifest["mixture"]["rows"] = dict(zip(job.rows.mixture.names, drawn, strict=True))
    job.record.write_manifest()


def _first_state(job: _Job) -> tuple[TrainState, TrainState]:
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


def _loop(job: _Job, state: TrainState, shardings: TrainState) -> TrainState:
    declared = job.declared
    step_function = _compile_step(declared, shardings)
    step, position = int(state.step), int(state.position)
    ended = position >= declared.total_rows
    if step == 0 or ended or _is_due(step, declared.evaluation.every_steps):
        _evaluate(job, state, step)
    mine = sharding.local_rows(job.mesh, declared.batch_rows)
    meter = _Meter(job, step, position)
    loader = batches(declared, job.rows, position, mine)
    compiled = False
    while position < declared.total_rows:
        with job.clock.on("data"):
            batch = sharding.place_batch(next(loader), job.mesh, mine, declared.batch_rows)
        with job.clock.on("step" if compiled else "compile"):
            state, metrics = step_function(state, batch)
        compiled = True
        step, position = step + 1, min(position + declared.batch_rows, declared.total_rows)
        with job.clock.on("step"):
            stopping = meter.dispatched(metrics)
        last = position >= declared.total_rows
        evaluates = last or _is_due(step, declared.evaluation.every_steps)
        if last or stopping or evaluates or _is_due(step, declared.checkpoint.every_steps):
            with job.clock.on("step"):
                stopping = meter.flush() or stopping
        saves = last or stopping or _is_due(step, declared.checkpoint.every_steps)
        try:
            if evaluates and not stopping:
                _evaluate(job, state, step)
        except Interrupted:
            stopping = saves = True
        if saves:
            with job.clock.on("save"):
                job.checkpoints.save(step, state, _facts(job, step, position))
            _note_session(job, position)
        if stopping:
            job.checkpoints.wait()
            raise Interrupted(f"stopped after step {step}, which is saved; the same command goes on from there")
        if saves or evaluates:
            meter.resume()
    with job.clock.on("save"):
        job.checkpoints.wait()
    return state


def _is_due(step: int, every: int) -> bool:
    return step > 0 and step % every == 0


def _compile_step(declared: Experiment, shardings: TrainState) -> Step:
    function = functools.partial(train_step, declared)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, None))


def _evaluate(job: _Job, state: TrainState, step: int) -> None:
    """Evaluates unless the figures are there.

    Raises:
        Interrupted: a wish to stop cut it short; nothing of it is recorded.
    """
    if _agree(jax.process_index() == 0 and job.record.evaluated(step)):
        return

    def proceed(done: int, total: int) -> None:
        if _agree(job.stop.reason is not None):
            raise Interrupted(f"stopped in the evaluation after step {step}; the same command goes on from there")
        job.display.progress("evaluate", done, total)

    with job.clock.on("evaluate"):
        figures = evaluation.bits_per_byte(job.declared, job.prepared, state.params, job.mesh, proceed)
    if figures:
        job.record.append([{"step": step, "eval": figures}])
        job.display.evaluation(step, figures)


def _sample(job: _Job, state: TrainState) -> None:
    """Keeps what the finished model writes, unless it is there."""
    step = int(state.step)
    if not _agree(jax.process_index() == 0 and job.record.sampled(step)):
        write_samples(job.declared, job.prepared, state.params, job.record, step)


def _agree(wish: bool) -> bool:
    """Whether any process of the job wishes it: the same answer in all of them."""
    if jax.process_count() == 1:
        return wish
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(wish))))


class _Meter:
    """Reads the metrics of step n - 1 once step n is dispatched, writes and shows them."""

    def __init__(self, job: _Job, step: int, position: int) -> None:
        self._job, self._step, self._position = job, step, position
        self._session = job.record.manifest["sessions"][-1]
        self._pending: list[tuple[dict, jax.Array | None]] = []
        self._clock = time.perf_counter()
        declared = job.declared
        self._flops = model.flops_per_token(declared.model, declared.data.sequence_length)
        peak = devices.peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()

    def dispatched(self, metrics: dict) -> bool:
        """Takes the metrics of a step that may still be running; returns whether any process wishes to stop."""
        flags = _stop_flags(self._job.stop, self._job.mesh) if jax.process_count() > 1 else None
        self._pending.append((metrics, flags))
        if len(self._pending) > 1:
            return self._write(self._pending.pop(0))
        return jax.process_count() == 1 and self._job.stop.reason is not None

    def flush(self) -> bool:
        """Writes what was dispatched, waiting for it; returns whether any process wishes to stop."""
        wishes = [self._write(entry) for entry in self._pending]
        self._pending = []
        return any(wishes)

    def resume(self) -> None:
        """The time since the last step was not a step's: the clock starts again."""
        self._clock = time.perf_counter()

    def _write(self, entry: tuple[dict, jax.Array | None]) -> bool:
        metrics, flags = entry
        read = jax.device_get(metrics)
        stopping = self._job.stop.reason is not None if flags is None else bool(np.asarray(flags) > 0)
        seconds = time.perf_counter() - self._clock
        self._clock += seconds
        self._step += 1
        line = self._line(read, seconds)
        self._session["steps"] += 1
        self._session["flops"] += self._flops * line["batch_tokens"]
        self._session["position"] = self._position
        del line["batch_tokens"]
        self._job.record.append([line])
        if not math.isfinite(line["loss"]):
            raise RunFailed(
                f"the loss of step {self._step} is not finite; look at the data and the learning rate: "
                "the last checkpoint is from before it"
            )
        self._job.display.step(line, self._job.declared.total_rows * self._job.declared.data.sequence_length)
        return stopping

    def _line(self, read: dict, seconds: float) -> dict:
        declared = self._job.declared
        before, length = self._position, declared.data.sequence_length
        self._position = min(before + declared.batch_rows, declared.total_rows)
        tokens = (self._position - before) * length
        sums, weights = read["loss_sum_M"], read["weight_M"]
        present = [(i, code) for i, code in enumerate(declared.language_codes) if weights[i] > 0]
        mfu = None if self._peak is None else self._flops * tokens / seconds / self._peak
        return {
            "step": self._step,
            "sequences": self._position,
            "tokens": self._position * length,
            "loss": float(read["loss"]),
            "loss_by_language": {code: float(sums[i] / weights[i]) for i, code in present},
            "grad_norm": float(read["grad_norm"]),
            "learning_rate": float(read["learning_rate"]),
            "padding_tokens": int(read["padding"]) - (declared.batch_rows * length - tokens),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": mfu,
            "batch_tokens": tokens,
        }


def _stop_flags(stop: Stop, mesh: jax.sharding.Mesh) -> jax.Array:
    """The number of devices whose process wishes to stop, computed on the devices behind the step."""
    flags = np.full(len(mesh.local_devices), stop.reason is not None, np.float32)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    placed = jax.make_array_from_process_local_data(everywhere, flags, (mesh.size,))
    return _sum(placed)


@jax.jit
def _sum(flags: jax.Array) -> jax.Array:
    return jax.numpy.sum(flags)


def _facts(job: _Job, step: int, position: int) -> dict:
    return {
        "experiment": to_json(job.declared),
        "mixture": job.rows.mixture.to_json(),
        "tokenizer": job.prepared.tokenizer.fingerprint,
        "step": step,
        "position": position,
        "skipped_ranges": [],
    }


def _session(job: _Job) -> dict:
    return {
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "mesh": dict(job.mesh.shape),
    }
