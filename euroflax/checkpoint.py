"""Checkpoints: saved by Orbax in the background, and trusted only behind a manifest of hashes of our own.

Orbax commits a step by renaming its folder; then we hash every file in it and write `manifests/STEP.json`, by rename
as well. A step without a manifest, or whose files do not fit theirs, is no checkpoint: the one before is. A step is
deleted by renaming it into the trash, so that a death in the middle of a deletion leaves nothing half there.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from euroflax import experiment
from euroflax.experiment import Interrupted
from euroflax.folders import is_full, replace_json
from euroflax.processes import gather_json
from euroflax.sharding import letters_of, name_of

T = TypeVar("T")


class SaveFailed(Exception):
    """A checkpoint could not be written; those before it are as they were."""


_TRASH = "trash"
_HARMED = "harmed"
_MANIFESTS = "manifests"


class Checkpoints:
    """The checkpoints of one run, for all processes of the job; process 0 keeps the manifests."""

    def __init__(self, path: pathlib.Path, declared: experiment.Checkpoint, note: Callable[[str], None]) -> None:
        """Opens the folder, empties its trash and puts aside what no manifest vouches for.

        Args:
            path: the folder `checkpoints` of a run.
            declared: what to keep.
            note: told, in a sentence, of each checkpoint that is passed over.
        """
        self._path, self._note = path.resolve(), note
        self._finishing: concurrent.futures.Future | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        _quiet()
        self.latest = _agreed(self._clean() if jax.process_index() == 0 else None)
        self.latest_saved = self.latest
        """Step of the latest save, which may not be finished."""
        self.save_seconds = 0.0
        """How long the longest save took, to its end."""
        self._declared = declared
        self._manager = self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        policies = checkpoint_managers.preservation_policy
        keep: list = [policies.LatestN(max(self._declared.keep_last, 2))]  # the last is unproven until it is hashed
        if self._declared.keep_every_steps is not None:
            keep.append(policies.EveryNSteps(self._declared.keep_every_steps))
        return ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                should_save_fn=lambda step, latest: True,
                todelete_subdir=_TRASH,
            ),
        )

    def _clean(self) -> int | None:
        """Latest step whose files are as its manifest says.

        Later and unfinished ones go to the trash; those that were whole once are put aside and never deleted.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        (self._path / _MANIFESTS).mkdir(exist_ok=True)
        latest = _latest_good(self._path, self._note)
        for entry in self._path.iterdir():
            if entry.name.isdigit() and (latest is None or int(entry.name) > latest):
                was_whole = (self._path / _MANIFESTS / f"{entry.name}.json").is_file()
                _put_aside(self._path, entry, _HARMED if was_whole else _TRASH)
        self._empty_trash()
        return latest

    def _empty_trash(self) -> None:
        """Throws away what is unfinished, too: no save is under way here."""
        for entry in self._path.glob("*orbax-checkpoint-tmp*"):
            _put_aside(self._path, entry, _TRASH)
        shutil.rmtree(self._path / _TRASH, ignore_errors=True)
        steps = set(listed_steps(self._path))
        for manifest in (self._path / _MANIFESTS).glob("*.json"):
            if int(manifest.stem) not in steps:
                manifest.unlink(missing_ok=True)

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
            replace_json(self._path / _MANIFESTS / f"{step}.json", hash_files(self._path / str(step)))
            self._empty_trash()
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
            self._reopen(lambda step: not (self._path / _MANIFESTS / f"{step}.json").is_file())
            raise SaveFailed(reason) from fault

    def go_back(self, position: int) -> bool:
        """Throws away the checkpoints that have consumed more rows than `position`; returns whether one is left."""
        with contextlib.suppress(SaveFailed):
            self.wait()
        self._reopen(lambda step: _read_facts(self._path, step)["position"] > position)
        self.latest = self.latest_saved = _agreed(
            _latest_good(self._path, self._note) if jax.process_index() == 0 else None
        )
        return self.latest is not None

    def _reopen(self, unwanted: Callable[[int], bool]) -> None:
        """Throws away unwanted steps, and what is unfinished, behind Orbax's back."""
        self._close_manager()
        if jax.process_index() == 0:
            for step in filter(unwanted, listed_steps(self._path)):
                _put_aside(self._path, self._path / str(step), _TRASH)
            self._empty_trash()
        _agreed(0)
        self._manager = self._open_manager()

    def restore(self, abstract_state: T, check: Callable[[dict], None]) -> T:
        """The state of the latest checkpoint, onto the shardings of `abstract_state`, whatever mesh saved it.

        Args:
            abstract_state: shapes, types and shardings to restore.
            check: given the facts before any array is read; raises where the checkpoint is not wanted.
        """
        assert self.latest is not None
        check(_read_facts(self._path, self.latest))
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(self.latest, args=wanted)["state"]

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
class SavedParams:
    """The parameters of a checkpoint, read piece by piece: memory holds no more than what is asked for."""

    path: pathlib.Path
    """The folder `checkpoints` of a run, which a running job may own; nothing in it is changed."""
    step: int
    facts: dict
    """What was saved beside the state: experiment, mixture, tokenizer, position."""

    def read(self, name: str, index: tuple[slice | int, ...] | None = None) -> np.ndarray:
        """A piece of a parameter, as it was saved: `read("layers/mlp/gate_DF", (3,))` is that of layer 3.

        Raises:
            Interrupted: a run that goes on has deleted the checkpoint meanwhile.
        """
        try:
            return self._read(name, index)
        except (ValueError, OSError) as error:
            raise Interrupted(
                f"checkpoint {self.step} went away or was changed while it was read; the same command reads the latest"
            ) from error

    def _read(self, name: str, index: tuple[slice | int, ...] | None) -> np.ndarray:
        if name not in self._opened:
            base = f"file://{(self.path / str(self.step) / 'state').resolve()}/"
            kvstore = {"driver": "ocdbt", "base": base, "path": f"params.{name.replace('/', '.')}/"}
            spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
            self._opened[name] = ts.open(spec, open=True, read=True).result()
        return self._opened[name][index or ()].read().result()

    @functools.cached_property
    def _opened(self) -> dict[str, ts.TensorStore]:
        return {}

    def place(self, abstract_params: T) -> T:
        """All parameters, onto the shardings of `abstract_params`, whatever mesh saved them."""

        def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = name_of(path)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: self.read(name, index))

        return jax.tree_util.tree_map_with_path(place, abstract_params)


def open_latest(path: pathlib.Path, check: Callable[[dict], None], note: Callable[[str], None]) -> SavedParams | None:
    """The parameters of the latest checkpoint that is whole; None where there is none.

    Args:
        path: the folder `checkpoints` of a run.
        check: given the facts of the checkpoint; raises where it is not wanted.
        note: told, in a sentence, of each checkpoint that is passed over.
    """
    latest = _agreed(_latest_good(path, note) if jax.process_index() == 0 else None)
    if latest is None:
        return None
    facts = _read_facts(path, latest)
    check(facts)
    return SavedParams(path, latest, facts)


def _reason(error: BaseException) -> str:
    """What is behind an error, in a line."""
    said = next((os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT) if is_full(error, number)), str(error))
    return said.strip().partition("\n")[0][:200] or type(error).__name__


def _read_facts(path: pathlib.Path, step: int) -> dict:
    return json.loads((path / str(step) / "facts" / "metadata").read_bytes())


def _chunks(path: tuple, leaf: jax.Array) -> ocp.SaveArgs:
    """Stacked parameters are stored a layer a chunk, so that one layer can be read without the others."""
    if not letters_of(path).startswith("N"):
        return ocp.SaveArgs()
    shard_bytes = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return ocp.SaveArgs(chunk_byte_size=shard_bytes // leaf.shape[0], shard_axes=(0,))


def _quiet() -> None:
    """Keeps Orbax's log off the user's terminal: what fails is raised, and said by us."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _latest_good(path: pathlib.Path, note: Callable[[str], None]) -> int | None:
    """Latest step whose files are as its manifest says."""
    for step in sorted(listed_steps(path), reverse=True):
        fault = verify(path, step)
        if fault is None:
            return step
        note(f"checkpoint {step} is passed over: {fault}")
    return None


def _agreed(step: int | None) -> int | None:
    """Process 0's answer, in every process."""
    if jax.process_count() == 1:
        return step
    value = int(multihost_utils.broadcast_one_to_all(-1 if step is None else step))
    return None if value < 0 else value


def listed_steps(path: pathlib.Path) -> list[int]:
    """Steps that have a folder, finished or not."""
    return [int(entry.name) for entry in path.iterdir() if entry.name.isdigit()] if path.is_dir() else []


def _put_aside(path: pathlib.Path, entry: pathlib.Path, folder: str) -> None:
    target = path / folder
    target.mkdir(exist_ok=True)
    entry.rename(target / f"{entry.name}-{os.urandom(4).hex()}")


def hash_files(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def digest(file: pathlib.Path) -> str:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        return {
            str(file.relative_to(folder)): found for file, found in zip(files, pool.map(digest, files), strict=True)
        }


def verify(path: pathlib.Path, step: int) -> str | None:
    """Why a step is not to be trusted; None where every file is as its manifest says."""
    try:
        expected = json.loads((path / _MANIFESTS / f"{step}.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return "its save was not finished"
    found = hash_files(path / str(step))
    if missing := sorted(expected.keys() - found.keys()):
        return f"{len(missing)} of its files are missing, {missing[0]} among them"
    changed = sorted(name for name, digest in found.items() if expected.get(name) != digest)
    if changed or not expected:
        return f"{len(changed)} of its files have changed, {changed[0]} among them" if changed else "it is empty"
    return None


def latest_step(path: pathlib.Path) -> int | None:
    """The latest step with a manifest, without verifying it; None where there is none."""
    steps = [step for step in listed_steps(path) if (path / _MANIFESTS / f"{step}.json").is_file()]
    return max(steps, default=None)
