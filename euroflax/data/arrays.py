"""Flat arrays in files, read by position and checked: chunks of values, each behind its CRC-32 (zlib's).

Nothing is mapped into memory, so a file that is cut short under a running job is an error and not a crash.
"""

import errno
import functools
import os
import pathlib
import resource
import weakref
import zlib

import numpy as np

from euroflax.experiment import ExperimentError, Interrupted

_CHUNK_BYTES = 8192


def _chunk(dtype: np.dtype) -> int:
    """Values in a chunk."""
    return _CHUNK_BYTES // dtype.itemsize


class FileArray:
    """A one-dimensional array in a file."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype | str, length: int) -> None:
        self.path, self._dtype, self._length = path, np.dtype(dtype), length
        self._chunk = _chunk(self._dtype)
        self._stride = self._chunk * self._dtype.itemsize + 4
        self.num_bytes = length * self._dtype.itemsize + 4 * -(-length // self._chunk)
        """Size of the file."""

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def _file(self) -> int:
        file = _open(self.path)
        weakref.finalize(self, os.close, file)
        return file

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values `start` to `stop`.

        Raises:
            ExperimentError: the file has vanished, was cut short or does not fit its checksums.
            Interrupted: the system cannot read it now.
        """
        assert 0 <= start <= stop <= self._length
        if start == stop:
            return np.zeros(0, self._dtype)
        first, last = start // self._chunk, (stop - 1) // self._chunk
        content = self._read_bytes(first * self._stride, min((last + 1) * self._stride, self.num_bytes))
        parts = []
        for at in range(0, len(content), self._stride):
            values = content[at + 4 : at + self._stride]
            if zlib.crc32(values) != int.from_bytes(content[at : at + 4], "little"):
                raise self._harmed(f"does not fit its checksum in chunk {first + at // self._stride}")
            parts.append(np.frombuffer(values, self._dtype))
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined[start - first * self._chunk : stop - first * self._chunk]

    def check_size(self) -> None:
        """Looks at the length of the file.

        Raises:
            ExperimentError: it is missing or has another length.
        """
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self.num_bytes:
            raise self._harmed(f"is {size} bytes long and not {self.num_bytes}")

    def _read_bytes(self, start: int, stop: int) -> memoryview:
        content = b""
        try:
            while start + len(content) < stop:  # one call gives at most 2 GB
                more = os.pread(self._file, stop - start - len(content), start + len(content))
                if not more:
                    raise self._harmed("was cut short")
                content = content + more if content else more
        except FileNotFoundError as error:
            raise self._harmed("has vanished") from error
        except OSError as error:
            fix = "raise the limit (ulimit -n)" if error.errno == errno.EMFILE else "see to the disk"
            raise Interrupted(
                f"{self.path} cannot be read ({error.strerror}); {fix} and run the same command"
            ) from error
        return memoryview(content)

    def _harmed(self, what: str) -> ExperimentError:
        return ExperimentError(f"{self.path} {what}; delete the folder {self.path.parent} and prepare again")


def _open(path: pathlib.Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise
    except OSError:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # hundreds of sources have two open files each
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return os.open(path, os.O_RDONLY)


class ArrayWriter:
    """Writes a `FileArray` from its beginning to its end."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype | str) -> None:
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")
        self._pending = np.zeros(0, self._dtype)
        self.length = 0

    def append(self, values: np.ndarray) -> None:
        """Adds values."""
        self.length += len(values)
        self._pending = np.concatenate([self._pending, values.astype(self._dtype)])
        self._write(len(self._pending) // _chunk(self._dtype) * _chunk(self._dtype))

    def _write(self, count: int) -> None:
        chunk = _chunk(self._dtype)
        for at in range(0, count, chunk):
            content = self._pending[at : min(at + chunk, count)].tobytes()
            self._file.write(zlib.crc32(content).to_bytes(4, "little") + content)
        self._pending = self._pending[count:]

    def close(self) -> None:
        """Writes what is left and closes the file."""
        if not self._file.closed:
            with self._file:
                self._write(len(self._pending))
