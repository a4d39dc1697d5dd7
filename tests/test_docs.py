"""Each command and each piece of Python in the documents is run, as it stands, where a reader would be."""

import json
import os
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pyarrow as pa
import pytest

from euroflax.languages import EU24
from tests.conftest import ROOT, user_environment

PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
SHRUNK = (
    "--set model.vocab_size=512 --set data.sequence_length=64 --set training.batch_tokens=512 "
    "--set training.tokens=2048 --set training.schedule.warmup_tokens=512 --set training.schedule.decay_tokens=512 "
    "--set evaluation.sample_tokens=4"
)


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def compressed(path, text):
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(text.encode())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the experiments in it, and beside it text where `--data-root ../shared/data` looks."""
    root = tmp_path_factory.mktemp("docs")
    here, data = root / "here", root / "shared" / "data" / "eu24"
    here.mkdir()
    data.mkdir(parents=True)
    (here / "experiments").symlink_to(ROOT / "experiments")
    for code in EU24:
        lines = (ROOT / f"euroflax/sample/{code}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines] * 20
        records = ({"text": row["text"], "source": f"{row['id']}-{i}", "license": "CC0"} for i, row in enumerate(rows))
        compressed(data / f"{code}.jsonl.zst", "".join(json.dumps(record) + "\n" for record in records))
    return here


def environment(place):
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return user_environment() | {"PATH": path, "EUROFLAX_CACHE": str(place.parent / "cache"), "MPLBACKEND": "agg"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_each_command_of_a_page_does_its_work(page, place):
    for script in blocks(page, "sh"):
        script = re.sub(r"(experiments/small_eu24\.py.*)", rf"\1 {SHRUNK}", script)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=place,
            env=environment(place),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        assert done.stderr == "" or "--json" in script or "--process-count" in script, (script, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_each_piece_of_python_of_a_page_does_its_work(page, place):
    for code in blocks(page, "python"):
        guarded = "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines())
        (place / "piece.py").write_text(guarded)
        done = subprocess.run(
            [sys.executable, "piece.py"], cwd=place, env=environment(place), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and done.stdout, done.stderr


def test_commands_are_all_in_blocks_that_are_run():
    for page in PAGES:
        text = re.sub(r"```(?:sh|python)\n.*?```", "", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
        text = re.sub(r"python -m .* --data-root DATA", "", text)  # of text that does not come with the project
        assert "python -m" not in text and "```" not in text, page


@pytest.mark.slow
def test_the_notebook_runs_and_shows_plan_row_table_plot_and_text(tmp_path, place, monkeypatch):
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    html = "".join(output.data.get("text/html", "") for output in outputs if "data" in output)
    for shown in ("<th>parameters</th>", "sample-", "Maltese", "It-tren<b>"):
        assert shown in html
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
