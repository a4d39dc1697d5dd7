"""What each stage of a run reads of each source, by opened stores or by declared sizes."""

from collections.abc import Sequence

from euroflax.data.ledger import Entry
from euroflax.data.order import Order
from euroflax.data.shares import DENOMINATOR, Size, declared_shares, declared_size, row_weights
from euroflax.experiment import Experiment, Span
from euroflax.languages import fold


def describe_stages(declared: Experiment, order: Order | None) -> list[dict]:
    """Each stage with what is read in it of each source: natural share, share asked, rows, epochs.

    Without the order of rows over opened stores the sizes are those that the sources declare, None where they do not.

    Raises:
        ExperimentError: the mixture cannot be met.
    """
    sources = declared.data.sources
    read = [0.0] * len(sources)
    stages = []
    for span in declared.spans:
        rows = span.stop_row - span.first_row
        sizes: list[Size | None]
        if order is None:
            sizes = [declared_size(source, span.sequence_length) for source in sources]
            known = [entry for entry in sizes if entry is not None]
            drawn: list[float] | None = None
            shares: Sequence[float | None] = [span.mixture.weights.get(source.name) for source in sources]
            if len(known) == len(sources):
                shares = declared_shares(span, sources, known, rows, read)
                weights = row_weights(span, sources, known, rows, read)
                drawn = [rows * weight / DENOMINATOR for weight in weights]
        else:
            mine = [stretch for stretch in order.stretches if stretch.span == span]
            sizes = [Size.of(packed.packing) for packed in mine[-1].sources]
            shares = mine[-1].shares
            ends = (stretch.numbers_at(stretch.stop_row) for stretch in mine)
            pairs = [[e - b for b, e in zip(s.begins, end, strict=True)] for s, end in zip(mine, ends, strict=True)]
            drawn = [float(sum(counts)) for counts in zip(*pairs, strict=True)]
        stages.append(_stage(declared, span, sizes, shares, drawn, read))
        if drawn is not None:
            read = [
                before + count / (size.rows if size else 1)
                for before, count, size in zip(read, drawn, sizes, strict=True)
            ]
    return stages


def _stage(
    declared: Experiment,
    span: Span,
    sizes: Sequence[Size | None],
    shares: Sequence[float | None],
    drawn: Sequence[float] | None,
    read: Sequence[float],
) -> dict:
    unit = span.mixture.unit
    total = sum(getattr(size, unit) for size in sizes if size) if all(sizes) else None
    table = []
    for i, source in enumerate(declared.data.sources):
        size = sizes[i]
        rows = None if drawn is None else drawn[i]
        table.append(
            {
                "source": source.name,
                "language": fold(source.language) or source.language,
                "size": "unknown" if size is None else "measured" if size.measured else "declared",
                "bytes": None if size is None else round(size.bytes),
                "tokens": None if size is None else round(size.tokens),
                "natural": getattr(size, unit) / total if size and total else None,
                "share": shares[i],
                "rows": None if rows is None else round(rows),
                "epochs": None if rows is None or size is None else rows / size.rows,
                "epochs_so_far": None if rows is None or size is None else read[i] + rows / size.rows,
            }
        )
    return {
        "stage": span.number,
        "first_row": span.first_row,
        "first_token": span.first_token,
        "sequence_length": span.sequence_length,
        "batch_rows": span.batch_rows,
        "unit": unit,
        "sources": table,
    }


def declared_ledger(declared: Experiment, stages: list[dict]) -> list[Entry] | None:
    """What the run will have read by declared sizes; None where one is not declared."""
    entries = []
    for i, source in enumerate(declared.data.sources):
        lines = [stage["sources"][i] for stage in stages]
        if any(line["epochs"] is None for line in lines):
            return None
        epochs = lines[-1]["epochs_so_far"]
        entries.append(
            Entry(
                source=source.name,
                language=fold(source.language) or source.language,
                provider=source.provider,
                rows=sum(line["rows"] for line in lines),
                documents=None,
                bytes=round(epochs * lines[0]["bytes"]),
                tokens=round(epochs * lines[0]["tokens"]),
                epochs=epochs,
                left_over_tokens=None,
                size="declared",
            )
        )
    return entries
