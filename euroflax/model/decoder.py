"""The decoder as pure functions: `init(config, key) -> params`, `apply(config, params, batch) -> logits`.

`params` is a tree of float32 arrays named by their dimensions; those below `layers` are stacked over the layers.
"""

import functools
import operator
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from euroflax.experiment import Model
from euroflax.model.attention import balanced, in_order
from euroflax.model.layers import Layer, LayerCache, rms_norm
from euroflax.sharding import constrain, gathered

INPUTS = ("tokens_BL", "segment_ids_BL", "positions_BL")
"""What the model reads of a batch."""

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def init(config: Model, key: PRNGKeyArray) -> dict:
    """Initial parameters: normal with `init_std`, norms at one.

    Returns:
        `embedding_VD`, `final_norm_D`, `output_DV` where the output is not tied, and `layers` with a leading N.
    """
    embedding_key, output_key, layers_key = jax.random.split(key, 3)
    shape = (config.vocab_size, config.embed_dim)
    params = {
        "embedding_VD": config.init_std * jax.random.normal(embedding_key, shape),
        "final_norm_D": jnp.ones(config.embed_dim),
        "layers": jax.vmap(functools.partial(_init_layer, config))(jax.random.split(layers_key, config.num_layers)),
    }
    if not config.tied_output:
        params["output_DV"] = config.init_std * jax.random.normal(output_key, shape[::-1])
    return params


def _init_layer(config: Model, key: PRNGKeyArray) -> dict:
    x_BLD, zeros_BL = jnp.zeros((1, 2, config.embed_dim)), jnp.zeros((1, 2), jnp.int32)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return dict(Layer(config).init(key, x_BLD, zeros_BL, zeros_BL)["params"])


def hidden(config: Model, params: dict, batch: dict) -> Float[Array, "B L D"]:
    """The normalised last hidden state, in the compute type.

    Args:
        config: the model.
        params: as `init` makes them.
        batch: `tokens_BL`, `segment_ids_BL` and `positions_BL`, int32; where devices share rows, their places lie as
            `attention.balanced` has them, and so do those of the result.
    """
    x_BRD = constrain(_embed(config, params, batch), "BRD")
    layers = _in_compute_type(config, params["layers"])

    def layer(x_BRD: jax.Array, layer_params: dict) -> jax.Array:
        return _apply_layer(config, layer_params, x_BRD, batch, None)[0]

    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[config.remat])
    if _unrolled(config):
        for i in range(config.num_layers):
            x_BRD = layer(x_BRD, jax.tree.map(operator.itemgetter(i), layers))
    else:
        x_BRD, _ = jax.lax.scan(lambda x, layer_params: (layer(x, layer_params), None), x_BRD, layers)
    normed_BRD = constrain(rms_norm(x_BRD, params["final_norm_D"], config.norm_epsilon), "BRD")
    return constrain(normed_BRD, "BLD")


def _in_compute_type(config: Model, layers: dict) -> dict:
    """The layers with their matrices in the compute type, before devices gather them: half of the bytes to move."""
    return jax.tree.map(lambda p: p.astype(config.compute_dtype) if p.ndim > 2 else p, layers)


def _embed(config: Model, params: dict, batch: dict) -> jax.Array:
    """The embeddings of the tokens: each device looks up its part of the width for the rows of all that share it."""
    embedding_VE = params["embedding_VD"].astype(jnp.dtype(config.compute_dtype))
    x_YSE = constrain(embedding_VE[constrain(batch["tokens_BL"], "YS")], "YSE")
    x_YLJ = constrain(x_YSE, "YLJ")
    return constrain(x_YLJ, "BLD")


def _apply_layer(
    config: Model, layer_params: dict, x_BLD: jax.Array, batch: dict, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None]:
    segments_BL, positions_BL = batch["segment_ids_BL"], batch["positions_BL"]
    return cast(tuple, Layer(config).apply({"params": layer_params}, x_BLD, segments_BL, positions_BL, cache))


def empty_cache(config: Model, num_rows: int, length: int) -> dict:
    """A cache of keys and values with `length` places, in the compute type: what `extend` fills.

    Returns:
        `keys_NBSGK`, `values_NBSGK`, `segment_ids_BS`, and `filled`, the number of places taken.
    """
    shape = (config.num_layers, num_rows, length, config.num_kv_heads, config.head_dim)
    return {
        "keys_NBSGK": jnp.zeros(shape, config.compute_dtype),
        "values_NBSGK": jnp.zeros(shape, config.compute_dtype),
        "segment_ids_BS": jnp.zeros((num_rows, length), jnp.int32),
        "filled": jnp.zeros((), jnp.int32),
    }


def extend(config: Model, params: dict, cache: dict, batch: dict) -> tuple[Float[Array, "B L D"], dict]:
    """As `hidden`, with the tokens of the batch placed behind those that the cache holds, and the longer cache.

    The places of a row count whatever its padding: a shorter prompt is padded at its left end, by segment 0.
    """
    start = cache["filled"]
    segments_BS = jax.lax.dynamic_update_slice_in_dim(
        cache["segment_ids_BS"], batch["segment_ids_BL"].astype(jnp.int32), start, axis=1
    )
    x_BLD = _embed(config, params, batch)

    def layer(x_BLD: jax.Array, of_layer: tuple) -> tuple[jax.Array, tuple]:
        layer_params, keys_BSGK, values_BSGK = of_layer
        before = LayerCache(keys_BSGK, values_BSGK, segments_BS, start)
        x_BLD, after = _apply_layer(config, layer_params, x_BLD, batch, before)
        assert after is not None
        return x_BLD, (after.keys_BSGK, after.values_BSGK)

    of_layers = (params["layers"], cache["keys_NBSGK"], cache["values_NBSGK"])
    if _unrolled(config):
        kept = []
        for i in range(config.num_layers):
            x_BLD, new = layer(x_BLD, jax.tree.map(operator.itemgetter(i), of_layers))
            kept.append(new)
        keys_NBSGK, values_NBSGK = (jnp.stack(parts) for parts in zip(*kept, strict=True))
    else:
        x_BLD, (keys_NBSGK, values_NBSGK) = jax.lax.scan(layer, x_BLD, of_layers)
    cache = {
        "keys_NBSGK": keys_NBSGK,
        "values_NBSGK": values_NBSGK,
        "segment_ids_BS": segments_BS,
        "filled": start + batch["tokens_BL"].shape[1],
    }
    return rms_norm(x_BLD, params["final_norm_D"], config.norm_epsilon), cache


def _unrolled(config: Model) -> bool:
    """Whether layers go one by one: on CPU the compiler makes twice as much of that as of a loop."""
    if config.layer_loop == "auto":
        return jax.default_backend() == "cpu" and config.num_layers <= 32
    return config.layer_loop == "unroll"


def project(config: Model, params: dict, hidden_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """The logits of hidden states, float32."""
    kernel_DV = gathered(output_kernel(config, params).astype(hidden_BLD.dtype), "DV")
    return constrain(jnp.einsum("BLD,DV->BLV", hidden_BLD, kernel_DV).astype(jnp.float32), "BLV")


def output_kernel(config: Model, params: dict) -> Float[Array, "D V"]:
    """What hidden states are multiplied by to give logits."""
    return params["embedding_VD"].T if config.tied_output else params["output_DV"]


def apply(config: Model, params: dict, batch: dict) -> Float[Array, "B L V"]:
    """The logits of the next token at each position, float32.

    Args:
        config: the model.
        params: as `init` makes them.
        batch: `tokens_BL`, `segment_ids_BL` and `positions_BL`, int32.
    """
    laid = {name: balanced(batch[name]) for name in INPUTS}
    return project(config, params, in_order(hidden(config, params, laid)))
