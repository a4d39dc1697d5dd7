"""The folder `checkpoints` of a run: which steps are in it, and which of them are as their manifest of hashes says.

Nothing here reads arrays. A step is thrown away by renaming it into the trash, so that a death in the middle of it
leaves nothing half there.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from euroflax.folders import parse_json
from euroflax.processes import from_first

TRASH = "trash"
HARMED = "harmed"
MANIFESTS = "manifests"
LAST_SAVE = "last_save.json"
"""In the run folder: the step of the latest checkpoint that was saved to its end."""


def listed_steps(path: pathlib.Path) -> list[int]:
    """Steps that have a folder, finished or not, in order."""
    return (
        sorted(int(entry.name) for entry in path.iterdir() if entry.name.isascii() and entry.name.isdecimal())
        if path.is_dir()
        else []
    )


def is_vouched(path: pathlib.Path, step: int) -> bool:
    """Whether a step has a manifest: it was whole once."""
    return manifest_of(path, step).is_file()


def manifest_of(path: pathlib.Path, step: int) -> pathlib.Path:
    """The manifest of a step: the hash of each of its files."""
    return path / MANIFESTS / f"{step}.json"


def latest_step(path: pathlib.Path) -> int | None:
    """The latest step with a manifest, without verifying it; None where there is none."""
    return max((step for step in listed_steps(path) if is_vouched(path, step)), default=None)


def latest_good(
    path: pathlib.Path, note: Callable[[str], None], position: int | None = None
) -> tuple[int | None, list[int]]:
    """Latest step whose files are as its manifest says, and those that were passed over because theirs are not.

    Args:
        path: the folder.
        note: told, in a sentence, of each step that is passed over.
        position: rows that it may have consumed at most; None for any number.
    """
    passed_over: list[int] = []
    for step in reversed(listed_steps(path)):
        if position is not None and (consumed := _position_of(path, step)) is not None and consumed > position:
            continue
        fault = verify(path, step)
        if fault is None:
            return step, passed_over
        note(f"checkpoint {step} is passed over: {fault}")
        passed_over.append(step)
    return None, passed_over


def of_first(step: int | None) -> int | None:
    """The step that process 0 says, in every process of the job."""
    said = int(from_first(np.array(-1 if step is None else step)))
    return None if said < 0 else said


def _position_of(path: pathlib.Path, step: int) -> int | None:
    try:
        return int(read_facts(path, step)["position"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_facts(path: pathlib.Path, step: int) -> dict:
    """What was saved beside the state."""
    return parse_json((path / str(step) / "facts" / "metadata").read_bytes())


def verify(path: pathlib.Path, step: int) -> str | None:
    """Why a step is not to be trusted; None where every file is as its manifest says."""
    try:
        expected = json.loads(manifest_of(path, step).read_bytes())
    except FileNotFoundError:
        return "its save was not finished"
    except ValueError:
        expected = None
    if not isinstance(expected, dict) or not expected:
        return "its manifest is harmed"
    found = hash_files(path / str(step))
    if missing := sorted(expected.keys() - found.keys()):
        return f"{len(missing)} of its files are missing, {missing[0]} among them"
    changed = sorted(name for name, digest in found.items() if expected.get(name) != digest)
    return f"{len(changed)} of its files have changed, {changed[0]} among them" if changed else None


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


def put_aside(path: pathlib.Path, step: int, folder: str) -> None:
    """Moves a step into the trash, or among the harmed ones."""
    _move(path, path / str(step), folder)


def _move(path: pathlib.Path, entry: pathlib.Path, folder: str) -> None:
    target = path / folder
    target.mkdir(exist_ok=True)
    entry.rename(target / f"{entry.name}-{os.urandom(4).hex()}")


def empty_trash(path: pathlib.Path) -> None:
    """Deletes the trash, what is unfinished, and manifests of steps that are gone; while no save is under way."""
    for entry in path.glob("*orbax-checkpoint-tmp*"):
        _move(path, entry, TRASH)
    shutil.rmtree(path / TRASH, ignore_errors=True)
    steps = {f"{step}.json" for step in listed_steps(path)}
    for manifest in (path / MANIFESTS).glob("*.json"):
        if manifest.name not in steps:
            manifest.unlink(missing_ok=True)
