"""A wish to stop, from a signal, a time limit or a test, and where it takes effect."""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping

from euroflax.ending import ended_by_signals
from euroflax.experiment import ExperimentError, Interrupted

_SPARE_SECONDS = 5.0
_LIMIT = re.compile(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d)(?::([0-5]\d))?")


class Stop:
    """A wish to stop: noted when it comes, acted upon where the program asks.

    A signal handler that raised at once would do so in the middle of another library's code, which may swallow the
    exception or crash on it. Each question is also a sign of life, which the watchdog looks for.
    """

    def __init__(self) -> None:
        self.began = self.asked = time.monotonic()
        """Monotonic time of its making, and of the last question."""
        self.deadline: float | None = None
        """Monotonic time at which the command must have ended."""
        self.reserve_seconds = 0.0
        """How long before the deadline it is a wish to stop: what it takes to end in good order; half of it at most."""
        self.listens = False
        """Whether signals of this process are wishes to it."""
        self._reason: str | None = None

    def limit(self, seconds: float) -> None:
        """Sets the deadline, so many seconds after the start of the command."""
        self.deadline = self.began + seconds

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside it a signal ends the process at once: for where there is nothing to save and nothing to ask.

        Raises:
            Interrupted: there is a wish already.
        """
        with ended_by_signals() if self.listens else contextlib.nullcontext():
            self.check()  # here and not before: what comes between a check and the beginning would be forgotten
            yield

    @property
    def reason(self) -> str | None:
        """What wishes to stop; None where nothing does."""
        self.asked = time.monotonic()
        if self._reason is None and self.deadline is not None:
            reserve = min(self.reserve_seconds + _SPARE_SECONDS, (self.deadline - self.began) / 2)
            self._reason = "the time limit" if self.deadline - self.asked <= reserve else None
        return self._reason

    def request(self, reason: str) -> None:
        """Notes the wish; more of them change nothing."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Ends the command where there is a wish and nothing to save.

        Raises:
            Interrupted: there is a wish to stop.
        """
        if self.reason is not None:
            raise Interrupted(f"stopped by {self.reason}; the same command goes on")


def time_limit(text: str) -> int:
    """Seconds of a time limit as hours and minutes.

    >>> time_limit("23:50"), time_limit("1-00:00"), time_limit("0:00:30")
    (85800, 86400, 30)

    Raises:
        ExperimentError: it is none.
    """
    found = _LIMIT.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((24 * days + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ExperimentError(
            f"--time-limit={text} is no time; write HOURS:MINUTES, 23:50 say, or DAYS-HOURS:MINUTES, or add :SECONDS"
        )
    return total


def slurm_limit(environment: Mapping[str, str], now: float) -> float | None:
    """Seconds until Slurm ends the job; None where it does not say.

    Args:
        environment: the variables of this process.
        now: the time since the epoch.
    """
    end = environment.get("SLURM_JOB_END_TIME", "")
    return int(end) - now if end.isdecimal() else None
