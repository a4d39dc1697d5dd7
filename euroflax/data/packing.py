"""Rows out of a token store: fixed windows of its tokens, marked by document, in a seeded order for each epoch."""

import dataclasses
import functools
import hashlib

import numpy as np

from euroflax.data.store import Store

_ROUNDS = 6
_MASK = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One training sequence; arrays are `[L]`."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    """1 where the target belongs to the same document as the token, else 0."""
    segment_ids: np.ndarray
    """1, 2, ... for the documents of the row, 0 for padding."""
    positions: np.ndarray
    """Positions within the part of the document that is in the row."""
    documents: range
    """Numbers of the documents in the store."""


def num_rows(store: Store, length: int) -> int:
    """Rows of `length` tokens in one pass over a store: each token but the first is a target once."""
    return max(1, -(-(store.num_tokens - 1) // length))


def cut_row(store: Store, index: int, length: int, pad: int) -> Row:
    """Row `index` of a store in the order of its documents: tokens `index * length` onwards, padded at the end."""
    start = index * length
    stop = min(start + length + 1, store.num_tokens)
    read = store.read(start, stop)
    first = int(np.searchsorted(store.ends, start, "right"))
    last = int(np.searchsorted(store.ends, stop - 1, "right"))
    begins = np.zeros(len(read), np.int32)
    begins[np.asarray(store.ends[first:last]) - start] = 1
    begins[0] = 1
    segments = np.cumsum(begins, dtype=np.int32)
    indices = np.arange(len(read), dtype=np.int32)
    positions = indices - indices[begins == 1][segments - 1]

    def padded(values: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.pad(values.astype(np.int32), (0, length - len(values)), constant_values=fill)

    return Row(
        tokens=padded(read[:-1], pad),
        targets=padded(read[1:], pad),
        loss_weights=padded(segments[1:] == segments[:-1]).astype(np.float32),
        segment_ids=padded(segments[:-1]),
        positions=padded(positions[:-1]),
        documents=range(first, first + int(segments[-2]) if len(segments) > 1 else first),
    )


@functools.lru_cache(maxsize=4096)
def epoch_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """Round keys of the permutation of a source's rows in an epoch."""
    words = [hashlib.sha256(f"{seed}/{source}/{epoch}/{i}".encode()).digest() for i in range(_ROUNDS)]
    return tuple(int.from_bytes(word[:8], "big") for word in words)


def permute(index: int, size: int, keys: tuple[int, ...]) -> int:
    """Place of `index` in a pseudorandom permutation of `range(size)`, in constant memory.

    A Feistel network over the next power of four, walked until it falls below `size` (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
