"""Ranges of rows that a run skips, and the batches between them."""

from collections.abc import Iterable, Iterator, Sequence

from euroflax.experiment import Span

Range = tuple[int, int]
"""Rows of the run, from the first to before the last."""


def next_position(position: int, skipped: Sequence[Range]) -> int:
    """The row that is read next at a position: itself, or where the ranges that it lies in end.

    >>> next_position(4, [(4, 8), (8, 9)])
    9
    """
    for start, stop in sorted(skipped):
        if start <= position < stop:
            position = stop
    return position


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same rows in ranges that neither touch nor overlap.

    >>> merged([(4, 8), (2, 9), (10, 12)])
    [(2, 9), (10, 12)]
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(stop, found.pop()[1])
        found.append((start, stop))
    return found


def batch_stop(span: Span, position: int, skipped: Sequence[Range]) -> int:
    """The end of the batch that begins at a position: it reaches into no range and not over the stage's end."""
    starts = [start for start, _ in skipped if start > position]
    return min(position + span.batch_rows, span.stop_row, *starts)


def pieces(span: Span, position: int, skipped: Sequence[Range]) -> Iterator[Range]:
    """The rows of a stage that are read from a position on."""
    position = next_position(max(position, span.first_row), skipped)
    while position < span.stop_row:
        stop = min([span.stop_row, *(start for start, _ in skipped if start > position)])
        yield position, stop
        position = next_position(stop, skipped)
