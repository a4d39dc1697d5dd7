import html.parser
import json
import re
import shutil
import subprocess
import sys

import pytest

from euroflax import report
from euroflax.experiment import ExperimentError, to_json
from euroflax.languages import LANGUAGES
from euroflax.training.goodput import KINDS
from euroflax.training.record import read_samples
from tests.conftest import ROOT

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


class Page(html.parser.HTMLParser):
    """What a page says, what it loads, and whether each element that it opens is closed."""

    def __init__(self, text):
        super().__init__()
        self.words, self.loads, self.open, self._skip = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of a finished run's folder, without its checkpoints."""
    target = tmp_path / "run"
    shutil.copytree(trained[2].path, target, ignore=shutil.ignore_patterns("checkpoints", "hf"))
    return target


def page(run_dir):
    return Page(report.write(run_dir).read_text(encoding="utf-8"))


def edit(file, change):
    value = json.loads(file.read_bytes())
    change(value)
    file.write_text(json.dumps(value))


def test_the_page_says_what_the_record_says(trained, copied):
    declared, _, run = trained
    found = page(copied)
    assert found.open == [] and found.loads == []
    assert "Complete: 3,072 tokens in 6 steps." in found.text
    for code in ("el", "en", "mt"):
        first = next(line["eval"] for line in run.metrics if "eval" in line)[f"bits_per_byte.{code}"]
        assert f"{LANGUAGES[code].name} {code} {first:.3f} → {run.bits_per_byte[code]:.3f}" in found.text
    cells = " ".join(f"{line['eval']['bits_per_byte.mean']:.3f}" for line in run.metrics if "eval" in line)
    assert f"mean {cells}" in found.text
    assert (
        "sample-mt Maltese mt 33.3% " in found.text and "CC0-1.0 Euroflax public not applicable training" in found.text
    )
    for sample in json.loads((run.path / "samples.json").read_text())["samples"]:
        assert " ".join(sample["prompt"].split()) in found.text
    cost = json.loads((run.path / "manifest.json").read_text())["tokenizer"]["mt"]
    assert f"Maltese mt {cost['characters_per_token']:.2f} {cost['bytes_per_token']:.2f}" in found.text
    assert "1 x cpu" not in found.text and "8 x cpu" in found.text
    whole = json.dumps(to_json(declared), indent=2, ensure_ascii=False)
    assert " ".join(whole.split()) in found.text


def test_time_is_counted_once_and_makes_up_the_session(trained):
    manifest = json.loads((trained[2].path / "manifest.json").read_text())
    seconds = manifest["sessions"][0]["seconds"]
    assert {"prepare", "compile", "step", "evaluate", "save", "restart", "data"} <= seconds.keys() <= set(KINDS)
    assert all(value >= 0 for value in seconds.values())


def test_what_was_not_measured_is_said_and_not_averaged(copied):
    (copied / "samples.json").unlink()
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "loss" in line][:3]
    kept[1]["loss"] = None
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    edit(copied / "manifest.json", lambda m: m["tokenizer"]["mt"].update(tokens_vs_english=None))
    found = page(copied)
    assert "50% of 3,072 tokens so far, 3 steps." in found.text
    assert "not measured bits per byte, mean over languages" in found.text
    assert "Not measured: nothing is held out." in found.text
    assert "None yet: they are written when the run is complete." in found.text
    assert re.search(r"Maltese mt [\d.]+ [\d.]+ [\d.]+ not measured", found.text)


def test_a_run_that_has_just_begun_has_a_page_too(copied):
    (copied / "metrics.jsonl").unlink()
    (copied / "samples.json").unlink()
    assert "0% of 3,072 tokens so far, 0 steps." in page(copied).text


def test_text_from_sources_and_models_is_shown_and_never_obeyed(copied):
    script = "<script>alert('a')</script>"
    edit(copied / "samples.json", lambda s: s["samples"][0].update(text=script, prompt="</p>"))
    edit(copied / "manifest.json", lambda m: m["sources"][0].update(licence=script))
    found = page(copied)
    assert found.open == [] and found.text.count(script) == 2


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match="holds no run; train first"):
        report.write(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("experiment.json", "{", "experiment.json is not a JSON object; restore it"),
        ("manifest.json", "{}", "lacks versions, data, mixture, ledger, sources, tokenizer, sessions; restore it"),
        ("manifest.json", None, "holds no manifest.json; train first"),
    ],
)
def test_a_harmed_record_is_refused(copied, name, content, message):
    (copied / name).unlink() if content is None else (copied / name).write_text(content)
    with pytest.raises(ExperimentError, match=re.escape(message)):
        report.write(copied)


def test_samples_that_are_not_whole_count_as_none_and_are_written_again(trained, copied):
    for content in ("{", "[]", '{"samples": []}'):
        (copied / "samples.json").write_text(content)
        assert "None yet" in page(copied).text
    assert read_samples(copied) is None and read_samples(trained[2].path)["step"] == 6


def test_figures_that_are_all_not_finite_are_shown_as_not_measured(copied):
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"eval": dict.fromkeys(line["eval"])} if "eval" in line else {"loss": None}
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": "x"}\n')
    assert "Maltese mt not measured not measured" in page(copied).text


def test_an_evaluation_stands_at_the_tokens_read_before_it_whatever_the_batch_was():
    lines = [{"step": 10, "tokens": 500, "loss": 1.0}, {"step": 10, "eval": {}}, {"step": 0, "eval": {}}]
    assert [entry["tokens"] for entry in report.evaluations_of(lines)] == [500, 0]


def test_the_report_is_written_without_jax():
    code = "import sys, euroflax.report; sys.exit(str({'jax', 'orbax', 'grain'} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr


def test_a_curve_goes_through_its_points_and_breaks_where_nothing_is_finite():
    made = report.chart([(0, 3.0), (50, None), (50, 2.0), (100, 1.0)], "loss", between=(1.0, 3.0))
    assert made.path == "M0.0 0.0 M50.0 50.0 L100.0 100.0" and (made.first, made.last) == (3.0, 1.0)
    many = report.chart([(x, float(x)) for x in range(10_000)], "loss")
    assert many.path.count("L") < 310 and many.last == 9999
    assert report.chart([(1, None)], "loss") is None


@pytest.fixture
def thirty_six(copied):
    """The same run with figures for 36 languages."""
    codes = list(LANGUAGES)[:36]
    experiment = json.loads((copied / "experiment.json").read_bytes())
    for group in (experiment["data"], experiment["evaluation"]):
        first = group["sources"][0]
        group["sources"] = [first | {"name": f"sample-{code}", "language": code} for code in codes]
    experiment["data"]["mixture"]["weights"] = {f"sample-{code}": 1 / 36 for code in codes}
    (copied / "experiment.json").write_text(json.dumps(experiment))
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            line["loss_by_language"] = dict.fromkeys(codes, line["loss"])
        else:
            line["eval"] = {f"bits_per_byte.{c}": line["eval"]["bits_per_byte.en"] for c in [*codes, "mean"]}
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def widen(manifest):
        manifest["sources"] = [manifest["sources"][0] | {"name": f"sample-{c}", "language": c} for c in codes]
        names = [f"sample-{code}" for code in codes]
        entry = manifest["ledger"]["entries"][0]
        manifest["ledger"]["entries"] = [
            entry | {"source": name, "language": code} for name, code in zip(names, codes, strict=True)
        ]
        manifest["mixture"]["resolved"][0]["shares"] = dict.fromkeys(names, 1 / 36)
        manifest["tokenizer"] = dict.fromkeys(codes, manifest["tokenizer"]["en"])

    edit(copied / "manifest.json", widen)
    return copied


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1600, 375])
def test_a_browser_shows_the_page_of_36_languages_without_a_sideways_scroll_or_a_request(thirty_six, width, tmp_path):
    path = report.write(thirty_six)
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe id=f src='{path.as_uri()}' style='width:{width}px;height:900px;border:0'></iframe><script>"
        "document.getElementById('f').onload = e => { const w = e.target.contentWindow, d = w.document;"
        "document.title = [d.documentElement.scrollWidth, d.querySelectorAll('.grid .card').length,"
        "d.querySelectorAll('path').length, w.performance.getEntriesByType('resource').length].join(' ') }</script>"
    )
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (title,) = re.findall(r"<title>([\d ]+)</title>", done.stdout)
    scroll_width, cards, paths, requests = map(int, title.split())
    assert scroll_width <= width and cards == 2 * 36 and paths == 3 * 36 + 4 and requests == 0
