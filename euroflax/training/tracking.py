"""The metrics of a run, shown elsewhere as well: TensorBoard, Weights & Biases. No failure there reaches the run.

A thread of its own takes the lines of the metrics one by one; what fails or hangs in it is said once and left alone.
"""

import contextlib
import importlib.util
import os
import pathlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from euroflax.experiment import Experiment, ExperimentError, to_json

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Those that there are, with the package that each needs."""
_LINES = 10_000
"""That wait for a tracker which is slow; more are left out."""
_FINISH_SECONDS = 20.0


class Tracker(Protocol):
    """Where figures are shown."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Shows figures of a step."""

    def close(self) -> None:
        """Shows what is not shown yet."""


def check(names: Sequence[str]) -> None:
    """Looks whether there are such trackers, and their packages.

    Raises:
        ExperimentError: there is none, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ExperimentError(f"--track={name} is not known; use {' or '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise ExperimentError(f"--track={name} needs a package; install euroflax with the extra track")


class Tracking:
    """Hands lines of metrics to trackers."""

    def __init__(
        self,
        names: Sequence[str],
        declared: Experiment,
        run_dir: pathlib.Path,
        run_id: str,
        note: Callable[[str], None],
    ) -> None:
        """Begins in the background.

        Args:
            names: which trackers.
            declared: the run.
            run_dir: its folder, into which they may write.
            run_id: by which a tracker knows it again.
            note: told, in a sentence, of a tracker that fails.
        """
        self._note = note
        self._threads: list[tuple[queue.Queue[Mapping | None], threading.Thread]] = []
        for name in dict.fromkeys(names):
            lines: queue.Queue[Mapping | None] = queue.Queue(_LINES)
            open_it = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}[name]
            arguments = (name, lambda open_it=open_it: open_it(declared, run_dir, run_id), lines)
            thread = threading.Thread(target=self._track, args=arguments, daemon=True, name=f"track {name}")
            thread.start()
            self._threads.append((lines, thread))

    def log(self, line: Mapping) -> None:
        """Takes a line of the metrics; never waits and never raises."""
        for lines, _ in self._threads:
            with contextlib.suppress(queue.Full):
                lines.put_nowait(line)

    def _track(self, name: str, open_it: Callable[[], Tracker], lines: queue.Queue) -> None:
        try:
            tracker = open_it()
            while (line := lines.get()) is not None:
                tracker.write(line["step"], dict(figures(line)))
            tracker.close()
        except Exception as error:  # whatever it is, it is no matter of the run's
            said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            self._note(f"tracking with {name} ended ({said}); the run goes on without it")

    def close(self) -> None:
        """Gives trackers some time to show what is left."""
        for lines, _ in self._threads:
            with contextlib.suppress(queue.Full):
                lines.put_nowait(None)
        for _, thread in self._threads:
            thread.join(_FINISH_SECONDS)


def figures(line: Mapping) -> Iterator[tuple[str, float]]:
    """The figures of a line of metrics by name: `loss`, `loss_by_language/mt`, `bits_per_byte/mt`.

    >>> dict(figures({"step": 3, "loss": 2.5, "mfu": None, "loss_by_language": {"mt": 2.0}, "session": {"number": 0}}))
    {'loss': 2.5, 'loss_by_language/mt': 2.0}
    """
    for name, value in line.items():
        if name in ("step", "session", "rows"):
            continue
        if name == "eval":
            yield from figures({key.replace(".", "/"): figure for key, figure in value.items()})
        elif isinstance(value, Mapping):
            yield from ((f"{name}/{key}", figure) for key, figure in value.items() if figure is not None)
        elif name == "skipped":
            yield name, 1.0
        elif value is not None:
            yield name, value


class _TensorBoard:
    """Event files in `tensorboard` in the run folder."""

    def __init__(self, declared: Experiment, run_dir: pathlib.Path, run_id: str) -> None:
        from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]

        self._writer = Writer(str(run_dir / "tensorboard"))

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, whose own variables say where to: WANDB_MODE=offline, WANDB_PROJECT."""

    def __init__(self, declared: Experiment, run_dir: pathlib.Path, run_id: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # pyright: ignore[reportMissingImports]

        settings = wandb.Settings(
            console="off", quiet=True, silent=True, init_timeout=_FINISH_SECONDS, finish_timeout=_FINISH_SECONDS
        )
        project = os.environ.get("WANDB_PROJECT", "euroflax")
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=declared.name,
            dir=str(run_dir),
            config=to_json(declared),
            resume="allow",
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()
