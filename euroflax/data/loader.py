"""The loader: the rows of a run as a pure function of position, and batches of them through Grain."""

import copy
import dataclasses
import html
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from euroflax.data.order import Order
from euroflax.data.packing import Packing
from euroflax.data.prepare import Prepared
from euroflax.data.skipping import Range, pieces
from euroflax.data.withdrawals import Withdrawal
from euroflax.experiment import Experiment, ExperimentError, Source, Span
from euroflax.languages import fold

BATCH_KEYS = ("tokens_BL", "targets_BL", "loss_weights_BL", "segment_ids_BL", "positions_BL", "language_ids_BL")

Batch = dict[str, np.ndarray]


def empty_batch(num_rows: int, length: int, pad: int) -> Batch:
    """A batch of padding, `[num_rows, length]` each: int32, and float32 loss weights of 0."""
    batch: Batch = {key: np.zeros((num_rows, length), np.int32) for key in BATCH_KEYS}
    batch["loss_weights_BL"] = np.zeros((num_rows, length), np.float32)
    batch["tokens_BL"][:] = batch["targets_BL"][:] = pad
    return batch


def fill_row(batch: Batch, at: int, packing: Packing, row: int, unlearnt: int | None = None) -> np.ndarray:
    """Puts a row of a packing into row `at` of an empty batch and returns its pieces.

    Segments are numbered 1, 2, ... by piece and positions begin at 0 in each. The target of a token is the next one
    of its document; the last one of a document has none, and so a loss weight of 0, as has the target `unlearnt`.
    """
    pieces = packing.pieces(row)
    store = packing.store
    starts, counts = pieces["start"], pieces["count"]
    stops = starts + counts
    apart = np.flatnonzero(starts[1:] != stops[:-1]) + 1  # pieces that lie side by side are read at once
    runs = zip([0, *apart.tolist()], [*apart.tolist(), len(pieces)], strict=True)
    place = 0
    for first, last in runs:
        start, stop = int(starts[first]), int(stops[last - 1])
        read = store.read(start, min(stop + 1, store.num_tokens))
        size = stop - start
        batch["tokens_BL"][at, place : place + size] = read[:size]
        batch["targets_BL"][at, place : place + len(read) - 1] = read[1:]
        place += size
    segments = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), counts)
    ends = np.cumsum(counts)
    batch["segment_ids_BL"][at, :place] = segments
    batch["positions_BL"][at, :place] = np.arange(place, dtype=np.int32) - (ends - counts)[segments - 1]
    weights = batch["loss_weights_BL"][at]
    weights[:place] = 1
    weights[ends[pieces["ends"] == 1] - 1] = 0
    if unlearnt is not None:
        weights[batch["targets_BL"][at] == unlearnt] = 0
    return pieces


@dataclasses.dataclass(frozen=True)
class PlacedRow:
    """A row of the run with where it comes from."""

    index: int
    tokens: np.ndarray
    """`[L]`, as all arrays of a row."""
    targets: np.ndarray
    loss_weights: np.ndarray
    """1 where the target belongs to the same document as the token, else 0."""
    segment_ids: np.ndarray
    """1, 2, ... for the pieces of the row, 0 for padding."""
    positions: np.ndarray
    """Positions within the piece."""
    source: Source
    stage: int
    """0 for what the run begins with."""
    epoch: int
    documents: list[dict]
    """The document of each piece: id, bytes, and provider and licence where they vary."""
    spans: list[tuple[int, int, int]]
    """Of each piece: its first and last-plus-one token in its document, and the tokens of the document."""
    texts: list[str]
    """The text of each piece."""

    def to_json(self) -> dict:
        """The row as JSON."""
        names = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
        arrays = {name: getattr(self, name).tolist() for name in names}
        about = {"source": self.source.name, "language": self.source.language, "stage": self.stage, "epoch": self.epoch}
        pieces = [
            {"document": document, "first_token": first, "stop_token": last, "document_tokens": length, "text": text}
            for document, (first, last, length), text in zip(self.documents, self.spans, self.texts, strict=True)
        ]
        return {"row": self.index, **about, "segments": pieces, **arrays}

    def _repr_html_(self) -> str:
        shades = ("#cfe0f5", "#f5e6c4")
        parts = [
            f"<span title='{html.escape(document['id'])}' style='background:{shades[i % 2]};color:#111'>"
            f"{html.escape(text)}</span>"
            for i, (document, text) in enumerate(zip(self.documents, self.texts, strict=True))
        ]
        about = f"{self.source.name} ({self.source.language}), epoch {self.epoch}, {len(self.documents)} documents"
        return f"<p>{html.escape(about)}</p><p style='white-space:pre-wrap'>{''.join(parts)}</p>"


class Rows:
    """All rows of a run: row i is the same however, whenever and on whatever host it is asked for."""

    def __init__(
        self, experiment: Experiment, prepared: Prepared, withdrawals: tuple[Withdrawal, ...] | None = None
    ) -> None:
        """Opens the rows.

        Args:
            experiment: the run.
            prepared: its stores.
            withdrawals: which documents are left out, and from where; by default as `prepared` has it on record.

        Raises:
            ExperimentError: a stage's cap on epochs cannot be met, or a share is too small.
        """
        self._experiment, self._prepared = experiment, prepared
        self.order = Order(experiment, prepared, prepared.withdrawals() if withdrawals is None else withdrawals)
        codes = experiment.language_codes
        self.skipped: tuple[Range, ...] = ()
        """Ranges of rows that no batch holds."""
        self._language_ids = [codes.index(fold(source.language) or "") for source, _ in prepared.train]

    def without(self, skipped: Sequence[Range]) -> "Rows":
        """The same rows, of which batches skip some ranges."""
        rows = copy.copy(self)
        rows.skipped = tuple(skipped)
        return rows

    def _fill(self, batch: Batch, at: int, index: int) -> np.ndarray:
        place = self.order.place(index)
        batch["language_ids_BL"][at] = self._language_ids[place.source]
        packing = place.stretch.sources[place.source].packing
        unlearnt = None if self._experiment.data.loss_at_document_end else self._prepared.tokenizer.eos
        return fill_row(batch, at, packing, place.row, unlearnt)

    def row(self, index: int) -> PlacedRow:
        """Row `index` of the run with its source and documents.

        Raises:
            ExperimentError: the run has no such row.
        """
        if not 0 <= index < self._experiment.total_rows:
            raise ExperimentError(f"row={index} is not in the run; use 0 to {self._experiment.total_rows - 1}")
        span = self._experiment.span_at(index)
        batch = empty_batch(1, span.sequence_length, self._prepared.tokenizer.pad)
        pieces = self._fill(batch, 0, index)
        place = self.order.place(index)
        source, store = self._prepared.train[place.source]
        edges = [store.document(int(document)) for document in pieces["document"]]
        spans = [
            (int(piece["start"]) - first, int(piece["start"] + piece["count"]) - first, last - first)
            for piece, (first, last) in zip(pieces, edges, strict=True)
        ]
        values = {key: batch[key][0] for key in BATCH_KEYS}
        parts = [values["tokens_BL"][values["segment_ids_BL"] == n + 1].tolist() for n in range(len(pieces))]
        return PlacedRow(
            index=index,
            tokens=values["tokens_BL"],
            targets=values["targets_BL"],
            loss_weights=values["loss_weights_BL"],
            segment_ids=values["segment_ids_BL"],
            positions=values["positions_BL"],
            source=source,
            stage=span.number,
            epoch=place.epoch,
            documents=store.documents(pieces["document"].tolist()),
            spans=spans,
            texts=[self._prepared.tokenizer.decode(part) for part in parts],
        )

    def batch(self, span: Span, indices: Sequence[int], stop: int | None = None) -> Batch:
        """Rows of a stage as a batch, `[len(indices), L]` each; those from `stop`, or the stage's end, are masked."""
        batch = empty_batch(len(indices), span.sequence_length, self._prepared.tokenizer.pad)
        for at, index in enumerate(indices):
            if index < (span.stop_row if stop is None else stop):
                self._fill(batch, at, index)
        return batch


def row(experiment: Experiment, prepared: Prepared, index: int) -> PlacedRow:
    """Row `index` of the run, from nothing but the experiment, the stores and the index."""
    return Rows(experiment, prepared).row(index)


class _Batches:
    """Batches of a piece of a stage, each only the rows that one process holds: what Grain indexes."""

    def __init__(self, rows: Rows, span: Span, piece: Range, mine: Sequence[int]) -> None:
        self._rows, self._span, self._piece, self._mine = rows, span, piece, mine

    def __len__(self) -> int:
        start, stop = self._piece
        return math.ceil((stop - start) / self._span.batch_rows)

    def __getitem__(self, index: int) -> Batch:
        first, stop = self._piece
        start = first + index * self._span.batch_rows
        return self._rows.batch(self._span, [start + offset for offset in self._mine], stop)


def batches(experiment: Experiment, rows: Rows, position: int, mine: Callable[[int], Sequence[int]]) -> Iterator[Batch]:
    """The batches of the rest of a run through Grain, read ahead in one thread.

    No batch reaches over a stage's end or into a range that is skipped.

    Args:
        experiment: gives the stages.
        rows: the rows of the run.
        position: number of rows consumed so far; the whole state of the loader.
        mine: which rows of a batch of so many this process holds, by their place in the batch.
    """
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    for span in experiment.spans:
        for piece in pieces(span, position, rows.skipped):
            source = _Batches(rows, span, piece, mine(span.batch_rows))
            yield from grain.MapDataset.source(source).to_iter_dataset(options)
