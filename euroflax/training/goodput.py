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


def recover(sessions: list[dict], lines: Iterable[Mapping]) -> None:
    """Brings sessions that did not end in good order up to what their last line of metrics says."""
    for number, line in _last(lines).items():
        told = {name: value for name, value in line["session"].items() if name != "number"}
        if number < len(sessions) and _whole(told) > _whole(sessions[number]):
            sessions[number] |= told


def lost(lines: Iterable[Mapping], step: int) -> dict[int, dict[str, float]]:
    """Seconds that the sessions spent behind a step, from which the run goes on, by session and what they were."""
    told = [line for line in lines if "session" in line]
    kept = _last(line for line in told if line["step"] <= step)
    found = {}
    for number, line in _last(line for line in told if line["step"] > step).items():
        after = line["session"]["seconds"]
        before = kept[number]["session"]["seconds"] if number in kept else {}
        spent = {kind: round(after.get(kind, 0.0) - before.get(kind, 0.0), 3) for kind in _REDONE}
        found[number] = {kind: seconds for kind, seconds in spent.items() if seconds > 0}
    return found


def _last(lines: Iterable[Mapping]) -> dict[int, Mapping]:
    return {line["session"]["number"]: line for line in lines if "session" in line}


def _whole(session: Mapping) -> float:
    return sum(session.get("seconds", {}).values())
