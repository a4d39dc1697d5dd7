"""Saves in the background, and what is done where one fails."""

import time

import jax

from euroflax.checkpoint import SaveFailed
from euroflax.experiment import Interrupted, RunFailed
from euroflax.folders import is_full
from euroflax.processes import agree
from euroflax.training.job import Job

PAUSES = (5.0, 10.0, 20.0, 40.0)
"""Seconds before a save that failed is tried again, for the first time, the second, and so on."""
_BYTES_PER_SECOND = 100e6
"""Of a save, for as long as none has been measured."""


class Saver:
    """Saves the state of a run, tries again what failed, and measures what it takes."""

    def __init__(self, job: Job) -> None:
        self._job, self._failures, self._most = job, 0, len(PAUSES)
        self._again: float | None = None
        self._session = job.record.manifest["sessions"][-1]

    def has_failed(self) -> bool:
        """Whether a save failed and is to be tried again; several processes see it at their next one."""
        if jax.process_count() == 1 and not self._job.checkpoints.is_saving:
            self._collect()
        return self._again is not None

    def is_ready(self) -> bool:
        """Whether the pause behind a save that failed is over, in the same step for all processes."""
        return self._again is None or agree(time.monotonic() >= self._again)

    def save(self, step: int, state: object, facts: dict, *, last: bool, patient: bool = True) -> bool:
        """Begins to save, and returns whether it could; the last one is on disk when this returns.

        Args:
            step: completed steps.
            state: the state.
            facts: what JSON can hold.
            last: whether there will be no other one.
            patient: whether a last one that fails may be tried again for longer than the first pause.

        Raises:
            Interrupted: the disk is full and stays so.
            RunFailed: it cannot be written.
        """
        began = time.monotonic()
        with self._job.clock.on("save"):
            self._collect()
            self._again, self._most = None, len(PAUSES) if patient else min(self._failures + 1, len(PAUSES))
            while not (begun := self._attempt(step, state, facts, last)) and last:
                self._pause()
        saves = self._session["saves"]
        saves["count"] += begun
        saves["blocking_seconds"] = round(saves["blocking_seconds"] + time.monotonic() - began, 4)
        return begun

    def _pause(self) -> None:
        """Waits for the time of the next attempt; behind a wish to stop it is the last one."""
        until = time.monotonic() + PAUSES[self._failures - 1]
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            if self._job.stop.reason is not None and jax.process_count() == 1:
                self._most = min(self._most, self._failures)

    def _attempt(self, step: int, state: object, facts: dict, last: bool) -> bool:
        """Whether a save was begun, or with `last` is done."""
        try:
            self._job.checkpoints.save(step, state, facts, self._job.record.flush)
            if last:
                self._job.checkpoints.wait()
                self._done()
        except SaveFailed as error:
            self._failed(error)
            return False
        return True

    def finish(self) -> None:
        """Waits for the last save, which `save` has not waited for."""
        with self._job.clock.on("save"):
            self._collect()

    def _collect(self) -> None:
        """Takes the outcome of the save before, for which it waits."""
        if self._job.checkpoints.has_begun:
            try:
                self._job.checkpoints.wait()
                self._done()
            except SaveFailed as error:
                self._failed(error)

    def _done(self) -> None:
        self._failures, self._again = 0, None
        self._session["saves"]["longest_seconds"] = round(self._job.checkpoints.save_seconds, 4)

    def _failed(self, error: SaveFailed) -> None:
        if self._failures >= self._most:
            tried = self._failures + 1
            text = f"the checkpoint cannot be written ({error}), tried {tried} times; those before it are kept"
            if is_full(error):
                raise Interrupted(f"error: {text}; make room and run the same command again") from error
            raise RunFailed(f"{text}; fix that") from error
        pause = PAUSES[self._failures]
        self._failures, self._again = self._failures + 1, time.monotonic() + pause
        self._job.display.note(
            f"a checkpoint could not be written ({error}); those before it are kept; tried again in {pause:.0f} s"
        )

    def reserve_seconds(self, state: object) -> float:
        """What to keep for the last save: twice the longest one, and one more while one is being written."""
        longest = self._longest_seconds(state)
        return (3 if self._job.checkpoints.is_saving else 2) * longest

    def _longest_seconds(self, state: object) -> float:
        """How long a save takes, by the last two sessions that have saved, or by the size of the state."""
        sessions = self._job.record.manifest["sessions"]
        known = [session.get("saves", {}).get("longest_seconds", 0.0) for session in sessions]
        if measured := [seconds for seconds in known if seconds > 0]:
            return max(measured[-2:])
        held = (leaf.addressable_shards for leaf in jax.tree.leaves(state))
        return sum(shard.data.nbytes for shards in held for shard in shards) / _BYTES_PER_SECOND
