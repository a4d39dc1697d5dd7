"""The ledger: what a run has read of each source, language and provider at a position, from the position alone."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from euroflax.data.order import Order
from euroflax.data.skipping import Range, merged
from euroflax.experiment import Experiment, Source
from euroflax.languages import fold


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was read of one source and provider."""

    source: str
    language: str
    provider: str
    rows: int | None
    """Rows of the source; on the first entry of a source alone, since a row may hold documents of several providers."""
    documents: int | None
    """Documents that begin in the rows, each as often as it was read; None where sizes are declared."""
    bytes: int
    """Text bytes, of a document that is not read whole in proportion to its tokens."""
    tokens: int
    """Tokens, padding not counted."""
    epochs: float | None
    """How often the source was read; on the first entry of a source alone."""
    left_over_tokens: int | None
    """Tokens that were passed over where rows began to be made otherwise; on the first entry of a source alone."""
    size: str = "measured"
    """`measured` in stores, or `declared` by the source."""


def ledger(declared: Experiment, order: Order, position: int, skipped: Sequence[Range] = ()) -> list[Entry]:
    """What the first `position` rows of a run hold, but for ranges that were skipped.

    Args:
        declared: the experiment.
        order: the order of its rows.
        position: rows consumed.
        skipped: ranges of rows that were passed over.
    """
    counts = _counts(order, position)
    for start, stop in merged(skipped):
        after, before = (_counts(order, min(at, position)) for at in (stop, start))
        for name in counts:
            counts[name] = counts[name] - (after[name] - before[name])
    left_over = dict.fromkeys(order.names, 0)
    for stretch, _ in order.read_until(position):
        for name, tokens in zip(order.names, stretch.left_over, strict=True):
            left_over[name] += tokens
    entries = []
    last = order.stretch_at(max(position - 1, 0))
    for source, rows in zip(declared.data.sources, last.sources, strict=True):
        entries += _entries(source, counts[source.name], rows.packing.store.providers, left_over[source.name])
    return entries


@dataclasses.dataclass(frozen=True)
class _Count:
    rows: int
    epochs: float
    amounts: np.ndarray
    """`[providers + 1, 3]`: documents, bytes and tokens."""

    def __sub__(self, other: "_Count") -> "_Count":
        return _Count(self.rows - other.rows, self.epochs - other.epochs, self.amounts - other.amounts)

    def __add__(self, other: "_Count") -> "_Count":
        return _Count(self.rows + other.rows, self.epochs + other.epochs, self.amounts + other.amounts)


def _counts(order: Order, position: int) -> dict[str, _Count]:
    counts: dict[str, _Count] = {}
    for name, rows in zip(order.names, order.stretches[0].sources, strict=True):
        size = 1 + len(rows.packing.store.providers or ())
        counts[name] = _Count(0, 0.0, np.zeros((size, 3), np.int64))
    for stretch, numbers in order.read_until(position):
        for name, rows, begin, end in zip(order.names, stretch.sources, stretch.begins, numbers, strict=True):
            amounts = rows.consumed(end) - rows.consumed(begin) if end > begin else 0 * counts[name].amounts
            epochs = float(amounts[:, 2].sum()) / rows.packing.num_tokens
            counts[name] += _Count(end - begin, epochs, amounts)
    return counts


def _entries(source: Source, count: _Count, providers: list[str] | None, left_over: int) -> Iterable[Entry]:
    """One entry, or one for each provider of which something was read."""
    by_name: dict[str, np.ndarray] = {}
    for name, amounts in zip((source.provider, *(providers or ())), count.amounts, strict=True):
        by_name[name] = by_name.get(name, 0) + amounts
    read = {name: amounts for name, amounts in by_name.items() if amounts.any()} or {source.provider: np.zeros(3, int)}
    for i, (name, (documents, size, tokens)) in enumerate(read.items()):
        once = (count.rows, count.epochs, left_over) if i == 0 else (None, None, None)
        yield Entry(
            source=source.name,
            language=fold(source.language) or source.language,
            provider=name,
            rows=once[0],
            documents=int(documents),
            bytes=int(size),
            tokens=int(tokens),
            epochs=once[1],
            left_over_tokens=once[2],
        )


def totals(entries: Iterable[Entry], by: str) -> dict[str, dict[str, int]]:
    """Documents, bytes and tokens of the entries, summed by `language`, `provider` or `source`."""
    found: dict[str, dict[str, int]] = {}
    for entry in entries:
        total = found.setdefault(getattr(entry, by), {"documents": 0, "bytes": 0, "tokens": 0})
        for name in total:
            total[name] += getattr(entry, name) or 0
    return found
