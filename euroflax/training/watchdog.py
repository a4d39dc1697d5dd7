"""Ends a command that hangs, or that has not ended by its time limit."""

import faulthandler
import sys
import threading
import time

from euroflax.ending import end_at_once, say
from euroflax.experiment import Interrupted
from euroflax.training.stop import Stop


class Watchdog:
    """A thread that looks for signs of life: each step and each part of a task asks whether to stop."""

    def __init__(self, stop: Stop, hang_seconds: float) -> None:
        """Begins to watch.

        Args:
            stop: what is asked.
            hang_seconds: without a question for so long the command hangs; 0 never.
        """
        self._stop, self._hang_seconds = stop, hang_seconds
        stop.asked = time.monotonic()
        self._closing = threading.Event()
        if hang_seconds or stop.deadline is not None:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def _until(self, period: float) -> float:
        """Seconds to the next look: not beyond the deadline."""
        deadline = self._stop.deadline
        return period if deadline is None else min(period, max(deadline - time.monotonic(), 0.01))

    def _watch(self) -> None:
        period = min(1.0, (self._hang_seconds or 10.0) / 10)
        looked = time.monotonic()
        while not self._closing.wait(self._until(period)):
            now, deadline = time.monotonic(), self._stop.deadline
            self._stop.asked += max(now - looked - 2 * period, 0.0)  # this thread stood too: the process was suspended
            looked = now
            idle = now - self._stop.asked
            if deadline is not None and now >= deadline:
                end_at_once(
                    "the time limit came before the command could end in good order; the same command goes on from the "
                    "last checkpoint",
                    Interrupted.exit_status,
                )
            if 0 < self._hang_seconds <= idle:
                say(f"\nwhat each thread of this process does, innermost first, after {idle:.0f} s:")
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                end_at_once(
                    f"error: nothing has moved for {idle:.0f} s (--hang-minutes), the stacks are above; the same "
                    "command goes on from the last checkpoint",
                    Interrupted.exit_status,
                )

    def close(self) -> None:
        """Watches no more."""
        self._closing.set()
