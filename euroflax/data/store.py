"""The token store: one source's documents as tokens on disk, readable at any position without reading the rest.

A store is a folder of few files. `tokens/` is a zarr3 array in large checksummed shards, `ends.i64` the end of each
document in it (little-endian int64), `documents.parquet` a row a document (id, bytes, provider, licence), and
`manifest.json`, written last, says what it is. Each document stands as beginning-of-document token, text tokens,
end-of-document token.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts

from euroflax.experiment import ExperimentError
from euroflax.folders import replace_json

FORMAT = 1
_CHUNK_TOKENS = 8192
_SHARD_TOKENS = 512 * _CHUNK_TOKENS
_DOCUMENTS_PER_GROUP = 8192
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("bytes", pa.int64()),
        ("provider", pa.dictionary(pa.int32(), pa.string())),
        ("licence", pa.dictionary(pa.int32(), pa.string())),
    ]
)


def _spec(path: pathlib.Path) -> dict:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path.resolve() / "tokens")},
        "recheck_cached_metadata": False,
        "recheck_cached_data": False,
        "fill_missing_data_reads": False,
    }


def _token_type(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclasses.dataclass(frozen=True)
class Store:
    """A finished token store, open for reading."""

    path: pathlib.Path
    manifest: dict
    ends: np.ndarray
    """Position after the last token of each document, int64 `[documents]`, mapped from disk."""

    @functools.cached_property
    def _tokens(self) -> ts.TensorStore:
        return ts.open(_spec(self.path), open=True, read=True).result()

    @property
    def num_tokens(self) -> int:
        """Tokens in the store, those that begin and end documents included."""
        return self.manifest["tokens"]

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return self.manifest["documents"]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text in the store."""
        return self.manifest["bytes"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens at positions `start` to `stop`, int32 `[stop - start]`.

        Raises:
            ExperimentError: the store's files have vanished, were cut short or do not fit their checksums.
        """
        try:
            return self._tokens[start:stop].read().result().astype(np.int32)
        except ValueError as error:
            raise ExperimentError(
                f"token store {self.path} cannot be read ({str(error)[:200]}); delete the folder and prepare again"
            ) from error

    def document(self, index: int) -> tuple[int, int]:
        """First and last-plus-one position of document `index`."""
        return (int(self.ends[index - 1]) if index else 0), int(self.ends[index])

    def counts(self, column: str) -> dict[str, int]:
        """Documents by what a column says of them (`provider`, `licence`), most first; empty where it says nothing."""
        values = pq.read_table(self.path / "documents.parquet", columns=[column])[column]
        pairs = [(entry["values"], entry["counts"]) for entry in values.value_counts().to_pylist()]
        return {value: count for value, count in sorted(pairs, key=lambda pair: -pair[1]) if value is not None}

    def documents(self, indices: list[int]) -> list[dict]:
        """What is known of each document: id, bytes, and provider and licence where they vary."""
        with pq.ParquetFile(self.path / "documents.parquet") as table:
            starts = np.cumsum([0, *(table.metadata.row_group(g).num_rows for g in range(table.num_row_groups))])
            groups = {index: int(np.searchsorted(starts, index, "right")) - 1 for index in indices}
            read = {group: table.read_row_group(group) for group in set(groups.values())}
            return [
                read[groups[index]].slice(index - int(starts[groups[index]]), 1).to_pylist()[0] for index in indices
            ]


def open_store(path: pathlib.Path) -> Store | None:
    """The store in a folder; None where there is none, or one that was not finished.

    Raises:
        ExperimentError: the store has another format or its files are not as long as its manifest says.
    """
    fix = "delete the folder and prepare again"
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not {"format", "documents", "tokens", "bytes"} <= manifest.keys():
        raise ExperimentError(f"token store {path} is not whole: its manifest is harmed; {fix}")
    if manifest["format"] != FORMAT:
        raise ExperimentError(f"token store {path} has format {manifest['format']}, not {FORMAT}; {fix}")
    ends = path / "ends.i64"
    if not ends.is_file() or ends.stat().st_size != 8 * manifest["documents"]:
        raise ExperimentError(f"token store {path} is not whole: ends.i64 does not have its size; {fix}")
    if manifest["documents"] == 0:
        return Store(path, manifest, np.zeros(0, "<i8"))
    return Store(path, manifest, np.memmap(ends, dtype="<i8", mode="r"))


class StoreWriter:
    """Writes a store in order, holding one shard of tokens in memory; `finish` makes it a whole one."""

    def __init__(self, path: pathlib.Path, vocab_size: int) -> None:
        self._path, self._dtype = path, _token_type(vocab_size)
        self.documents = self.tokens = self.bytes = 0
        self._written = 0
        self._pending: list[np.ndarray] = []
        self._rows: list[dict] = []
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        self._array = self._create()
        self._ends = open(path / "ends.i64", "wb")
        self._table = pq.ParquetWriter(path / "documents.parquet", _SCHEMA, compression="zstd")

    def _create(self) -> ts.TensorStore:
        inner = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [_CHUNK_TOKENS],
            "codecs": [inner, {"name": "crc32c"}],
            "index_codecs": [inner, {"name": "crc32c"}],
            "index_location": "end",
        }
        grid = {"name": "regular", "configuration": {"chunk_shape": [_SHARD_TOKENS]}}
        metadata = {
            "shape": [_SHARD_TOKENS],
            "data_type": self._dtype,
            "chunk_grid": grid,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        return ts.open({**_spec(self._path), "metadata": metadata}, create=True).result()

    def append(self, tokens: np.ndarray, rows: list[dict], lengths: np.ndarray) -> None:
        """Adds documents: their tokens back to back, a row of facts and a number of tokens for each."""
        ends = self.tokens + np.cumsum(lengths, dtype="<i8")
        self._ends.write(ends.tobytes())
        self._pending.append(tokens.astype(self._dtype))
        self._rows.extend(rows)
        self.documents += len(rows)
        self.tokens += len(tokens)
        self.bytes += sum(row["bytes"] for row in rows)
        if self.tokens - self._written >= _SHARD_TOKENS:
            self._flush(whole_shards=True)
        while len(self._rows) >= _DOCUMENTS_PER_GROUP:
            self._write_rows(_DOCUMENTS_PER_GROUP)

    def _write_rows(self, count: int) -> None:
        self._table.write_table(pa.Table.from_pylist(self._rows[:count], schema=_SCHEMA), row_group_size=count)
        del self._rows[:count]

    def _flush(self, *, whole_shards: bool) -> None:
        tokens = np.concatenate(self._pending) if self._pending else np.zeros(0, self._dtype)
        count = len(tokens) // _SHARD_TOKENS * _SHARD_TOKENS if whole_shards else len(tokens)
        self._array = self._array.resize(exclusive_max=[self._written + count], expand_only=False).result()
        if count:
            self._array[self._written : self._written + count] = tokens[:count]
        self._written += count
        self._pending = [tokens[count:]]

    def finish(self, manifest: dict) -> None:
        """Closes the files and writes the manifest, which makes the store a whole one."""
        self._flush(whole_shards=False)
        if self._rows:
            self._write_rows(len(self._rows))
        self.close()
        sizes = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        replace_json(self._path / "manifest.json", {"format": FORMAT, **sizes, **manifest})

    def close(self) -> None:
        """Closes the files; a store that is not finished stays without a manifest."""
        self._table.close()
        self._ends.close()
