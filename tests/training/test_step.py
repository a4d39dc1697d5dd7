import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from euroflax import model, sharding
from euroflax.data.loader import Rows
from euroflax.data.prepare import prepare
from euroflax.training import step as steps
from euroflax.training.step import TrainState, abstract_state, init_state, train_step
from tests.conftest import assert_trees_close, small

AXES = ("replica", "data", "fsdp", "sequence", "tensor")
MESHES = [
    *({axis: 8} for axis in ("replica", "data", "fsdp")),
    {"sequence": 8},
    {"tensor": 2},
    {"replica": 2, "data": 2, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "sequence": 4},
    {"sequence": 4, "tensor": 2},
    {"replica": 2, "sequence": 2, "tensor": 2},
    {"replica": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "sequence": 2, "tensor": 2},
]


def meshed(sizes, **changes):
    return small(**{f"mesh__{axis}": sizes.get(axis, 1) for axis in AXES}, **changes)


@pytest.fixture(scope="module")
def batch(cache, tmp_path_factory):
    from euroflax.folders import Folders

    declared = small()
    return Rows(declared, prepare(declared, Folders(cache_dir=cache))).batch(declared.spans[0], range(8))


def on_mesh(declared, batch, function):
    """The result of `function(state, batch)` with the state and batch placed on the experiment's mesh."""
    used = math.prod(dataclasses.asdict(declared.mesh).values())
    mesh = sharding.make_mesh(declared, devices=jax.devices()[:used])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(declared, mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(init_state, declared), out_shardings=shardings)()
        placed = sharding.place_batch(batch, mesh, list(range(8)), 8)
        return jax.device_get(jax.jit(function)(state, placed))


def first(declared):
    return jax.jit(functools.partial(init_state, declared))()


def gradients(declared, state, batch):
    part = functools.partial(steps._gradients, declared)
    return sharding.per_replica(part, state.params, batch, batch["loss_weights_BL"].sum())


def alone(declared, batch):
    """Loss and gradients on one device, without a mesh."""
    one = jax.jit(functools.partial(gradients, dataclasses.replace(declared)))
    return jax.device_get(one(jax.jit(functools.partial(init_state, declared))(), batch))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_sharded_loss_and_gradients_equal_unsharded(batch, mesh):
    declared = meshed(mesh, training__z_loss=1e-3, training__loss_chunk_entries=128)
    found = on_mesh(declared, batch, functools.partial(gradients, declared))
    assert_trees_close(alone(declared, batch), found, 2e-5)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_gradients_equal_those_of_the_large_batch(batch, parts):
    whole = small(training__z_loss=1e-3)
    assert_trees_close(
        alone(whole, batch), alone(small(training__z_loss=1e-3, training__accumulation_steps=parts), batch), 2e-5
    )


def test_accumulation_on_a_mesh_equals_the_large_batch(batch):
    declared = meshed({"replica": 2, "fsdp": 2, "tensor": 2}, training__accumulation_steps=2)
    found = on_mesh(declared, batch, functools.partial(gradients, declared))
    assert_trees_close(alone(small(), batch), found, 2e-5)


def test_losses_by_language_make_up_the_loss(batch):
    declared = small()
    state, metrics = jax.jit(functools.partial(train_step, declared, declared.spans[0]))(first(declared), batch)
    assert isinstance(state, TrainState)
    assert metrics["weight_M"].sum() == batch["loss_weights_BL"].sum()
    np.testing.assert_allclose(metrics["loss_sum_M"].sum() / metrics["weight_M"].sum(), metrics["loss"], rtol=1e-5)
    nats, _ = jax.jit(model.token_losses, static_argnums=(0, 3))(declared.model, first(declared).params, batch, 64)
    for language in range(3):
        mine = (batch["language_ids_BL"] == language) * batch["loss_weights_BL"]
        np.testing.assert_allclose(metrics["loss_sum_M"][language], (nats * mine).sum(), rtol=1e-4)


def test_the_reported_loss_is_without_z_loss_and_the_gradient_with_it(batch):
    plain, with_z = (alone(small(training__z_loss=z), batch) for z in (0.0, 1e-2))
    assert plain[1]["loss"] == with_z[1]["loss"]
    with pytest.raises(AssertionError):
        assert_trees_close(plain[0], with_z[0], 1e-3)


def test_a_step_moves_parameters_position_and_step(batch):
    declared = small()
    state = first(declared)
    after, metrics = jax.jit(functools.partial(train_step, declared, declared.spans[0]))(state, batch)
    assert (int(after.step), int(after.position)) == (1, 8)
    assert metrics["learning_rate"] == np.float32(declared.training.schedule.peak_learning_rate)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert all(jax.tree.leaves(moved))


def test_masked_rows_at_the_end_count_for_nothing(batch):
    declared = small(training__tokens=5 * 64, training__schedule__warmup_tokens=0, training__schedule__decay_tokens=0)
    masked = {key: np.where(np.arange(8)[:, None] < 5, values, 0) for key, values in batch.items()}
    other = {key: np.where(np.arange(8)[:, None] < 5, values, batch[key][0]) for key, values in masked.items()}
    other["loss_weights_BL"] = masked["loss_weights_BL"]
    a, b = (alone(declared, part) for part in (masked, other))
    assert_trees_close(a[0], b[0], 1e-6)
    after, _ = jax.jit(functools.partial(train_step, declared, declared.spans[0]))(first(declared), masked)
    assert int(after.position) == 5
