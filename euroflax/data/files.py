"""Which files a source has, and what its folder holds besides."""

import collections
import importlib.resources
import os
import pathlib
import stat

from euroflax.experiment import ExperimentError, Source

ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
_SHOWN = 3


def find_files(source: Source, data_root: pathlib.Path) -> list[pathlib.Path]:
    """The files of a source, in the order in which they are read: sorted by path.

    Raises:
        ExperimentError: there are none, or one of them has an ending that is not read.
    """
    path = _location(source, data_root)
    where = f"source {source.name}: path={source.path}"
    try:
        found, other = _look(path)
    except (ValueError, OSError, NotImplementedError) as error:  # such as a NUL in the path, or `**x`
        reason = error.strerror if isinstance(error, OSError) else error
        raise ExperimentError(f"{where} cannot be looked up ({reason}); give a path that the file system allows")
    if not found and other:
        raise ExperimentError(f"{where} names no file that is read, but {_listed(other)}; give {', '.join(ENDINGS)}")
    if not found:
        raise ExperimentError(f"{where} names no file at {path.absolute()}; correct the path or --data-root")
    if not path.is_dir() and other:
        raise ExperimentError(f"{where} names {other[0].name}, which is not read; give {', '.join(ENDINGS)}")
    return found


def not_read(source: Source, data_root: pathlib.Path) -> str | None:
    """What a source's folder holds and is not read, in a line; None where there is nothing."""
    path = _location(source, data_root)
    other = _look(path)[1] if path.is_dir() else []
    return f"not read    source {source.name}: {_listed(other)} in {path}" if other else None


def _listed(files: list[pathlib.Path]) -> str:
    kinds = collections.Counter(_kind(file) for file in files)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    names = ", ".join(file.name for file in files[:_SHOWN]) + (", ..." if len(files) > _SHOWN else "")
    return f"{counts} ({names})"


def _kind(file: pathlib.Path) -> str:
    if not _is_regular(file):
        return "not regular files"
    if file.name.lower().endswith(ENDINGS):
        return "hidden"
    return f"{file.suffix or 'without an ending'}"


def _location(source: Source, data_root: pathlib.Path) -> pathlib.Path:
    if source.path.startswith("sample:"):
        return pathlib.Path(str(importlib.resources.files("euroflax") / "sample")) / source.path.removeprefix("sample:")
    return data_root / source.path


def _look(path: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Files that are read, and others, sorted by path. What exists is that file or folder, and never a pattern."""
    if path.is_dir():
        files = _below(path)
    elif path.exists() or not any(mark in str(path) for mark in "*?["):
        files = [path] if path.exists() else []
    else:
        base = pathlib.Path(path.anchor or ".")
        files = [file for file in base.glob(str(path.relative_to(path.anchor))) if not file.is_dir()]
    top = path if path.is_dir() else None
    read = [file for file in files if _is_read(file, top)]
    return sorted(read), sorted(set(files) - set(read))


def _is_read(file: pathlib.Path, folder: pathlib.Path | None) -> bool:
    """Whether a file is read: of a folder those that are not hidden."""
    hidden = folder is not None and any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.name.lower().endswith(ENDINGS) and _is_regular(file)


def _is_regular(file: pathlib.Path) -> bool:
    """Whether a file can be read to an end: a FIFO or device cannot."""
    return stat.S_ISREG(file.stat().st_mode) if file.exists() else True


def _below(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, through links to folders too, each folder once."""
    files: list[pathlib.Path] = []
    seen: set[tuple[int, int]] = set()
    for name, folders, names in os.walk(folder, followlinks=True):
        known = os.stat(name)
        if (known.st_dev, known.st_ino) in seen:
            folders.clear()
            continue
        seen.add((known.st_dev, known.st_ino))
        folders.sort()
        files += [pathlib.Path(name) / file for file in names]
    return files
