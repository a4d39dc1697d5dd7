import dataclasses
import json

import jax
import numpy as np
import pytest

from euroflax import model, verbs
from euroflax.checkpoint import hash_files, latest_step, listed_steps
from euroflax.console import SilentDisplay
from euroflax.data.loader import Rows
from euroflax.data.prepare import prepare
from euroflax.experiment import ExperimentError, Interrupted, RunFailed, fingerprint, override, to_json
from euroflax.training import loop
from euroflax.training.record import read_metrics
from euroflax.training.stop import Stop
from tests.conftest import small

TIMES = ("step_seconds", "tokens_per_second", "mfu", "goodput", "session")


def deterministic(metrics):
    """What the contract says is bitwise the same: everything but times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]


class StopAfter(SilentDisplay):
    """Wishes to stop once a step's metrics, or an evaluation, have been shown; notes what it was shown."""

    def __init__(self, stop=None, step=None, evaluation=None):
        self.stop, self.at, self.evaluation_at, self.notes, self.steps = stop, step, evaluation, [], []

    def note(self, text):
        self.notes.append(text)

    def step(self, metrics, total_tokens):
        self.steps.append(metrics["step"])
        if metrics["step"] == self.at:
            self.stop.request("a test")

    def progress(self, task, done, total):
        if task == "evaluate" and self.steps and self.steps[-1] == self.evaluation_at:
            self.evaluation_at = None
            self.stop.request("a test")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    from euroflax.folders import Folders

    folders = Folders(cache_dir=cache, runs_dir=tmp_path_factory.mktemp("undisturbed"))
    return verbs.train(small(mesh__data=8), folders)


def test_a_run_leaves_its_whole_record(undisturbed):
    lines = undisturbed.metrics
    assert [(line["step"], "eval" in line) for line in lines] == [
        *[(0, True), (1, False), (2, False), (3, False), (3, True)],
        *[(4, False), (5, False), (6, False), (6, True)],
    ]
    first = lines[1]
    assert (first["sequences"], first["tokens"]) == (8, 512)
    assert first["loss"] == pytest.approx(np.log(512), rel=0.02)
    assert set(first["loss_by_language"]) <= {"el", "en", "mt"} and first["mfu"] is None
    assert set(lines[0]["eval"]) == {f"bits_per_byte.{c}" for c in ("el", "en", "mt", "mean")}
    assert set(undisturbed.bits_per_byte) == {"el", "en", "mt", "mean"}
    session = json.loads((undisturbed.path / "manifest.json").read_text())["sessions"][0]
    assert session["steps"] == 6 and session["flops"] > 0 and session["to"] >= session["from"]
    assert session["processes"] == 1 and session["devices"] == 8
    rows = json.loads((undisturbed.path / "manifest.json").read_text())["ledger"]
    assert rows["position"] == 48 == sum(entry["rows"] for entry in rows["entries"])
    sources = json.loads((undisturbed.path / "manifest.json").read_text())["sources"]
    assert [(s["name"], s["split"]) for s in sources[:4]] == [
        *[(f"sample-{c}", "train") for c in ("el", "en", "mt")],
        ("sample-el", "all"),
    ]
    assert sources[0]["licence"] == "CC0-1.0" and sources[0]["documents"] == 10 and sources[0]["bytes"] > 5000
    assert (undisturbed.path / "tokenizer" / "tokenizer.json").is_file()
    assert {leaf.dtype for leaf in jax.tree.leaves(undisturbed.params)} == {jax.numpy.dtype("float32")}


@pytest.mark.parametrize(
    "disturb", [{"step": 1}, {"step": 2}, {"step": 5}, {"evaluation": 3}, {"evaluation": 6}], ids=str
)
def test_a_resumed_run_equals_an_uninterrupted_one(undisturbed, folders, disturb):
    stop = Stop()
    with pytest.raises(Interrupted, match="the same command goes on"):
        verbs.train(small(mesh__data=8), folders, StopAfter(stop, **disturb), stop)
    stopped = len(read_metrics(folders.run_dir("tiny_eu24")))
    last = max(line["step"] for line in read_metrics(folders.run_dir("tiny_eu24")) if "loss" in line)
    assert latest_step(folders.run_dir("tiny_eu24") / "checkpoints") == last
    assert 0 < stopped < len(undisturbed.metrics)
    run = verbs.train(small(mesh__data=8), folders)
    assert deterministic(run.metrics) == deterministic(undisturbed.metrics)
    jax.tree.map(np.testing.assert_array_equal, run.params, undisturbed.params)


def test_metrics_beyond_the_checkpoint_are_made_again_and_stand_once(undisturbed, folders):
    stop = Stop()
    with pytest.raises(Interrupted):
        verbs.train(small(mesh__data=8), folders, StopAfter(stop, step=3), stop)
    with open(folders.run_dir("tiny_eu24") / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')
    run = verbs.train(small(mesh__data=8), folders)
    assert deterministic(run.metrics) == deterministic(undisturbed.metrics)


def test_a_complete_run_says_so_and_does_nothing(folders):
    verbs.train(small(), folders)
    before = (folders.run_dir("tiny_eu24") / "metrics.jsonl").read_bytes()
    display = StopAfter()
    run = verbs.train(small(), folders, display)
    assert any("run tiny_eu24 is complete: 6 steps" in note for note in display.notes)
    assert display.steps == [] and (run.path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [{"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, {"training__batch_tokens": 16 * 64, "mesh__data": 8}],
    ids=str,
)
def test_another_mesh_or_batch_goes_on_with_the_same_rows(undisturbed, folders, changes):
    stop = Stop()
    with pytest.raises(Interrupted):
        verbs.train(small(mesh__data=8), folders, StopAfter(stop, step=2), stop)
    run = verbs.train(small(**changes), folders)
    last, expected = run.metrics[-1]["eval"], undisturbed.metrics[-1]["eval"]
    assert run.metrics[-2]["sequences"] == 48
    if "training__batch_tokens" not in changes:
        losses = [[line["loss"] for line in lines if "loss" in line] for lines in (run.metrics, undisturbed.metrics)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
        np.testing.assert_allclose(list(last.values()), list(expected.values()), rtol=1e-4)


def test_a_longer_run_goes_on_where_the_shorter_ended(folders):
    verbs.train(small(), folders)
    run = verbs.train(small(training__tokens=8 * 8 * 64), folders)
    assert [line["step"] for line in run.metrics if "loss" in line] == list(range(1, 9))


def test_a_batch_cut_short_at_the_end_counts_its_rows(folders):
    run = verbs.train(small(training__tokens=(2 * 8 + 3) * 64), folders)
    assert [(line["sequences"], line["tokens"]) for line in run.metrics if "loss" in line][-1] == (19, 19 * 64)
    assert run.metrics[-2]["padding_tokens"] < 3 * 64


def test_step_n_is_dispatched_before_the_metrics_of_the_one_before_are_read(folders, monkeypatch):
    order = []
    compiled = loop.compile_step

    def counting(*given):
        step = compiled(*given)
        return lambda state, batch: (order.append("dispatch"), step(state, batch))[1]

    monkeypatch.setattr(loop, "compile_step", counting)
    display = StopAfter()
    display.step = lambda metrics, total: order.append(metrics["step"])
    verbs.train(small(evaluation__every_steps=100, checkpoint__every_steps=100), folders, display)
    assert order == ["dispatch", "dispatch", 1, "dispatch", 2, "dispatch", 3, "dispatch", 4, "dispatch", 5, 6]


def test_another_experiment_in_the_folder_is_refused(folders):
    verbs.train(small(), folders)
    with pytest.raises(ExperimentError, match=r"training.seed=5 differs from 0"):
        verbs.train(small(training__seed=5), folders)
    (folders.run_dir("tiny_eu24") / "experiment.json").unlink()
    for verb in (verbs.evaluate, verbs.train):
        with pytest.raises(ExperimentError, match=r"model.mlp_dim=32 differs from 64"):
            verb(small(model__mlp_dim=32), folders)


def test_a_loss_that_is_not_finite_ends_the_run_as_failed(folders):
    declared = small(training__schedule__peak_learning_rate=1e30, training__schedule__warmup_tokens=0)
    with pytest.raises(RunFailed, match=r"the latest since its .* is not finite; look at rows .*no checkpoint"):
        verbs.train(declared, folders)


def test_another_tokenizer_is_not_evaluated_with(folders):
    run = verbs.train(small(), folders)
    for file in run.path.glob("checkpoints/*/facts/metadata"):
        file.write_text(file.read_text().replace('"tokenizer": "', '"tokenizer": "x'))
    for step in listed_steps(run.path / "checkpoints"):
        manifest = run.path / "checkpoints" / "manifests" / f"{step}.json"
        manifest.write_text(json.dumps(hash_files(run.path / "checkpoints" / str(step))))
    with pytest.raises(ExperimentError, match="the tokenizer changed since the run began"):
        verbs.evaluate(small(), folders)


def test_a_wish_is_heard_though_every_step_is_saved(folders):
    stop = Stop()
    with pytest.raises(Interrupted, match="stopped by a test after step 3, which is saved"):
        verbs.train(small(checkpoint__every_steps=1), folders, StopAfter(stop, step=3), stop)


def test_the_manifest_is_up_to_date_at_each_checkpoint(folders):
    seen = []
    display = StopAfter()
    display.step = lambda metrics, total: seen.append(
        json.loads((folders.run_dir("tiny_eu24") / "manifest.json").read_text())["sessions"][0]["steps"]
    )
    verbs.train(small(), folders, display)
    assert seen == [0, 0, 2, 2, 4, 4]


def test_losses_are_those_of_the_rows_in_their_order(undisturbed, folders):
    declared = small(mesh__data=8)
    rows = Rows(declared, prepare(declared, folders))
    for step in (1, 4):
        batch = rows.batch(declared.spans[0], range(8 * (step - 1), 8 * step))
        present = {declared.language_codes[i] for i in batch["language_ids_BL"][batch["loss_weights_BL"] > 0]}
        (line,) = [line for line in undisturbed.metrics if line["step"] == step and "loss" in line]
        assert set(line["loss_by_language"]) == present


def test_without_held_out_text_nothing_is_measured(folders):
    declared = small()
    declared = dataclasses.replace(declared, evaluation=dataclasses.replace(declared.evaluation, sources=()))
    run = verbs.train(declared, folders)
    assert run.bits_per_byte == {} and not [line for line in run.metrics if "eval" in line]
    with pytest.raises(ExperimentError, match="leave nothing to evaluate on"):
        verbs.evaluate(declared, folders)


def test_the_evaluate_verb_gives_the_figures_of_the_last_evaluation(undisturbed, folders):
    from euroflax.folders import Folders

    there = Folders(cache_dir=folders.cache_dir, runs_dir=undisturbed.path.parent)
    found = verbs.evaluate(small(mesh__data=8), there)
    assert found == {"step": 6} | undisturbed.metrics[-1]["eval"]
    with pytest.raises(ExperimentError, match="holds no checkpoint; train first"):
        verbs.evaluate(small(), folders)


def test_mfu_is_the_share_of_the_peak_that_the_model_needs(folders, monkeypatch):
    monkeypatch.setattr("euroflax.training.meter.peak_flops", lambda kind: 1e12)
    declared = small(training__tokens=4 * 8 * 64, evaluation__every_steps=100)
    lines = [line for line in verbs.train(declared, folders).metrics if "loss" in line]
    for line in lines:
        needed = 8 * 64 * model.flops_per_token(declared.model, 64)
        assert line["mfu"] == pytest.approx(needed / line["step_seconds"] / (8 * 1e12), rel=1e-6)


def test_fingerprints_differ_where_values_do():
    values = [{}, {"a": 1}, {"a": 2}, {"b": 1}, ["a", 1], "a1", None]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_a_run_that_is_complete_and_typed_again_counts_as_no_session(folders):
    declared = small(training__tokens=2 * 8 * 64)
    for _ in range(3):
        run = verbs.train(declared, folders)
    assert len(json.loads((run.path / "manifest.json").read_bytes())["sessions"]) == 1


def test_a_run_that_is_refused_leaves_no_folder(folders):
    sources = [to_json(small())["data"]["sources"][0] | {"path": "none.jsonl"}]
    declared = override(small(), {"data.sources": sources, "data.mixture": {}})
    with pytest.raises(ExperimentError, match="names no file"):
        verbs.train(declared, folders)
    assert not folders.run_dir(declared.name).exists()
