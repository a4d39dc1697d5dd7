"""The speed of the loader over an experiment's sources on one core, beside Grain's mixing and Hugging Face's.

All three read the same rows of the same packings, so that the ratios are those of drawing and feeding alone.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from rich.table import Table

from euroflax.console import ConsoleDisplay, SilentDisplay
from euroflax.data import prepare as preparation
from euroflax.data.loader import Batch, Rows, batches, empty_batch, fill_row
from euroflax.data.order import Stretch
from euroflax.data.packing import Packing
from euroflax.data.prepare import Prepared
from euroflax.experiment import Experiment
from euroflax.folders import Folders
from euroflax.training.stop import Stop

ROWS = 20_000
_BATCH_ROWS = 8
_WARM_ROWS = 2000
_PART_ROWS = 2000
_SECONDS = 60.0
_FAR_ROW = 3_000_000_000

Display = ConsoleDisplay | SilentDisplay


def bench(declared: Experiment, folders: Folders, num_rows: int, display: Display, stop: Stop) -> dict:
    """Reads rows of the run in both packings with each loader, and says how fast.

    The other loaders are given a minute at most. Speeds are medians over parts of the rows, in tokens of rows, padding
    counted.

    Raises:
        ExperimentError: the data is at fault.
        Interrupted: it was stopped.
    """
    loaders = []
    for packing in ("concat", "best-fit"):
        data = dataclasses.replace(declared.data, packing=packing)
        length = declared.data.sequence_length
        first = declared.spans[0]  # the first stage alone: its cap on epochs is not for the tokens of later ones
        tokens = first.tokens_at(first.stop_row)
        training = dataclasses.replace(declared.training, tokens=tokens, batch_tokens=_BATCH_ROWS * length)
        variant = dataclasses.replace(declared, data=data, training=training, stages=())
        prepared = preparation.prepare(variant, folders, display.progress)
        display.close()
        with _on_one_core():
            rows, opening = _open(variant, prepared)
            stretch = rows.order.stretches[0]
            feeds: dict[str, Callable[[], Iterator[Batch]] | None] = {
                "euroflax": lambda v=variant, r=rows: batches(v, r, 0, range),
                "grain IterDataset.mix": lambda s=stretch, p=prepared: _grain(s, p),
                "datasets interleave": _hugging_face(stretch, prepared),
            }
            before = None
            for name, feed in feeds.items():
                display.note(f"measuring   {name}, {packing}")
                found = {"loader": name, "packing": packing, "tokens_per_second": None}
                if feed is not None:
                    found |= _measure(feed, num_rows, length, stop, None if name == "euroflax" else _SECONDS)
                before = before or found["tokens_per_second"]
                speed = found["tokens_per_second"]
                found["times_slower"] = before / speed if before and speed else None
                loaders.append(found | (opening if name == "euroflax" else {}))
    return {"sources": len(declared.data.sources), "sequence_length": length, "cores": 1, "loaders": loaders}


@contextlib.contextmanager
def _on_one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _open(declared: Experiment, prepared: Prepared) -> tuple[Rows, dict]:
    """Opens the rows far into the run, or at its end, and says how long it took and how much memory."""
    row = min(_FAR_ROW, declared.total_rows - 1)
    held, start = _resident_bytes(), time.perf_counter()
    rows = Rows(declared, prepared)
    rows.batch(declared.span_at(row), [row])
    seconds = time.perf_counter() - start
    return rows, {"open_row": row, "open_seconds": seconds, "open_bytes": _resident_bytes() - held}


def _measure(
    feeds: Callable[[], Iterator[Batch]], num_rows: int, length: int, stop: Stop, most_seconds: float | None
) -> dict:
    feed = _without_end(feeds)
    for _ in range(0, min(_WARM_ROWS, num_rows), _BATCH_ROWS):
        next(feed)
    held, read, began = _resident_bytes(), 0, time.perf_counter()
    speeds = []
    part = max(min(num_rows // 10, _PART_ROWS) // _BATCH_ROWS, 1)
    while read < num_rows and (most_seconds is None or time.perf_counter() - began < most_seconds):
        start = time.perf_counter()
        for _ in range(part):
            next(feed)
        stop.check()
        read += part * _BATCH_ROWS
        speeds.append(part * _BATCH_ROWS * length / (time.perf_counter() - start))
    growth = _resident_bytes() - held
    return {"rows": read, "tokens_per_second": statistics.median(speeds), "growth_bytes": growth}


def _without_end(feeds: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """The batches of a run over and over: it may be shorter than the measurement."""
    while True:
        yield from feeds()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Random:
    """The rows of one packing by number, as Grain wants a source."""

    def __init__(self, packing: Packing, pad: int) -> None:
        self._packing, self._pad = packing, pad

    def __len__(self) -> int:
        return self._packing.num_rows

    def __getitem__(self, index: int) -> Batch:
        batch = empty_batch(1, self._packing.manifest["sequence_length"], self._pad)
        fill_row(batch, 0, self._packing, index)
        return {key: values[0] for key, values in batch.items()}


def _sources(stretch: Stretch, prepared: Prepared) -> list[_Random]:
    return [_Random(rows.packing, prepared.tokenizer.pad) for rows in stretch.sources]


def _grain(stretch: Stretch, prepared: Prepared) -> Iterator[Batch]:
    import grain

    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    parts = [
        grain.MapDataset.source(source).shuffle(seed=0).repeat().to_iter_dataset(options)
        for source in _sources(stretch, prepared)
    ]
    return iter(grain.IterDataset.mix(parts, stretch.weights).batch(_BATCH_ROWS))


def _hugging_face(stretch: Stretch, prepared: Prepared) -> Callable[[], Iterator[Batch]] | None:
    """None where the package is not installed."""
    if importlib.util.find_spec("datasets") is None:
        return None
    sources = _sources(stretch, prepared)

    def feed() -> Iterator[Batch]:
        datasets = importlib.import_module("datasets")

        def generate(number: int) -> Iterator[Batch]:
            source, order = sources[number], np.random.default_rng(number)
            while True:
                for index in order.permutation(len(source)):
                    yield source[int(index)]

        parts = [
            datasets.IterableDataset.from_generator(generate, gen_kwargs={"number": i}) for i in range(len(sources))
        ]
        shares = [weight / sum(stretch.weights) for weight in stretch.weights]
        mixed = iter(datasets.interleave_datasets(parts, probabilities=shares, seed=0))
        while True:
            taken = [next(mixed) for _ in range(_BATCH_ROWS)]
            yield {key: np.stack([example[key] for example in taken]) for key in taken[0]}

    return feed


def table(found: dict) -> Table:
    """The figures as a table."""
    title = f"{found['sources']} sources, rows of {found['sequence_length']:,} tokens, one core"
    shown = Table(title=title, title_justify="left", box=None)
    shown.add_column("loader")
    shown.add_column("packing")
    for name in ("rows", "tokens/s", "slower", "memory growth", "open at row", "in", "taking"):
        shown.add_column(name, justify="right")
    for line in found["loaders"]:
        speed = line["tokens_per_second"]
        if speed is None:
            shown.add_row(line["loader"], line["packing"], "not installed: pip install -e '.[bench]'")
            continue
        shown.add_row(
            line["loader"],
            line["packing"],
            f"{line['rows']:,}",
            f"{speed / 1e6:.2f}M",
            f"{line['times_slower']:.1f}x",
            f"{line['growth_bytes'] / 1e6:.1f} MB",
            *(_opening(line) if "open_row" in line else []),
        )
    return shown


def _opening(line: dict) -> list[str]:
    return [f"{line['open_row']:,}", f"{line['open_seconds']:.2f} s", f"{line['open_bytes'] / 1e6:.0f} MB"]
