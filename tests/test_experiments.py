import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from euroflax import planning, verbs
from euroflax.data.loader import BATCH_KEYS
from euroflax.experiment import Stage, load, override, validate
from euroflax.folders import Folders
from euroflax.languages import EU24
from euroflax.planning import compiled
from euroflax.training.step import init_state, train_step
from tests.conftest import ROOT, TINY, small

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_valid_and_says_how_to_run_it(path):
    declared = load(path)
    assert validate(declared) == [] and declared.name == path.stem
    assert f"python -m euroflax.run experiments/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_shrunk_trains_two_steps_on_eight_devices(path, folders):
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    declared = small(path, languages=EU24, training__tokens=2 * 8 * 64, **mesh)
    run = verbs.train(declared, folders)
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert losses == pytest.approx([math.log(512)] * 2, rel=0.05)
    assert set(run.bits_per_byte) == {*EU24, "mean"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_traces_at_full_size_without_memory(path):
    declared = load(path)
    shape = (declared.batch_rows, declared.data.sequence_length)
    types = {key: jnp.float32 if key == "loss_weights_BL" else jnp.int32 for key in BATCH_KEYS}
    batch = {key: jax.ShapeDtypeStruct(shape, types[key]) for key in BATCH_KEYS}
    state = jax.eval_shape(functools.partial(init_state, declared))
    after, metrics = jax.eval_shape(functools.partial(train_step, declared, declared.spans[0]), state, batch)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)
    assert metrics["loss"].shape == () and metrics["loss_sum_M"].shape == (len(declared.language_codes),)


def test_the_7b_model_has_the_languages_shares_and_sizes_that_its_name_says():
    declared = load(ROOT / "experiments/7b_eu24.py")
    assert declared.language_codes == EU24
    assert all(source.expected_bytes for source in declared.data.sources)
    assert sum(declared.data.mixture.weights.values()) == pytest.approx(1, abs=1e-9)
    assert declared.data.mixture.weights["hplt3-en"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_stage_of_every_experiment_traces_at_ten_trillion_tokens(path):
    declared = override(load(path), {"training.tokens": 10**13, "data.sequence_length": 4096})
    declared = override(declared, {"training.batch_tokens": 2**22, "data.mixture": {"sources": "uniform"}})
    declared = dataclasses.replace(declared, stages=(Stage(from_tokens=9 * 10**12, sequence_length=8192),))
    assert validate(declared) == []
    planning.trace_stages(declared, 64 if path.stem in ("7b_eu24", "mix156_eu24") else 1)


def test_check_traces_each_stage(folders, monkeypatch):
    monkeypatch.setattr(compiled, "train_step", lambda declared, span, state, batch: 1 // (1 - span.number))
    declared = small(training__tokens=8 * 8 * 64)
    declared = dataclasses.replace(declared, stages=(Stage(from_tokens=4 * 8 * 64, batch_tokens=4 * 64),))
    with pytest.raises(ZeroDivisionError):
        verbs.check(declared, folders)


@pytest.mark.slow
def test_the_default_run_gives_the_same_figures_on_every_mesh(cache, tmp_path):
    figures = []
    for mesh in ({"fsdp": 8}, {"data": 4, "tensor": 2}, {"data": 2, "sequence": 4}):
        sizes = {"mesh.data": 1} | {f"mesh.{axis}": size for axis, size in mesh.items()}
        declared = override(load(TINY), sizes | {"name": "_".join(mesh), "evaluation.sample_tokens": 0})
        run = verbs.train(declared, Folders(cache_dir=cache, runs_dir=tmp_path))
        norms = [line["grad_norm"] for line in run.metrics if "loss" in line]
        assert max(norms) < 4
        figures.append(run.bits_per_byte["mean"])
    assert max(figures) - min(figures) < 2e-3
