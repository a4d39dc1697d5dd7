"""Work of other processes: documents to tokens, in order and with few batches in memory, and a tokenizer's training."""

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
from multiprocessing.connection import Connection

import numpy as np

from euroflax.data import documents, tokenizer
from euroflax.data.documents import BadLine, Document, RawBatch
from euroflax.data.tokenizer import Tokenizer
from euroflax.ending import SIGNALS, signals_held
from euroflax.experiment import Experiment, ExperimentError, RunFailed, Source

TRAIN, HELD_OUT, ALL = "train", "held-out", "all"
_DIED = (
    "a worker process died, as in a script (a file, not stdin) that calls without if __name__ == '__main__':, or for "
    "want of memory; nothing half is left"
)
_REPORTED_BYTES = 1 << 20
_LOOK_SECONDS = 0.2


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


Tokenize = Callable[[Iterator[RawBatch], Source, str, int], Iterator[Tokenized]]


class TokenizingPool:
    """Worker processes that tokenize batches of lines."""

    def __init__(self, tokenizer_path: pathlib.Path) -> None:
        workers = max(1, min(len(os.sched_getaffinity(0)), 64))
        context = multiprocessing.get_context("spawn")
        self._in_flight = 2 * workers
        with signals_held():
            self._pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (str(tokenizer_path),))

    def tokenize(self, batches: Iterator[RawBatch], source: Source, split: str, most_bytes: int) -> Iterator[Tokenized]:
        """The documents of each batch that belong to a split, in the order of the batches."""
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for batch in batches:
            with signals_held():  # since a submission may start a worker
                waiting.append(self._pool.submit(_tokenize, batch, source, split, most_bytes))
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
        raise RunFailed(f"source {source.name}: {_DIED}") from error


_worker_tokenizer: Tokenizer


def _serve() -> None:
    """Runs first in each worker: no reaction to signals, which are the parent's to handle, and no life without it.

    Until here they are held: a worker is started inside `signals_held`.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _start_worker(tokenizer_path: str) -> None:
    global _worker_tokenizer
    _serve()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = tokenizer.read(pathlib.Path(tokenizer_path))


def _tokenize(batch: RawBatch, source: Source, split: str, most_bytes: int) -> Tokenized:
    """What `Tokenized` says of a batch.

    Raises:
        ExperimentError: a library failed on it; their own errors may not survive the way to another process.
    """
    try:
        return _tokenized(batch, source, split, most_bytes)
    except BaseException as error:  # a panic in Rust is no Exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        last = batch.first_line + len(batch.lines) - 1
        raise ExperimentError(
            f"source {source.name}: lines {batch.first_line} to {last} of {batch.file} cannot be tokenized ({reason}); "
            "correct the tokenizer or take them out"
        ) from None


def _tokenized(batch: RawBatch, source: Source, split: str, most_bytes: int) -> Tokenized:
    parsed = list(documents.parse(batch, source, most_bytes))
    kept = [item for item in parsed if isinstance(item, Document) and _belongs(item, source, split)]
    known = _worker_tokenizer
    encoded = known.encode([document.text for document in kept])
    rows = [
        {
            "id": document.id,
            "bytes": len(document.text.encode()),
            "provider": document.provider,
            "licence": document.licence,
            "lost": known.lost_bytes(document.text, ids),
        }
        for document, ids in zip(kept, encoded, strict=True)
    ]
    arrays = [np.array([known.bos, *ids, known.eos], np.uint32) for ids in encoded]
    return Tokenized(
        tokens=np.concatenate([np.zeros(0, np.uint32), *arrays]),
        rows=rows,
        lengths=np.array([len(array) for array in arrays], np.int64),
        bad=[item for item in parsed if isinstance(item, BadLine)],
        lines=len(parsed),
        bytes_read=batch.bytes_read,
    )


def _belongs(document: Document, source: Source, split: str) -> bool:
    return split == ALL or documents.is_held_out(document, source.holdout_fraction) == (split == HELD_OUT)


def train_apart(experiment: Experiment, files: dict[str, list[pathlib.Path]], advance: Callable[[int], None]) -> str:
    """What `tokenizer.train` returns; this process looks up meanwhile, and can be told to stop.

    Args:
        experiment: its sources and the size of its vocabulary are used.
        files: the files of each source by name.
        advance: told the bytes read since it was told last, and of none several times a second while the vocabulary
            is made of what was read; what it raises ends the training.

    Raises:
        ExperimentError: the sample does not fill the vocabulary.
        RunFailed: the process that trains died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_train, args=(sender, experiment, files), daemon=True)
    has_read = False
    try:
        with signals_held():
            worker.start()
        sender.close()
        while True:
            if receiver.poll(_LOOK_SECONDS):
                try:
                    told = receiver.recv()
                except (EOFError, OSError) as error:  # OSError: it died in the middle of a message
                    advance(0)
                    raise RunFailed(f"data.tokenizer: {_DIED}") from error
                if isinstance(told, ExperimentError):
                    raise told
                if isinstance(told, str):
                    return told
                advance(told)
                has_read = told == 0
            elif has_read:  # and not before: a read that hangs is no sign of life
                advance(0)
    finally:
        worker.kill()
        worker.join()
        receiver.close()


def _train(sender: Connection, experiment: Experiment, files: dict[str, list[pathlib.Path]]) -> None:
    _serve()
    read = 0

    def advance(size: int) -> None:
        nonlocal read
        read += size
        if read >= _REPORTED_BYTES or size == 0:
            sender.send(read)
            read = 0
        if size == 0:
            sender.send(0)

    try:
        sender.send(tokenizer.train(experiment, files, advance))
    except ExperimentError as fault:
        sender.send(fault)
    except BaseException as error:  # a panic in Rust is no Exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        sender.send(ExperimentError(f"data.tokenizer cannot be trained ({reason}); correct the text"))
