import jax
import pytest

from euroflax import planning, verbs
from euroflax.data.loader import Rows
from euroflax.data.prepare import prepare
from euroflax.experiment import ExperimentError, load
from euroflax.training.step import abstract_state, init_state
from tests.conftest import ROOT, small


def test_memory_is_what_the_devices_really_hold():
    declared = small(mesh__fsdp=4, mesh__tensor=2, mesh__data=1)
    made = planning.make_plan(declared, 8)
    from euroflax import sharding

    mesh = sharding.make_mesh(declared)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(declared, mesh))
    state = jax.jit(lambda: init_state(declared), out_shardings=shardings)()

    def held(tree):
        device = jax.devices()[3]
        shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == device]
        return sum(shard.data.nbytes for shard in shards)

    assert made.memory_bytes["parameters"] == made.memory_bytes["gradients"] == held(state.params)
    assert made.memory_bytes["optimizer"] == held(state.optimizer)
    assert made.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    parts = ("parameters", "optimizer", "gradients", "temporaries")
    assert made.memory_bytes["total"] == sum(made.memory_bytes[part] for part in parts)


def test_tokens_steps_and_epochs_are_those_of_the_run(folders):
    declared = small(training__tokens=19 * 64)
    order = Rows(declared, prepare(declared, folders)).order
    made = planning.make_plan(declared, 8, order)
    assert (made.tokens, made.steps) == (19 * 64, 3)
    (stage,) = made.stages
    assert sum(row["rows"] for row in stage["sources"]) == 19
    for row, rows in zip(stage["sources"], order.stretches[0].sources, strict=True):
        assert row["epochs"] == row["rows"] / rows.packing.num_rows and row["size"] == "measured"
    assert sum(entry["rows"] for entry in made.ledger) == 19
    assert verbs.plan(declared, folders, 8).to_json() == made.to_json()


def test_a_plan_needs_no_data_and_no_devices(folders):
    made = verbs.plan(load(ROOT / "experiments/7b_eu24.py"), folders)
    assert made.devices == 64 and 6.7e9 < made.parameters < 6.8e9
    assert made.memory_bytes["parameters"] == pytest.approx(4 * made.parameters / 64, rel=0.01)
    text = "\n".join(planning.plan_lines(made))
    assert "24 sources in 24 languages" in text and "33.33% (hplt3-en)" in text
    assert {row["size"] for row in made.stages[0]["sources"]} == {"declared"}
    assert {entry["size"] for entry in made.ledger} == {"declared"}
    english = next(row for row in made.stages[0]["sources"] if row["source"] == "hplt3-en")
    assert english["natural"] == pytest.approx(2000 / 5676.58, rel=1e-3)
    assert english["epochs"] == pytest.approx(2e12 / 3 / 2000e9, rel=1e-3)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ExperimentError, match=r"does not make up 4 devices; use mesh\.fsdp=4"):
        planning.make_plan(small(mesh__fsdp=8), 4)


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB"), (2**51, "2048.0 TiB")]
)
def test_sizes_are_for_people(count, text):
    assert planning.size(count) == text
