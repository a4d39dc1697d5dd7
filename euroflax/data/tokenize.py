"""Documents to tokens, spread over worker processes: in order, and with a bounded number of batches in memory."""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np

from euroflax.data import documents, tokenizer
from euroflax.data.documents import BadLine, Document, RawBatch
from euroflax.data.tokenizer import Tokenizer
from euroflax.experiment import RunFailed, Source

TRAIN, HELD_OUT, ALL = "train", "held-out", "all"


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The documents of a batch of lines."""

    tokens: np.ndarray
    """Their tokens back to back, each with its beginning and end, uint32."""
    rows: list[dict]
    """What is known of each document."""
    lengths: np.ndarray
    """Number of tokens of each document, int64."""
    bad: list[BadLine]
    """Lines that hold no document."""
    lines: int
    """Lines that were not blank."""
    bytes_read: int
    """How far into the file reading had come."""


Tokenize = Callable[[Iterator[RawBatch], Source, str], Iterator[Tokenized]]


class TokenizingPool:
    """Worker processes that tokenize batches of lines."""

    def __init__(self, tokenizer_path: pathlib.Path) -> None:
        workers = max(1, min(len(os.sched_getaffinity(0)), 64))
        context = multiprocessing.get_context("spawn")
        self._in_flight = 2 * workers
        self._pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (str(tokenizer_path),))

    def tokenize(self, batches: Iterator[RawBatch], source: Source, split: str) -> Iterator[Tokenized]:
        """The documents of each batch that belong to a split, in the order of the batches."""
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for batch in batches:
            waiting.append(self._pool.submit(_tokenize, batch, source, split))
            if len(waiting) >= self._in_flight:
                yield _result(waiting.popleft(), source)
        while waiting:
            yield _result(waiting.popleft(), source)

    def close(self) -> None:
        """Ends the workers once they have finished the batches that they are at."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _result(future: concurrent.futures.Future, source: Source) -> Tokenized:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RunFailed(
            f"source {source.name}: a worker process died, for want of memory or of if __name__ == '__main__': in the "
            "script that called; nothing half is left"
        ) from error


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_path: str) -> None:
    """Runs first in each worker: no reaction to signals, which are the parent's to handle, and no life without it."""
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker_tokenizer = tokenizer.read(pathlib.Path(tokenizer_path))


def _tokenize(batch: RawBatch, source: Source, split: str) -> Tokenized:
    parsed = list(documents.parse(batch, source))
    kept = [item for item in parsed if isinstance(item, Document) and _belongs(item, source, split)]
    known = _worker_tokenizer
    encoded = [[known.bos, *ids, known.eos] for ids in known.encode([document.text for document in kept])]
    return Tokenized(
        tokens=np.array([token for ids in encoded for token in ids], np.uint32),
        rows=[{"id": d.id, "bytes": len(d.text.encode()), "provider": d.provider, "licence": d.licence} for d in kept],
        lengths=np.array([len(ids) for ids in encoded], np.int64),
        bad=[item for item in parsed if isinstance(item, BadLine)],
        lines=len(parsed),
        bytes_read=batch.bytes_read,
    )


def _belongs(document: Document, source: Source, split: str) -> bool:
    return split == ALL or documents.is_held_out(document, source.holdout_fraction) == (split == HELD_OUT)
