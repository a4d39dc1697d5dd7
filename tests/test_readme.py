import json
import re

import pytest

from tests.conftest import ROOT, TINY, run

README = (ROOT / "README.md").read_text()
LINES = [line.strip() for line in README.splitlines() if line.startswith("    ") and ".venv/bin" in line]


def test_the_readme_has_two_lines_and_ci_runs_them_as_they_stand():
    assert len(LINES) == 2
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    for line in LINES:
        assert line in script


def test_the_first_line_makes_an_environment_and_runs_the_tiny_experiment():
    assert LINES[0].startswith("python3 -m venv") and LINES[0].endswith("euroflax.run experiments/tiny_eu24.py")


def test_every_verb_is_in_the_readme_and_no_other():
    from euroflax.run import VERBS

    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(VERBS)


def test_every_path_in_readme_and_docs_exists():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for name in re.findall(r"`((?:euroflax|experiments|docs|tests)/[\w/.]+)`", text):
            if name != "experiments/mine.py":
                assert (ROOT / name).exists(), name
        for name in re.findall(r"(?:`|\()((?:data|model|train)/\w+\.py|\w+\.py)\b", text):
            assert (ROOT / "euroflax" / name).exists(), name


@pytest.mark.slow
def test_the_readmes_own_experiment_trains(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "mine.py"
    path.write_text(block)
    lines = (ROOT / "euroflax/sample/mt.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines] * 8
    (tmp_path / "my_text.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "text": record["text"]}) + "\n" for i, record in enumerate(records))
    )
    small = ("--set", "training.tokens=40960", "--data-root", tmp_path, "--runs-dir", tmp_path / "runs")
    done = run(path, *small, "--cache-dir", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "mt Maltese" in done.stdout


@pytest.mark.slow
def test_the_tiny_experiment_falls_in_every_language_without_a_warning(tmp_path):
    done = run(TINY, "--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny_eu24/metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line["eval"] for line in lines if "eval" in line]
    assert len(first) == 25 and all(last[key] < 0.9 * first[key] for key in first)
