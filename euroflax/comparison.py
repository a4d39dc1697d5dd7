"""`comparison.html`: several runs beside one another on one page, from their folders alone. Loads no JAX."""

import pathlib
import statistics
from collections.abc import Sequence

from euroflax.experiment import ExperimentError, from_json
from euroflax.experiment.codec import shown
from euroflax.folders import replace_file
from euroflax.report import Chart, chart, energy_of, evaluations_of, range_of, render, time_of
from euroflax.training.record import leaves, read_json, read_manifest, read_metrics


def write(run_dir: pathlib.Path, others: Sequence[pathlib.Path]) -> pathlib.Path:
    """Writes `comparison.html` into the folder of the first run and returns its path.

    Raises:
        ExperimentError: a folder holds no run, or its record is harmed, or one is named twice.
    """
    folders = [run_dir, *others]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ExperimentError(f"--compare names {run_dir} or another run twice; name each run once")
    runs = [_read(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    for run, folder, name in zip(runs, folders, names, strict=True):
        run["label"] = name if names.count(name) == 1 else str(folder)
    common = set.intersection(*(set(run["bits"]) - {"mean"} for run in runs))
    figures = {
        "common": len(common),
        "runs": runs,
        "losses": _lines([run["losses"] for run in runs], "nats a token"),
        "means": _lines([_means(run["evaluations"], common) for run in runs], "bits per byte", dots=True),
        "languages": _languages(runs, common),
        "differences": _differences(runs),
    }
    replace_file(run_dir / "comparison.html", render("comparison.html.j2", figures))
    return run_dir / "comparison.html"


def _read(run_dir: pathlib.Path) -> dict:
    """What the page says of a run."""
    experiment = read_json(run_dir / "experiment.json")
    if experiment is None:
        raise ExperimentError(f"run folder={run_dir} holds no run; train first, or name another with --compare")
    declared, manifest, metrics = from_json(experiment), read_manifest(run_dir), read_metrics(run_dir)
    steps = [line for line in metrics if "loss" in line]
    evaluations = evaluations_of(metrics)
    time, last = time_of(manifest), manifest["sessions"][-1]
    return {
        "experiment": experiment,
        "done": steps[-1]["tokens"] if steps else 0,
        "total": declared.total_tokens,
        "steps": len(steps),
        "skipped": sum("skipped" in line for line in steps),
        "returns": len(manifest.get("returns", [])),
        "loss": steps[-1]["loss"] if steps else None,
        "bits": evaluations[-1]["figures"] if evaluations else {},
        "evaluated": evaluations[-1]["tokens"] if evaluations else None,
        "speed": statistics.median(line["tokens_per_second"] for line in steps) if steps else None,
        "devices": f"{last['devices']} x {last['device_kind']}",
        "goodput": time["goodput"],
        "seconds": time["whole"],
        "flops": sum(session["flops"] for session in manifest["sessions"]),
        "joules": energy_of(manifest)["energy_joules"],
        "losses": [(line["tokens"], line["loss"]) for line in steps],
        "evaluations": evaluations,
    }


def _lines(points: list[list[tuple[float, float | None]]], label: str, *, dots: bool = False) -> list[Chart]:
    """A line a run, on axes that all share; none where nothing is measured of any run."""
    between = range_of(y for line in points for _, y in line)
    right = max((x for line in points for x, _ in line), default=0)
    drawn = [chart(line, label, between=between, right=right, dots=dots) for line in points]
    if not any(drawn):
        return []
    axes = next(line for line in drawn if line is not None)
    empty = Chart("", [], [], axes.x_ticks, axes.y_ticks, 0.0, 0.0, label)
    return [line or empty for line in drawn]


def _means(evaluations: list[dict], common: set[str]) -> list[tuple[float, float | None]]:
    """The mean of each evaluation over the languages that all runs have: that over others is not comparable."""
    return [(line["tokens"], _mean(line["figures"], common)) for line in evaluations]


def _mean(figures: dict[str, float | None], codes: set[str]) -> float | None:
    values = [value for code in codes if (value := figures.get(code)) is not None]
    return statistics.fmean(values) if values and len(values) == len(codes) else None


def _languages(runs: list[dict], common: set[str]) -> list[dict]:
    """The last figures of each language, a value a run; at the end their mean over those that all have."""
    codes = sorted({code for run in runs for code in run["bits"]} - {"mean"})
    rows = [(code, [run["bits"].get(code) for run in runs]) for code in codes]
    rows += [("mean", [_mean(run["bits"], common) for run in runs])] if codes else []
    return [
        {"code": code, "cells": values, "best": min((v for v in values if v is not None), default=None)}
        for code, values in rows
    ]


def _differences(runs: list[dict]) -> list[dict]:
    """The fields of the experiments that are not the same in all, a value a run."""
    flat = [dict(leaves(run["experiment"], "")) for run in runs]
    fields = sorted(set().union(*flat))
    rows = [(field, [values.get(field, "nothing") for values in flat]) for field in fields]
    return [
        {"field": field, "cells": [shown(value) for value in values]}
        for field, values in rows
        if any(value != values[0] for value in values)
    ]
