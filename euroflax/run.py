"""The command line: `python -m euroflax.run EXPERIMENT.py [VERB]`. Parses, loads, dispatches one verb."""

import argparse
import errno
import json
import pathlib
import shlex
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

from euroflax.experiment import Experiment, ExperimentError, Interrupted, RunFailed, load
from euroflax.training.stop import Stop

VERBS = {
    "train": "prepare what is missing, train, go on where it was interrupted, evaluate (default)",
    "check": "look at values, files and folders, without an accelerator",
    "plan": "parameters, tokens, mixture and memory, without an accelerator",
    "prepare": "make the tokenizer and the token stores",
    "evaluate": "bits per byte of the latest checkpoint, by language",
}
_ON_DEVICES = ("train", "evaluate")
_WITH_JSON = ("check", "plan", "evaluate")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 the user's mistake, 75 run it again."""
    options = argparse.Namespace(debug=False)
    try:
        options = _parser().parse_args(arguments)
        overrides = dict(_assignment(text) for text in options.set)
        declared = load(options.experiment, overrides)
        if options.json and options.verb not in _WITH_JSON:
            raise ExperimentError(f"--json is not for {options.verb}; it goes with {', '.join(_WITH_JSON)}")
        stop = Stop()
        _listen(stop)
        return _dispatch(declared, options, stop)
    except ExperimentError as error:
        _debug(options)
        for fault in error.faults:
            print(f"error: {_with_command(error, fault, options)}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        _debug(options)
        print(
            f"error: {error}; {'make room and run the same command again' if _is_full(error) else 'mend that'}",
            file=sys.stderr,
        )
        return Interrupted.exit_status if _is_full(error) else RunFailed.exit_status
    except (RunFailed, Interrupted) as error:
        _debug(options)
        print(f"{'error: ' if isinstance(error, RunFailed) else ''}{error}", file=sys.stderr)
        return error.exit_status


def _with_command(error: ExperimentError, fault: str, options: argparse.Namespace) -> str:
    """A fault; where a job of several processes lacks prepared data, with the command that prepares it."""
    part = getattr(error, "part", None)
    if part is None or options.process_count == 1:
        return fault
    given = [f"--set={text}" for text in options.set]
    for name in ("data_root", "cache_dir"):
        if (path := getattr(options, name)) is not None:
            given += [f"--{name.replace('_', '-')}", str(path)]
    command = shlex.join(["python", "-m", "euroflax.run", str(options.experiment), "prepare", *given])
    return (
        f"{part} is not prepared, and a job of {options.process_count} processes does not prepare; run first: {command}"
    )


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class _Parser(argparse.ArgumentParser):
    """A parser whose faults look like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises the fault of a command that cannot be parsed."""
        raise ExperimentError(f"{message}; see --help")


def _debug(options: argparse.Namespace) -> None:
    if options.debug:
        traceback.print_exc()


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
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _listen(stop: Stop) -> None:
    """From here on SIGTERM and SIGINT end the command in good order, with status 75."""

    def on_signal(number: int, _: FrameType | None) -> None:
        stop.request(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


def _assignment(text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals:
        raise ExperimentError(f"--set {text} has no value; write --set FIELD=VALUE")
    return field.strip(), value


def _dispatch(declared: Experiment, options: argparse.Namespace, stop: Stop) -> int:
    from euroflax import devices
    from euroflax.folders import Folders

    given = {name: getattr(options, name) for name in ("data_root", "cache_dir", "runs_dir")}
    folders = Folders(**{name: path for name, path in given.items() if path is not None})
    processes = devices.Processes(
        coordinator=options.coordinator, process_id=options.process_id, process_count=options.process_count
    )
    simulated = options.devices or (None if options.verb in _ON_DEVICES else "cpu")
    devices.set_up(declared, simulated, folders.cache_dir, processes)
    _listen(stop)  # again: jax.distributed takes SIGTERM for itself

    from rich.console import Console

    from euroflax import verbs
    from euroflax.console import ConsoleDisplay, SilentDisplay

    stop.check()
    console = Console(stderr=options.json)
    display = ConsoleDisplay(console)
    shown = display if options.process_id == 0 else SilentDisplay()
    result: dict = {}
    try:
        if options.verb == "train":
            run = verbs.train(declared, folders, shown, stop)
            if options.process_id == 0:
                display.close()
                display.evaluations(run.metrics)
                display.note(f"run folder  {run.path}")
        elif options.verb == "prepare":
            prepared = verbs.prepare(declared, folders, shown, stop)
            display.close()
            tokens = sum(store.num_tokens for _, store in prepared.train)
            display.note(f"prepared    {len(prepared.train)} sources, {tokens:,} tokens, in {folders.cache_dir}")
        elif options.verb == "plan":
            result = verbs.plan(declared, folders, _device_count(options.devices)).to_json()
        elif options.verb == "check":
            result = verbs.check(declared, folders)
        else:
            result = verbs.evaluate(declared, folders, shown, stop)
    finally:
        display.close()
    if options.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    elif options.process_id == 0:
        _show(options.verb, result, display)
    return 0


def _device_count(devices: str | None) -> int | None:
    return None if devices is None else int(devices.partition(":")[2] or 1)


def _show(verb: str, result: dict, display: object) -> None:
    from euroflax import planning
    from euroflax.console import ConsoleDisplay

    assert isinstance(display, ConsoleDisplay)
    if verb == "plan":
        for line in planning.lines(planning.Plan(**result)):
            display.note(line)
    elif verb == "check":
        for source in result["sources"]:
            display.note(f"{source['source']}: {source['files']} files, {planning.size(source['file_bytes'])}")
        display.note(f"{result['name']} is ready")
    elif verb == "evaluate":
        display.evaluations([{"step": result.pop("step"), "eval": result}])


if __name__ == "__main__":
    sys.exit(main())
