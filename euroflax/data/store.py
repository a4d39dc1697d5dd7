"""The token store: one source's documents as tokens on disk, readable at any position without reading the rest.

A store is a folder of few files, arrays with checksums (`arrays.py`). `tokens` holds all tokens (uint16 or uint32),
`ends` the end of each document in it and `bytes` the text bytes up to there, `windows` the documents before each
window, `providers` the number of each document's provider where it varies, `documents.parquet` a row a document (id,
bytes, provider, licence, bytes that its tokens do not give back), and `manifest.json`, written last, says what it is.
Each document stands as beginning-of-document token, text tokens, end-of-document token.

Windows are runs of whole documents, the unit of packing and of shuffling: a sixty-fourth of the store, within bounds;
a quarter of a small one.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import pathlib
import shutil
from collections.abc import Collection, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from euroflax.data.arrays import ArrayWriter, FileArray
from euroflax.experiment import ExperimentError, fingerprint
from euroflax.folders import parse_json, replace_json

FORMAT = 3
_FACTS = {"format", "dtype", "providers", "documents", "tokens", "bytes", "windows", "table_bytes"}
_DOCUMENTS_PER_GROUP = 8192
_DOCUMENTS_AT_ONCE = 2**20
_WINDOWS = 64
_FEWEST_WINDOWS = 4
_WINDOW_TOKENS = (2**18, 2**22)
_LEAST_WINDOW_TOKENS = 2**12
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("bytes", pa.int64()),
        ("provider", pa.dictionary(pa.int32(), pa.string())),
        ("licence", pa.dictionary(pa.int32(), pa.string())),
        ("lost", pa.int64()),
    ]
)


class NotPrepared(ExperimentError):
    """A store, the rows of one, or the tokenizer is not in the cache."""

    def __init__(self, part: str) -> None:
        super().__init__(f"{part} is not prepared; run the verb prepare first")
        self.part = part


def _token_type(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


@dataclasses.dataclass(frozen=True)
class Store:
    """A finished token store, open for reading."""

    path: pathlib.Path
    manifest: dict

    @functools.cached_property
    def tokens(self) -> FileArray:
        """All tokens, uint16 or uint32."""
        return FileArray(self.path / "tokens", self.manifest["dtype"], self.num_tokens)

    @functools.cached_property
    def ends(self) -> FileArray:
        """Position after the last token of each document, int64 `[documents]`."""
        return FileArray(self.path / "ends", "<i8", self.num_documents)

    @functools.cached_property
    def text_bytes(self) -> FileArray:
        """UTF-8 bytes of the text up to the end of each document, int64 `[documents]`."""
        return FileArray(self.path / "bytes", "<i8", self.num_documents)

    @functools.cached_property
    def windows(self) -> FileArray:
        """Documents before each window, and before the end, int64 `[windows + 1]`."""
        return FileArray(self.path / "windows", "<i8", self.manifest["windows"] + 1)

    @functools.cached_property
    def provider_numbers(self) -> FileArray:
        """The place in `providers` of the provider of each document, -1 for none, int32 `[documents]`."""
        return FileArray(self.path / "providers", "<i4", self.num_documents if self.providers else 0)

    @property
    def providers(self) -> list[str] | None:
        """The names of the providers where they vary by document; those with none are of the source's own."""
        return self.manifest["providers"]

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

    @property
    def num_lost_bytes(self) -> int:
        """Of these, the bytes that the tokens do not give back; 0 in stores from before they were counted."""
        return self.manifest.get("lost_bytes", 0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens at positions `start` to `stop`, `[stop - start]`, uint16 or uint32.

        Raises:
            ExperimentError: the store's files have vanished, were cut short or do not fit their checksums.
        """
        return self.tokens.read(start, stop)

    def document(self, index: int) -> tuple[int, int]:
        """First and last-plus-one position of document `index`."""
        first, last = self.ends.read(index - 1, index + 1) if index else (0, self.ends.read(0, 1)[0])
        return int(first), int(last)

    @contextlib.contextmanager
    def _table(self) -> Iterator[pq.ParquetFile]:
        """The table of documents, whose pages are checked as they are read."""
        path = self.path / "documents.parquet"
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as table:
                yield table
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
                raise
            raise ExperimentError(
                f"{path} cannot be read ({str(error)[:200]}); delete the folder {self.path} and prepare again"
            ) from error

    def check_content(self) -> None:
        """Reads all files of the store and compares them with the hashes in its manifest.

        Raises:
            ExperimentError: one was changed.
        """
        known = self.manifest.get("content")
        changed = [] if known is None else [n for n, d in file_digests(self.path).items() if known.get(n) != d]
        if changed:
            raise ExperimentError(
                f"token store {self.path} is not as it was made: {', '.join(changed)} changed; delete the folder and "
                "prepare again"
            )

    def find(self, ids: Collection[str]) -> tuple[np.ndarray, list[str]]:
        """The numbers of the documents with one of these ids, in order, int64; and the ids that no document has."""
        found, seen, start = [np.zeros(0, np.int64)], set(), 0
        if ids:
            wanted = pa.array(ids, pa.string())
            with self._table() as table:
                for batch in table.iter_batches(columns=["id"]):
                    among = pc.is_in(batch["id"], wanted)  # pyright: ignore[reportAttributeAccessIssue]
                    found.append(start + np.flatnonzero(among.to_numpy(zero_copy_only=False)))
                    seen.update(batch["id"].filter(among).to_pylist())
                    start += len(batch)
        return np.concatenate(found), [name for name in ids if name not in seen]

    def counts(self, column: str) -> dict[str, int]:
        """Documents by what a column says of them (`provider`, `licence`), most first; empty where it says nothing."""
        with self._table() as table:
            values = table.read(columns=[column])[column]
        pairs = [(entry["values"], entry["counts"]) for entry in values.value_counts().to_pylist()]
        return {value: count for value, count in sorted(pairs, key=lambda pair: -pair[1]) if value is not None}

    def documents(self, indices: list[int]) -> list[dict]:
        """What is known of each document: id, bytes, and provider and licence where they vary."""
        with self._table() as table:
            starts = np.cumsum([0, *(table.metadata.row_group(g).num_rows for g in range(table.num_row_groups))])
            groups = {index: int(np.searchsorted(starts, index, "right")) - 1 for index in indices}
            read = {group: table.read_row_group(group) for group in set(groups.values())}
            return [
                read[groups[index]].slice(index - int(starts[groups[index]]), 1).to_pylist()[0] for index in indices
            ]


def file_digests(path: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file of a store but its manifest."""
    found = {}
    for file in sorted(file for file in path.iterdir() if file.name != "manifest.json"):
        with open(file, "rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def sealed(manifest: dict) -> dict:
    """A manifest with a hash of itself."""
    return manifest | {"seal": fingerprint(manifest)}


def is_sealed(manifest: dict) -> bool:
    """Whether a manifest is as it was written, as far as it can tell: earlier versions wrote no seal."""
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    return manifest.get("seal", fingerprint(rest)) == fingerprint(rest)


def open_store(path: pathlib.Path) -> Store | None:
    """The store in a folder; None where there is none, or one that was not finished.

    Raises:
        ExperimentError: the store has another format or its files are not as long as its manifest says.
    """
    fix = "delete the folder and prepare again"
    try:
        manifest = parse_json((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not manifest.keys() >= _FACTS:
        raise ExperimentError(f"token store {path} is not whole: its manifest is harmed; {fix}")
    if manifest["format"] != FORMAT:
        raise ExperimentError(f"token store {path} has format {manifest['format']}, not {FORMAT}; {fix}")
    if not is_sealed(manifest):
        raise ExperimentError(f"token store {path} is not as it was made: its manifest was changed; {fix}")
    store = Store(path, manifest)
    table = path / "documents.parquet"
    if not table.is_file() or table.stat().st_size != manifest["table_bytes"]:
        raise ExperimentError(f"token store {path} is not whole: {table.name} does not have its size; {fix}")
    for array in (store.tokens, store.ends, store.text_bytes, store.windows, store.provider_numbers):
        array.check_size()
    return store


class StoreWriter:
    """Writes a store in order, holding few tokens in memory; `finish` makes it a whole one."""

    def __init__(self, path: pathlib.Path, vocab_size: int) -> None:
        self._path, self._dtype = path, _token_type(vocab_size)
        self.documents = self.tokens = self.bytes = self.lost_bytes = 0
        self._rows: list[dict] = []
        self._providers: dict[str, int] = {}
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        types = {"tokens": self._dtype, "ends": "<i8", "bytes": "<i8", "providers": "<i4", "windows": "<i8"}
        self._arrays = {name: ArrayWriter(path / name, dtype) for name, dtype in types.items()}
        self._table = pq.ParquetWriter(
            path / "documents.parquet", _SCHEMA, compression="zstd", write_page_checksum=True
        )

    def append(self, tokens: np.ndarray, rows: list[dict], lengths: np.ndarray) -> None:
        """Adds documents: their tokens back to back, a row of facts and a number of tokens for each."""
        sizes = np.array([row["bytes"] for row in rows], np.int64)
        names = [row["provider"] for row in rows]
        codes = [-1 if name is None else self._providers.setdefault(name, len(self._providers)) for name in names]
        self._arrays["tokens"].append(tokens)
        self._arrays["ends"].append(self.tokens + np.cumsum(lengths))
        self._arrays["bytes"].append(self.bytes + np.cumsum(sizes))
        self._arrays["providers"].append(np.array(codes))
        self._rows.extend(rows)
        self.documents += len(rows)
        self.tokens += len(tokens)
        self.bytes += int(sizes.sum())
        self.lost_bytes += sum(row["lost"] for row in rows)
        while len(self._rows) >= _DOCUMENTS_PER_GROUP:
            self._write_rows(_DOCUMENTS_PER_GROUP)

    def _write_rows(self, count: int) -> None:
        self._table.write_table(pa.Table.from_pylist(self._rows[:count], schema=_SCHEMA), row_group_size=count)
        del self._rows[:count]

    def finish(self, manifest: dict) -> None:
        """Closes the files and writes the manifest, which makes the store a whole one."""
        if self._rows:
            self._write_rows(len(self._rows))
        self._arrays["ends"].close()
        windows = _windows(FileArray(self._path / "ends", "<i8", self.documents), self.tokens)
        self._arrays["windows"].append(windows)
        self.close()
        if not self._providers:
            (self._path / "providers").write_bytes(b"")
        sizes = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "windows": len(windows) - 1}
        sizes["lost_bytes"] = self.lost_bytes
        facts = {
            "format": FORMAT,
            "dtype": self._dtype,
            "providers": list(self._providers) or None,
            "table_bytes": (self._path / "documents.parquet").stat().st_size,
        }
        content = {"content": file_digests(self._path)}
        replace_json(self._path / "manifest.json", sealed({**facts, **sizes, **manifest, **content}))

    def close(self) -> None:
        """Closes the files; a store that is not finished stays without a manifest."""
        with contextlib.ExitStack() as stack:
            for file in (self._table, *self._arrays.values()):
                stack.callback(file.close)


def _windows(ends: FileArray, num_tokens: int) -> np.ndarray:
    """Documents before each window, and before the end."""
    least = min(max(num_tokens // _FEWEST_WINDOWS, _LEAST_WINDOW_TOKENS), _WINDOW_TOKENS[0])
    size = min(max(num_tokens // _WINDOWS, least), _WINDOW_TOKENS[1])
    cuts = np.arange(1, max(num_tokens // size, 1)) * size
    found, done = [np.zeros(1, np.int64)], 0
    for start in range(0, len(ends), _DOCUMENTS_AT_ONCE):
        part = ends.read(start, min(start + _DOCUMENTS_AT_ONCE, len(ends)))
        reached = int(np.searchsorted(cuts, part[-1], "right"))
        found.append(start + np.searchsorted(part, cuts[done:reached], "left") + 1)
        done = reached
    return np.unique(np.concatenate([*found, [len(ends)]]))
