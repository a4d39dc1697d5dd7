"""Documents out of files: their lines, and the text, id and provenance in each line."""

import codecs
import collections
import dataclasses
import errno
import functools
import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from euroflax.experiment import ExperimentError, Source

_BATCH_BYTES = 1 << 20
_BATCH_LINES = 1024
_SHOWN_BYTES = 1000
_UTF16 = "UTF-16 and not UTF-8"


Update = Callable[[bytes | memoryview], object]
"""Such as the `update` of a hash."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with what is known of it."""

    id: str
    text: str
    provider: str | None = None
    licence: str | None = None


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that holds no document, with the reason, one of a few words so that it can be counted."""

    file: str
    line: int
    reason: str
    content: str


@dataclasses.dataclass(frozen=True)
class RawBatch:
    """Some lines of one file, still unread: what is handed to a worker process."""

    file: str
    first_line: int
    lines: list[bytes] | pa.RecordBatch
    bytes_read: int
    """How far into the file, as it lies on disk, reading has come."""
    too_long: frozenset[int] = frozenset()
    """Which of the lines are longer than they may be; of them only the beginning is there."""


def read_raw(
    file: pathlib.Path, source: Source, most_bytes: int, update: Update = lambda part: None
) -> Iterator[RawBatch]:
    """The lines (or rows) of a file in batches of about 1 MB, in order, in memory that does not grow with the file.

    Args:
        file: the file.
        source: whose it is.
        most_bytes: a longer line is passed over and only its beginning is given.
        update: given all bytes of the file, as they lie on disk; those of a parquet file after its rows.

    Raises:
        ExperimentError: the file cannot be read to its end, for example since it was cut short.
        OSError: the system cannot read it.
    """
    try:
        if file.suffix.lower() == ".parquet":
            yield from _read_parquet(file, source)
            with open(file, "rb") as opened:
                while part := opened.read(_BATCH_BYTES):
                    update(part)
        else:
            yield from _read_lines(file, most_bytes, update)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno != errno.EIO:
            raise
        fix = "copy or download it again"
        if "too much memory" in str(error):
            fix = "it was compressed with a long window (zstd --long): compress it again without"
        raise ExperimentError(
            f"source {source.name}: file {file} cannot be read to its end ({error}); {fix}"
        ) from error


class _Watched(io.RawIOBase):
    """A file whose bytes are given to a function as they are read."""

    def __init__(self, raw: io.FileIO, update: Update) -> None:
        self._raw, self._update = raw, update

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fills a buffer and returns the number of bytes."""
        count = self._raw.readinto(buffer) or 0
        self._update(memoryview(buffer)[:count])
        return count


def _read_lines(file: pathlib.Path, most_bytes: int, update: Update) -> Iterator[RawBatch]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())
    with open(file, "rb", buffering=0) as raw:
        plain = _Watched(raw, update)
        stream = plain if compression is None else pa.CompressedInputStream(plain, compression)
        with io.BufferedReader(cast(io.RawIOBase, stream), _BATCH_BYTES) as reader:
            lines: list[bytes] = []
            too_long: set[int] = set()
            first, size = 1, 0
            while line := reader.readline(most_bytes + 1):
                if len(line) > most_bytes and not line.endswith(b"\n"):
                    too_long.add(len(lines))
                    line = line[:_SHOWN_BYTES]
                    while (more := reader.readline(_BATCH_BYTES)) and not more.endswith(b"\n"):
                        yield RawBatch(str(file), first, [], raw.tell())  # so that whoever asks can stop here
                lines.append(line)
                size += len(line)
                if size >= _BATCH_BYTES or len(lines) >= _BATCH_LINES:
                    yield RawBatch(str(file), first, lines, raw.tell(), frozenset(too_long))
                    first += len(lines)
                    lines, too_long, size = [], set(), 0
            if lines:
                yield RawBatch(str(file), first, lines, raw.tell(), frozenset(too_long))
            while plain.read(_BATCH_BYTES):  # what lies behind the last frame
                pass


def _read_parquet(file: pathlib.Path, source: Source) -> Iterator[RawBatch]:
    with pq.ParquetFile(file) as table:
        columns = [name for name in _fields(source) if _has_column(table, name)]
        first = 1
        for batch in table.iter_batches(batch_size=_BATCH_LINES // 8, columns=columns):
            first += len(batch)
            done = file.stat().st_size * (first - 1) // max(table.metadata.num_rows, 1)
            yield RawBatch(str(file), first - len(batch), batch, done)


def _fields(source: Source) -> list[str]:
    wanted = (source.text_field, source.id_field, source.provider_field, source.licence_field)
    return [name for name in wanted if name is not None]


def _has_column(table: pq.ParquetFile, name: str) -> bool:
    """Whether a file has a column, of whatever type: those of lists and structs have longer paths."""
    paths = [table.schema.column(i).path for i in range(len(table.schema.names))]
    return any(path == name or path.startswith(f"{name}.") for path in paths)


def first_fault(file: pathlib.Path, source: Source, most_bytes: int) -> str | None:
    """Why the first lines of a file hold no document; None where one of them does, or the file is empty."""
    for batch in read_raw(file, source, most_bytes):
        found = list(parse(batch, source, most_bytes))
        if found and all(isinstance(item, BadLine) for item in found):
            return no_document(source, collections.Counter(i.reason for i in found if isinstance(i, BadLine)), file)
        if found:
            return None
    return None


def no_document(source: Source, reasons: Mapping[str, int], file: pathlib.Path | None = None) -> str:
    """The fault of lines that hold no document, with the fix that their most frequent reason asks for."""
    where = f"file {file}" if file is not None else f"path={source.path}"
    if not reasons:
        return f"source {source.name}: {where} holds no document: it is empty; give it text"
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
    lines = f"its {'' if file is None else 'first '}{sum(reasons.values()):,} lines"
    most = max(reasons, key=lambda reason: reasons[reason])
    fix = "give it text"
    if most == f"no field {source.id_field}":
        fix = "name the field of the id in id_field, or set id_field=None"
    elif f"field {source.text_field}" in most:
        fix = "name the field of the text in text_field"
    elif most == _UTF16:
        fix = "convert it to UTF-8"
    return f"source {source.name}: {where} holds no document: {lines} hold none ({counts}); {fix}"


def parse(batch: RawBatch, source: Source, most_bytes: int) -> Iterator[Document | BadLine]:
    """The document of each line of a batch, or the reason why it holds none; blank lines are passed over."""
    for offset in range(len(batch.lines)):
        number = batch.first_line + offset
        content: object = None
        if isinstance(batch.lines, pa.RecordBatch):
            record, reason = _parquet_record(batch.lines, offset)
            content = record
        else:
            line = batch.lines[offset].removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            content = line
            record, reason = (None, "") if offset in batch.too_long else _json_record(line)
        if offset in batch.too_long:
            reason = f"longer than {most_bytes} bytes"
        found = reason or _document(record, source, f"{pathlib.Path(batch.file).name}:{number}", most_bytes)
        yield found if isinstance(found, Document) else BadLine(batch.file, number, found, _shown(content, found))


def _shown(content: object, reason: str) -> str:
    """A line as the file of bad lines has it; of one that is too long the beginning."""
    if isinstance(content, bytes):
        text = content.decode("utf-8", "backslashreplace").rstrip("\n")
    else:
        text = "" if content is None else json.dumps(content, ensure_ascii=True, default=str)
    return text[:_SHOWN_BYTES] if reason.startswith("longer than") else text


def _parquet_record(rows: pa.RecordBatch, index: int) -> tuple[object, str]:
    try:
        return rows.slice(index, 1).to_pylist()[0], ""
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, OverflowError):  # such as a time before the year 1
        return None, "a value that Python cannot hold"


def _json_record(line: bytes) -> tuple[object, str]:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 3 * line.count(0) > len(line):
        return None, _UTF16
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    try:
        return json.loads(text), ""
    except (ValueError, RecursionError):
        return None, "not JSON"


def _document(record: object, source: Source, place: str, most_bytes: int) -> Document | str:
    text = _field(record, source.text_field)
    if text is None:
        return f"no field {source.text_field}" if isinstance(record, dict) else "not a JSON object"
    if not isinstance(text, str):
        return f"field {source.text_field} is not a text"
    if not text:
        return f"field {source.text_field} is empty"
    identifier = place if source.id_field is None else _field(record, source.id_field)
    if identifier is None:
        return f"no field {source.id_field}"
    if not isinstance(identifier, (str, int)):
        return f"field {source.id_field} is not a text or a whole number"
    provider, licence = _field(record, source.provider_field), _field(record, source.licence_field)
    document = Document(
        str(identifier), text, None if provider is None else str(provider), None if licence is None else str(licence)
    )
    try:
        size = len(text.encode())
        "".join(value for value in (document.id, document.provider, document.licence) if value).encode()
    except UnicodeEncodeError:
        return "lone surrogates"
    return document if size <= most_bytes else f"longer than {most_bytes} bytes"


def _field(record: object, path: str | None) -> object:
    if path is None:
        return None
    if isinstance(record, dict) and path in record:
        return record[path]
    return functools.reduce(
        lambda part, key: part.get(key) if isinstance(part, dict) else None, path.split("."), record
    )


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: decided by a hash of its id alone."""
    digest = hashlib.sha256(f"held out:{document.id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
