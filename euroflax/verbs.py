"""What can be done with an experiment, as functions: the command line and notebooks call the same ones."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence

import jax

from euroflax import devices, evaluation, generation, huggingface, planning, processes, sharding, tables
from euroflax.checking import check
from euroflax.checkpoint import SavedParams, latest_step, open_latest
from euroflax.console import SilentDisplay, evaluations_as_html
from euroflax.data import prepare as preparation
from euroflax.data import tokenizer as tokens
from euroflax.data.files import not_read
from euroflax.data.ledger import Entry, ledger
from euroflax.data.loader import PlacedRow, Rows
from euroflax.data.prepare import Prepared
from euroflax.data.store import NotPrepared
from euroflax.data.tokenizer import Tokenizer
from euroflax.experiment import Experiment, ExperimentError, Source, from_json
from euroflax.folders import Folders, make_folder
from euroflax.generation import Completion, Sampling
from euroflax.huggingface.card import model_card
from euroflax.training import loop, tracking
from euroflax.training.clock import Clock
from euroflax.training.record import read_json, read_manifest, read_metrics
from euroflax.training.step import abstract_state
from euroflax.training.stop import Stop

__all__ = ["Read", "Run", "check", "evaluate", "export", "generate", "plan", "prepare", "show", "show_ledger", "train"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has ended."""

    path: pathlib.Path
    """Its folder."""
    params: dict = dataclasses.field(repr=False)
    """The parameters, as `euroflax.model.init` makes them."""
    metrics: list[dict] = dataclasses.field(repr=False)
    """The lines of its metrics."""

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """The last evaluation: figures by language code, and `mean`."""
        found = [line["eval"] for line in self.metrics if "eval" in line]
        return {key.removeprefix("bits_per_byte."): value for key, value in (found[-1] if found else {}).items()}

    def _repr_html_(self) -> str:
        return evaluations_as_html(self.metrics)


def prepare(
    declared: Experiment, folders: Folders, display: loop.Display | None = None, stop: Stop | None = None
) -> Prepared:
    """Makes the tokenizer and the token stores that are missing; in a job of several processes only opens them.

    Raises:
        ExperimentError: the data is at fault, or not prepared and this is one process of several.
        Interrupted: it was stopped; the same call goes on.
    """
    display, stop = display or SilentDisplay(), stop or Stop()

    def progress(task: str, done: int, total: int) -> None:
        stop.check()
        display.progress(task, done, total)

    if jax.distributed.is_initialized() and jax.process_count() > 1:  # the count alone would start the devices
        return _open_together(declared, folders)
    with stop.at_once():  # a file system that does not answer is not waited for
        for source in declared.data.sources + declared.evaluation.sources:
            if (line := _not_read(source, folders)) is not None:
                display.note(line)
    return preparation.prepare(declared, folders, progress, stop.at_once)


def _not_read(source: Source, folders: Folders) -> str | None:
    """What a source's folder holds and is not read; nothing where the text is not on this machine."""
    try:
        return not_read(source, folders.data_root)
    except OSError:
        return None


def _open_together(declared: Experiment, folders: Folders) -> Prepared:
    """What was prepared, the same in every process of the job.

    Raises:
        NotPrepared: something is missing in every process.
        ExperimentError: it is not the same everywhere.
    """
    try:
        prepared, lacking = preparation.open_prepared(declared, folders), None
    except NotPrepared as error:
        prepared, lacking = None, error
    data = f"nothing: {lacking}"
    if prepared is not None:
        stores = [(source.name, store.path.name) for source, store in (*prepared.train, *prepared.evaluation)]
        lists = {name: sorted(ids) for name, ids in prepared.withdrawn.items()}
        data = repr((prepared.tokenizer.fingerprint, stores, sorted(lists.items())))
    processes.same_everywhere({"data": data})
    if prepared is None:
        assert lacking is not None
        raise lacking
    return prepared


def plan(
    declared: Experiment, folders: Folders, num_devices: int | None = None, on: str | None = None
) -> planning.Plan:
    """What the run will be on a target or a number of devices; by default on as many as its mesh needs at least.

    The mixture is that of the stores where they are prepared, otherwise as declared.

    Args:
        declared: the experiment.
        folders: where its stores are.
        num_devices: devices that need not be here.
        on: hardware that need not be here, such as `h100:64x4`; the step is compiled for it where that can be.

    Raises:
        ExperimentError: the mesh does not fit, or there is no such target.
    """
    target = None if on is None else planning.parse_target(on)
    if target is not None:
        num_devices = target.num_devices
    elif num_devices is None:
        num_devices = sharding.least_devices(declared.mesh)
    try:
        order = Rows(declared, preparation.open_prepared(declared, folders)).order
    except NotPrepared:
        order = None
    return planning.make_plan(declared, num_devices, order, target)


def train(
    declared: Experiment,
    folders: Folders,
    display: loop.Display | None = None,
    stop: Stop | None = None,
    track: Sequence[str] = (),
    *,
    from_scratch: bool = False,
    try_memory: bool = False,
) -> Run:
    """Prepares what is missing, trains or goes on training, and evaluates.

    Args:
        declared: the run.
        folders: where its data is, and its folder.
        display: what is told of it.
        stop: a wish to stop.
        track: what shows its metrics besides: `tensorboard`, `wandb`.
        from_scratch: whether a run folder that is there is renamed, so that the run begins at step 0.
        try_memory: whether to begin though the state is larger than the memory.

    Raises:
        ExperimentError: something in the experiment does not fit the data, the devices or the run folder.
        Interrupted: it was stopped; the same call goes on.
        RunFailed: running it again will not help.
    """
    display, stop = display or SilentDisplay(), stop or Stop()
    clock = Clock(stop.began)
    tracking.check(track)
    sharding.make_mesh(declared)
    run_dir = folders.run_dir(declared.name)
    if "[" in str(run_dir.absolute()):
        raise ExperimentError(f"run folder={run_dir} has a [ in its path, which Orbax cannot read; use another folder")
    if from_scratch:
        aside = folders.set_aside(declared.name) if jax.process_index() == 0 else None
        if aside is not None:
            display.note(f"the run that was there is kept in {aside}")
        processes.agree(False)  # the others wait until it is renamed
    make_folder(folders.runs_dir, "--runs-dir")
    if declared.continue_from is not None and latest_step(run_dir / "checkpoints") is None:
        huggingface.check_agreement(declared, folders.data_root)
    with clock.on("prepare"):
        prepared = prepare(declared, folders, display, stop)
    display.note(tables.about_tokenizer(prepared))
    about = (tables.about_lost_text(prepared), tables.about_bad_lines(folders, prepared))
    for line in (*itertools.chain(*about), *tables.about_withdrawn(prepared)):
        display.note(line)
    planned = planning.make_plan(declared, jax.device_count(), Rows(declared, prepared).order)
    for line in planning.plan_lines(planned):
        display.note(line)
    if not try_memory:
        _check_memory(planned, devices.memory_bytes())
    opens = functools.partial(huggingface.check_agreement, declared, folders.data_root, prepared.tokenizer)
    weights = None if declared.continue_from is None else opens
    params = loop.train(declared, prepared, weights, run_dir, display, stop, clock, track)
    return Run(run_dir, params, read_metrics(run_dir))


def _check_memory(planned: planning.Plan, there: int | None) -> None:
    """Refuses a state that cannot fit: what a step needs besides is not counted.

    Raises:
        ExperimentError: it cannot.
    """
    needed = sum(planned.memory_bytes[part] or 0 for part in ("parameters", "optimizer", "gradients"))
    if there is not None and needed > there:
        raise ExperimentError(
            f"model of {planned.parameters:,} parameters: parameters, optimizer and gradients take "
            f"{planning.size(needed)} on each of {planned.devices} devices, which have {planning.size(there)}; use "
            "more devices, a larger mesh.fsdp or a smaller model, or --try-memory to begin all the same"
        )


def show(declared: Experiment, folders: Folders, index: int) -> PlacedRow:
    """A row of the run, with what its run folder says of withdrawn documents.

    Raises:
        ExperimentError: the run has no such row, or is not prepared.
    """
    return Rows(declared, preparation.open_prepared(declared, folders)).row(index)


@dataclasses.dataclass(frozen=True)
class Read:
    """What a run has read."""

    position: int
    total_rows: int
    skipped_ranges: list[tuple[int, int]]
    entries: list[Entry]


def show_ledger(declared: Experiment, folders: Folders, position: int | None = None) -> Read:
    """What the run has read at a position; by default where its record ends, or at its end where it has not begun.

    Raises:
        ExperimentError: the run has no such position, or is not prepared.
    """
    prepared = preparation.open_prepared(declared, folders)
    manifest = read_json(folders.run_dir(declared.name) / "manifest.json") or {}
    if position is None:
        position = int(manifest.get("ledger", {}).get("position", declared.total_rows))
    if not 0 <= position <= declared.total_rows:
        raise ExperimentError(f"position={position} is not in the run; use 0 to {declared.total_rows}")
    skipped = [(start, stop) for start, stop in manifest.get("skipped_ranges", [])]
    entries = ledger(declared, Rows(declared, prepared).order, position, skipped)
    return Read(position, declared.total_rows, skipped, entries)


def evaluate(
    declared: Experiment, folders: Folders, display: loop.Display | None = None, stop: Stop | None = None
) -> dict[str, float]:
    """Bits per byte of the latest checkpoint of a run on its held-out text, by language, and its `step`.

    Raises:
        ExperimentError: there is no checkpoint of this experiment, or nothing is held out.
        Interrupted: it was stopped.
    """
    display, stop = display or SilentDisplay(), stop or Stop()
    run_dir = _trained(declared, folders)
    prepared = prepare(declared, folders, display, stop)
    mesh = sharding.mesh_to_read(declared, display.note)

    def proceed(done: int, total: int) -> None:
        stop.check()
        display.progress("evaluate", done, total)

    with jax.set_mesh(mesh):
        saved = _open_saved(declared, run_dir, prepared.tokenizer, display)
        params = saved.place(abstract_state(declared, mesh).params)
        figures = evaluation.bits_per_byte(declared, prepared, params, mesh, proceed)
    if not figures:
        raise ExperimentError("evaluation.sources=() and no holdout_fraction leave nothing to evaluate on; state one")
    return {"step": saved.step, **figures}


def generate(
    declared: Experiment,
    folders: Folders,
    prompts: Sequence[str],
    sampling: Sampling,
    display: loop.Display | None = None,
    stop: Stop | None = None,
    on_text: Callable[[int, str], None] = lambda number, text: None,
) -> list[Completion]:
    """Continuations of the prompts by the latest checkpoint of a run; `generation.generate` says the rest.

    Raises:
        ExperimentError: there is no checkpoint of this experiment, a prompt is longer than the context, or `sampling`
            is at fault.
        Interrupted: it was stopped.
    """
    run_dir = _trained(declared, folders)
    display = display or SilentDisplay()
    mesh = sharding.mesh_to_read(declared, display.note)
    tokenizer = tokens.read(run_dir / "tokenizer" / "tokenizer.json")
    with jax.set_mesh(mesh):
        saved = _open_saved(declared, run_dir, tokenizer, display)
        params = saved.place(abstract_state(declared, mesh).params)
        length = declared.context_length
        proceed = (stop or Stop()).check
        return generation.generate(declared.model, params, tokenizer, length, prompts, sampling, on_text, proceed)


def export(
    declared: Experiment,
    folders: Folders,
    dtype: str = "float32",
    display: loop.Display | None = None,
    stop: Stop | None = None,
) -> pathlib.Path:
    """Writes the latest checkpoint of a run as a Hugging Face folder, `hf` in the run folder, and returns its path.

    Raises:
        ExperimentError: there is no checkpoint of this experiment, or `dtype` cannot be written.
        Interrupted: it was stopped; nothing half is left under the name.
    """
    display, stop = display or SilentDisplay(), stop or Stop()
    if dtype not in huggingface.DTYPES:
        raise ExperimentError(f"dtype={dtype} cannot be written; use one of {', '.join(huggingface.DTYPES)}")
    run_dir = _trained(declared, folders)
    tokenizer = run_dir / "tokenizer" / "tokenizer.json"
    saved = _open_saved(declared, run_dir, tokens.read(tokenizer), display)

    def advance(done: int, total: int) -> None:
        stop.check()
        display.progress("export", done, total)

    declared = from_json(saved.facts["experiment"])
    card = model_card(declared, read_manifest(run_dir), read_metrics(run_dir), saved.facts)
    old = huggingface.export(declared, saved.read, run_dir / "hf", tokenizer, card, dtype, advance=advance)
    if old is not None:
        display.note(f"the folder that was there is kept as {old}")
    return run_dir / "hf"


def _trained(declared: Experiment, folders: Folders) -> pathlib.Path:
    """The run folder, which holds a checkpoint.

    Raises:
        ExperimentError: it does not.
    """
    run_dir = folders.run_dir(declared.name)
    if latest_step(run_dir / "checkpoints") is None:
        raise ExperimentError(f"run folder={run_dir} holds no checkpoint; train first")
    return run_dir


def _open_saved(
    declared: Experiment, run_dir: pathlib.Path, tokenizer: Tokenizer, display: loop.Display
) -> SavedParams:
    """The parameters of the latest whole checkpoint, which is of this experiment and tokenizer."""
    check_facts = functools.partial(loop.check_facts, declared, tokenizer, run_dir)
    saved = open_latest(run_dir / "checkpoints", check_facts, display.note)
    if saved is None:
        raise ExperimentError(f"run folder={run_dir} holds no checkpoint that is whole; train first")
    return saved
