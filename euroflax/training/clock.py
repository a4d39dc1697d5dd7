"""Where the time of a session goes."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class Clock:
    """Wall-clock seconds by what they were spent on; each second counts once, for the innermost."""

    def __init__(self, began: float | None = None) -> None:
        """Begins with `restart`.

        Args:
            began: monotonic time from which it counts; by default now.
        """
        self._seconds: dict[str, float] = {}
        self._doing, self._since = "restart", time.monotonic() if began is None else began

    @contextlib.contextmanager
    def on(self, doing: str) -> Iterator[None]:
        """Counts what passes inside for `doing`."""
        before = self.turn(doing)
        try:
            yield
        finally:
            self.turn(before)

    def turn(self, doing: str) -> str:
        """Counts what passes from here on for `doing`; returns what came before."""
        now = time.monotonic()
        before, self._doing = self._doing, doing
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._since = now
        return before

    def lose(self, seconds: Mapping[str, float]) -> None:
        """What so many seconds were spent on is lost."""
        for doing, lost in seconds.items():
            self._seconds[doing] = self._seconds.get(doing, 0.0) - lost
        self._seconds["lost"] = self._seconds.get("lost", 0.0) + sum(seconds.values())

    def read(self) -> dict[str, float]:
        """Seconds so far by what they were spent on."""
        self.turn(self._doing)
        return {doing: round(seconds, 3) for doing, seconds in sorted(self._seconds.items())}
