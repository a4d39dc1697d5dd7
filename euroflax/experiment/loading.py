"""An experiment file, read by its path: `experiments/7b_eu24.py` need not be a module name."""

import contextlib
import dataclasses
import hashlib
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Mapping

from euroflax.experiment import schema
from euroflax.experiment.codec import from_json, override, unknown_field
from euroflax.experiment.errors import ExperimentError
from euroflax.experiment.schema import Experiment
from euroflax.experiment.validation import validate


def load(path: str | pathlib.Path, overrides: Mapping[str, object] | None = None) -> Experiment:
    """The `experiment` of an experiment file, named after the file where it has no name, overridden and valid.

    Raises:
        ExperimentError: there is no such file, it does not run, it declares no experiment, or a value is wrong.
    """
    path = pathlib.Path(path)
    experiment = _execute(path)
    if not isinstance(experiment, Experiment):
        rule = "declares no Experiment" if experiment is None else "holds no Experiment in it"
        raise ExperimentError(f"experiment file {path} {rule}; end it with `experiment = Experiment(...)`")
    experiment = from_json({field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)})
    if not experiment.name:
        experiment = dataclasses.replace(experiment, name=path.stem)
    experiment = override(experiment, overrides or {})
    faults = validate(experiment)
    if not experiment.name:
        faults.append("name= is empty and the run folder needs one; use letters, digits, and - _ . +")
    if faults:
        raise ExperimentError(*faults)
    return experiment


def _execute(path: pathlib.Path) -> object:
    try:
        if path.exists() and not path.is_file():
            raise ExperimentError(f"experiment file {path} is not a regular file; give a path to a .py file")
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ExperimentError(f"experiment file {path} cannot be read ({reason}); give a path to a .py file")
    module = types.ModuleType(f"experiment_{path.stem}_{hashlib.sha256(bytes(path.absolute())).hexdigest()[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look for the annotations of their fields
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is the command's
            exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    except ExperimentError:
        raise
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        place = f"{path}:{line}" if line else f"{_line_of(error, path)}"
        raise ExperimentError(f"experiment file {place} {_sentence(error)}; fix that line") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also one that ends the process
        raise ExperimentError(f"experiment file {_line_of(error, path)} {_describe(error, path)}") from error
    return getattr(module, "experiment", None)


def _sentence(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"does not run ({type(error).__name__}: {message})"


def _describe(error: BaseException, path: pathlib.Path) -> str:
    if isinstance(error, SystemExit):
        return f"ends the process (SystemExit: {error.code}); take that line out"
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name is not None and (path.parent / f"{name}.py").is_file():
        return (
            f"imports {name}, a file beside it, and experiment files are no modules; use "
            f'`load(pathlib.Path(__file__).parent / "{name}.py")` of euroflax.experiment'
        )
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    cls = getattr(schema, match[1], None) if match else None
    if match and cls is not None:
        return unknown_field(cls, "", match[2])
    return f"{_sentence(error)}; fix that line"


def _line_of(error: BaseException, path: pathlib.Path) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)
