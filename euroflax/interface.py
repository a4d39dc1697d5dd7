"""Euroflax from Python: what the verbs of the command line do, for notebooks and scripts."""

import pathlib
from collections.abc import Sequence

from rich.console import Console

from euroflax import devices as machine
from euroflax import report, verbs
from euroflax.console import ConsoleDisplay
from euroflax.data.prepare import Prepared
from euroflax.experiment import Experiment
from euroflax.folders import Folders
from euroflax.generation import Completion, Sampling
from euroflax.planning import Plan
from euroflax.processes import Processes
from euroflax.verbs import Run

Path = str | pathlib.Path


def _folders(runs_dir: Path | None = None, data_root: Path | None = None, cache_dir: Path | None = None) -> Folders:
    given = {"runs_dir": runs_dir, "data_root": data_root, "cache_dir": cache_dir}
    return Folders(**{name: pathlib.Path(path) for name, path in given.items() if path is not None})


def train(
    experiment: Experiment,
    runs_dir: Path | None = None,
    *,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    devices: str | None = None,
    track: Sequence[str] = (),
) -> Run:
    """Prepares what is missing, trains or goes on training, evaluates, writes the report; the verb `train`.

    Args:
        experiment: as `euroflax.load` gives it.
        runs_dir: where run folders are; by default `runs`.
        data_root: where relative source paths start.
        cache_dir: where token stores and tokenizers are.
        devices: `cpu:8` simulates eight devices, where nothing has asked JAX for its devices yet.
        track: what shows its metrics besides: `tensorboard`, `wandb`.

    Raises:
        ExperimentError: the experiment does not fit the data, the devices or the run folder.
        RunFailed: running it again will not help.
    """
    folders = _folders(runs_dir, data_root, cache_dir)
    machine.set_up(experiment, devices, folders.cache_dir, Processes())
    display = ConsoleDisplay(Console(markup=False, emoji=False))
    try:
        run = verbs.train(experiment, folders, display, track=track)
    finally:
        display.close()
    report.write(run.path)
    return run


def check(
    experiment: Experiment,
    runs_dir: Path | None = None,
    *,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
) -> dict:
    """The files that an experiment needs, with their sizes; the verb `check`.

    Raises:
        ExperimentError: with all faults found.
    """
    return verbs.check(experiment, _folders(runs_dir, data_root, cache_dir))


def prepare(
    experiment: Experiment,
    runs_dir: Path | None = None,
    *,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
) -> Prepared:
    """The tokenizer, the token stores and their rows, made where they are missing; the verb `prepare`.

    A run folder tells which documents the rows of the run were without.

    Raises:
        ExperimentError: the data is at fault.
    """
    display = ConsoleDisplay(Console(markup=False, emoji=False))
    try:
        return verbs.prepare(experiment, _folders(runs_dir, data_root, cache_dir), display)
    finally:
        display.close()


def plan(
    experiment: Experiment,
    num_devices: int | None = None,
    *,
    runs_dir: Path | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
) -> Plan:
    """What the run will be on a number of devices, by default as many as its mesh needs at least; the verb `plan`.

    Raises:
        ExperimentError: the mesh does not make up the devices.
    """
    return verbs.plan(experiment, _folders(runs_dir, data_root, cache_dir), num_devices)


def evaluate(
    experiment: Experiment,
    runs_dir: Path | None = None,
    *,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    devices: str | None = None,
) -> dict[str, float]:
    """Bits per byte of the latest checkpoint, by language, and its `step`; the verb `evaluate`.

    Raises:
        ExperimentError: there is no checkpoint of this experiment, or nothing is held out.
    """
    folders = _folders(runs_dir, data_root, cache_dir)
    machine.set_up(experiment, devices, folders.cache_dir, Processes())
    return verbs.evaluate(experiment, folders)


def generate(
    experiment: Experiment,
    prompts: str | Sequence[str],
    sampling: Sampling | None = None,
    runs_dir: Path | None = None,
    *,
    cache_dir: Path | None = None,
    devices: str | None = None,
) -> list[Completion]:
    """Continuations of the prompts by the latest checkpoint; the verb `generate`.

    Raises:
        ExperimentError: there is no checkpoint of this experiment, or a prompt is longer than the context.
    """
    folders = _folders(runs_dir, None, cache_dir)
    machine.set_up(experiment, devices, folders.cache_dir, Processes())
    given = [prompts] if isinstance(prompts, str) else prompts
    return verbs.generate(experiment, folders, given, sampling or Sampling())


def export(experiment: Experiment, runs_dir: Path | None = None, *, dtype: str = "float32") -> pathlib.Path:
    """Writes the latest checkpoint as a Hugging Face folder and returns its path; the verb `export`.

    Raises:
        ExperimentError: there is no checkpoint of this experiment, or `dtype` cannot be written.
    """
    return verbs.export(experiment, _folders(runs_dir), dtype)
