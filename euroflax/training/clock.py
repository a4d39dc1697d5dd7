"""Where the time of a session goes."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Wall-clock seconds by what they were spent on; each second counts once, for the innermost."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._doing, self._since = "other", time.perf_counter()

    @contextlib.contextmanager
    def on(self, doing: str) -> Iterator[None]:
        """Counts what passes inside for `doing`."""
        before = self._switch(doing)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, doing: str) -> str:
        now = time.perf_counter()
        before, self._doing = self._doing, doing
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._since = now
        return before

    def read(self) -> dict[str, float]:
        """Seconds so far by what they were spent on."""
        self._switch(self._doing)
        return {doing: round(seconds, 3) for doing, seconds in sorted(self._seconds.items())}
