"""Where things lie on disk, and how a file is replaced so that no reader ever sees half of it."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator

from euroflax.experiment import ExperimentError


def _default_cache() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("EUROFLAX_CACHE") or pathlib.Path(base) / "euroflax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders:
    """The three folders that a command works with; none of them is part of an experiment."""

    data_root: pathlib.Path = dataclasses.field(
        default_factory=lambda: pathlib.Path(os.environ.get("EUROFLAX_DATA") or ".")
    )
    """Where relative source paths start."""
    cache_dir: pathlib.Path = dataclasses.field(default_factory=_default_cache)
    """Token stores, tokenizers and compiled programs: content-addressed, shared by runs."""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Where run folders are made."""

    def run_dir(self, name: str) -> pathlib.Path:
        """The folder of the run of this name."""
        return self.runs_dir / name

    def find_run(self, name: str) -> pathlib.Path:
        """A run by its name, or by its folder wherever it is."""
        return self.run_dir(name) if self.run_dir(name).is_dir() else pathlib.Path(name)


def make_folder(path: pathlib.Path, option: str) -> pathlib.Path:
    """Makes a folder that can be written to.

    Raises:
        ExperimentError: it cannot be made or written to; `option` names what the user may change.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ExperimentError(f"{option}={path} cannot be written ({error.strerror}); name another folder") from error
    return path


def replace_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: into a neighbour, to the disk, then by rename."""
    data = content.encode() if isinstance(content, str) else content
    neighbour = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(neighbour, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        neighbour.replace(path)
    except OSError:
        neighbour.unlink(missing_ok=True)
        raise


def replace_json(path: pathlib.Path, value: object) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    replace_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def is_full(error: BaseException, *numbers: int) -> bool:
    """Whether a disk, or a user's share of it, is full. Libraries in C++ say so in words alone."""
    numbers = numbers or (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock that the kernel lets go when the process ends, however it ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
