"""The order in which the rows of a source pass: windows in a new order each epoch, rows mixed in groups of them."""

import functools
import hashlib

import numpy as np

from euroflax.data.packing import AMOUNTS, Packing

_GROUPS = 16
_MAX_WINDOWS_IN_GROUP = 16


def shuffled(count: int, *key: object) -> np.ndarray:
    """`range(count)` in a pseudorandom order that the key decides, the same on every machine, int64.

    In the order of the outputs of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014) from a hash of the key.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    seed = np.uint64(int.from_bytes(digest[:8], "little"))
    values = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.argsort(values ^ values >> np.uint64(31), kind="stable")


class SourceRows:
    """The rows of one source, epoch after epoch: row n of them is a function of seed, source, packing and n.

    An epoch passes all windows in an order of its own, in groups: a sixteenth of the windows or 16 of them. The rows of
    a group are mixed among each other. What changes how rows are made begins at the next group.
    """

    def __init__(self, packing: Packing, name: str, seed: int) -> None:
        self.packing = packing
        self._name, self._seed = name, seed
        self._size = min(max(packing.num_windows // _GROUPS, 1), _MAX_WINDOWS_IN_GROUP)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._group = functools.lru_cache(maxsize=2)(self._make_group)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows in their order, and the rows before each group of them and before the end."""
        windows = shuffled(self.packing.num_windows, self._seed, self._name, epoch)
        rows = np.diff(self.packing.first_rows)[windows]
        sums = np.add.reduceat(rows, np.arange(0, len(rows), self._size))
        return windows, np.concatenate([[0], np.cumsum(sums)])

    def _make_group(self, epoch: int, group: int) -> np.ndarray:
        """The rows of a group in their order."""
        windows = self._epoch(epoch)[0][group * self._size : (group + 1) * self._size]
        firsts, stops = (self.packing.first_rows[windows + after].tolist() for after in (0, 1))
        rows = np.concatenate([np.arange(first, stop) for first, stop in zip(firsts, stops, strict=True)])
        return rows[shuffled(len(rows), self._seed, self._name, epoch, group)]

    def row(self, number: int) -> tuple[int, int]:
        """The epoch of row `number`, and its place in the packing."""
        epoch, offset = divmod(number, self.packing.num_rows)
        firsts = self._epoch(epoch)[1]
        group = int(firsts.searchsorted(offset, "right")) - 1
        return epoch, int(self._group(epoch, group)[offset - firsts[group]])

    def group_after(self, number: int) -> tuple[int, int]:
        """The epoch and the group that is the first to begin at row `number` or after it."""
        epoch, offset = divmod(number, self.packing.num_rows)
        firsts = self._epoch(epoch)[1]
        group = int(firsts.searchsorted(offset, "left"))
        return (epoch, group) if group < len(firsts) - 1 else (epoch + 1, 0)

    def number_of(self, epoch: int, group: int) -> int:
        """The number of the first row of a group."""
        return epoch * self.packing.num_rows + int(self._epoch(epoch)[1][group])

    def consumed(self, number: int) -> np.ndarray:
        """What the first `number` rows hold, int64 `[providers + 1, 3]`: documents, bytes and tokens.

        The first line is of documents without a provider of their own; the others as the store lists providers.
        A document counts where it begins, and its bytes in proportion to the tokens that are read of it.
        """
        epochs, offset = divmod(number, self.packing.num_rows)
        windows, firsts = self._epoch(epochs)
        group = int(firsts.searchsorted(offset, "right")) - 1
        found = self._sum_of_windows(windows[: group * self._size])
        if epochs:
            found = found + epochs * self._sum_of_windows(np.arange(self.packing.num_windows))
        rows = np.sort(self._group(epochs, group)[: offset - firsts[group]])
        for window in np.sort(windows[group * self._size : (group + 1) * self._size]):
            first, last = self.packing.first_rows[window : window + 2].tolist()
            mine = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)]
            if len(mine):
                pieces, counts = self.packing.pieces_of(first, last)
                pieces = pieces[np.repeat(np.isin(np.arange(first, last), mine), counts)]
                providers = self.packing.providers_of(pieces)
                found = found + self._by_provider(providers, pieces["begins"], pieces["bytes"], pieces["count"])
        return found

    def _sum_of_windows(self, windows: np.ndarray) -> np.ndarray:
        totals = self.packing.totals.read(0, len(self.packing.totals))
        totals = totals[np.isin(totals["window"], windows)]
        return self._by_provider(totals["provider"], *(totals[name] for name in AMOUNTS))

    def _by_provider(self, providers: np.ndarray, *values: np.ndarray) -> np.ndarray:
        size = 1 + len(self.packing.store.providers or ())
        return np.stack([np.bincount(providers + 1, value, size).astype(np.int64) for value in values], axis=1)
