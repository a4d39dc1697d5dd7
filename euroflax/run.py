"""The command line: `python -m euroflax.run EXPERIMENT.py [VERB]`. Parses, loads, dispatches one verb."""

import argparse
import contextlib
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TextIO, cast

from euroflax.ending import SIGNALS, Tolerant, end, end_at_second_interrupt, open_streams, printable, say
from euroflax.experiment import Experiment, ExperimentError, Interrupted, RunFailed, load, to_json
from euroflax.folders import Folders, of_system
from euroflax.processes import Processes
from euroflax.training.stop import Stop, slurm_limit, time_limit
from euroflax.training.watchdog import Watchdog

VERBS = {
    "train": "prepare what is missing, train, go on where it was interrupted, evaluate (default)",
    "check": "look at values, files and folders, without an accelerator",
    "plan": "parameters, tokens, mixture and memory, without an accelerator",
    "prepare": "make the tokenizer and the token stores",
    "show": "the text behind --row I of the run, or with --ledger what it has read of whom",
    "bench": "speed of the loader over the experiment's sources, beside Grain's and Hugging Face's",
    "evaluate": "bits per byte of the latest checkpoint, by language",
    "generate": "continue --prompt TEXT by the latest checkpoint",
    "export": "write the latest checkpoint as a Hugging Face folder, hf in the run folder",
    "report": "write report.html in the run folder: the run on one page; with --compare beside others",
}
_MAKE_FILES = ("train", "prepare", "export", "report")
"""What these print is beside the matter."""
_ON_DEVICES = ("train", "evaluate", "generate")
_HANG_MINUTES = 30.0
_LESS_MEMORY = "use more devices, a larger mesh.fsdp, more training.accumulation_steps or model.remat=full"
_LEAST_SLURM_SECONDS = 20.0
"""A limit of Slurm's that is nearer than this when the command begins is that of a wrong clock."""
_ONLY_FOR = {
    "json": ("check", "plan", "evaluate", "generate", "show", "bench"),
    "on": ("plan",),
    "deep": ("check",),
    "row": ("show",),
    "ledger": ("show",),
    "position": ("show",),
    "rows": ("bench",),
    "prompt": ("generate",),
    "max_new_tokens": ("generate",),
    "temperature": ("generate",),
    "top_k": ("generate",),
    "top_p": ("generate",),
    "stop": ("generate",),
    "seed": ("generate",),
    "dtype": ("export",),
    "compare": ("report",),
    "time_limit": ("train", "prepare", "evaluate", "generate"),
    "track": ("train",),
    "hang_minutes": ("train", "evaluate", "generate"),
    "from_scratch": ("train",),
    "try_memory": ("train",),
}
"""Flags that mean nothing to other verbs."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 the user's mistake, 75 run it again."""
    options = argparse.Namespace(debug=False)
    try:
        options = _parser().parse_intermixed_args(arguments)
        overrides = dict(_assignment(text) for text in options.set)
        _check_flags(options)
        stop = Stop()
        _set_limit(options, stop)
        _listen(stop)
        with stop.at_once():  # an experiment file is a program, which may hang
            declared = load(options.experiment, overrides)
        status = _dispatch(declared, options, stop)
        if options.json or options.verb not in _MAKE_FILES:
            sys.stdout.flush()  # here what cannot be written is still told
        return status
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RunFailed.exit_status
    except OSError as error:
        _debug(options)
        return _told(of_system(error), options)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(
            error
        ):  # JAX's, which is not loaded here
            raise
        _debug(options)
        return _told(RunFailed(f"out of memory ({str(error).partition(chr(10))[0][:200]}); {_LESS_MEMORY}"), options)
    except (ExperimentError, RunFailed, Interrupted) as error:
        _debug(options)
        return _told(error, options)


def _told(error: ExperimentError | RunFailed | Interrupted, options: argparse.Namespace) -> int:
    """Says an error on the terminal and returns its exit status."""
    if isinstance(error, ExperimentError):
        for fault in error.faults:
            say(f"error: {printable(_with_command(error, fault, options))}")
    else:
        say(f"{'error: ' if isinstance(error, RunFailed) else ''}{printable(str(error))}")
    return error.exit_status


def _with_command(error: ExperimentError, fault: str, options: argparse.Namespace) -> str:
    """A fault; where a job of several processes lacks prepared data, with the command that prepares it."""
    part = getattr(error, "part", None)
    if part is None or options.process_count == 1:
        return fault
    given = [f"--set={text}" for text in options.set]
    for name in ("data_root", "cache_dir", "runs_dir"):
        if (path := getattr(options, name)) is not None:
            given += [f"--{name.replace('_', '-')}", str(path)]
    command = shlex.join(["python", "-m", "euroflax.run", str(options.experiment), "prepare", *given])
    return (
        f"{part} is not prepared, and a job of {options.process_count} processes does not prepare; run first: {command}"
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose faults look like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises the fault of a command that cannot be parsed."""
        raise ExperimentError(f"{message}; see --help")


def _debug(options: argparse.Namespace) -> None:
    if options.debug:
        traceback.print_exc(file=cast(TextIO, Tolerant(sys.stderr)))


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    parser = _Parser(
        prog="python -m euroflax.run",
        description="Trains the model that an experiment file declares.",
        epilog=f"verbs:\n{verbs}\n\nexit status: 0 done, 1 failed, 2 a mistake in the command or experiment, "
        "75 interrupted: run the same command again",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", metavar="EXPERIMENT.py", type=pathlib.Path, help="the experiment file")
    parser.add_argument("verb", metavar="VERB", nargs="?", default="train", choices=VERBS, help="what to do with it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field: --set model.num_layers=2"
    )
    parser.add_argument("--runs-dir", type=pathlib.Path, metavar="DIR", help="where run folders are (runs)")
    parser.add_argument("--data-root", type=pathlib.Path, metavar="DIR", help="where relative source paths start")
    parser.add_argument("--cache-dir", type=pathlib.Path, metavar="DIR", help="where token stores and tokenizers are")
    parser.add_argument("--devices", metavar="cpu:N", help="simulate N devices on the CPU")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 of a job of several processes")
    parser.add_argument("--process-id", type=int, default=0, metavar="I", help="number of this process")
    parser.add_argument("--process-count", type=int, default=1, metavar="N", help="number of processes")
    parser.add_argument("--time-limit", metavar="HH:MM", help="save and end in time, with status 75 (Slurm's)")
    parser.add_argument(
        "--hang-minutes",
        type=float,
        metavar="N",
        help="end, with status 75, if nothing moves for so long (30); 0 never",
    )
    parser.add_argument(
        "--track", action="append", metavar="NAME", help="show metrics with tensorboard or wandb too; may be repeated"
    )
    parser.add_argument(
        "--from-scratch", action="store_true", default=None, help="begin at step 0; the run folder is renamed and kept"
    )
    parser.add_argument(
        "--try-memory", action="store_true", default=None, help="begin though the state is larger than the memory"
    )
    parser.add_argument("--json", action="store_true", default=None, help="one JSON document on standard output")
    _add_flags_of_verbs(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_flags_of_verbs(parser: argparse.ArgumentParser) -> None:
    checks = parser.add_argument_group("check")
    checks.add_argument("--deep", action="store_true", default=None, help="compare prepared data with its hashes")
    plans = parser.add_argument_group("plan")
    plans.add_argument("--on", metavar="TARGET", help="hardware that need not be here: v5p:8x8x8, h100:64x4")
    writing = parser.add_argument_group("generate")
    writing.add_argument("--prompt", action="append", metavar="TEXT", help="a text to continue; may be repeated")
    writing.add_argument("--max-new-tokens", type=int, metavar="N", help="the most tokens to write (64)")
    writing.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token (0)")
    writing.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0 from all (0)")
    writing.add_argument("--top-p", type=float, metavar="P", help="draw from as few as have probability P (1)")
    writing.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    writing.add_argument("--seed", type=int, metavar="N", help="seeds the draws (0)")
    showing = parser.add_argument_group("show")
    showing.add_argument("--row", type=int, metavar="I", help="row of the run, from 0, as `sequences` counts them")
    showing.add_argument("--ledger", action="store_true", default=None, help="what was read by source and provider")
    showing.add_argument("--position", type=int, metavar="N", help="after N rows (where the run's record ends)")
    benching = parser.add_argument_group("bench")
    benching.add_argument("--rows", type=int, metavar="N", help="rows to read (20,000)")
    reporting = parser.add_argument_group("report")
    reporting.add_argument(
        "--compare", action="extend", nargs="+", metavar="RUN", help="other runs, by name or folder: comparison.html"
    )
    exporting = parser.add_argument_group("export")
    exporting.add_argument("--dtype", metavar="TYPE", help="type of the tensors: float32 or bfloat16 (float32)")


def _check_flags(options: argparse.Namespace) -> None:
    for name, verbs in _ONLY_FOR.items():
        if getattr(options, name) is not None and options.verb not in verbs:
            flag = f"--{name.replace('_', '-')}"
            raise ExperimentError(f"{flag} is not for {options.verb}; it goes with {', '.join(verbs)}")
    if options.verb == "show" and (options.row is None) == (options.ledger is None):
        raise ExperimentError("show needs one of --row I and --ledger")
    if options.hang_minutes is not None and not 0 <= options.hang_minutes < math.inf:
        raise ExperimentError(f"--hang-minutes={options.hang_minutes} is no time; use minutes, 30 say, or 0 for never")
    if options.rows is not None and options.rows < 1:
        raise ExperimentError(f"--rows {options.rows} is no number of rows; use 1 or more")
    if options.position is not None and options.ledger is None:
        raise ExperimentError("--position goes with --ledger")
    if options.verb == "generate" and not options.prompt:
        raise ExperimentError("generate has nothing to continue; give --prompt TEXT")


def _listen(stop: Stop) -> None:
    """From here on signals end the command in good order, with status 75; a second SIGINT at once."""

    def on_signal(number: int, _: FrameType | None) -> None:
        stop.request(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, on_signal)
    end_at_second_interrupt()
    stop.listens = True


def _set_limit(options: argparse.Namespace, stop: Stop) -> None:
    """The command ends in time: as its flag says, or else as Slurm does."""
    if options.time_limit is not None:
        stop.limit(time_limit(options.time_limit))
    elif options.verb in _ONLY_FOR["time_limit"]:
        left = slurm_limit(os.environ, time.time())
        if left is not None and left > _LEAST_SLURM_SECONDS:
            stop.deadline = time.monotonic() + left


def _assignment(text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals:
        raise ExperimentError(f"--set {text} has no value; write --set FIELD=VALUE")
    return field.strip(), value


def _dispatch(declared: Experiment, options: argparse.Namespace, stop: Stop) -> int:
    given = {name: getattr(options, name) for name in ("data_root", "cache_dir", "runs_dir")}
    folders = Folders(**{name: path for name, path in given.items() if path is not None})
    if options.verb == "report":  # loads no JAX: it is wanted on login nodes too
        from euroflax import comparison, report

        run_dir = folders.run_dir(declared.name)
        with stop.at_once():
            say(f"report      {report.write(run_dir)}", sys.stdout)
            if options.compare:
                others = [folders.find_run(name) for name in options.compare]
                say(f"comparison  {comparison.write(run_dir, others)}", sys.stdout)
        return 0
    from euroflax import devices, processes

    job = processes.Processes(
        coordinator=options.coordinator, process_id=options.process_id, process_count=options.process_count
    )
    if options.verb in _ON_DEVICES:
        job = processes.find(job, os.environ)
    simulated = options.devices or (None if options.verb in _ON_DEVICES else "cpu")
    job = devices.set_up(declared, simulated, folders.cache_dir, job)
    options.process_id, options.process_count = job.process_id, job.process_count
    _listen(stop)  # again: jax.distributed takes SIGTERM for itself
    minutes = _HANG_MINUTES if options.hang_minutes is None else options.hang_minutes
    watchdog = Watchdog(stop, 60 * minutes if options.verb in _ON_DEVICES else 0.0)
    with contextlib.closing(watchdog):
        if job.process_count == 1 or options.verb not in _ON_DEVICES:
            return _run_verb(declared, options, folders, stop)
        return _watched(lambda: _run_verb(declared, options, folders, stop), declared, job)


def _watched(run_verb: Callable[[], int], declared: Experiment, job: Processes) -> int:
    """Runs a verb in a job of several processes, which must all be the same, and all end when one dies."""
    from euroflax import processes
    from euroflax.watch import Watch

    watch, status, sure = Watch(job), RunFailed.exit_status, False
    try:
        processes.same_everywhere({"code": processes.code_fingerprint(), "experiment": json.dumps(to_json(declared))})
        status = run_verb()
        sure = True
        return status
    except (ExperimentError, Interrupted, RunFailed) as error:
        status, sure = error.exit_status, True
        raise
    finally:
        watch.leave(status, sure)


def _run_verb(declared: Experiment, options: argparse.Namespace, folders: Folders, stop: Stop) -> int:
    from rich.console import Console

    from euroflax import commands
    from euroflax.console import ConsoleDisplay, SilentDisplay

    stop.check()
    stream: TextIO = sys.stderr if options.json else sys.stdout
    if options.json or options.verb in _MAKE_FILES:  # of other verbs it is what they were asked for
        stream = cast(TextIO, Tolerant(stream))
    display = (
        ConsoleDisplay(Console(file=stream, markup=False, emoji=False)) if options.process_id == 0 else SilentDisplay()
    )
    try:
        result = commands.COMMANDS[options.verb](commands.Call(declared, folders, options, display, stop))
    finally:
        display.close()
    if options.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    return 0


if __name__ == "__main__":
    open_streams()
    end(main())
