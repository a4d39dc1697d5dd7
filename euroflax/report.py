"""`report.html`: a run on one page, from its folder alone. Needs no network to be read and no JAX to be written."""

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence

import jinja2

from euroflax.data.ledger import Entry, totals
from euroflax.data.skipping import merged
from euroflax.experiment import Experiment, ExperimentError, from_json
from euroflax.folders import replace_file
from euroflax.languages import LANGUAGES
from euroflax.training import goodput
from euroflax.training.goodput import KINDS
from euroflax.training.record import read_json, read_manifest, read_metrics, read_samples

_POINTS = 300
_VALUES = 60
_COLUMNS = 6

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines in a plane of 100 by 100, y downwards, with what its axes say."""

    path: str
    """The `d` of an SVG path; broken where a value is not finite."""
    dots: list[Point]
    values: list[tuple[float, float, str]]
    """Where the value of each point is shown under the pointer: left, width, and text."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    first: float
    last: float
    label: str


def write(run_dir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into the folder of a run, finished or not, and returns its path.

    Raises:
        ExperimentError: the folder holds no run, or its record is harmed.
    """
    experiment = read_json(run_dir / "experiment.json")
    if experiment is None:
        raise ExperimentError(f"run folder={run_dir} holds no run; train first")
    declared = from_json(experiment)
    page = _render(declared, read_manifest(run_dir), read_metrics(run_dir), read_samples(run_dir))
    replace_file(run_dir / "report.html", page)
    return run_dir / "report.html"


def _passed_over(declared: Experiment, manifest: dict) -> int:
    """Tokens until the run's position in rows that it skipped after it went back."""
    position = manifest.get("ledger", {}).get("position", 0)
    ranges = merged((start, stop) for start, stop in manifest.get("skipped_ranges", []))
    until = [(min(start, position), min(stop, position)) for start, stop in ranges]
    return sum(declared.tokens_at(stop) - declared.tokens_at(start) for start, stop in until)


def _render(declared: Experiment, manifest: dict, metrics: list[dict], samples: dict | None) -> str:
    steps = [line for line in metrics if "loss" in line]
    evaluations = evaluations_of(metrics)
    speeds = [(line["tokens"], line["tokens_per_second"]) for line in steps]
    figures = {
        "declared": declared,
        "manifest": manifest,
        "steps": steps,
        "returns": manifest.get("returns", []),
        "skipped": [line for line in steps if "skipped" in line],
        "done": steps[-1]["tokens"] if steps else 0,
        "total": declared.total_tokens,
        "passed_over": _passed_over(declared, manifest),
        "evaluations": evaluations,
        "columns": _columns(evaluations),
        "most_bits": max((y for line in evaluations for y in line["figures"].values() if y is not None), default=0),
        "loss": chart([(line["tokens"], line["loss"]) for line in steps], "nats a token"),
        "norm": chart([(line["tokens"], line["grad_norm"]) for line in steps], "gradient norm", from_zero=True),
        "rate": chart([(line["tokens"], line["learning_rate"]) for line in steps], "learning rate", from_zero=True),
        "marks": _marks(declared, steps),
        "speed": chart(speeds, "tokens a second", from_zero=True),
        "median_speed": statistics.median(speed for _, speed in speeds) if speeds else None,
        "languages": _languages(declared, steps, evaluations),
        "mixture": _mixture(declared, manifest),
        "unit": _reached(manifest)["unit"],
        "withdrawn": _withdrawn(manifest),
        "providers": _by(manifest, "provider"),
        "read_languages": _by(manifest, "language"),
        "time": time_of(manifest),
        "energy": energy_of(manifest),
        "samples": samples,
        "experiment": (json.dumps(dataclasses.asdict(declared), indent=2, ensure_ascii=False)),
    }
    return render("report.html.j2", figures)


def _marks(declared: Experiment, steps: list[dict]) -> list[tuple[float, str]]:
    """Where stages begin on the x axis, in percent, until where the run is."""
    done = steps[-1]["tokens"] if steps else 0
    begun = [span for span in declared.spans[1:] if span.first_token < done]
    return [(round(100 * span.first_token / done, 2), f"stage {span.number} begins") for span in begun]


def render(template: str, figures: dict) -> str:
    """A page of the package, whose text is shown and never obeyed."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("euroflax", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "name": _name, "percent": _percent, "bits": _bits}
    environment.filters |= {"seconds": _duration, "joules": _joules}
    return environment.get_template(template).render(figures)


def evaluations_of(metrics: list[dict]) -> list[dict]:
    """Each evaluation with the tokens read before it and its figures by language."""
    tokens = {line["step"]: line["tokens"] for line in metrics if "loss" in line}
    return [
        {
            "step": line["step"],
            "tokens": tokens.get(line["step"], 0),
            "figures": {key.removeprefix("bits_per_byte."): value for key, value in line["eval"].items()},
        }
        for line in metrics
        if "eval" in line
    ]


def _columns(evaluations: list[dict]) -> list[dict]:
    """As many evaluations as a table has room for: the first, the last, and some between."""
    last = len(evaluations) - 1
    picks = {round(i * last / (_COLUMNS - 1)) for i in range(_COLUMNS)} if last >= _COLUMNS else range(last + 1)
    return [evaluations[i] for i in sorted(picks)]


def _languages(declared: Experiment, steps: list[dict], evaluations: list[dict]) -> list[dict]:
    """The curves of each language, on axes that all languages share."""
    codes = [*declared.language_codes]
    losses = {c: [(s["tokens"], s["loss_by_language"][c]) for s in steps if c in s["loss_by_language"]] for c in codes}
    bits = {c: [(e["tokens"], e["figures"][c]) for e in evaluations if c in e["figures"]] for c in codes}
    loss_range, bits_range = (range_of(y for points in all_.values() for _, y in points) for all_ in (losses, bits))
    right = max((line["tokens"] for line in (*steps, *evaluations)), default=0)
    return [
        {
            "code": code,
            "loss": chart(losses[code], "loss, nats a token", between=loss_range, right=right, ticks=3),
            "own": chart(bits[code], "bits per byte", right=right, ticks=3, dots=True),
            "bits": chart(bits[code], "bits per byte", between=bits_range, right=right, ticks=3, dots=True),
        }
        for code in codes
    ]


def _mixture(declared: Experiment, manifest: dict) -> list[dict]:
    """Each source with its share as asked over the rows read so far, and what the ledger says was read of it."""
    entries, unit = manifest["ledger"]["entries"], _reached(manifest)["unit"]
    total = sum(entry[unit] for entry in entries)
    asked = _asked(declared, manifest)
    found = []
    for source in manifest["sources"]:
        if source["split"] != "train":
            continue
        mine = [entry for entry in entries if entry["source"] == source["name"]]
        read = {name: sum(entry[name] or 0 for entry in mine) for name in ("documents", "bytes", "tokens")}
        share, epochs = read[unit] / total if total else None, sum(entry["epochs"] or 0 for entry in mine)
        found.append({"source": source, "asked": asked.get(source["name"], 0), "read": share, "epochs": epochs, **read})
    return found


def _asked(declared: Experiment, manifest: dict) -> dict[str, float]:
    """The share of each source as the stages ask for it, each stage counted by the tokens that were read in it."""
    resolved, position = manifest["mixture"]["resolved"], manifest["ledger"]["position"]
    lengths = {span.number: span.sequence_length for span in declared.spans}
    edges = [*(stretch["first_row"] for stretch in resolved[1:]), position]
    tokens = [
        max(min(edge, position) - stretch["first_row"], 0) * lengths.get(stretch["stage"], 1)
        for stretch, edge in zip(resolved, edges, strict=True)
    ]
    if not any(tokens):
        return resolved[0]["shares"]
    shares: dict[str, float] = {}
    for stretch, count in zip(resolved, tokens, strict=True):
        for name, share in stretch["shares"].items():
            shares[name] = shares.get(name, 0.0) + share * count / sum(tokens)
    return shares


def _reached(manifest: dict) -> dict:
    """The part of the resolved mixture in which the run is."""
    position = manifest["ledger"]["position"]
    resolved = manifest["mixture"]["resolved"]
    return ([stretch for stretch in resolved if stretch["first_row"] <= position] or resolved)[-1]


def _withdrawn(manifest: dict) -> list[str]:
    """What was left out, from where on."""
    found = []
    for entry in manifest.get("withdrawn", []):
        listed = {name: count for name, count in entry["listed"].items() if count}
        if listed:
            count, names = sum(listed.values()), ", ".join(listed)
            found.append(f"the documents of {count:,} listed ids of {names} from row {entry['position']:,} on")
    return found


def _by(manifest: dict, field: str) -> list[dict]:
    """Documents, bytes and tokens that were read, by language (by code) or provider (most bytes first)."""
    sums = totals([Entry(**entry) for entry in manifest["ledger"]["entries"]], field)
    rows = [{"name": name, **amounts} for name, amounts in sums.items()]
    return sorted(rows, key=lambda row: row["name"] if field == "language" else -row["bytes"])


def energy_of(manifest: dict) -> dict:
    """Joules of all sessions, measured where each was, and as the plan estimates them where it can."""
    sessions = [session for session in manifest["sessions"] if session["steps"]]
    found = {}
    for name in ("energy_joules", "energy_estimate_joules"):
        values = [session.get(name) for session in sessions]
        found[name] = None if None in values or not values else sum(values)
    return found | {"boundaries": sorted({session.get("energy_boundary") or "not measured" for session in sessions})}


def time_of(manifest: dict) -> dict:
    """Where the wall-clock of all sessions went, most first, and what saves took of it."""
    spent = goodput.totals(manifest["sessions"])
    whole = sum(spent.values())
    parts = [(kind, KINDS.get(kind, ""), seconds) for kind, seconds in spent.items() if seconds > 0]
    saves = [session["saves"] for session in manifest["sessions"] if session.get("saves", {}).get("count")]
    count, blocking = (sum(save[name] for save in saves) for name in ("count", "blocking_seconds"))
    return {
        "parts": sorted(parts, key=lambda part: -part[2]),
        "whole": whole,
        "goodput": goodput.goodput(manifest["sessions"]),
        "saves": count,
        "each_save": blocking / count if count else None,
        "saving": blocking / whole if whole else None,
        "longest_save": max((save["longest_seconds"] for save in saves), default=None),
    }


def time_line(manifest: dict) -> str:
    """Where the wall-clock of a run went, in a line."""
    time = time_of(manifest)
    saves = f"; each of {time['saves']} saves held them up for {time['each_save']:.2f} s" if time["saves"] else ""
    share, count = _percent(time["goodput"]), len(manifest["sessions"])
    sessions = f"{count} session{'' if count == 1 else 's'}"
    return f"time        {_duration(time['whole'])} in {sessions}, {share} of it in steps that count{saves}"


def chart(
    points: Sequence[tuple[float, float | None]],
    label: str,
    between: tuple[float, float] | None = None,
    right: float | None = None,
    ticks: int = 4,
    *,
    from_zero: bool = False,
    dots: bool = False,
) -> Chart | None:
    """A line through points `(x, y)`; None where no value is finite. Many points become their means.

    Args:
        points: in the order of x, which begins at 0.
        label: what y is.
        between: the least and the greatest y that are shown; by default those of the points.
        right: the greatest x that is shown; by default that of the points.
        ticks: about as many on each axis.
        from_zero: whether y is shown from 0.
        dots: whether each point is marked.
    """
    if not [y for _, y in points if y is not None]:
        return None
    points = _thinned(points)
    low, high = between or range_of(y for _, y in points)
    low = 0.0 if from_zero else low
    right = right or max(x for x, _ in points) or 1.0
    span = (high - low) or 1.0
    path, pen, placed = [], "M", []
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        at = (round(100 * x / right, 2), round(100 * (high - y) / span, 2))
        path.append(f"{pen}{at[0]} {at[1]}")
        placed.append(at)
        pen = "L"
    finite = [y for _, y in points if y is not None]
    x_ticks = [(round(100 * x / right, 1), number(x)) for x in _round_values(0, right, ticks)]
    y_ticks = [(round(100 * (high - y) / span, 1), number(y)) for y in _round_values(low, low + span, ticks)]
    values = _values(points, right)
    return Chart(" ".join(path), placed if dots else [], values, x_ticks, y_ticks, finite[0], finite[-1], label)


def _values(points: Sequence[tuple[float, float | None]], right: float) -> list[tuple[float, float, str]]:
    """At most `_VALUES` of the points, each with the part of the x axis that is nearest to it, in percent."""
    picked = points[:: math.ceil(len(points) / _VALUES)]
    edges = [0.0, *((a + b) / 2 for (a, _), (b, _) in itertools.pairwise(picked)), right]
    return [
        (round(100 * left / right, 2), round(100 * (end - left) / right, 2), f"{number(x)} tokens: {number(y)}")
        for (x, y), left, end in zip(picked, edges, edges[1:], strict=False)
    ]


def _round_values(low: float, high: float, count: int) -> list[float]:
    """About `count` round values between two.

    >>> _round_values(2.24, 5.85, 4)
    [3.0, 4.0, 5.0]
    """
    magnitude = 10.0 ** math.floor(math.log10((high - low) / count))
    steps = [magnitude * size for size in (1, 2, 2.5, 5, 10)]
    step = min(steps, key=lambda size: abs((high - low) / size - count))
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thinned(points: Sequence[tuple[float, float | None]]) -> Sequence[tuple[float, float | None]]:
    """At most `_POINTS` points: each the mean of its neighbours, the last one as it is."""
    size = math.ceil(len(points) / _POINTS)
    if size <= 1:
        return points
    found: list[tuple[float, float | None]] = []
    for start in range(0, len(points) - 1, size):
        part = points[start : min(start + size, len(points) - 1)]
        values = [y for _, y in part if y is not None]
        found.append((part[-1][0], statistics.fmean(values) if values else None))
    return [*found, points[-1]]


def range_of(values: Iterable[float | None]) -> tuple[float, float]:
    """The least and the greatest value with a little room."""
    finite = [value for value in values if value is not None]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    room = 0.04 * (high - low or abs(high) or 1.0)
    return low - room, high + room


def number(value: float | None) -> str:
    """A number in few characters: 1.23M.

    >>> [number(x) for x in (None, 0, 0.0312, 4.3, 1234, 327_680, 8_900_000, 2e12)]
    ['not measured', '0', '0.0312', '4.3', '1,234', '328k', '8.9M', '2T']
    """
    if value is None:
        return "not measured"
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _bits(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.3g}%"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _joules(value: float | None) -> str:
    return "not measured" if value is None else f"{number(value)} J"


def _name(code: str) -> str:
    return LANGUAGES[code].name if code in LANGUAGES else code
