"""The parts of a layer. The end of each parameter's name says its dimensions, and so its place on the mesh."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from euroflax.experiment import Model
from euroflax.model.attention import attend, cached_attention
from euroflax.sharding import constrain, gathered


def residual_std(config: Model) -> float:
    """Initial standard deviation of projections into the residual stream: `init_std / sqrt(2 num_layers)`.

    Radford et al., "Language models are unsupervised multitask learners" (2019), section 2.3.
    """
    return config.init_std / (2 * config.num_layers) ** 0.5


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "*B D"]:
    """`x` over its root mean square, times `scale`; computed in float32 (Zhang and Sennrich, 2019)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype)


def rotate(x_BLHK: Float[Array, "B L H K"], positions_BL: Int[Array, "B L"], theta: float) -> Float[Array, "B L H K"]:
    """Rotary positions over the two halves of each head, as Llama lays them out (Su et al., 2021)."""
    half = x_BLHK.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)


class LayerCache(NamedTuple):
    """Keys and values of one layer at S places, and where the next ones go."""

    keys_BSGK: jax.Array
    values_BSGK: jax.Array
    segment_ids_BS: jax.Array
    """0 at places that hold nothing."""
    start: jax.Array
    """The place of the first of the new tokens."""


class Attention(nn.Module):
    """Grouped-query attention within documents."""

    config: Model

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        segment_ids_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerCache | None]:
        """The change that attention makes to the residual stream, and the cache with the new keys and values."""
        c, dtype = self.config, x_BLD.dtype
        init = nn.initializers.normal(c.init_std)
        w_DHK = self.param("query_DHK", init, (c.embed_dim, c.num_heads, c.head_dim))
        k_DGK = self.param("key_DGK", init, (c.embed_dim, c.num_kv_heads, c.head_dim))
        v_DGK = self.param("value_DGK", init, (c.embed_dim, c.num_kv_heads, c.head_dim))
        o_HKD = self.param(
            "output_HKD", nn.initializers.normal(residual_std(c)), (c.num_heads, c.head_dim, c.embed_dim)
        )
        q_BLHK = constrain(jnp.einsum("BLD,DHK->BLHK", x_BLD, gathered(w_DHK.astype(dtype), "DHK")), "BLHK")
        k_BLGK = constrain(jnp.einsum("BLD,DGK->BLGK", x_BLD, gathered(k_DGK.astype(dtype), "DGK")), "BLGK")
        v_BLGK = constrain(jnp.einsum("BLD,DGK->BLGK", x_BLD, gathered(v_DGK.astype(dtype), "DGK")), "BLGK")
        if c.qk_norm:
            q_BLHK = rms_norm(q_BLHK, self.param("query_norm_K", nn.initializers.ones, (c.head_dim,)), c.norm_epsilon)
            k_BLGK = rms_norm(k_BLGK, self.param("key_norm_K", nn.initializers.ones, (c.head_dim,)), c.norm_epsilon)
        q_BLHK = rotate(q_BLHK, positions_BL, c.rope_theta)
        k_BLGK = rotate(k_BLGK, positions_BL, c.rope_theta)
        if cache is None:
            y_BLHK = attend(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)
        else:
            cache = _extended(cache, k_BLGK, v_BLGK)
            y_BLHK = cached_attention(
                q_BLHK, cache.keys_BSGK, cache.values_BSGK, segment_ids_BL, cache.segment_ids_BS, cache.start
            )
        y_BLHK = constrain(y_BLHK, "BLHK")
        return jnp.einsum("BLHK,HKD->BLD", y_BLHK, gathered(o_HKD.astype(dtype), "HKD")), cache


def _extended(cache: LayerCache, k_BLGK: jax.Array, v_BLGK: jax.Array) -> LayerCache:
    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return constrain(jax.lax.dynamic_update_slice_in_dim(old, new, cache.start, axis=1), "BSGK")

    return cache._replace(keys_BSGK=put(cache.keys_BSGK, k_BLGK), values_BSGK=put(cache.values_BSGK, v_BLGK))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, "GLU variants improve transformer", 2020)."""

    config: Model

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The change that the feed-forward part makes to the residual stream."""
        c, dtype = self.config, x_BLD.dtype
        init = nn.initializers.normal(c.init_std)
        gate_DF = self.param("gate_DF", init, (c.embed_dim, c.mlp_dim))
        up_DF = self.param("up_DF", init, (c.embed_dim, c.mlp_dim))
        down_FD = self.param("down_FD", nn.initializers.normal(residual_std(c)), (c.mlp_dim, c.embed_dim))
        gate_BLF = constrain(jnp.einsum("BLD,DF->BLF", x_BLD, gathered(gate_DF.astype(dtype), "DF")), "BLF")
        up_BLF = constrain(jnp.einsum("BLD,DF->BLF", x_BLD, gathered(up_DF.astype(dtype), "DF")), "BLF")
        return jnp.einsum("BLF,FD->BLD", jax.nn.silu(gate_BLF) * up_BLF, gathered(down_FD.astype(dtype), "FD"))


class Layer(nn.Module):
    """One transformer layer with normalisation before each part."""

    config: Model

    @nn.compact
    def __call__(
        self,
        x_BRD: Float[Array, "B L D"],
        segment_ids_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerCache | None]:
        """The residual stream after the layer, and its cache.

        Between the parts of a layer the places of rows are split over the tensor axis as well (Korthikanti et al.,
        "Reducing activation recomputation in large transformer models", 2022); new tokens behind a cache are few and
        are not.
        """
        residual = "BRD" if cache is None else "BLD"
        c, ones = self.config, nn.initializers.ones
        attention_norm_D = self.param("attention_norm_D", ones, (c.embed_dim,))
        mlp_norm_D = self.param("mlp_norm_D", ones, (c.embed_dim,))
        normed_BRD = constrain(rms_norm(x_BRD, attention_norm_D, c.norm_epsilon), residual)
        normed_BLD = constrain(normed_BRD, "BLD")
        change_BLD, cache = Attention(c, name="attention")(normed_BLD, segment_ids_BL, positions_BL, cache)
        x_BRD = x_BRD + constrain(change_BLD, residual)
        normed_BRD = constrain(rms_norm(x_BRD, mlp_norm_D, c.norm_epsilon), residual)
        normed_BLD = constrain(normed_BRD, "BLD")
        return x_BRD + constrain(FeedForward(c, name="mlp")(normed_BLD), residual), cache
