"""The metrics of steps, read one step late so that no device waits for the host."""

import statistics
import time
from collections import deque

import jax
import numpy as np

from euroflax import model
from euroflax.accelerators import peak_flops
from euroflax.data.skipping import Range, batch_stop, next_position
from euroflax.experiment import RunFailed
from euroflax.training.goodput import goodput
from euroflax.training.guard import NOT_FINITE, REASONS, BadStretch
from euroflax.training.job import Job
from euroflax.training.record import read_metrics
from euroflax.training.stop import Stop

_LAST_STEPS = 16


class Meter:
    """Reads the metrics of step n - 1 once step n is dispatched, writes and shows them."""

    def __init__(self, job: Job, step: int, position: int, skipped: tuple[Range, ...]) -> None:
        self._job, self._step, self._position, self._skipped_rows = job, step, position, skipped
        self._sessions = job.record.manifest["sessions"]
        self._session = self._sessions[-1]
        self._pending: list[tuple[dict, jax.Array | None]] = []
        self._clock = time.monotonic()
        self._last_seconds: deque[float] = deque(maxlen=_LAST_STEPS)
        self.skipped = False
        """Whether the last step that was read was not applied."""
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * jax.device_count()

    @property
    def step_seconds(self) -> float:
        """Median of the last steps; 0 before there are any."""
        return statistics.median(self._last_seconds or [0.0])

    def dispatched(self, metrics: dict) -> bool:
        """Takes the metrics of a step that may still be running; returns whether any process wishes to stop.

        Raises:
            BadStretch: too many steps were not applied.
            RunFailed: the last step of the run was not, and is not finite.
        """
        flags = _stop_flags(self._job.stop, self._job.mesh) if jax.process_count() > 1 else None
        self._pending.append((metrics, flags))
        if len(self._pending) > 1:
            return self._write(self._pending.pop(0))
        return jax.process_count() == 1 and self._job.stop.reason is not None

    def flush(self) -> bool:
        """Writes what was dispatched, waiting for it, as `dispatched` does."""
        wishes = [self._write(entry) for entry in self._pending]
        self._pending = []
        return any(wishes)

    def resume(self) -> None:
        """The time since the last step was not a step's: the clock starts again."""
        self._clock = time.monotonic()

    def _write(self, entry: tuple[dict, jax.Array | None]) -> bool:
        metrics, flags = entry
        read = jax.device_get(metrics)
        stopping = self._job.stop.reason is not None if flags is None else bool(np.asarray(flags) > 0)
        seconds = time.monotonic() - self._clock
        self._clock += seconds
        self._last_seconds.append(seconds)
        self._step += 1
        held_back = self._job.record.holds_back
        line = self._line(read, seconds)
        self._job.record.append([line])
        if self._job.record.holds_back and not held_back:
            self._job.display.note("the disk is full: metrics are held back until there is room")
        self.skipped = "skipped" in line
        if self.skipped:
            self._tell(line, read)
        self._job.display.step(line, self._job.declared.total_tokens)
        return stopping

    def _tell(self, line: dict, read: dict) -> None:
        """Tells of a step that was not applied."""
        first, last = line["rows"]
        self._job.display.note(
            f"step {line['step']} is not applied, {line['skipped']}: loss {line['loss']:.4g}, gradient norm "
            f"{line['grad_norm']:.4g}; its rows are {first} to {last} (show --row {first})"
        )
        if bool(read["too_many"]):
            guard = self._job.declared.training.guard
            raise BadStretch(
                (int(read["refused_from"]), last + 1),
                f"more than {guard.max_skipped} of the last {guard.window_steps} steps, or most of all, were not "
                f"applied, the latest since {line['skipped']}; {self._look()}",
            )
        if self._position >= self._job.declared.total_rows and int(read["skipped"]) in NOT_FINITE:
            kept = self._job.checkpoints.settle()
            raise RunFailed(f"the last step of the run is not applied, {line['skipped']}; {self._look()}; {kept}")

    def _look(self) -> str:
        """Where to look after steps that were not applied: their rows, and what it may be."""
        refused = [line["rows"] for line in read_metrics(self._job.record.path) if "skipped" in line]
        most = self._job.declared.training.guard.max_skipped + 1
        rows = ", ".join(f"{first} to {last}" for first, last in refused[-most:])
        return (
            f"look at rows {rows}: likely bad documents (show --row says whose they are), a learning rate too high or "
            "a broken device"
        )

    def _line(self, read: dict, seconds: float) -> dict:
        declared = self._job.declared
        before, span = self._position, declared.span_at(self._position)
        stop = batch_stop(span, before, self._skipped_rows)
        self._position = next_position(stop, self._skipped_rows)
        tokens = (stop - before) * span.sequence_length
        flops = tokens * model.flops_per_token(declared.model, span.sequence_length)
        sums, weights = read["loss_sum_M"], read["weight_M"]
        present = [(i, code) for i, code in enumerate(declared.language_codes) if weights[i] > 0]
        skipped = int(read["skipped"])
        return {
            "step": self._step,
            "sequences": stop,
            "tokens": declared.tokens_at(stop),
            "loss": float(read["loss"]),
            "loss_by_language": {code: float(sums[i] / weights[i]) for i, code in present},
            "padding_tokens": int(read["padding"]) - (span.batch_rows * span.sequence_length - tokens),
            "grad_norm": float(read["grad_norm"]),
            "learning_rate": float(read["learning_rate"]),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": None if self._peak is None else flops / seconds / self._peak,
            **({"skipped": REASONS[skipped], "rows": [before, stop - 1]} if skipped else {}),
            **self._account(flops),
        }

    def _account(self, flops: float) -> dict:
        """What the session has done until now, and the share of steps in the time of all sessions."""
        session = self._session
        session["steps"] += 1
        session["flops"] += flops
        session["position"] = self._position
        session["seconds"] = self._job.clock.read()
        told = {name: session[name] for name in ("steps", "flops", "seconds")}
        return {"goodput": goodput(self._sessions), "session": {"number": session["number"], **told}}


def _stop_flags(stop: Stop, mesh: jax.sharding.Mesh) -> jax.Array:
    """The number of devices whose process wishes to stop, computed on the devices behind the step."""
    flags = np.full(len(mesh.local_devices), stop.reason is not None, np.float32)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    placed = jax.make_array_from_process_local_data(everywhere, flags, (mesh.size,))
    return _sum(placed)


@jax.jit
def _sum(flags: jax.Array) -> jax.Array:
    return jax.numpy.sum(flags)
