"""Where things lie on disk, and how a file is replaced so that no reader ever sees half of it."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from euroflax.experiment import ExperimentError, Interrupted, RunFailed


def _default_cache() -> pathlib.Path:
    if given := os.environ.get("EUROFLAX_CACHE"):
        return pathlib.Path(given)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise ExperimentError("there is no home folder for the cache; give --cache-dir or EUROFLAX_CACHE") from error
    return pathlib.Path(base) / "euroflax"


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

    def set_aside(self, name: str) -> pathlib.Path | None:
        """Renames the folder of a run, so that the run begins from scratch; None where there is none.

        Raises:
            ExperimentError: another process is using it.
        """
        folder = self.run_dir(name)
        if not folder.is_dir():
            return None
        with open_lock(folder / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ExperimentError(f"run folder={folder} is in use by another process; wait for it") from error
            return folder.rename(folder.with_name(f"{folder.name}.aside-{os.urandom(4).hex()}"))

    def find_run(self, name: str) -> pathlib.Path:
        """A run by its name, or by its folder wherever it is."""
        return self.run_dir(name) if self.run_dir(name).is_dir() else pathlib.Path(name)


def make_folder(path: pathlib.Path, option: str) -> pathlib.Path:
    """Makes a folder that can be written to.

    Raises:
        ExperimentError: it cannot be made or written to; `option` names what the user may change.
        Interrupted: its disk is full or for the time being mounted for reading only.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.urandom(8).hex()}"
        os.close(_create(probe))
        probe.unlink()
    except (OSError, ValueError) as error:
        if is_full(error, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise of_system(error) from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise ExperimentError(f"{option}={path} cannot be written ({reason}); name another folder") from error
    return path


def _create(path: pathlib.Path) -> int:
    """A new file, open for writing, with the rights that the umask leaves; never one that is there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def replace_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: into a neighbour, to the disk, then by rename."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    neighbour = path.with_name(f".{path.name[:200]}.{os.urandom(8).hex()}")  # of two hosts one may have the other's pid
    try:
        with open(_create(neighbour), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        neighbour.replace(path)
    except OSError:
        neighbour.unlink(missing_ok=True)
        raise


def parse_json(content: bytes) -> Any:
    """The value in a JSON text.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def replace_json(path: pathlib.Path, value: object) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    replace_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def is_full(error: BaseException, *numbers: int) -> bool:
    """Whether a disk, or a user's share of it, is full. Libraries in C++ say so in words alone."""
    numbers = numbers or (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def of_system(error: BaseException) -> Interrupted | RunFailed | ExperimentError:
    """What the system could not do, as an error with the path, the fix and the status that fits."""
    number = getattr(error, "errno", None)
    number = next((known for known in _ADVICE if is_full(error, known)), number)
    kind, fix = _ADVICE.get(number or 0, (RunFailed, "correct that and run the same command again"))
    path = getattr(error, "filename", None)
    reason = os.strerror(number) if number else " ".join(str(error).split())[:300]
    return kind(
        f"error: {path or 'the system'}: {reason}; {fix}".removeprefix("" if kind is Interrupted else "error: ")
    )


_ADVICE: dict[int, tuple[type[Interrupted | RunFailed | ExperimentError], str]] = {
    errno.ENOSPC: (Interrupted, "make room and run the same command again"),
    errno.EDQUOT: (Interrupted, "make room in your quota and run the same command again"),
    errno.EROFS: (Interrupted, "have it mounted for writing and run the same command again"),
    errno.EMFILE: (Interrupted, "raise the limit of open files (ulimit -n) and run the same command again"),
    errno.ENFILE: (Interrupted, "the machine has too many open files; run the same command again when it has fewer"),
    errno.EIO: (Interrupted, "see to the disk and run the same command again"),
    errno.ESTALE: (Interrupted, "see to the network file system and run the same command again"),
    errno.ENOLCK: (Interrupted, "see to the locks of the file system and run the same command again"),
    errno.ENOMEM: (RunFailed, "give the command more memory"),
    errno.EACCES: (RunFailed, "give yourself the right to it, or name another folder"),
    errno.EPERM: (RunFailed, "give yourself the right to it, or name another folder"),
    errno.ENAMETOOLONG: (ExperimentError, "use a shorter name or folder"),
    errno.ENOSYS: (RunFailed, "the file system cannot do that; name a folder on another"),
    errno.EOPNOTSUPP: (RunFailed, "the file system cannot do that; name a folder on another"),
}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LOOK_SECONDS = 0.2


def open_lock(path: pathlib.Path) -> IO:
    """A file to be locked: made where it is missing, never emptied, and never behind a symbolic link.

    Raises:
        RunFailed: a symbolic link stands in its place.
    """
    try:
        return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RunFailed(f"{path} is a symbolic link where a lock should be; remove it") from error
        raise


@contextlib.contextmanager
def locked(path: pathlib.Path, waits: Callable[[str], None]) -> Iterator[bool]:
    """Holds a lock that the kernel releases when the process ends; gives whether it is held.

    It is not on a file system without locks: what is made there has a name of its own until it is whole.

    Args:
        path: the file that is locked.
        waits: told several times a second what is waited for, while another process holds the lock.
    """
    with open_lock(path) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                waits(f"waiting for another process that holds {path}")
                time.sleep(_LOOK_SECONDS)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                held = False
                break
        yield held


@contextlib.contextmanager
def made_once(
    final: pathlib.Path, is_there: Callable[[], bool], waits: Callable[[str], None]
) -> Iterator[pathlib.Path | None]:
    """Gives a name for a folder that is to be made and takes its final name when it is whole; None where it is there.

    Args:
        final: its name.
        is_there: whether it is there and whole.
        waits: as that of `locked`.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with locked(final.with_suffix(".lock"), waits) as held:
        if is_there():
            yield None
            return
        if held:
            for stale in (final, *final.parent.glob(f"{final.name}*.partial")):
                shutil.rmtree(stale, ignore_errors=True)
        partial = final.with_name(f"{final.name}.{os.urandom(8).hex()}.partial")
        try:
            yield partial
            try:
                os.replace(partial, final)
            except OSError as error:  # without locks another process may have been faster
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_there():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
