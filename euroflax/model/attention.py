"""Attention: the one place where its kernel is chosen."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK_LENGTH = 512


def attend(
    q_BLHK: Float[Array, "B L H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGK: Float[Array, "B S G K"],
    segment_ids_BL: Int[Array, "B L"],
    segment_ids_BS: Int[Array, "B S"],
    start: int | Int[Array, ""] = 0,
) -> Float[Array, "B L H K"]:
    """Causal attention within segments; each of the G key heads serves H / G query heads.

    The queries stand at places `start` to `start + L` of the S places of the keys.

    Rows longer than 512 are taken in blocks of queries whose scores are computed again in the backward pass, so
    that memory grows with the length and not with its square.
    """
    length = q_BLHK.shape[1]
    if length <= _BLOCK_LENGTH or length % _BLOCK_LENGTH:
        return _attend_block(q_BLHK, k_BSGK, v_BSGK, segment_ids_BL, segment_ids_BS, start + jnp.arange(length))
    offsets = jnp.arange(0, length, _BLOCK_LENGTH)

    @jax.checkpoint
    def block(offset: jax.Array) -> jax.Array:
        q_BCHK = jax.lax.dynamic_slice_in_dim(q_BLHK, offset, _BLOCK_LENGTH, axis=1)
        segments_BC = jax.lax.dynamic_slice_in_dim(segment_ids_BL, offset, _BLOCK_LENGTH, axis=1)
        places_C = start + offset + jnp.arange(_BLOCK_LENGTH)
        return _attend_block(q_BCHK, k_BSGK, v_BSGK, segments_BC, segment_ids_BS, places_C)

    blocks = jax.lax.map(block, offsets)
    return jnp.moveaxis(blocks, 0, 1).reshape(q_BLHK.shape)


def _attend_block(
    q_BCHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BC: jax.Array,
    segments_BS: jax.Array,
    places_C: jax.Array,
) -> jax.Array:
    same_BCS = segments_BC[:, :, None] == segments_BS[:, None, :]
    causal_CS = places_C[:, None] >= jnp.arange(k_BSGK.shape[1])[None, :]
    mask_B1CS = (same_BCS & causal_CS)[:, None]
    return jax.nn.dot_product_attention(q_BCHK, k_BSGK, v_BSGK, mask=mask_B1CS, implementation="xla")
