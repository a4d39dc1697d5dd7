import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from euroflax import sharding
from euroflax.experiment import ExperimentError, Mesh
from euroflax.sharding import ACTIVATIONS, PARAMETERS, constrain, mesh_sizes, spec
from euroflax.training.step import abstract_state, init_state
from tests.conftest import small


def test_letters_become_mesh_axes():
    assert spec("DHK", PARAMETERS) == PartitionSpec(("fsdp", "sequence"), "tensor", None)
    assert spec("BLD", ACTIVATIONS) == PartitionSpec(("data", "fsdp"), "sequence", None)
    assert spec("WR", ACTIVATIONS) == PartitionSpec(("replica", "data", "fsdp"), ("sequence", "tensor"))


def test_an_unknown_letter_and_an_axis_used_twice_are_errors():
    with pytest.raises(KeyError, match="dimension Z of BZ"):
        spec("BZ", ACTIVATIONS)
    with pytest.raises(ValueError, match="HF uses a mesh axis twice"):
        spec("HF", PARAMETERS)


def test_every_letter_of_the_tables_names_mesh_axes_that_exist():
    for table in (PARAMETERS, ACTIVATIONS):
        for axis in table.values():
            assert set([axis] if isinstance(axis, str) else axis or ()) <= set(sharding.AXES)


def test_constrain_is_strict_with_and_without_a_mesh():
    x = jnp.zeros((8, 4, 6))
    with pytest.raises(KeyError):
        constrain(x, "BLZ")
    with pytest.raises(ValueError, match="names 2 dimensions"):
        constrain(x, "BL")
    with jax.set_mesh(sharding.make_mesh(small(mesh__fsdp=4, mesh__data=2))):
        with pytest.raises(ValueError, match="B=6 of BLD does not divide over 8 devices"):
            jax.jit(lambda x: constrain(x, "BLD"))(jnp.zeros((6, 4, 8)))
        placed = jax.jit(lambda x: constrain(x, "BLD"))(x)
        assert placed.addressable_shards[0].data.shape == (1, 4, 6)


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (Mesh(), 8, (1, 8, 1, 1, 1)),
        (Mesh(data=2, fsdp=-1, tensor=2), 8, (1, 2, 2, 1, 2)),
        (Mesh(data=1), 1, (1, 1, 1, 1, 1)),
        (Mesh(fsdp=8), 8, (1, 1, 8, 1, 1)),
        (Mesh(replica=-1, data=2, sequence=2), 8, (2, 2, 1, 2, 1)),
    ],
)
def test_what_is_left_fills_the_mesh(mesh, devices, sizes):
    assert tuple(mesh_sizes(mesh, devices).values()) == sizes


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(data=16), "mesh=data 16 does not make up 8 devices; use mesh.data=8, or -1 in place of a size"),
        (Mesh(fsdp=3), "mesh=data -1 x fsdp 3 does not make up 8 devices; use mesh.fsdp=2 or mesh.fsdp=4"),
        (Mesh(data=4), "use mesh.data=8, or -1 in place of a size"),
        (Mesh(data=2, fsdp=2, tensor=4), "use mesh.data=1, or mesh.fsdp=1, or mesh.tensor=2, or -1 in place of a size"),
        (Mesh(data=3, fsdp=5), "mesh=data 3 x fsdp 5 does not make up 8 devices; use sizes whose product is 8"),
        (Mesh(fsdp=5, tensor=3), "use sizes whose product divides 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_machine_is_the_users_mistake(mesh, message):
    with pytest.raises(ExperimentError, match=message):
        mesh_sizes(mesh, 8)


def test_a_batch_that_does_not_divide_over_what_is_left_is_refused():
    with pytest.raises(ExperimentError, match="does not divide over"):
        sharding.make_mesh(small(training__batch_tokens=4 * 64))


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2), (2, 2)])
def test_every_parameter_is_really_split(fsdp, tensor):
    declared = small(mesh__fsdp=fsdp, mesh__tensor=tensor)
    mesh = sharding.make_mesh(declared)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(declared, mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(declared), out_shardings=shardings)()
    moments = state.optimizer[1]
    for tree in (state.params, moments.mu, moments.nu):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            letters = sharding.letters_of(path)
            ways = (fsdp if "D" in letters else 1) * (tensor if set("HGFV") & set(letters) else 1)
            shard = leaf.addressable_shards[0].data
            assert shard.size * ways == leaf.size, path
            assert set(letters) == {"N", "K"} or ways > 1


def test_a_parameter_whose_name_does_not_tell_its_dimensions_is_an_error():
    mesh = sharding.make_mesh(small(), 8)
    with pytest.raises(ValueError, match="does not name its dimensions"):
        sharding.shardings({"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, mesh)
    with pytest.raises(ValueError, match="does not name its dimensions"):
        sharding.shardings({"w_DF": jax.ShapeDtypeStruct((4,), jnp.float32)}, mesh)


def test_a_batch_is_placed_row_by_row():
    mesh = sharding.make_mesh(small(mesh__fsdp=2, mesh__tensor=2))
    mine = sharding.local_rows(mesh, 8)
    assert mine == list(range(8))
    batch = {"tokens_BL": np.arange(32, dtype=np.int32).reshape(8, 4)}
    placed = sharding.place_batch(batch, mesh, mine, 8)["tokens_BL"]
    assert np.array_equal(placed, batch["tokens_BL"])
    assert placed.addressable_shards[0].data.shape == (2, 4)
