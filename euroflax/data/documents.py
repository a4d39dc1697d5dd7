"""Documents out of files: which files a source has, their lines, and the text, id and provenance in each line."""

import dataclasses
import functools
import hashlib
import importlib.resources
import io
import json
import pathlib
from collections.abc import Iterator
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from euroflax.experiment import ExperimentError, Source

ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
_BATCH_BYTES = 1 << 20
_BATCH_LINES = 1024


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


def find_files(source: Source, data_root: pathlib.Path) -> list[pathlib.Path]:
    """The files of a source, in the order in which they are read: sorted by path.

    Raises:
        ExperimentError: there are none, or one of them has an ending that is not read.
    """
    if source.path.startswith("sample:"):
        root = pathlib.Path(str(importlib.resources.files("euroflax") / "sample"))
        path = root / source.path.removeprefix("sample:")
    else:
        root = data_root
        path = root / source.path
    if any(mark in source.path for mark in "*?["):
        found = sorted(pathlib.Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    elif path.is_dir():
        found = sorted(file for ending in ENDINGS for file in path.rglob(f"*{ending}"))
    else:
        found = [path] if path.is_file() else []
    where = f"source {source.name}: path={source.path}"
    if not found:
        raise ExperimentError(f"{where} names no file at {path.resolve()}; mend the path or --data-root")
    for file in found:
        if not file.name.endswith(ENDINGS):
            raise ExperimentError(f"{where} names {file.name}, which is not read; give {', '.join(ENDINGS)}")
    return found


def read_raw(file: pathlib.Path, source: Source) -> Iterator[RawBatch]:
    """The lines (or rows) of a file in batches of about 1 MB, in order, in memory that does not grow with the file.

    Raises:
        ExperimentError: the file cannot be read to its end, for example since it was cut short.
    """
    try:
        yield from _read_parquet(file, source) if file.suffix == ".parquet" else _read_lines(file)
    except (OSError, pa.ArrowException) as error:
        raise ExperimentError(
            f"source {source.name}: file {file} cannot be read to its end ({error}); copy or download it again"
        ) from error


def _read_lines(file: pathlib.Path) -> Iterator[RawBatch]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
    with open(file, "rb", buffering=0) as raw:
        stream = raw if compression is None else pa.CompressedInputStream(raw, compression)
        with io.BufferedReader(cast(io.RawIOBase, stream), _BATCH_BYTES) as reader:
            lines: list[bytes] = []
            first, size = 1, 0
            for number, line in enumerate(reader, start=1):
                lines.append(line)
                size += len(line)
                if size >= _BATCH_BYTES or len(lines) >= _BATCH_LINES:
                    yield RawBatch(str(file), first, lines, raw.tell())
                    lines, first, size = [], number + 1, 0
            if lines:
                yield RawBatch(str(file), first, lines, raw.tell())


def _read_parquet(file: pathlib.Path, source: Source) -> Iterator[RawBatch]:
    with pq.ParquetFile(file) as table:
        wanted = [source.text_field, source.id_field, source.provider_field, source.licence_field]
        present = [schema.path for schema in map(table.schema.column, range(len(table.schema.names)))]
        columns = [name for name in wanted if name in present]
        first = 1
        for batch in table.iter_batches(batch_size=_BATCH_LINES // 8, columns=columns):
            first += len(batch)
            done = file.stat().st_size * (first - 1) // max(table.metadata.num_rows, 1)
            yield RawBatch(str(file), first - len(batch), batch, done)


def parse(batch: RawBatch, source: Source) -> Iterator[Document | BadLine]:
    """The document of each line of a batch, or the reason why it holds none; blank lines are passed over."""
    for offset in range(len(batch.lines)):
        number = batch.first_line + offset
        if isinstance(batch.lines, pa.RecordBatch):
            record, reason = _parquet_record(batch.lines, offset)
            content = "" if record is None else json.dumps(record, ensure_ascii=False, default=str)
        else:
            line = batch.lines[offset]
            if not line.strip():
                continue
            record, reason = _json_record(line)
            content = line.decode("utf-8", "backslashreplace").rstrip("\n")
        found = reason or _document(record, source, f"{pathlib.Path(batch.file).name}:{number}")
        yield found if isinstance(found, Document) else BadLine(batch.file, number, found, content)


def _parquet_record(rows: pa.RecordBatch, index: int) -> tuple[object, str]:
    try:
        return rows.slice(index, 1).to_pylist()[0], ""
    except UnicodeDecodeError:
        return None, "not UTF-8"


def _json_record(line: bytes) -> tuple[object, str]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    try:
        return json.loads(text), ""
    except (ValueError, RecursionError):
        return None, "not JSON"


def _document(record: object, source: Source, place: str) -> Document | str:
    text = _field(record, source.text_field)
    if text is None:
        return f"no field {source.text_field}" if isinstance(record, dict) else "not a JSON object"
    if not isinstance(text, str):
        return f"field {source.text_field} is not a text"
    if not text:
        return f"field {source.text_field} is empty"
    identifier = place if source.id_field is None else _field(record, source.id_field)
    if not isinstance(identifier, (str, int)):
        return f"no field {source.id_field}"
    provider, licence = _field(record, source.provider_field), _field(record, source.licence_field)
    document = Document(
        str(identifier), text, None if provider is None else str(provider), None if licence is None else str(licence)
    )
    try:
        "".join(value for value in dataclasses.astuple(document) if value).encode()
    except UnicodeEncodeError:
        return "lone surrogates"
    return document


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
