"""Which source each row is drawn from: exact integer weights, each source within one row of its share at any place.

Draw j of a source with share w/D must fall in its window of places, from floor(j D/w) to ceil((j+1) D/w); taking, at
each place, the draw whose window closes first keeps every draw in its window, and every source within one of its share
(Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980; as just-in-time scheduling: Steiner and
Yeomans, Management Science 39, 1993).

To find the draw at place three thousand million without the ones before it, the places are cut into blocks at least as
long as the widest window, and the counts at each cut are fixed by apportionment: every source has its share rounded
down or up. Let f be the share of the draw that straddles the cut which lies before it. A choice of the draws that are
rounded up leaves room for all windows on the left if among the straddling draws that open at or after any place at
most ceil(sum f) are chosen, and on the right if among those that close by any place at least floor(sum f) are. Both
families of sets are nested, so a rounding of f that keeps both exists, and the greedy choice, the earliest closing
first as long as the first rule holds, keeps the second one too (it is a greedy base of a laminar matroid).
"""

import functools
import heapq
import math
from collections.abc import Iterator

import numpy as np

_MIN_BLOCK = 2**12
_MAX_BLOCK = 2**21
"""The longest block: memory grows with it."""


class Schedule:
    """The source of every place, for positive integer weights; their sum is the denominator D.

    Sources that come less than once in `_MAX_BLOCK` places, of weight W together, have the places in the middle of
    the windows of one source of that weight, and divide them by a schedule of their own. The others share the rest.
    Where there are such sources, one of weight w is within 1 + w / 2W of its share at any place, and one of the others
    within 1 + w / 2(D - W); elsewhere all are within one.
    """

    def __init__(self, weights: tuple[int, ...]) -> None:
        self._total = sum(weights)
        is_rare = np.array([weight * _MAX_BLOCK < self._total for weight in weights])
        self._common, self._rare = np.flatnonzero(~is_rare), np.flatnonzero(is_rare)
        self._blocks = _Blocks(tuple(weights[i] for i in self._common))
        self._weight = sum(weights[i] for i in self._rare)
        self._inner = Schedule(tuple(weights[i] for i in self._rare)) if len(self._rare) else None

    def _num_rare(self, position: int) -> int:
        """How many of the first `position` places are of rare sources: j with (2 j + 1) D < 2 W position."""
        return (2 * self._weight * position - 1 - self._total) // (2 * self._total) + 1 if self._weight else 0

    def place(self, index: int) -> tuple[int, int]:
        """Source of place `index`, and how many places before it are of that source."""
        rare = self._num_rare(index)
        if self._inner is not None and self._num_rare(index + 1) > rare:
            source, before = self._inner.place(rare)
            return int(self._rare[source]), before
        source, before = self._blocks.place(index - rare)
        return int(self._common[source]), before

    def drawn(self, position: int) -> np.ndarray:
        """How many of the first `position` places are of each source, int64."""
        rare = self._num_rare(position)
        found = np.zeros(len(self._common) + len(self._rare), np.int64)
        found[self._common] = self._blocks.drawn(position - rare)
        if self._inner is not None:
            found[self._rare] = self._inner.drawn(rare)
        return found

    def forget(self) -> None:
        """Releases the blocks that are kept for the next places."""
        self._blocks.forget()
        if self._inner is not None:
            self._inner.forget()


class _Blocks:
    """A schedule of sources of which each comes at least once in `_MAX_BLOCK` places."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self._weights = np.array(weights, np.int64)
        self.denominator = int(self._weights.sum())
        widest = -(-self.denominator // int(self._weights.min()))
        self.block_length = max(_MIN_BLOCK, 1 << (widest - 1).bit_length())
        self._block = functools.lru_cache(maxsize=2)(self._make_block)

    def place(self, index: int) -> tuple[int, int]:
        """Source of place `index`, and how many places before it are of that source."""
        block, offset = divmod(index, self.block_length)
        order, before = self._block(block)
        return int(order[offset]), int(before[offset])

    def drawn(self, position: int) -> np.ndarray:
        """How many of the first `position` places are of each source, int64."""
        block, offset = divmod(position, self.block_length)
        counts = self.cut(block * self.block_length)
        if offset:
            counts = counts + np.bincount(self._block(block)[0][:offset], minlength=len(counts))
        return counts

    def forget(self) -> None:
        """Releases the blocks that are kept for the next places."""
        self._block.cache_clear()

    def cut(self, position: int) -> np.ndarray:
        """The same at a multiple of the block's length, without drawing."""
        whole, part = np.divmod(position * self._weights, self.denominator)
        straddling = np.flatnonzero(part)
        chosen = int(part.sum()) // self.denominator
        opens, closes = self._windows(straddling, whole[straddling])
        latest = np.argsort(-opens, kind="stable")
        rank = np.empty(len(latest), np.int64)
        rank[latest] = np.arange(len(latest))
        room = -(-np.cumsum(part[straddling][latest]) // self.denominator)
        for entry in np.argsort(closes, kind="stable"):
            if chosen == 0:
                break
            if room[rank[entry] :].min() >= 1:
                room[rank[entry] :] -= 1
                whole[straddling[entry]] += 1
                chosen -= 1
        assert chosen == 0
        return whole

    def _windows(self, sources: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First place, and last-plus-one, at which draw `draws[i]` of source `sources[i]` may fall."""
        weights = self._weights[sources]
        return draws * self.denominator // weights, -(-(draws + 1) * self.denominator // weights)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place of a block, and how many of that source are before it in the whole schedule."""
        start = block * self.block_length
        first, last = self.cut(start), self.cut(start + self.block_length)
        counts = last - first
        sources = np.repeat(np.arange(len(counts)), counts)
        draws = np.arange(self.block_length) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        opens, closes = self._windows(sources, draws)
        order = _earliest_first(opens - start, closes - start, sources)
        before = np.empty(self.block_length, np.int64)
        before[np.argsort(order, kind="stable")] = draws
        return order, before


def _earliest_first(opens: np.ndarray, closes: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """The sources in the order in which their draws are taken: of the open windows, the one that closes first."""
    total, size = len(sources), int(sources.max()) + 1
    by_opening = np.argsort(opens, kind="stable")
    opening = _values(np.maximum(opens, 0)[by_opening])
    keys = _values((np.minimum(closes, total) * size + sources)[by_opening])

    def take() -> Iterator[int]:
        window: list[int] = []
        opened = next(opening)
        for place in range(total):
            while opened <= place:
                heapq.heappush(window, next(keys))
                opened = next(opening, total)
            yield heapq.heappop(window)

    closing, order = np.divmod(np.fromiter(take(), np.int64, total), size)
    assert np.all(closing > np.arange(total))
    return order.astype(np.int32)


def _values(array: np.ndarray) -> Iterator[int]:
    """The values of an array as Python integers, in less memory than a list of them takes."""
    for start in range(0, len(array), _MIN_BLOCK):
        yield from array[start : start + _MIN_BLOCK].tolist()


def apportion(shares: list[float], total: int) -> list[int]:
    """Positive integers that sum to `total`, as near to proportional as may be (largest remainders).

    >>> apportion([0.5, 0.3, 0.2], 10)
    [5, 3, 2]
    """
    scale = total / math.fsum(shares)
    exact = np.array(shares) * scale
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    missing = total - int(counts.sum())
    order = np.argsort(counts - exact, kind="stable")
    if missing >= 0:
        counts[order[:missing]] += 1
    else:  # many were lifted to one: the largest give
        for _ in range(-missing):
            counts[np.argmax(counts)] -= 1
    return counts.tolist()
