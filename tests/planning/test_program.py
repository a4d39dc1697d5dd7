"""What the compiled step moves and holds, held against arithmetic; each fault that these tests are for is planted."""

import jax
import pytest

from euroflax import sharding
from euroflax.data.loader import empty_batch
from euroflax.model import decoder
from euroflax.planning import minimum
from euroflax.planning.program import read_program
from euroflax.training.step import abstract_state, compile_step
from tests.conftest import small

MESHES = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"replica": 2, "fsdp": 4},
    {"replica": 2, "data": 2, "fsdp": 2},
    {"fsdp": 4, "sequence": 2},
]
SCALARS = 2_000
"""Bytes for the loss, the norm of the gradients and counts."""


def compiled(mesh, **changes):
    """The step of a small experiment on a mesh: what it moves and holds, and the least that it must move."""
    declared = small(**{f"mesh__{axis}": mesh.get(axis, 1) for axis in sharding.AXES}, **changes)
    placed, span = sharding.make_mesh(declared, devices=jax.devices()), declared.spans[0]
    state, rows = abstract_state(declared, placed), sharding.batch_sharding(placed)
    shape = (span.batch_rows, span.sequence_length)
    batch = {k: jax.ShapeDtypeStruct(shape, v.dtype, sharding=rows) for k, v in empty_batch(1, 1, 0).items()}
    with jax.set_mesh(placed):
        step = compile_step(declared, span, jax.tree.map(lambda leaf: leaf.sharding, state)).lower(state, batch)
        program = step.compile()
    sizes = dict(placed.shape)
    found = read_program(program.as_text(), sizes)
    return found, program.memory_analysis().temp_size_in_bytes, minimum.least_messages(declared, span, sizes)


def assert_moves_little(found, least):
    """A CPU program scatters by an all-reduce, which sends twice as much."""
    for message in found.collectives:
        allowed = least.get((message.kind, message.axis), 0)
        if message.kind == "all-reduce":
            allowed += 2 * least.get(("reduce-scatter", message.axis), 0)
        assert message.bytes <= 1.45 * allowed + SCALARS, message


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_step_moves_what_its_mesh_asks_for(mesh):
    found, _, least = compiled(mesh)
    assert_moves_little(found, least)
    assert {kind for kind, _ in least} - {m.kind for m in found.collectives} <= {"reduce-scatter"}


def test_no_activation_is_gathered_where_rows_lengths_and_widths_are_split():
    found, _, least = compiled({"fsdp": 2, "sequence": 2, "tensor": 2})
    for message in (m for m in found.collectives if m.kind == "all-gather"):
        assert message.bytes <= 1.45 * least.get(("all-gather", message.axis), 0) + SCALARS, message


def test_gradients_cross_the_slow_network_once_a_step():
    parts = {"training__accumulation_steps": 2, "training__batch_tokens": 16 * 64}
    found, _, least = compiled({"replica": 2, "fsdp": 4}, **parts)
    (crossing,) = [m for m in found.collectives if m.axis == "replica"]
    assert crossing.kind == "all-reduce" and crossing.bytes <= least["all-reduce", "replica"] + SCALARS


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_batch_that_loses_an_axis_is_caught(monkeypatch, axis):
    monkeypatch.setitem(sharding.ACTIVATIONS, "B", axis)
    found, _, least = compiled({"data": 2, "fsdp": 4})
    with pytest.raises(AssertionError):
        assert_moves_little(found, least)


def test_a_gather_of_the_residual_stream_is_caught(monkeypatch):
    monkeypatch.setitem(sharding.ACTIVATIONS, "S", None)
    whole = decoder._apply_layer

    def gathering(config, params, x_BLD, batch, cache):
        everywhere = jax.sharding.PartitionSpec(None, None, None)
        return whole(config, params, jax.lax.with_sharding_constraint(x_BLD, everywhere), batch, cache)

    monkeypatch.setattr(decoder, "_apply_layer", gathering)
    found, _, least = compiled({"fsdp": 8})
    with pytest.raises(AssertionError):
        assert_moves_little(found, least)


ONE_LAYER = 2.6
"""Its residual stream, and its gradients and on a CPU their update, which together are three quarters as large here."""


def growth():
    """Bytes of temporaries of a layer more, in residual streams of a device."""
    shapes = {"model__remat": "full", "model__layer_loop": "scan", "data__sequence_length": 1024}
    sizes = {"training__batch_tokens": 8 * 1024, "training__tokens": 48 * 1024}
    few, many = (compiled({"data": 8}, model__num_layers=n, **shapes, **sizes)[1] for n in (4, 12))
    return (many - few) / 8 / (1024 * 32 * 4)


def test_a_layer_more_keeps_one_residual_stream_more():
    assert growth() <= ONE_LAYER


def test_a_temporary_that_doubles_is_caught(monkeypatch):
    monkeypatch.setitem(decoder._REMAT_POLICIES, "full", jax.checkpoint_policies.everything_saveable)
    assert growth() > 2 * ONE_LAYER


HLO = """
HloModule m

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %g = f32[32,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[8,32]{1,0} dot(%x, %g), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %s = f32[8,16]{1,0} reduce-scatter(%g), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %s)
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %z = s32[] constant(0)
  %t0 = (s32[], f32[8,16]{1,0}) tuple(%z, %a)
  %w = (s32[], f32[8,16]{1,0}) while(%t0), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %r = f32[8,16]{1,0} get-tuple-element(%w), index=1
  ROOT %o = f32[8,16]{1,0} all-reduce(%r), channel_id=3, replica_groups=GROUPS, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "data"),
        ("mesh['a'=8] {'a':(1)2}", "data"),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "data"),
        ("{}", "data+fsdp"),
    ],
)
def test_messages_and_flops_are_read_from_a_program(groups, axis):
    mesh = {"replica": 1, "data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    found = read_program(HLO.replace("GROUPS", groups), mesh)
    moved = {(m.kind, m.axis): (m.bytes, m.count) for m in found.collectives}
    array, ways = 8 * 16 * 4, 8 if axis == "data+fsdp" else 2
    assert moved == {
        ("all-gather", "fsdp"): (5 * 3 * array, 5),
        ("reduce-scatter", "fsdp"): (5 * 3 * array, 5),
        ("all-reduce", axis): (2 * array * (ways - 1) // ways, 1),
    }
    assert found.flops == 5 * 2 * 8 * 32 * 16


ASYNC = """
%on_another_core (q: f32[8,16]) -> f32[32,16] {
  %q = f32[8,16]{1,0} parameter(0)
  ROOT %g = f32[32,16]{1,0} all-gather(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (a: f32[8,16]) -> f32[32,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %s = ((f32[8,16]{1,0}), f32[32,16]{1,0}) call-start(%a), async_execution_thread="sparsecore", CALLS=%on_another_core
  ROOT %d = f32[32,16]{1,0} call-done(%s)
}
"""


def test_messages_that_another_core_sends_are_read_and_none_is_passed_over():
    mesh = {"data": 2, "fsdp": 4}
    (message,) = read_program(ASYNC.replace("CALLS", "to_apply"), mesh).collectives
    assert (message.kind, message.axis, message.bytes) == ("all-gather", "fsdp", 3 * 8 * 16 * 4)
    with pytest.raises(ValueError, match="nothing known runs on_another_core, which sends messages"):
        read_program(ASYNC.replace("CALLS", "newly_named"), mesh)


@pytest.mark.parametrize(
    ("pairs", "moved"), [("", {}), ("{0,0},{1,1}", {}), ("{0,0},{1,5},{5,1}", {"data": 8 * 16 * 4})], ids=str
)
def test_a_permutation_sends_only_what_changes_its_device(pairs, moved):
    permute = f"%n = f32[8,16] collective-permute(%a), channel_id=4, source_target_pairs={{{pairs}}}"
    text = HLO.replace("GROUPS", "{}").replace("  %z = s32[] constant(0)", f"  {permute}\n  %z = s32[] constant(0)")
    found = read_program(text, {"data": 2, "fsdp": 4}).collectives
    assert {m.axis: m.bytes for m in found if m.kind == "collective-permute"} == moved


def test_devices_of_a_message_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="cannot read the devices"):
        read_program(HLO.replace("GROUPS", "?"), {"data": 2, "fsdp": 4})
