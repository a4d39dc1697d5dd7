"""What stays the same in one start of a run, and what the run tells of itself."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax

from euroflax.checkpoint import Checkpoints
from euroflax.data.prepare import Prepared
from euroflax.experiment import Experiment
from euroflax.huggingface import Folder
from euroflax.training.clock import Clock
from euroflax.training.energy import Energy
from euroflax.training.record import Record
from euroflax.training.stop import Stop


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
class Job:
    """What stays the same in one start of a run."""

    declared: Experiment
    prepared: Prepared
    weights: Callable[[], Folder] | None
    mesh: jax.sharding.Mesh
    record: Record
    checkpoints: Checkpoints
    display: Display
    stop: Stop
    clock: Clock
    energy: Energy
