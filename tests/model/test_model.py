import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from euroflax import model, sharding
from euroflax.model import attention, size
from euroflax.model.layers import rms_norm, rotate
from tests.conftest import assert_trees_close, small

CONFIG = small().model
apply = jax.jit(model.apply, static_argnums=0)
hidden = jax.jit(model.hidden, static_argnums=0)
token_losses = jax.jit(model.token_losses, static_argnums=(0, 3))


def batch(rows=2, length=12, seed=0, boundaries=(5,)):
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    for at in boundaries:
        segments[:, at:] += 1
        positions[:, at:] = np.arange(length - at)
    return {
        "tokens_BL": jnp.asarray(rng.integers(3, CONFIG.vocab_size, (rows, length)), jnp.int32),
        "targets_BL": jnp.asarray(rng.integers(3, CONFIG.vocab_size, (rows, length)), jnp.int32),
        "segment_ids_BL": jnp.asarray(segments),
        "positions_BL": jnp.asarray(positions),
    }


def params(config=CONFIG):
    # Larger than initial weights, so that attention has something to tell apart.
    return jax.tree.map(lambda p: 8 * p if p.ndim > 1 else p, model.init(config, jax.random.key(1)))


def embedding_gradient(config, output_position, data):
    """Gradient of one position's logits with respect to the embedding of each input token, `[L]` norms."""
    weights = params(config)
    length = data["tokens_BL"].shape[1]
    rows = {
        **data,
        "tokens_BL": jnp.arange(length)[None],
        **{k: data[k][:1] for k in ("segment_ids_BL", "positions_BL")},
    }

    def logits(embedding_VD):
        out = model.apply(config, {**weights, "embedding_VD": embedding_VD}, rows)
        return jnp.sum(out[0, output_position] ** 2)

    untied = jax.jit(jax.grad(logits))(weights["embedding_VD"])
    return jnp.linalg.norm(untied[:length], axis=-1)


UNTIED = dataclasses.replace(CONFIG, tied_output=False)


def test_future_tokens_get_zero_gradient():
    norms = embedding_gradient(UNTIED, 7, batch(boundaries=()))
    assert np.all(norms[8:] == 0) and np.all(norms[:8] > 0)


def test_tokens_of_another_document_get_zero_gradient():
    norms = embedding_gradient(UNTIED, 9, batch(boundaries=(5,)))
    assert np.all(norms[:5] == 0) and np.all(norms[5:10] > 0) and np.all(norms[10:] == 0)


def test_a_packed_document_has_the_logits_it_has_alone():
    packed = batch(rows=1, boundaries=(5, 9))
    together = apply(CONFIG, params(), packed)
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        alone = {key: values[:, start:stop] for key, values in packed.items()}
        np.testing.assert_allclose(apply(CONFIG, params(), alone), together[:, start:stop], atol=2e-5)


def plain_attention(q, k, v, segments):
    """Attention by its definition, float32: whole scores, and autodiff through them."""
    length, per_group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, per_group, axis=2) for x in (k, v))
    scores = jnp.einsum("bihk,bjhk->bhij", q, k) / q.shape[3] ** 0.5
    seen = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhij,bjhk->bihk", weights, v)


def values_and_gradients(attend, q, k, v, segments):
    def loss(q, k, v):
        out = attend(q, k, v, segments)
        return jnp.sum(out**3), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)


def attention_inputs(length):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    lengths = (13, 10, length - 23)
    return q, k, v, jnp.asarray(np.stack([np.repeat([1, 2, 3], lengths), np.repeat([1, 2, 3], lengths[::-1])]))


@pytest.mark.parametrize("block", [512, 8])
def test_attention_has_the_values_and_gradients_of_a_plain_one_within_segments_and_groups(monkeypatch, block):
    monkeypatch.setattr(attention, "_BLOCK_LENGTH", block)
    inputs = attention_inputs(32)
    expected, found = (values_and_gradients(attend, *inputs) for attend in (plain_attention, attention.attend))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sequence", "tensor"), [(4, 2), (2, 1)])
def test_attention_over_shared_rows_is_that_of_whole_rows(monkeypatch, sequence, tensor):
    monkeypatch.setattr(attention, "_BLOCK_LENGTH", 4)
    inputs = attention_inputs(32)
    declared = small(mesh__data=1, mesh__fsdp=1, mesh__sequence=sequence, mesh__tensor=tensor)

    order = np.repeat(attention._pieces(sequence), 32 // (2 * sequence)) * (32 // (2 * sequence))
    order += np.tile(np.arange(32 // (2 * sequence)), 2 * sequence)

    def shared(q, k, v, segments):
        return attention.attend(*(x[:, order] for x in (q, k, v, segments)))[:, np.argsort(order)]

    expected = values_and_gradients(plain_attention, *inputs)
    with jax.set_mesh(sharding.make_mesh(declared, devices=jax.devices()[: sequence * tensor])):
        found = values_and_gradients(shared, *inputs)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_each_device_meets_as_many_blocks_and_none_behind_its_queries(devices):
    numbers, pairs = attention._block_table(64, devices, 4)
    assert sorted(numbers) == list(range(16))
    queries = numbers.reshape(devices, -1)
    met = {(int(queries[d, i]), int(numbers[j])) for d in range(devices) for i, j in pairs[d]}
    assert met == {(own, key) for own in range(16) for key in range(own + 1)}
    assert pairs.shape == (devices, len(met) // devices, 2)


@pytest.mark.parametrize(
    ("length", "devices", "block"), [(4096, 1, 512), (4096, 2, 512), (96, 8, 6), (2 * 521, 1, 1042)]
)
def test_blocks_divide_the_pieces_of_a_row(length, devices, block):
    assert attention._block_length(length, devices) == block


def test_rotary_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        return jnp.sum(rotate(q, jnp.array([[i]]), 1e4) * rotate(k, jnp.array([[j]]), 1e4))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    np.testing.assert_array_equal(rotate(q, jnp.array([[0]]), 1e4), q)


def test_rms_norm_is_its_formula():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    scale = np.linspace(0.5, 2, 8).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), expected, rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_loops_and_rematerialisation_change_nothing(remat, loop):
    data, weights = batch(), params()

    def loss(config):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.token_losses(config, p, data, 4)[0])))(weights)

    expected = loss(dataclasses.replace(CONFIG, layer_loop="unroll", remat="none"))
    found = loss(dataclasses.replace(CONFIG, layer_loop=loop, remat=remat))
    assert_trees_close(expected, found, 1e-4)


def jaxprs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from jaxprs(inner)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_rematerialisation_is_really_on(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    traced = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(model.hidden(config, p, batch()))))(params())
    names = {equation.primitive.name for jaxpr in jaxprs(traced.jaxpr) for equation in jaxpr.eqns}
    assert bool(names & {"checkpoint", "remat2", "remat"}) == (remat == "full")


def test_the_loss_never_holds_logits_of_the_whole_batch():
    data = batch(rows=2, length=12)

    def largest(chunk):
        traced = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(model.token_losses(CONFIG, p, data, chunk)[0])))(params())
        shapes = [
            v.aval.shape for j in jaxprs(traced.jaxpr) for e in j.eqns for v in e.outvars if hasattr(v.aval, "shape")
        ]
        return max(np.prod(shape) for shape in shapes if shape[:2] == (2, 12) and len(shape) == 4 and shape[2] == 1)

    assert largest(chunk=128) == 2 * 12 * 128
    assert largest(chunk=100) == 2 * 12 * 64  # the most that divides
    assert largest(chunk=1000) == 2 * 12 * 512


def test_losses_in_chunks_are_those_of_the_logits():
    data, weights = batch(), params()
    logits = np.asarray(apply(CONFIG, weights, data), np.float64)
    normaliser = np.log(np.exp(logits).sum(-1))
    expected = normaliser - np.take_along_axis(logits, np.asarray(data["targets_BL"])[..., None], -1)[..., 0]
    for chunk in (8, 100, 256, 1000):
        nats, found = token_losses(CONFIG, weights, data, chunk)
        np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found, normaliser, rtol=1e-4, atol=1e-4)


def test_parameters_are_float32_and_compute_is_as_declared():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    weights = params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    assert hidden(config, weights, batch()).dtype == jnp.bfloat16
    assert apply(config, weights, batch()).dtype == jnp.float32
    exact = apply(CONFIG, model.init(CONFIG, jax.random.key(0)), batch())
    rough = apply(config, model.init(config, jax.random.key(0)), batch())
    np.testing.assert_allclose(exact, rough, atol=0.05)


def test_tied_and_untied_outputs_and_qk_norm_have_their_parameters():
    config = dataclasses.replace(CONFIG, tied_output=False, qk_norm=False)
    weights = model.init(config, jax.random.key(0))
    assert weights["output_DV"].shape == (32, 512)
    assert "query_norm_K" not in weights["layers"]["attention"]
    tied = model.init(dataclasses.replace(CONFIG, tied_output=True, qk_norm=True), jax.random.key(0))
    assert "output_DV" not in tied and tied["layers"]["attention"]["query_norm_K"].shape == (2, 16)
    count = sum(leaf.size for leaf in jax.tree.leaves(weights))
    assert model.num_parameters(config) == count
    layer = 32 * (4 + 2 + 2) * 16 + 4 * 16 * 32 + 3 * 32 * 64 + 2 * 32
    assert count == 2 * layer + 2 * 512 * 32 + 32


def test_flops_are_six_a_weight_and_attention():
    config = dataclasses.replace(CONFIG, tied_output=False, qk_norm=False)
    weights = model.num_parameters(config) - 512 * 32
    assert model.flops_per_token(config, 64) == 6 * weights + 6 * 2 * 4 * 16 * 64


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_tokens_read_in_parts_through_a_cache_have_the_hidden_states_of_the_whole(loop):
    config = dataclasses.replace(CONFIG, layer_loop=loop)
    params = model.init(config, jax.random.key(0))
    row = {key: value for key, value in batch(boundaries=()).items() if key != "targets_BL"}
    whole_BLD = model.hidden(config, params, row)
    cache = model.empty_cache(config, 2, 16)
    found = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 12)):
        hidden_BLD, cache = model.extend(config, params, cache, {key: value[:, part] for key, value in row.items()})
        found.append(hidden_BLD)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole_BLD, atol=2e-5)
    assert int(cache["filled"]) == 12


def test_rope_theta_is_the_base_of_the_frequencies():
    heads = jnp.ones((1, 1, 1, 4))
    positions = jnp.full((1, 1), 2, jnp.int32)
    for theta in (100.0, 10_000.0):
        angles = 2 * np.array([1, theta**-0.5])
        expected = [*(np.cos(angles) - np.sin(angles)), *(np.cos(angles) + np.sin(angles))]
        np.testing.assert_allclose(np.ravel(rotate(heads, positions, theta)), expected, rtol=1e-5)
    data, weights = batch(), params()
    found = [np.asarray(apply(dataclasses.replace(CONFIG, rope_theta=theta), weights, data)) for theta in (100.0, 1e4)]
    assert np.abs(found[0] - found[1]).max() > 1e-5


def test_initial_weights_have_init_std_and_those_into_the_residual_stream_less():
    config = dataclasses.replace(CONFIG, init_std=0.5, num_layers=8, tied_output=False)
    found = jax.jit(model.init, static_argnums=0)(config, jax.random.key(1))
    layers = found["layers"]
    plain = [
        found["embedding_VD"],
        found["output_DV"],
        *(layers["attention"][f"{n}"] for n in ("query_DHK", "key_DGK")),
    ]
    plain += [layers["attention"]["value_DGK"], layers["mlp"]["gate_DF"], layers["mlp"]["up_DF"]]
    for weight in plain:
        assert float(jnp.std(weight)) == pytest.approx(0.5, rel=0.05)
    for weight in (layers["attention"]["output_HKD"], layers["mlp"]["down_FD"]):
        assert float(jnp.std(weight)) == pytest.approx(0.5 / 16**0.5, rel=0.05)


def test_dots_computes_no_matrix_product_again_and_full_computes_all():
    data, weights = batch(), params()

    def products(remat):
        config = dataclasses.replace(CONFIG, remat=remat, layer_loop="unroll", num_layers=2)
        compiled = jax.jit(jax.grad(lambda p: jnp.sum(model.hidden(config, p, data)))).lower(weights)
        return compiled.as_text().count("stablehlo.dot_general")

    assert products("none") <= products("dots") < products("full")


def test_the_model_is_traced_once_for_its_size(monkeypatch):
    traced = []
    monkeypatch.setattr(size, "init", lambda config, key: traced.append(1) or model.init(config, key))
    config = dataclasses.replace(CONFIG, mlp_dim=80)
    assert len({model.flops_per_token(config, 64) for _ in range(5)}) == 1 and len(traced) == 1
