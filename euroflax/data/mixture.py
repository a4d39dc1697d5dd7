"""The mixture: shares of sources as integer weights, and from them the source of each row of the run."""

import dataclasses
import functools
import heapq
import math

import numpy as np

from euroflax.data.packing import num_rows
from euroflax.data.prepare import Prepared
from euroflax.experiment import Experiment

_DENOMINATOR = 2**16


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Row weights of the sources as integers over their sum; they repeat with that period."""

    names: tuple[str, ...]
    weights: tuple[int, ...]
    rows_per_epoch: tuple[int, ...]

    @property
    def denominator(self) -> int:
        """Sum of the weights."""
        return sum(self.weights)

    @functools.cached_property
    def _period(self) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place of a period, and how many places before it were of the same source."""
        order = schedule(self.weights)
        rank = np.zeros(len(order), np.int64)
        for source in range(len(self.weights)):
            mine = order == source
            rank[mine] = np.arange(mine.sum())
        return order, rank

    def place(self, index: int) -> tuple[int, int]:
        """Source of row `index` of the run, and how many rows before it were of that source."""
        order, rank = self._period
        period, offset = divmod(index, self.denominator)
        source = int(order[offset])
        return source, period * self.weights[source] + int(rank[offset])

    def drawn(self, position: int) -> list[int]:
        """Rows of each source among the first `position` rows of the run."""
        order, _ = self._period
        periods, offset = divmod(position, self.denominator)
        counts = np.bincount(order[:offset], minlength=len(self.weights))
        return [periods * weight + int(count) for weight, count in zip(self.weights, counts, strict=True)]

    def to_json(self) -> dict:
        """What the manifest records."""
        return {
            "denominator": self.denominator,
            "weights": dict(zip(self.names, self.weights, strict=True)),
            "rows_per_epoch": dict(zip(self.names, self.rows_per_epoch, strict=True)),
        }


def resolve(experiment: Experiment, prepared: Prepared) -> Resolved:
    """The experiment's shares as row weights, once the stores tell how much text a row of each source holds."""
    length, mixture = experiment.data.sequence_length, experiment.data.mixture
    stores = [store for _, store in prepared.train]
    names = tuple(source.name for source, _ in prepared.train)
    rows = tuple(num_rows(store, length) for store in stores)
    sizes = [store.num_bytes if mixture.unit == "bytes" else store.num_tokens for store in stores]
    shares = [mixture.weights[name] for name in names] if mixture.weights else [size / sum(sizes) for size in sizes]
    row_shares = [share * count / size for share, count, size in zip(shares, rows, sizes, strict=True)]
    weights = apportion(row_shares, _DENOMINATOR)
    divisor = math.gcd(*weights)
    return Resolved(names, tuple(weight // divisor for weight in weights), rows)


def apportion(shares: list[float], total: int) -> list[int]:
    """Positive integers that sum to `total`, as near to proportional as may be (largest remainders).

    >>> apportion([0.5, 0.3, 0.2], 10)
    [5, 3, 2]
    """
    scale = total / math.fsum(shares)
    exact = [share * scale for share in shares]
    counts = [max(1, math.floor(value)) for value in exact]
    order = sorted(range(len(shares)), key=lambda i: exact[i] - counts[i], reverse=True)
    missing = total - sum(counts)
    for i in range(abs(missing)):
        if missing > 0:
            counts[order[i % len(order)]] += 1
        else:
            counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
    return counts


def schedule(weights: tuple[int, ...]) -> np.ndarray:
    """An order in which each source comes `weight` times, and at no place more than one from its exact share.

    Each draw has a window of places in which it must fall; the open window that closes first goes first.
    Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980); just-in-time form: Steiner and
    Yeomans, Management Science 39 (1993).

    >>> schedule((2, 1, 1)).tolist()
    [0, 1, 2, 0]
    """
    total = sum(weights)
    opening: list[list[tuple[int, int, int]]] = [[] for _ in range(total)]
    for source, weight in enumerate(weights):
        for draw in range(weight):
            closes = -(-(draw + 1) * total // weight)
            opening[draw * total // weight].append((closes, source, draw))
    order = np.empty(total, np.int32)
    window: list[tuple[int, int, int]] = []
    for place in range(total):
        for draw in opening[place]:
            heapq.heappush(window, draw)
        order[place] = heapq.heappop(window)[1]
    return order
