"""Hashes of the text files of an experiment, so that what was made of them is found again and nothing is made twice."""

import collections
import concurrent.futures
import hashlib
import os
import pathlib
import threading
from collections.abc import Callable

from euroflax.data.files import find_files
from euroflax.data.store import NotPrepared
from euroflax.experiment import Experiment, ExperimentError, Source, fingerprint
from euroflax.folders import Folders, parse_json, replace_json

_PART_BYTES = 1 << 24
_LOOK_SECONDS = 0.2

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all."""


def digests(experiment: Experiment, folders: Folders, progress: Progress | None) -> dict[str, list]:
    """For each source path the `[file, sha256]` of its files; a file is read only where it is new or has changed.

    Args:
        experiment: whose sources.
        folders: where their files are, and what is known of them.
        progress: told of files that are read; None reads none.

    Raises:
        NotPrepared: a file would have to be read, and none may be.
        ExperimentError: a source has no files, or one cannot be read.
    """
    found = {}
    sources = experiment.data.sources + experiment.evaluation.sources
    for source in {source.path: source for source in sources}.values():
        record_path = _record_path(folders, source)
        try:
            known = {row["file"]: row for row in parse_json(record_path.read_bytes())}
        except (OSError, ValueError):
            known = {}
        try:
            files = find_files(source, folders.data_root)
        except ExperimentError:
            if not known and progress is None:
                raise NotPrepared(f"source {source.name}")
            if not known:
                raise
            files = None  # prepared earlier, on a machine that had the text
        rows = list(known.values()) if files is None else _digest_files(files, known, source, progress)
        if rows != list(known.values()) and progress is not None:
            record_path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(record_path, rows)
        found[source.path] = [(row["file"], row["sha256"]) for row in rows]
    return found


def _record_path(folders: Folders, source: Source) -> pathlib.Path:
    return folders.cache_dir / "fingerprints" / fingerprint([str(folders.data_root.resolve()), source.path])


def forget(folders: Folders, source: Source) -> None:
    """Has the files of a source read again, since one was not as its hash says."""
    _record_path(folders, source).unlink(missing_ok=True)


def _digest_files(files: list[pathlib.Path], known: dict, source: Source, progress: Progress | None) -> list[dict]:
    """What is to be known of files, in their order; they are read in threads, until `progress` raises."""
    parts: collections.deque[None] = collections.deque()
    """One for each part that was read: a file that is read for long goes on, one that hangs does not."""
    ended = threading.Event()

    def digest(file: pathlib.Path) -> dict:
        try:
            stat = file.stat()
            row = {"file": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            old = known.get(str(file))
            if old and row == {key: old[key] for key in row}:
                return old
            if progress is None:
                raise NotPrepared(f"source {source.name}")
            return row | {"sha256": _digest(file, parts, ended)}
        except OSError as error:
            raise ExperimentError(
                f"source {source.name}: file {file} cannot be read ({error.strerror}); check its permissions"
            ) from error

    with concurrent.futures.ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(digest, file) for file in files]
        waiting = set(futures)
        try:
            while waiting:
                ready, waiting = concurrent.futures.wait(waiting, _LOOK_SECONDS, concurrent.futures.FIRST_EXCEPTION)
                for future in ready:
                    future.result()
                if parts and progress is not None:
                    parts.clear()
                    progress(f"fingerprint {source.name}", len(files) - len(waiting), len(files))
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _digest(file: pathlib.Path, parts: collections.deque[None], ended: threading.Event) -> str:
    """The hash of a file; adds to `parts` as it goes on, and stops where it has ended."""
    hashed = hashlib.sha256()
    with open(file, "rb") as opened:
        while not ended.is_set() and (part := opened.read(_PART_BYTES)):
            hashed.update(part)
            parts.append(None)
    return hashed.hexdigest()
