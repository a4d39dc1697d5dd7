"""Several runs on one page."""

import json
import re
import shutil

import pytest

from euroflax import comparison
from euroflax.experiment import ExperimentError
from tests.test_report import Page, edit


@pytest.fixture
def runs(trained, tmp_path):
    """Two folders of runs: that of `trained`, and one that differs in rate, figures and languages."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        shutil.copytree(trained[2].path, folder)
    edit(folders[1] / "experiment.json", lambda e: e["training"]["schedule"].update(peak_learning_rate=0.5))
    lines = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval" in line:
            line["eval"] = {"bits_per_byte.en": 1.25, "bits_per_byte.fr": 9.0, "bits_per_byte.mean": 5.125}
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folders


def page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_shows_each_run_each_language_and_what_differs(trained, runs):
    found = page(comparison.write(runs[0], runs[1:]))
    assert found.open == [] and found.loads == []
    figures = trained[2].bits_per_byte
    assert f"English {figures['en']:.3f} 1.250" in found.text
    assert f"Maltese {figures['mt']:.3f} not measured" in found.text and "French not measured 9.000" in found.text
    assert "training.schedule.peak_learning_rate 0.02 0.5" in found.text
    assert "seed" not in found.text.partition("What differs")[2]


def test_a_mean_is_over_the_languages_that_all_runs_have(trained, runs):
    path = comparison.write(runs[0], runs[1:])
    assert f"mean {trained[2].bits_per_byte['en']:.3f} 1.250" in page(path).text
    assert "mean over 1 languages" in page(path).text
    assert re.search(r"<strong>1\.250</strong>", path.read_text())


def test_a_mean_with_a_figure_that_is_not_finite_is_not_measured(trained, runs):
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval" in line:
            line["eval"] = {"bits_per_byte.en": 1.25, "bits_per_byte.mt": None, "bits_per_byte.mean": None}
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = trained[2].bits_per_byte
    mean = (figures["en"] + figures["mt"]) / 2
    assert f"mean {mean:.3f} not measured" in page(comparison.write(runs[0], runs[1:])).text


def test_a_run_that_has_just_begun_is_compared_too(runs):
    (runs[1] / "metrics.jsonl").unlink()
    found = page(comparison.write(runs[0], runs[1:]))
    assert found.open == [] and "second 0 3,072 0 not measured" in found.text


def test_a_folder_without_a_run_and_a_run_named_twice_are_refused(runs, tmp_path):
    with pytest.raises(ExperimentError, match="nothing holds no run; train first, or name another with --compare"):
        comparison.write(runs[0], [tmp_path / "nothing"])
    with pytest.raises(ExperimentError, match="twice; name each run once"):
        comparison.write(runs[0], [runs[1], runs[0]])
