"""The Python interface, as a notebook uses it: in an interpreter of its own."""

import json
import subprocess
import sys

import pytest

import euroflax
from tests.conftest import ROOT, small, user_environment, write_experiment

SCRIPT = """
import sys, json, pathlib
import euroflax

root = pathlib.Path(sys.argv[1])
folders = {{"cache_dir": root / "cache"}}

if {guard}:
    exp = euroflax.load(root / "mine.py", overrides={{"model.num_layers": 1, "mesh.fsdp": 2}})
    assert "jax" not in sys.modules
    assert euroflax.check(exp, root / "runs", **folders)["sources"][0]["source"] == "sample-el"
    plan = euroflax.plan(exp, 8, **folders)
    prepared = euroflax.prepare(exp, **folders)
    run = euroflax.train(exp, runs_dir=root / "runs", devices="cpu:8", **folders)
    row = euroflax.row(exp, prepared, 0)
    logits = euroflax.model.apply(exp.model, run.params, {{
        "tokens_BL": row.tokens[None], "segment_ids_BL": row.segment_ids[None],
        "positions_BL": row.positions[None]}})
    sampling = euroflax.Sampling(max_new_tokens=3)
    (said,) = euroflax.generate(exp, "The", sampling, root / "runs", **folders)
    found = euroflax.evaluate(exp, root / "runs", **folders)
    past = ""
    try:
        euroflax.row(exp, prepared, 48)
    except euroflax.ExperimentError as error:
        past = str(error)
    late = ""
    try:
        euroflax.train(exp, runs_dir=root / "runs", devices="cpu:3", **folders)
    except euroflax.ExperimentError as error:
        late = str(error)
    (root / "found.json").write_text(json.dumps({{
        "plan": plan.parameters, "plan_html": plan._repr_html_(), "row_html": row._repr_html_(), "texts": row.texts,
        "documents": row.documents, "logits": list(logits.shape),
        "losses": [line["loss"] for line in run.metrics if "loss" in line],
        "bits": run.bits_per_byte, "run_html": run._repr_html_(), "said": said.tokens, "evaluated": found,
        "said_html": said._repr_html_(), "hf": str(euroflax.export(exp, root / "runs")), "late": late,
        "prepared_html": prepared._repr_html_(), "repr": repr(run), "past": past,
        "report": (run.path / "report.html").is_file(), "names": sorted(run.params)}}))
"""


def script(path, guard):
    path.joinpath("script.py").write_text(SCRIPT.format(guard=guard))
    command = [sys.executable, path / "script.py", path]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=user_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("interface")
    write_experiment(root / "mine.py", small())
    done = script(root, "__name__ == '__main__'")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads((root / "found.json").read_text())


def test_a_run_in_python_gives_plain_metrics_parameters_and_figures(found):
    assert len(found["losses"]) == 6 and set(found["bits"]) == {"el", "en", "mt", "mean"}
    assert found["names"] == ["embedding_VD", "final_norm_D", "layers"]
    assert found["logits"] == [1, 64, 512] and len(found["said"]) <= 3
    assert found["evaluated"].pop("step") == 6
    assert found["evaluated"] == {f"bits_per_byte.{key}": value for key, value in found["bits"].items()}
    assert found["hf"].endswith("runs/mine/hf") and found["report"]


def test_objects_show_themselves_in_a_notebook(found):
    assert "<th>parameters</th>" in found["plan_html"] and "Maltese" in found["run_html"]
    assert found["documents"][0]["id"] in found["row_html"] and len(found["texts"]) == len(found["documents"])
    assert "<td>sample-mt</td><td>mt</td><td>training</td>" in found["prepared_html"] and len(found["repr"]) < 200
    assert found["past"] == "row=48 is not in the run; use 0 to 47"
    assert found["said_html"].startswith("<p>The<b>")


def test_devices_that_come_too_late_are_refused(found):
    assert found["late"].startswith("devices=cpu:3 comes too late: JAX already has 8 cpu devices")


def test_a_script_without_a_guard_is_told_so_and_does_not_hang(tmp_path):
    write_experiment(tmp_path / "mine.py", small())
    done = script(tmp_path, "True")
    assert done.returncode == 1 and "call it below if __name__ == '__main__':" in done.stderr


def test_the_names_of_the_package_are_those_it_gives():
    assert dir(euroflax) == euroflax.__all__ == sorted(euroflax.__all__)
    for name in euroflax.__all__:
        assert getattr(euroflax, name) is not None
    assert callable(euroflax.train) and callable(euroflax.plan) and callable(euroflax.generate)
    with pytest.raises(AttributeError, match="no attribute trian"):
        _ = euroflax.trian
