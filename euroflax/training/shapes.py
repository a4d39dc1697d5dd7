"""What the files of a run folder hold, so that one that was spoilt and still parses is found where it is read."""

import types
from typing import Any

NUMBER = (int, float, types.NoneType)
"""A number, or null where it was not finite or not measured."""
FINITE = (int, float)
TEXT = (str, types.NoneType)

Shape = Any
"""A type; a tuple of such of which one fits; a list `[shape of each]`; a dict with the keys that must be there, or
`{str: shape of each value}`."""

SESSION = {
    "number": int,
    "from": str,
    "to": TEXT,
    "steps": int,
    "flops": FINITE,
    "seconds": {str: FINITE},
    "saves": {"count": int, "blocking_seconds": FINITE, "longest_seconds": FINITE},
    "energy_joules": NUMBER,
    "energy_boundary": TEXT,
    "energy_estimate_joules": NUMBER,
    "devices": int,
    "device_kind": str,
    "processes": int,
    "mesh": {str: int},
}
_NO_SESSION = {
    **{"number": 0, "from": "not recorded", "to": None, "steps": 0, "flops": 0, "seconds": {}, "devices": 0},
    **{"device_kind": "not recorded", "processes": 1, "mesh": {}, "energy_joules": None, "energy_boundary": None},
    "energy_estimate_joules": None,
}
"""What a session says that does not."""
_COUNTS = {str: int}
_SOURCE = {
    **dict.fromkeys(("name", "licence", "provider", "origin", "opt_out", "split"), str),
    **dict.fromkeys(("generator", "language"), TEXT),
    **dict.fromkeys(("documents", "tokens", "bytes", "lines"), int),
    "bad_lines": _COUNTS,
}
_ENTRY = {
    **dict.fromkeys(("source", "language", "provider"), str),
    **dict.fromkeys(("rows", "documents", "epochs", "left_over_tokens"), NUMBER),
    **dict.fromkeys(("bytes", "tokens"), int),
}
_RESOLVED = {
    **dict.fromkeys(("stage", "first_row"), int),
    "unit": str,
    "shares": {str: FINITE},
    **{name: {str: int} for name in ("weights", "begins", "rows_per_epoch")},
    "packings": {str: str},
}
_COST = dict.fromkeys(("characters_per_token", "tokens_per_word", "bytes_per_token", "tokens_vs_english"), NUMBER)
MANIFEST = {
    "versions": {"euroflax": str},
    "data": {"tokenizer": str, "stores": {str: str}},
    "mixture": {"asked": [dict], "resolved": [_RESOLVED]},
    "ledger": {"position": int, "entries": [_ENTRY]},
    "sources": [_SOURCE],
    "tokenizer": {str: _COST},
    "withdrawn": [{"position": int, "listed": _COUNTS}],
    "returns": [{"at": str, "step": int, "rows": [int], "why": str}],
    "skipped_ranges": [[int]],
    "sessions": [SESSION],
}
"""The parts of `manifest.json`, each by its name."""
SAMPLES = {
    "step": int,
    **dict.fromkeys(("temperature", "top_p", "seed"), NUMBER),
    "samples": [dict.fromkeys(("language", "prompt", "text"), str)],
}
TRAIN_LINE = {
    **dict.fromkeys(("step", "sequences", "tokens"), int),
    **dict.fromkeys(("loss", "grad_norm"), NUMBER),
    **dict.fromkeys(("learning_rate", "step_seconds", "tokens_per_second"), FINITE),
    "loss_by_language": {str: NUMBER},
}
EVAL_LINE = {"step": int, "eval": {str: NUMBER}}


def fits(value: object, shape: Shape) -> bool:
    """Whether a value out of JSON has a shape.

    >>> fits({"step": 1, "more": []}, {"step": int}), fits([{}], [{"step": int}])
    (True, False)
    """
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if str in shape:
            return all(fits(item, shape[str]) for item in value.values())
        return all(name in value and fits(value[name], part) for name, part in shape.items())
    return isinstance(value, shape) and not (isinstance(value, bool) and shape in (int, float))


def completed(manifest: dict) -> list[str]:
    """The parts of a manifest that are not as they are written, sessions first completed by what they lack."""
    if fits(manifest.get("sessions"), [dict]):
        no_saves = {"count": 0, "blocking_seconds": 0.0, "longest_seconds": 0.0}
        manifest["sessions"] = [{**_NO_SESSION, "saves": dict(no_saves), **one} for one in manifest["sessions"]]
    return [name for name, shape in MANIFEST.items() if name in manifest and not fits(manifest[name], shape)]
