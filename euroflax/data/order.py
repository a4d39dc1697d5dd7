"""The order of the rows of a run: stage after stage, source by source, as a function of position alone."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from euroflax.data.packings import recipe
from euroflax.data.prepare import Prepared
from euroflax.data.schedule import Schedule
from euroflax.data.shares import DENOMINATOR, Size, declared_shares, row_weights
from euroflax.data.shuffling import SourceRows
from euroflax.data.withdrawals import Withdrawal
from euroflax.experiment import Experiment, Span


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Rows that are drawn by the same weights from the same packings: a stage, or a part of one between block lists."""

    span: Span
    first_row: int
    stop_row: int
    weights: tuple[int, ...]
    """Rows of each source in `DENOMINATOR` rows."""
    shares: tuple[float, ...]
    """Shares as asked, of bytes or tokens."""
    sources: tuple[SourceRows, ...]
    begins: tuple[int, ...]
    """The row of each source with which the stretch begins, counted over epochs."""
    left_over: tuple[int, ...]
    """Tokens of each source before that row that no stretch reads: what was left of a window group."""

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Which source each row is of."""
        return Schedule(self.weights)

    @functools.cached_property
    def ends(self) -> list[int]:
        """The row of each source that comes next at the end of the stretch."""
        numbers = self._numbers_at(self.stop_row)
        self.schedule.forget()
        return numbers

    def numbers_at(self, position: int) -> list[int]:
        """The row of each source that comes next at a position of the run within the stretch, or at its end."""
        return self.ends if position >= self.stop_row else self._numbers_at(position)

    def _numbers_at(self, position: int) -> list[int]:
        drawn = self.schedule.drawn(position - self.first_row)
        return [begin + int(count) for begin, count in zip(self.begins, drawn, strict=True)]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row of the run comes from."""

    stretch: Stretch
    source: int
    """The number of the source in the experiment."""
    epoch: int
    row: int
    """The number of the row in the packing."""


class Order:
    """The order of all rows of a run."""

    def __init__(self, declared: Experiment, prepared: Prepared, withdrawals: tuple[Withdrawal, ...]) -> None:
        """Finds where each stretch begins, in each source.

        Raises:
            ExperimentError: a stage's cap on epochs cannot be met, or a share is too small.
        """
        self._declared = declared
        self.names = tuple(source.name for source, _ in prepared.train)
        self.withdrawals = withdrawals
        stretches: list[Stretch] = []
        for span, first_row, stop_row, withdrawal in _pieces(declared, withdrawals):
            sources = tuple(
                SourceRows(
                    prepared.packings[source.name, recipe(declared, source, span.sequence_length, withdrawal.ids)],
                    source.name,
                    declared.training.seed,
                )
                for source, _ in prepared.train
            )
            stretches.append(self._stretch(span, first_row, stop_row, sources, stretches))
        self.stretches = tuple(stretches)

    def _stretch(
        self, span: Span, first_row: int, stop_row: int, sources: tuple[SourceRows, ...], earlier: list[Stretch]
    ) -> Stretch:
        begins, left_over = [0] * len(sources), [0] * len(sources)
        if earlier:
            last = earlier[-1]
            pairs = zip(last.sources, sources, last.ends, strict=True)
            begins, left_over = (list(values) for values in zip(*(_go_on(*pair) for pair in pairs), strict=True))
        sizes = [Size.of(rows.packing) for rows in sources]
        read = [begin / rows.packing.num_rows for begin, rows in zip(begins, sources, strict=True)]
        # To the end of the stage, also beyond a later block list, of which nothing is known when the rows are read.
        rows_of_stage = span.stop_row - first_row
        asked = (span, self._declared.data.sources, sizes, rows_of_stage, read)
        shares, weights = tuple(declared_shares(*asked)), row_weights(*asked)
        return Stretch(span, first_row, stop_row, weights, shares, sources, tuple(begins), tuple(left_over))

    def stretch_at(self, index: int) -> Stretch:
        """The stretch in which a row of the run lies."""
        return next((s for s in self.stretches if index < s.stop_row), self.stretches[-1])

    def place(self, index: int) -> Place:
        """Where row `index` of the run comes from."""
        stretch = self.stretch_at(index)
        source, before = stretch.schedule.place(index - stretch.first_row)
        epoch, row = stretch.sources[source].row(stretch.begins[source] + before)
        return Place(stretch, source, epoch, row)

    def read_until(self, position: int) -> Iterator[tuple[Stretch, list[int]]]:
        """Each stretch that begins before a position, with the row of each source that comes next in it then."""
        for stretch in self.stretches:
            if stretch.first_row < position:
                yield stretch, stretch.numbers_at(min(position, stretch.stop_row))

    def to_json(self) -> list[dict]:
        """What the manifest and checkpoints record: the weights of each stretch, and where they begin."""
        return [
            {
                "stage": stretch.span.number,
                "first_row": stretch.first_row,
                "unit": stretch.span.mixture.unit,
                "shares": dict(zip(self.names, stretch.shares, strict=True)),
                "denominator": DENOMINATOR,
                "weights": dict(zip(self.names, stretch.weights, strict=True)),
                "rows_per_epoch": dict(
                    zip(self.names, (rows.packing.num_rows for rows in stretch.sources), strict=True)
                ),
                "packings": dict(zip(self.names, (rows.packing.path.name for rows in stretch.sources), strict=True)),
                "begins": dict(zip(self.names, stretch.begins, strict=True)),
                "left_over_tokens": dict(zip(self.names, stretch.left_over, strict=True)),
            }
            for stretch in self.stretches
        ]


def _pieces(declared: Experiment, withdrawals: tuple[Withdrawal, ...]) -> Iterator[tuple[Span, int, int, Withdrawal]]:
    """The stages, cut where a block list begins to hold: each with its rows and the list."""
    for span in declared.spans:
        cuts = [w.position for w in withdrawals if span.first_row < w.position < span.stop_row]
        edges = [span.first_row, *cuts, span.stop_row]
        for first_row, stop_row in itertools.pairwise(edges):
            holds = [withdrawal for withdrawal in withdrawals if withdrawal.position <= first_row]
            yield span, first_row, stop_row, holds[-1]


def _go_on(before: SourceRows, after: SourceRows, number: int) -> tuple[int, int]:
    """The row with which a source goes on where its rows may be made otherwise, and the tokens that are passed over."""
    if before.packing.path == after.packing.path:
        return number, 0
    epoch, group = before.group_after(number)
    left = before.consumed(before.number_of(epoch, group)) - before.consumed(number)
    return after.number_of(epoch, group), int(np.sum(left[:, 2]))
