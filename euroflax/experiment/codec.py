"""Experiments from and to JSON and text, checked against the types of the dataclasses."""

import dataclasses
import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Literal

from euroflax.experiment.errors import ExperimentError
from euroflax.experiment.schema import Experiment

_TOO_LARGE = 2**63


@functools.cache
def field_types(cls: type) -> dict[str, object]:
    """The resolved type of each field of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def shown(value: object) -> str:
    """A value as error messages show it: short, on one line."""
    if isinstance(value, int) and abs(value) >= _TOO_LARGE**2:
        return "a number of 2^63 or more"  # Python refuses to write out some
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def _is_union(kind: object) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _type_name(kind: object) -> str:
    if _is_union(kind):
        return " or ".join(map(_type_name, typing.get_args(kind)))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "none"}
    if kind in plain:
        return plain[typing.cast(type, kind)]
    if typing.get_origin(kind) is tuple:
        return "a list"
    return "a table" if typing.get_origin(kind) is dict else getattr(kind, "__name__", str(kind))


def unknown_field(cls: type, path: str, name: str) -> str:
    """The fault of a field that `cls` does not have, with its nearest neighbours."""
    close = difflib.get_close_matches(name, field_types(cls), n=3, cutoff=0.5) or list(field_types(cls))
    return f"{path}{name} is not a field of {cls.__name__}; its nearest are {', '.join(close)}"


def decode(kind: object, value: object, path: str, faults: list[str]) -> object:
    """`value`, made of what JSON can hold, as an instance of `kind`; faults are appended, not raised."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, path, faults)
    if _is_union(kind):
        fits = next((k for k in arguments if _fits(k, value)), None)
        return _fault(kind, value, path, faults) if fits is None else decode(fits, value, path, faults)
    if not _fits(kind, value):
        return _fault(kind, value, path, faults)
    if origin is tuple:
        items = typing.cast(list, value)
        return tuple(decode(arguments[0], item, f"{path}[{i}]", faults) for i, item in enumerate(items))
    if origin is dict:
        table = typing.cast(dict, value)
        return {k: decode(arguments[1], v, f"{path}[{k}]", faults) for k, v in table.items()}
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _TOO_LARGE:
        faults.append(f"{path}={shown(value)} is too large; use a number below 2^63")
        return value
    if isinstance(value, str) and (fault := _unusable(value)):
        faults.append(f"{path}={shown(value)} {fault}; take it out")
        return value
    if kind is float:
        return float(typing.cast(float, value))
    return value


def _unusable(text: str) -> str | None:
    """Why no file system and no JSON file takes a text; None where they do."""
    if "\0" in text:
        return "holds a NUL"
    return "holds half a surrogate pair" if any("\ud800" <= character <= "\udfff" for character in text) else None


def _fits(kind: object, value: object) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return any(_fits(k, value) for k in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, (list, tuple))
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return isinstance(value, (dict, kind))
    return isinstance(value, typing.cast(type, kind))


def _fault(kind: object, value: object, path: str, faults: list[str]) -> object:
    faults.append(f"{path}={shown(value)} has the wrong type; give {_type_name(kind)}")
    return value


def _decode_dataclass(cls: type, value: object, path: str, faults: list[str]) -> object:
    prefix = f"{path}." if path else ""
    if isinstance(value, cls):
        value = {name: getattr(value, name) for name in field_types(cls)}
    if not isinstance(value, dict):
        return _fault(cls, value, path, faults)
    before = len(faults)
    given = {}
    for name, item in value.items():
        if name not in field_types(cls):
            faults.append(unknown_field(cls, prefix, name))
        else:
            given[name] = decode(field_types(cls)[name], item, prefix + name, faults)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            faults.append(f"{prefix}{field.name} is missing; give {_type_name(field_types(cls)[field.name])}")
    return cls(**given) if len(faults) == before else value


def to_json(experiment: Experiment) -> dict:
    """The experiment as plain dicts, lists, numbers and texts; `from_json` reads it back equal."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def from_json(value: object) -> Experiment:
    """The experiment that `to_json` wrote.

    Raises:
        ExperimentError: a field is unknown, missing or of the wrong type.
    """
    faults: list[str] = []
    experiment = decode(Experiment, value, "", faults)
    if faults:
        raise ExperimentError(*faults)
    return typing.cast(Experiment, experiment)


def _parse_text(kind: object, text: str) -> object:
    """A command-line text as what `kind` wants: a plain text where it fits, JSON otherwise."""
    if _fits(kind, text):
        return text
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    lowered = text.strip().lower()
    if types.NoneType in options and lowered in ("none", "null"):
        return None
    if bool in options and lowered in ("true", "false"):
        return lowered == "true"
    try:
        if int in options:
            return int(text.replace("_", ""))
    except ValueError:
        pass
    try:
        if float in options or int in options:
            number = float(text)
            return int(number) if int in options and number.is_integer() else number
    except ValueError:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def override(experiment: Experiment, overrides: Mapping[str, object]) -> Experiment:
    """The experiment with fields replaced: `{"model.num_layers": 2}`; texts are typed by the dataclass.

    Raises:
        ExperimentError: a field is unknown, or a value has the wrong type.
    """
    faults: list[str] = []
    for path, value in overrides.items():
        experiment = _replace(experiment, path, path.split("."), value, faults)
    if faults:
        raise ExperimentError(*faults)
    return experiment


def _replace(parent: typing.Any, path: str, parts: list[str], value: object, faults: list[str]) -> typing.Any:
    name, *rest = parts
    kinds = field_types(type(parent)) if dataclasses.is_dataclass(type(parent)) else {}
    if name not in kinds:
        prefix = path[: len(path) - len(".".join(parts))]
        if kinds:
            faults.append(unknown_field(type(parent), prefix, name))
        else:
            faults.append(f"{path} reaches into {prefix.rstrip('.')}, which has no fields; set it as a whole")
        return parent
    if rest:
        child = _replace(getattr(parent, name), path, rest, value, faults)
    else:
        parsed = _parse_text(kinds[name], value) if isinstance(value, str) else value
        child = decode(kinds[name], parsed, path, faults)
    return dataclasses.replace(parent, **{name: child})


def fingerprint(value: object) -> str:
    """A short hash of a value that JSON can hold, the same on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
