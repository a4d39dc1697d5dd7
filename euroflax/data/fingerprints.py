"""Hashes of the text files of an experiment, so that what was made of them is found again and nothing is made twice."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Callable

from euroflax.data import documents
from euroflax.data.store import NotPrepared
from euroflax.experiment import Experiment, ExperimentError, Source, fingerprint
from euroflax.folders import Folders, replace_json

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
        record_path = folders.cache_dir / "fingerprints" / fingerprint([str(folders.data_root.resolve()), source.path])
        try:
            known = {row["file"]: row for row in json.loads(record_path.read_bytes())}
        except (OSError, ValueError):
            known = {}
        try:
            files = documents.find_files(source, folders.data_root)
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


def _digest_files(files: list[pathlib.Path], known: dict, source: Source, progress: Progress | None) -> list[dict]:
    def digest(file: pathlib.Path) -> dict:
        try:
            stat = file.stat()
            row = {"file": str(file), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            old = known.get(str(file))
            if old and row == {key: old[key] for key in row}:
                return old
            if progress is None:
                raise NotPrepared(f"source {source.name}")
            with open(file, "rb") as opened:
                return row | {"sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
        except OSError as error:
            raise ExperimentError(
                f"source {source.name}: file {file} cannot be read ({error.strerror}); check its permissions"
            ) from error

    total, done, rows = len(files), 0, []
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for row in pool.map(digest, files):
            done += 1
            rows.append(row)
            if total > 1 and progress is not None:
                progress(f"fingerprint {source.name}", done, total)
    return rows
