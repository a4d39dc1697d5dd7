"""Tables and lines of messages, the mixture, the ledger and a row, for a terminal or as text."""

from collections.abc import Sequence

from rich.table import Table

from euroflax.data.ledger import Entry, totals
from euroflax.data.loader import PlacedRow
from euroflax.data.packings import recipe
from euroflax.data.prepare import Prepared, bad_lines_file
from euroflax.ending import printable
from euroflax.experiment import Experiment
from euroflax.folders import Folders
from euroflax.languages import LANGUAGES
from euroflax.planning import Plan, size


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.4g}%"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _epochs(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def mixture(stages: list[dict]) -> Table:
    """Each source with its natural frequency, its share and rows in each stage, and its epochs at the end."""
    first = stages[0]
    unit = first["unit"]
    many = len(stages) > 1
    of = {s["stage"]: "" if s["unit"] == unit else f" of {s['unit']}" for s in stages}
    columns = [unit, "natural", *("share" if not many else f"share {n}{other}" for n, other in of.items())]
    rows = [*("rows" if not many else f"rows {stage['stage']}" for stage in stages), "epochs"]
    table = _table(f"mixture, shares of {unit}", ["source", "language", "size"], [*columns, *rows])
    for i, source in enumerate(first["sources"]):
        lines = [stage["sources"][i] for stage in stages]
        table.add_row(
            source["source"],
            source["language"],
            source["size"],
            _number(source[unit]),
            _percent(source["natural"]),
            *(_percent(line["share"]) for line in lines),
            *(_number(line["rows"]) for line in lines),
            _epochs(lines[-1]["epochs_so_far"]),
        )
    return table


def collectives(plan: Plan) -> Table:
    """Messages of a device in a step, beside the least that the mesh asks for."""
    table = _table("messages of a device in a step", ["kind", "axis"], ["bytes", "least", "ratio"])
    found = plan.collectives or []
    rows = [(row["kind"], row["axis"], row["bytes"], row["minimum_bytes"]) for row in found]
    total = None if plan.method == "analytical" else sum(row["bytes"] for row in found)
    rows.append(("all", "", total, sum(row["minimum_bytes"] for row in found)))
    for kind, axis, count, least in rows:
        ratio = "" if count is None or not least else f"{count / least:.2f}"
        table.add_row(kind, axis, "not compiled" if count is None else size(count), size(least), ratio)
    return table


def stages(found: list[dict]) -> Table:
    """Where each stage begins, and its rows and batches."""
    table = _table("stages", [], ["stage", "from token", "from row", "tokens a row", "rows a batch"])
    for stage in found:
        names = ("stage", "first_token", "first_row", "sequence_length", "batch_rows")
        table.add_row(*(f"{stage[name]:,}" for name in names))
    return table


def ledger(entries: Sequence[Entry], title: str) -> list[Table]:
    """What was read, by source and provider, then summed by language and by provider."""
    names = ("documents", "bytes", "tokens")
    table = _table(title, ["source", "language", "provider"], ["rows", *names, "epochs", "left over"])
    for entry in entries:
        once = entry.epochs is not None
        table.add_row(
            entry.source,
            entry.language,
            printable(entry.provider),
            _number(entry.rows) if once else "",
            *(_number(getattr(entry, name)) for name in names),
            _epochs(entry.epochs) if once else "",
            _number(entry.left_over_tokens) if once else "",
        )
    tables = [table]
    for by in ("language", "provider"):
        sums = _table(f"by {by}", [by], names)
        for name, amounts in totals(entries, by).items():
            code = f"{name} {LANGUAGES[name].name}" if by == "language" and name in LANGUAGES else name
            sums.add_row(printable(code), *(_number(amounts[column]) for column in names))
        tables.append(sums)
    return tables


def row(placed: PlacedRow) -> list[str]:
    """A row of the run in lines: its source, its documents with their pieces, and their text."""
    source = placed.source
    padding = int((placed.segment_ids == 0).sum())
    lines = [
        f"row {placed.index}: source {source.name} ({source.language}), stage {placed.stage}, epoch {placed.epoch}, "
        f"{len(placed.tokens)} tokens, {padding} of them padding"
    ]
    parts = zip(placed.documents, placed.spans, placed.texts, strict=True)
    for number, (document, (first, last, length), text) in enumerate(parts, start=1):
        known = [f"{name} {document[name]}" for name in ("provider", "licence") if document[name] is not None]
        about = [f"tokens {first} to {last} of {length}", f"{document['bytes']} bytes", *known]
        lines += ["", f"segment {number}: document {document['id']}, {', '.join(about)}", text]
    return lines


def about_rows(declared: Experiment, prepared: Prepared) -> list[str]:
    """The rows of each length in a line each, with the share of padding, and what is withdrawn."""
    lines = []
    for length in dict.fromkeys(span.sequence_length for span in declared.spans):
        packed = [
            prepared.packings[source.name, recipe(declared, source, length, prepared.withdrawn)]
            for source, _ in prepared.train
        ]
        rows, tokens = sum(p.num_rows for p in packed), sum(p.num_tokens for p in packed)
        cut = sum(p.manifest["cut_tokens"] for p in packed)
        more = f", {cut:,} tokens cut off long documents" if cut else ""
        lines.append(
            f"rows        {rows:,} of {length:,} tokens ({declared.data.packing}), "
            f"{100 * (1 - tokens / (rows * length)):.2f}% padding{more}"
        )
    return lines + about_lost_text(prepared) + about_withdrawn(prepared)


def about_withdrawn(prepared: Prepared) -> list[str]:
    """What the block lists as they are now leave out, a line a source."""
    lines = []
    for name, ids in prepared.withdrawn.items():
        unknown = prepared.unknown_ids[name]
        shown = f" ({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''})" if unknown else ""
        lines.append(f"withdrawn   source {name}: {len(ids)} ids listed, {len(unknown)} of them unknown{shown}")
    return lines


def about_bad_lines(folders: Folders, prepared: Prepared) -> list[str]:
    """The lines that hold no document, by source and reason with the file that has them, a line a source."""
    found = {}
    for source, store in (*prepared.train, *prepared.evaluation):
        if reasons := store.manifest["bad_lines"]:
            counts = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
            file = bad_lines_file(folders, store.path.name)
            of, where = f"of {store.manifest['lines']:,} lines", f", see {file}" if file is not None else ""
            found[source.name] = f"bad lines   source {source.name}: {counts}, {of}{where}"
    return list(found.values())


def about_lost_text(prepared: Prepared) -> list[str]:
    """The text that tokens do not give back, a line a source."""
    stores = {source.name: store for source, store in (*prepared.train, *prepared.evaluation)}
    return [
        f"lost text   source {name}: the tokens do not give back {store.num_lost_bytes:,} of {store.num_bytes:,} bytes"
        for name, store in stores.items()
        if store.num_lost_bytes
    ]


def about_tokenizer(prepared: Prepared) -> str:
    """The tokenizer in a line: how many bytes of text a token stands for, at best and at worst."""
    cost: dict[str, list[int]] = {}
    for source, store in prepared.train:
        sizes = cost.setdefault(source.language, [0, 0])
        sizes[0] += store.num_bytes
        sizes[1] += store.num_tokens - 2 * store.num_documents
    rates = sorted((size / max(count, 1), language) for language, (size, count) in cost.items())
    return (
        f"tokenizer   {prepared.tokenizer.vocab_size:,} entries over {len(rates)} languages, "
        f"{rates[0][0]:.2f} ({rates[0][1]}) to {rates[-1][0]:.2f} ({rates[-1][1]}) bytes a token"
    )
