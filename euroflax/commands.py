"""What each verb of the command line shows of what `verbs` does; what it returns is printed under --json."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable

from euroflax import bench, planning, report, tables, verbs
from euroflax.console import ConsoleDisplay, SilentDisplay
from euroflax.ending import printable
from euroflax.experiment import Experiment
from euroflax.folders import Folders
from euroflax.generation import Sampling
from euroflax.training.record import read_manifest
from euroflax.training.stop import Stop


@dataclasses.dataclass(frozen=True)
class Call:
    """One command."""

    declared: Experiment
    folders: Folders
    options: argparse.Namespace
    display: ConsoleDisplay | SilentDisplay
    """Shows nothing in processes other than the first."""
    stop: Stop


def _train(call: Call) -> None:
    options = call.options
    given = (call.declared, call.folders, call.display, call.stop, options.track or ())
    flags = {name: bool(getattr(options, name)) for name in ("from_scratch", "try_memory")}
    run = verbs.train(*given, **flags)
    call.display.close()
    call.display.evaluations(run.metrics)
    if call.options.process_id == 0:
        call.display.note(report.time_line(read_manifest(run.path)))
    call.display.note(f"run folder  {run.path}")
    if call.options.process_id == 0:
        with call.stop.at_once():
            call.display.note(f"report      {report.write(run.path)}")


def _check(call: Call) -> dict:
    found = verbs.check(call.declared, call.folders, deep=bool(call.options.deep))
    files, size = (sum(source[name] for source in found["sources"]) for name in ("files", "file_bytes"))
    count = len(found["sources"])
    call.display.note(f"files       {files:,} in {count} source{'' if count == 1 else 's'}, {planning.size(size)}")
    _tables(call, found["stages"])
    for line in (*found["not_read"], *found["bad_lines"], *found["withdrawn"]):
        call.display.note(line)
    call.display.note(f"{found['name']} is ready")
    return found


def _tables(call: Call, stages: list[dict]) -> None:
    if len(stages) > 1:
        call.display.table(tables.stages(stages))
    call.display.table(tables.mixture(stages))


def _plan(call: Call) -> dict:
    devices = call.options.devices
    count = None if devices is None else int(devices.partition(":")[2] or 1)
    made = verbs.plan(call.declared, call.folders, count, call.options.on)
    for line in planning.plan_lines(made):
        call.display.note(line)
    if made.target is not None and made.collectives:
        call.display.table(tables.collectives(made))
    _tables(call, made.stages)
    return made.to_json()


def _prepare(call: Call) -> None:
    prepared = verbs.prepare(call.declared, call.folders, call.display, call.stop)
    call.display.close()
    tokens = sum(store.num_tokens for _, store in prepared.train)
    call.display.note(f"prepared    {len(prepared.train)} sources, {tokens:,} tokens, in {call.folders.cache_dir}")
    about_bad = tables.about_bad_lines(call.folders, prepared)
    if not prepared.tokenizer.begins_texts:
        call.display.note(
            f"tokenizer   {prepared.tokenizer_path} puts no begin token before a text; training, evaluation and "
            "generation do, and an export will"
        )
    for line in (*tables.about_rows(call.declared, prepared), *about_bad):
        call.display.note(line)


def _show(call: Call) -> dict:
    options = call.options
    if options.row is not None:
        placed = verbs.show(call.declared, call.folders, options.row)
        for line in tables.row(placed):
            call.display.note(line)
        return placed.to_json()
    found = verbs.show_ledger(call.declared, call.folders, options.position)
    for table in tables.ledger(found.entries, f"read in the first {found.position:,} of {found.total_rows:,} rows"):
        call.display.table(table)
    return dataclasses.asdict(found)


def _bench(call: Call) -> dict:
    found = bench.bench(call.declared, call.folders, call.options.rows or bench.ROWS, call.display, call.stop)
    call.display.close()
    call.display.table(bench.table(found))
    return found


def _evaluate(call: Call) -> dict:
    found = verbs.evaluate(call.declared, call.folders, call.display, call.stop)
    call.display.close()
    figures = {key: value if math.isfinite(value) else None for key, value in found.items() if key != "step"}
    call.display.evaluations([{"step": found["step"], "eval": figures}])
    return {"step": found["step"], **figures}


def _generate(call: Call) -> list[dict]:
    options = call.options
    names = [field.name for field in dataclasses.fields(Sampling)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    sampling = dataclasses.replace(Sampling(), **given | {"stop": tuple(options.stop or ())})
    stream = _Stream(options.prompt) if options.process_id == 0 and not options.json else None
    found = verbs.generate(
        call.declared,
        call.folders,
        options.prompt,
        sampling,
        call.display,
        call.stop,
        stream.write if stream else _ignore,
    )
    if stream:
        stream.finish()
    return [dataclasses.asdict(completion) for completion in found]


def _ignore(number: int, text: str) -> None:
    """Prints nothing."""


class _Stream:
    """Prints continuations as they are written: one prompt at a time, the later ones once their turn comes."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts, self._current = prompts, -1
        self._waiting = [""] * len(prompts)

    def write(self, number: int, text: str) -> None:
        """Takes what was just written after a prompt."""
        self._waiting[number] += text
        if self._current < 0:
            self._turn()
        if number == self._current:
            self._print()

    def _turn(self) -> None:
        self._current += 1
        sys.stdout.write("\n\n" if self._current else "")
        self._show(self._prompts[self._current])
        self._print()

    def _print(self) -> None:
        self._show(self._waiting[self._current])
        sys.stdout.flush()
        self._waiting[self._current] = ""

    def _show(self, text: str) -> None:
        sys.stdout.write(printable(text, lines=True) if sys.stdout.isatty() else text)

    def finish(self) -> None:
        """Prints what waits for its turn."""
        while self._current + 1 < len(self._prompts):
            self._turn()
        sys.stdout.write("\n")


def _export(call: Call) -> None:
    path = verbs.export(call.declared, call.folders, call.options.dtype or "float32", call.display, call.stop)
    call.display.close()
    call.display.note(f"exported    {path}")


COMMANDS: dict[str, Callable[[Call], object]] = {
    "train": _train,
    "check": _check,
    "plan": _plan,
    "prepare": _prepare,
    "show": _show,
    "bench": _bench,
    "evaluate": _evaluate,
    "generate": _generate,
    "export": _export,
}
