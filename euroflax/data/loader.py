"""The loader: the rows of a run as a pure function of position, and batches of them through Grain."""

import dataclasses
import html
from collections.abc import Iterator, Sequence

import numpy as np

from euroflax.data import mixture
from euroflax.data.packing import Row, cut_row, epoch_keys, permute
from euroflax.data.prepare import Prepared
from euroflax.experiment import Experiment, ExperimentError, Source
from euroflax.languages import fold

BATCH_KEYS = ("tokens_BL", "targets_BL", "loss_weights_BL", "segment_ids_BL", "positions_BL", "language_ids_BL")


def empty_batch(num_rows: int, length: int, pad: int) -> dict[str, np.ndarray]:
    """A batch of padding, `[num_rows, length]` each: int32, and float32 loss weights of 0."""
    batch: dict[str, np.ndarray] = {key: np.zeros((num_rows, length), np.int32) for key in BATCH_KEYS}
    batch["loss_weights_BL"] = np.zeros((num_rows, length), np.float32)
    batch["tokens_BL"][:] = batch["targets_BL"][:] = pad
    return batch


@dataclasses.dataclass(frozen=True)
class PlacedRow:
    """A row of the run with where it comes from."""

    row: Row
    source: Source
    epoch: int
    documents: list[dict]
    """The documents of the row: id, bytes, and provider and licence where they vary."""
    texts: list[str]
    """The text of each document, as much of it as the row holds."""

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

    def __init__(self, experiment: Experiment, prepared: Prepared) -> None:
        self._experiment, self._prepared = experiment, prepared
        self.mixture = mixture.resolve(experiment, prepared)
        codes = experiment.language_codes
        self._language_ids = [codes.index(fold(source.language)) for source, _ in prepared.train]

    def _cut(self, index: int) -> tuple[Row, int, int]:
        source, drawn = self.mixture.place(index)
        epoch, offset = divmod(drawn, self.mixture.rows_per_epoch[source])
        keys = epoch_keys(self._experiment.training.seed, self.mixture.names[source], epoch)
        place = permute(offset, self.mixture.rows_per_epoch[source], keys)
        store = self._prepared.train[source][1]
        length = self._experiment.data.sequence_length
        return cut_row(store, place, length, self._prepared.tokenizer.pad), source, epoch

    def row(self, index: int) -> PlacedRow:
        """Row `index` of the run with its source and documents.

        Raises:
            ExperimentError: the run has no such row.
        """
        if not 0 <= index < self._experiment.total_rows:
            raise ExperimentError(f"row={index} is not in the run; use 0 to {self._experiment.total_rows - 1}")
        row, source, epoch = self._cut(index)
        declared, store = self._prepared.train[source]
        tokens, segments = row.tokens, row.segment_ids
        parts = [tokens[segments == segment + 1].tolist() for segment in range(len(row.documents))]
        texts = [self._prepared.tokenizer.decode(part) for part in parts]
        return PlacedRow(row, declared, epoch, store.documents(list(row.documents)), texts)

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The given rows of the run as a batch, `[len(indices), L]` each; rows past the run's end are masked."""
        length = self._experiment.data.sequence_length
        batch = empty_batch(len(indices), length, self._prepared.tokenizer.pad)
        for at, index in enumerate(indices):
            if index < self._experiment.total_rows:
                row, source, _ = self._cut(index)
                for key in BATCH_KEYS[:-1]:
                    batch[key][at] = getattr(row, key.removesuffix("_BL"))
                batch["language_ids_BL"][at] = self._language_ids[source]
        return batch


def row(experiment: Experiment, prepared: Prepared, index: int) -> PlacedRow:
    """Row `index` of the run, from nothing but the experiment, the stores and the index."""
    return Rows(experiment, prepared).row(index)


class _Batches:
    """Batches from a position on, each of them only the rows that one process holds: what Grain indexes."""

    def __init__(self, rows: Rows, position: int, batch_rows: int, total_rows: int, mine: Sequence[int]) -> None:
        self._rows, self._position, self._batch_rows, self._mine = rows, position, batch_rows, mine
        self._length = -(-(total_rows - position) // batch_rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = self._position + index * self._batch_rows
        return self._rows.batch([start + offset for offset in self._mine])


def batches(experiment: Experiment, rows: Rows, position: int, mine: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    """The batches of the rest of a run through Grain, read ahead in one thread.

    Args:
        experiment: gives the size of a batch and the end of the run.
        rows: the rows of the run.
        position: number of rows consumed so far; the whole state of the loader.
        mine: which rows of each batch this process holds, by their place in the batch.
    """
    import grain

    source = _Batches(rows, position, experiment.batch_rows, experiment.total_rows, mine)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
