"""The loss of each token, from chunks of logits; and sums of it by language."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from euroflax.experiment import Model
from euroflax.model.decoder import hidden, project
from euroflax.sharding import constrain


def token_losses(
    config: Model, params: dict, batch: dict, chunk_tokens: int
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Negative log-likelihood in nats of each target, and the log-normaliser of its logits.

    Logits exist for at most `chunk_tokens` positions of each row at a time, and again in the backward pass: no array
    of `[B, L, V]` is ever held.
    """
    hidden_BLD = hidden(config, params, batch)
    length = hidden_BLD.shape[1]
    chunk = (
        max(size for size in range(1, min(length // 2, chunk_tokens) + 1) if length % size == 0) if length > 1 else 1
    )

    @jax.checkpoint
    def losses(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = project(config, params, constrain(hidden_BCD, "BCD"))
        normaliser_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return normaliser_BC - target_BC, normaliser_BC

    def chunked(values: jax.Array) -> jax.Array:
        return jnp.moveaxis(values.reshape(values.shape[0], length // chunk, chunk, *values.shape[2:]), 1, 0)

    nats, normalisers = jax.lax.map(lambda part: losses(*part), (chunked(hidden_BLD), chunked(batch["targets_BL"])))
    nats_BL, normaliser_BL = (jnp.moveaxis(x, 0, 1).reshape(-1, length) for x in (nats, normalisers))
    return constrain(nats_BL, "BL"), constrain(normaliser_BL, "BL")


def sums_by_language(values_BL: Float[Array, "B L"], batch: dict, num_languages: int) -> Float[Array, " M"]:
    """The sum of `values_BL` over the tokens of each language; a product, so that its order is fixed on a GPU too."""
    language_BLM = jax.nn.one_hot(batch["language_ids_BL"], num_languages, dtype=jnp.float32)
    return jnp.einsum("BL,BLM->M", values_BL, language_BLM, precision=jax.lax.Precision.HIGHEST)
