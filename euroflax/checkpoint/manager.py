"""The checkpoints of a run that goes on: saved by Orbax in the background, trusted only behind hashes of our own."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from euroflax import experiment
from euroflax.checkpoint.folder import (
    HARMED,
    LAST_SAVE,
    MANIFESTS,
    TRASH,
    empty_trash,
    hash_files,
    is_vouched,
    latest_good,
    latest_step,
    listed_steps,
    manifest_of,
    of_first,
    put_aside,
    read_facts,
)
from euroflax.checkpoint.params import check_readable
from euroflax.experiment import ExperimentError
from euroflax.folders import is_full, parse_json, replace_json
from euroflax.processes import gather_json
from euroflax.sharding import letters_of

T = TypeVar("T")


class SaveFailed(Exception):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints of one run, for all processes of the job; process 0 keeps the manifests."""

    def __init__(
        self,
        path: pathlib.Path,
        declared: experiment.Checkpoint,
        note: Callable[[str], None],
        return_steps: int | None = None,
    ) -> None:
        """Opens the folder, empties its trash and puts aside what no manifest vouches for.

        Args:
            path: the folder `checkpoints` of a run.
            declared: what to keep.
            note: told, in a sentence, of each checkpoint that is passed over.
            return_steps: how many steps the run may want to go back; a checkpoint from before them is kept too.
        """
        self._path, self._note, self._return_steps = path.resolve(), note, return_steps
        self._finishing: concurrent.futures.Future | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        _quiet()
        self.latest = of_first(self._clean() if jax.process_index() == 0 else None)
        self.latest_saved = self.latest
        """Step of the latest save, which may not be finished."""
        self.save_seconds = 0.0
        """How long the longest save took, to its end."""
        self._declared = declared
        self._manager = self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        keep_last = max(self._declared.keep_last, 2)  # the last is unproven until it is hashed
        keep: list = [checkpoint_managers.LatestN(keep_last)]
        if self._declared.keep_every_steps is not None:
            keep.append(checkpoint_managers.EveryNSteps(self._declared.keep_every_steps))
        if self._return_steps is not None:
            keep.append(_Behind(self._return_steps))
        return ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                should_save_fn=lambda step, latest: True,
                todelete_subdir=TRASH,
            ),
        )

    def _clean(self) -> int | None:
        """Latest step whose files are as its manifest says; later ones are put aside and never deleted.

        A save that dies leaves one step without a manifest at most; where there are several, they have lost theirs.

        Raises:
            ExperimentError: there were checkpoints, and none of them is whole.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        (self._path / MANIFESTS).mkdir(exist_ok=True)
        latest, _ = latest_good(self._path, self._note)
        later = [step for step in listed_steps(self._path) if latest is None or step > latest]
        bare = [step for step in later if not is_vouched(self._path, step)]
        lost = [step for step in later if step not in bare or len(bare) > 1]
        fix = "restore one, begin from scratch with --from-scratch, or give the run another name"
        if latest is None and lost:
            raise ExperimentError(
                f"run folder={self._path.parent}: none of its checkpoints ({', '.join(map(str, lost))}) is whole; {fix}"
            )
        if latest is None and self._saved_before():
            raise ExperimentError(f"run folder={self._path.parent}: its checkpoints are gone; {fix}")
        for step in later:
            put_aside(self._path, step, HARMED)
        empty_trash(self._path)
        return latest

    def _saved_before(self) -> bool:
        """Whether the record of the run says that a checkpoint was saved to its end."""
        if (self._path.parent / LAST_SAVE).exists():
            return True
        try:  # of earlier versions
            sessions = parse_json((self._path.parent / "manifest.json").read_bytes())["sessions"]
            return any(session["saves"]["longest_seconds"] > 0 for session in sessions)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def save(self, step: int, state: object, facts: dict, first: Callable[[], None] = lambda: None) -> None:
        """Begins to save; returns when the state may be changed, while files are still being written.

        Args:
            step: completed steps.
            state: a tree of arrays, sharded as they are.
            facts: what JSON can hold.
            first: done before; where it fails in any process, nothing is saved.

        Raises:
            SaveFailed: this save, or the one before, could not be written.
        """
        self.wait()
        self._all_did(first)
        began = time.monotonic()
        chunks = jax.tree_util.tree_map_with_path(_chunks, state)
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state, chunks), facts=ocp.args.JsonSave(facts))
        self._all_did(lambda: self._manager.save(step, args=arguments, force=True))
        self._finishing, self.latest_saved = self._pool.submit(self._finish, step, began), step

    def _finish(self, step: int, began: float) -> None:
        """Waits for Orbax to commit a step, then vouches for it. Orbax's own callback comes before its commit."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            check_readable(self._path, step)
            replace_json(manifest_of(self._path, step), hash_files(self._path / str(step)))
            replace_json(self._path.parent / LAST_SAVE, {"step": step})
            empty_trash(self._path)
        self.save_seconds = max(self.save_seconds, time.monotonic() - began)

    @property
    def has_begun(self) -> bool:
        """Whether there is a save that nobody has waited for."""
        return self._finishing is not None

    @property
    def is_saving(self) -> bool:
        """Whether a save is still being written."""
        return self._finishing is not None and not self._finishing.done()

    def wait(self) -> None:
        """Returns when the last save is on disk with its manifest.

        Raises:
            SaveFailed: it could not be written.
        """
        if self._finishing is None:
            return
        finishing, self._finishing = self._finishing, None
        self._all_did(finishing.result)

    def _all_did(self, work: Callable[[], object]) -> None:
        """Does work that every process of the job does; where one of them fails, clears away what a save has left.

        Raises:
            SaveFailed: in every process.
        """
        fault = None
        try:
            work()
        except Exception as error:
            fault = error
        reasons = gather_json(None if fault is None else _reason(fault))
        if reason := next((found for found in reasons if found is not None), None):
            self._reopen(lambda step: not is_vouched(self._path, step))
            self.latest_saved = latest_step(self._path)
            raise SaveFailed(reason) from fault

    def go_back(self, position: int) -> bool:
        """Goes back to the latest good step that has consumed `position` rows at most, and throws later ones away.

        Behind `settle`.

        Returns whether there is one; where there is none, all stay as they are.
        """
        found, harmed = latest_good(self._path, self._note, position) if jax.process_index() == 0 else (None, [])
        before = of_first(found)
        if before is not None:
            self._reopen(lambda step: step > before, harmed)
            self.latest = self.latest_saved = before
        return before is not None

    def _reopen(self, unwanted: Callable[[int], bool], harmed: Collection[int] = ()) -> None:
        """Throws away unwanted steps, and what is unfinished, behind Orbax's back; harmed ones are put aside."""
        self._close_manager()
        if jax.process_index() == 0:
            for step in filter(unwanted, listed_steps(self._path)):
                put_aside(self._path, step, HARMED if step in harmed and is_vouched(self._path, step) else TRASH)
            empty_trash(self._path)
        of_first(0)
        self._manager = self._open_manager()

    def settle(self) -> str:
        """Which checkpoint is kept, in words, once there is no save that nobody has waited for.

        Every process of the job must ask, and before one of them may end.
        """
        with contextlib.suppress(SaveFailed):
            self.wait()
        return "there is no checkpoint yet" if self.latest_saved is None else f"checkpoint {self.latest_saved} is kept"

    def restore(self, abstract_state: T, check: Callable[[dict], None]) -> T:
        """The state of the latest checkpoint, onto the shardings of `abstract_state`, whatever mesh saved it.

        Args:
            abstract_state: shapes, types and shardings to restore.
            check: given the facts before any array is read; raises where the checkpoint is not wanted.
        """
        assert self.latest is not None
        check(read_facts(self._path, self.latest))
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(self.latest, args=wanted)["state"]

    @property
    def latest_facts(self) -> dict | None:
        """What was saved beside the state of the latest checkpoint; None where there is none."""
        return None if self.latest is None else read_facts(self._path, self.latest)

    def close(self) -> None:
        """Waits for the last save and lets go of Orbax's threads."""
        self._pool.shutdown()
        if self._finishing is not None and (error := self._finishing.exception()) is not None:
            self._note(f"the last checkpoint could not be written: {_reason(error)}")
        self._close_manager()

    def _close_manager(self) -> None:
        with contextlib.suppress(Exception):  # of the save that failed, once more
            self._manager.close()


@dataclasses.dataclass(frozen=True)
class _Behind(checkpoint_managers.PreservationPolicy):
    """Keeps a checkpoint so many steps behind the last but one, for the last is unproven, or else the first of all.

    And the one after it, which takes its place in time: so it is twice as many steps behind at most, and one save.
    """

    steps: int

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        """Whether to keep each of the checkpoints, which are in the order of their steps."""
        numbers = [checkpoint.step for checkpoint in checkpoints]
        behind = [number for number in numbers if number <= numbers[-2:][0] - self.steps]
        first = max(len(behind) - 1, 0)
        return [first <= i <= first + 1 for i in range(len(numbers))]


def _reason(error: BaseException) -> str:
    """What is behind an error, in a line."""
    said = next((os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT) if is_full(error, number)), str(error))
    return said.strip().partition("\n")[0][:200] or type(error).__name__


def _chunks(path: tuple, leaf: jax.Array) -> ocp.SaveArgs:
    """Stacked parameters are stored a layer a chunk, so that one layer can be read without the others."""
    if not letters_of(path).startswith("N"):
        return ocp.SaveArgs()
    shard_bytes = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return ocp.SaveArgs(chunk_byte_size=shard_bytes // leaf.shape[0], shard_axes=(0,))


@functools.cache
def _quiet() -> None:
    """Keeps logs of a save off the user's terminal: what fails is raised, and said by us.

    Where a save fails, TensorStore's threads complain that Orbax's event loop no longer listens to them.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(what: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    sys.unraisablehook = hook
