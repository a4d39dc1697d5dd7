"""Rows out of a token store: which pieces of documents each row holds, planned once, window by window.

A row is made of pieces: runs of tokens of one document. `concat` lays the documents of a window end to end and cuts
rows out of them; `best-fit` puts each whole document into the row that it fills best, the longest first (best-fit
decreasing: Johnson, "Near-optimal bin packing algorithms", 1973; for training rows Ding et al., "Fewer truncations
improve language modeling", 2024). A document longer than a row goes on in further rows of its window, or is cut, as
declared.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable

import numpy as np

from euroflax.data.arrays import ArrayWriter, FileArray
from euroflax.data.store import Store
from euroflax.experiment import ExperimentError, fingerprint
from euroflax.folders import parse_json, replace_json

_FORMAT = 3
PIECE = np.dtype(
    [
        ("document", "<i8"),  # its number in the store
        ("start", "<i8"),  # position of its first token in the store
        ("count", "<i4"),  # tokens
        ("bytes", "<i4"),  # text bytes of the document, in proportion to tokens where it is not whole
        ("begins", "<i2"),  # 1 where the document begins with it
        ("ends", "<i2"),  # 1 where the document ends with it
    ]
)
_Documents = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
TOTAL = np.dtype(
    [
        ("window", "<i8"),
        ("provider", "<i8"),  # as the store numbers them, -1 for none of the document's own
        ("documents", "<i8"),
        ("bytes", "<i8"),
        ("tokens", "<i8"),
    ]
)
AMOUNTS = ("documents", "bytes", "tokens")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What rows are made by."""

    sequence_length: int
    packing: str
    long_documents: str
    withdrawn: tuple[str, ...]
    """Ids of the documents that are left out, sorted."""

    def key(self, store: Store) -> str:
        """The name of the packing of a store."""
        return fingerprint([_FORMAT, store.path.name, *dataclasses.astuple(self)])


@dataclasses.dataclass(frozen=True)
class Packing:
    """The rows of a store, open for reading."""

    path: pathlib.Path
    store: Store
    manifest: dict

    @property
    def num_rows(self) -> int:
        """Rows in one pass over the store."""
        return self.manifest["rows"]

    @property
    def num_tokens(self) -> int:
        """Tokens in one pass, padding not counted."""
        return self.manifest["tokens"]

    @property
    def num_bytes(self) -> int:
        """Text bytes in one pass."""
        return self.manifest["bytes"]

    @property
    def num_windows(self) -> int:
        """Windows of the store."""
        return self.store.manifest["windows"]

    @functools.cached_property
    def totals(self) -> FileArray:
        """What the rows of a window hold of each provider, of type `TOTAL`, in the order of windows."""
        return FileArray(self.path / "totals", TOTAL, self.manifest["totals"])

    @functools.cached_property
    def _first_rows(self) -> FileArray:
        return FileArray(self.path / "first_rows", "<i8", self.num_windows + 1)

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """Rows before each window, and before the end, int64 `[windows + 1]`."""
        return self._first_rows.read(0, self.num_windows + 1)

    @functools.cached_property
    def _pieces(self) -> FileArray:
        return FileArray(self.path / "pieces", PIECE, self.manifest["pieces"])

    @functools.cached_property
    def _first_pieces(self) -> FileArray:
        return FileArray(self.path / "first_pieces", "<i8", self.num_rows + 1)

    def pieces(self, row: int) -> np.ndarray:
        """The pieces of a row, of type `PIECE`."""
        first, last = self._first_pieces.read(row, row + 2).tolist()
        return self._pieces.read(first, last)

    def pieces_of(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of rows `start` to `stop`, and how many each row has."""
        firsts = self._first_pieces.read(start, stop + 1)
        return self._pieces.read(int(firsts[0]), int(firsts[-1])), np.diff(firsts)

    def providers_of(self, pieces: np.ndarray) -> np.ndarray:
        """The provider of the document of each piece, numbered as in `TOTAL`."""
        return _providers(self.store, pieces["document"])


def open_packing(path: pathlib.Path, store: Store) -> Packing | None:
    """The packing in a folder; None where there is none, or one that was not finished.

    Raises:
        ExperimentError: its files are not as long as its manifest says.
    """
    try:
        manifest = parse_json((path / "manifest.json").read_bytes())
        found = Packing(path, store, manifest)
        arrays = (found.totals, found._first_rows, found._pieces, found._first_pieces)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ExperimentError(
            f"packing {path} is not whole: its manifest is harmed; delete the folder and prepare again"
        )
    for array in arrays:
        array.check_size()
    return found


def make_packing(path: pathlib.Path, store: Store, recipe: Recipe, advance: Callable[[int], None]) -> None:
    """Plans the rows of a store and writes them into a folder, which is not there yet.

    Args:
        path: the folder.
        store: the documents.
        recipe: how.
        advance: told how many tokens are packed.
    """
    path.mkdir(parents=True)
    withdrawn, unknown = store.find(recipe.withdrawn)
    sums = dict.fromkeys(AMOUNTS, 0)
    with contextlib.ExitStack() as stack:
        types = {"pieces": PIECE, "first_pieces": "<i8", "first_rows": "<i8", "totals": TOTAL}
        arrays = {name: ArrayWriter(path / name, dtype) for name, dtype in types.items()}
        for array in arrays.values():
            stack.callback(array.close)
        num_rows = cut_tokens = 0
        for window in range(store.manifest["windows"]):
            documents = _documents(store, window, withdrawn)
            pieces, rows = pack(*documents, recipe)
            cut_tokens += int(documents[2].sum() - pieces["count"].sum())
            order = np.lexsort((pieces["start"], rows))
            pieces, rows = pieces[order], rows[order]
            firsts = np.flatnonzero(np.diff(rows, prepend=-1))
            arrays["first_rows"].append(np.array([num_rows]))
            arrays["first_pieces"].append(arrays["pieces"].length + firsts)
            arrays["pieces"].append(pieces)
            totals = _totals(store, window, pieces)
            arrays["totals"].append(totals)
            num_rows += len(firsts)
            for name in AMOUNTS:
                sums[name] += int(totals[name].sum())
            advance(sums["tokens"])
        arrays["first_rows"].append(np.array([num_rows]))
        arrays["first_pieces"].append(np.array([arrays["pieces"].length]))
    facts = (
        sums
        | {"rows": num_rows, "cut_tokens": cut_tokens}
        | {name: arrays[name].length for name in ("pieces", "totals")}
    )
    asked = {name: value for name, value in dataclasses.asdict(recipe).items() if name != "withdrawn"}
    left_out = {"withdrawn": withdrawn.tolist(), "unknown": unknown}
    replace_json(path / "manifest.json", {"format": _FORMAT, **asked, **facts, **left_out})


def _documents(store: Store, window: int, withdrawn: np.ndarray) -> _Documents:
    """Number, first position, tokens and bytes of the documents of a window, the withdrawn ones left out."""
    first, last = store.windows.read(window, window + 2).tolist()
    numbers = np.arange(first, last)
    ends, sizes = (array.read(max(first - 1, 0), last) for array in (store.ends, store.text_bytes))
    if first == 0:
        ends, sizes = np.concatenate([[0], ends]), np.concatenate([[0], sizes])
    kept = ~np.isin(numbers, withdrawn)
    return numbers[kept], ends[:-1][kept], np.diff(ends)[kept], np.diff(sizes)[kept]


def _providers(store: Store, documents: np.ndarray) -> np.ndarray:
    """The numbers of the providers of documents that lie near each other."""
    if store.providers is None or not len(documents):
        return np.full(len(documents), -1)
    first = int(documents.min())
    return store.provider_numbers.read(first, int(documents.max()) + 1)[documents - first]


def _totals(store: Store, window: int, pieces: np.ndarray) -> np.ndarray:
    """What the pieces of a window hold of each provider, of type `TOTAL`."""
    providers, places = np.unique(_providers(store, pieces["document"]), return_inverse=True)
    totals = np.zeros(len(providers), TOTAL)
    totals["window"], totals["provider"] = window, providers
    for name, field in zip(AMOUNTS, ("begins", "bytes", "count"), strict=True):
        totals[name] = np.bincount(places, pieces[field], len(providers))
    return totals


def pack(
    numbers: np.ndarray, starts: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of documents, and the row of each, numbered from 0.

    Args:
        numbers: the documents' numbers.
        starts: positions of their first tokens.
        lengths: their tokens.
        sizes: their bytes.
        recipe: how they are packed.
    """
    length = recipe.sequence_length
    kept = np.minimum(lengths, length) if recipe.long_documents == "cut" else lengths
    laid = np.concatenate([[0], np.cumsum(kept)])  # where each document begins when they lie end to end
    if recipe.packing == "concat":
        cuts = np.arange(0, laid[-1], length)
    else:
        long = np.flatnonzero(kept > length)
        cuts = np.concatenate([np.arange(laid[i], laid[i + 1], length) for i in long] or [np.zeros(0, np.int64)])
    edges = np.unique(np.concatenate([laid, cuts]))
    document = np.searchsorted(laid, edges[:-1], "right") - 1
    first = edges[:-1] - laid[document]
    last = first + np.diff(edges)
    pieces = np.zeros(len(document), PIECE)
    pieces["document"], pieces["start"] = numbers[document], starts[document] + first
    pieces["count"] = last - first
    pieces["bytes"] = sizes[document] * last // lengths[document] - sizes[document] * first // lengths[document]
    pieces["begins"], pieces["ends"] = first == 0, last == lengths[document]
    rows = edges[:-1] // length if recipe.packing == "concat" else best_fit(pieces["count"], length)
    return pieces, rows


def best_fit(counts: np.ndarray, length: int) -> np.ndarray:
    """The row of each item, none longer than a row: the longest first, each into the fullest row that has room.

    >>> best_fit(np.array([3, 6, 4, 5]), 9).tolist()
    [0, 0, 1, 1]
    """
    rows = np.zeros(len(counts), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
    sizes = 0  # bit s is set where a row has room for s more tokens
    used = 0
    for item in np.argsort(-counts, kind="stable").tolist():
        count = int(counts[item])
        fits = sizes >> count
        if fits:
            room = count + (fits & -fits).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                sizes ^= 1 << room
        else:
            room, row, used = length, used, used + 1
        rows[item] = row
        if left := room - count:
            open_rows[left].append(row)
            sizes |= 1 << left
    return rows
