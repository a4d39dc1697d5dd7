"""How much of a run's wall-clock went into steps that count, over all its sessions. No jax here.

Each line of the metrics carries what its session had done until then, so that a session that was killed is accounted
for up to its last line; what came behind the checkpoint from which the run went on is lost work.
"""

from collections.abc import Iterable, Mapping

KINDS = {
    "step": "steps that count, and waiting for the devices that compute them",
    "compile": "compiling steps",
    "data": "waiting for the loader",
    "save": "blocked by saves",
    "evaluate": "evaluations and samples",
    "restart": "from the start of the command to its first step, but for preparing",
    "prepare": "preparing or opening text",
    "lost": "steps and what went with them behind the checkpoint from which the run went on",
    "other": "writing the record, and all else",
}
_REDONE = ("step", "data", "save", "evaluate", "other")


def totals(sessions: Iterable[Mapping]) -> dict[str, float]:
    """Seconds of all sessions by what they were spent on."""
    spent = dict.fromkeys(KINDS, 0.0)
    for session in sessions:
        for kind, seconds in session.get("seconds", {}).items():
            spent[kind] = spent.get(kind, 0.0) + seconds
    return {kind: round(seconds, 3) for kind, seconds in spent.items()}


def goodput(sessions: Iterable[Mapping]) -> float | None:
    """The share of steps in the wall-clock of all sessions; None before there is any."""
    spent = totals(sessions)
    whole = sum(spent.values())
    return spent["step"] / whole if whole else None


def recover(sessions: dict[int, dict], lines: Iterable[Mapping]) -> None:
    """Brings sessions, by number, that did not end in good order up to what their last line of metrics says."""
    for number, told in _last(lines).items():
        if number in sessions and _whole(told) > _whole(sessions[number]):
            sessions[number] |= told


def lost(lines: Iterable[Mapping], step: int) -> dict[int, dict[str, float]]:
    """Seconds that the sessions spent behind a step, from which the run goes on, by session and what they were."""
    lines = list(lines)
    kept = _last(line for line in lines if line["step"] <= step)
    found = {}
    for number, told in _last(line for line in lines if line["step"] > step).items():
        after, before = told["seconds"], kept.get(number, {"seconds": {}})["seconds"]
        spent = {kind: round(after.get(kind, 0.0) - before.get(kind, 0.0), 3) for kind in _REDONE}
        found[number] = {kind: seconds for kind, seconds in spent.items() if seconds > 0}
    return found


def moved(seconds: Mapping[str, float], spent: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a session with those that were lost booked as such."""
    left = {kind: round(seconds.get(kind, 0.0) - part, 3) for kind, part in spent.items()}
    return {**seconds, **left, "lost": round(seconds.get("lost", 0.0) + sum(spent.values()), 3)}


def next_number(lines: Iterable[Mapping]) -> int:
    """The number of a session that begins behind these lines of metrics."""
    return max(_last(lines), default=-1) + 1


def _last(lines: Iterable[Mapping]) -> dict[int, dict]:
    """What each session had done at its last line, by its number."""
    found = {}
    for line in lines:
        told = line.get("session")
        if (
            isinstance(told, Mapping)
            and isinstance(told.get("number"), int)
            and isinstance(told.get("seconds"), Mapping)
        ):
            found[told["number"]] = {name: value for name, value in told.items() if name != "number"}
    return found


def _whole(session: Mapping) -> float:
    return sum(session.get("seconds", {}).values())
