"""The loss of each token, from chunks of logits; and sums of it by language."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from euroflax.accelerators import MAX_UNROLLED_CHUNKS
from euroflax.experiment import Model
from euroflax.model.attention import balanced, in_order
from euroflax.model.decoder import INPUTS, hidden, output_kernel
from euroflax.sharding import PARAMETERS, constrain, scattered, ways


def token_losses(
    config: Model, params: dict, batch: dict, chunk_entries: int
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Negative log-likelihood in nats of each target, and the log-normaliser of its logits.

    Logits exist for at most `chunk_entries` entries of the vocabulary at a time, if so many divide it, and again in
    the backward pass; each chunk of the output matrix is gathered when its turn comes, and its gradient reduced.
    """
    laid = {name: balanced(batch[name]) for name in (*INPUTS, "targets_BL")}
    hidden_BLD = hidden(config, params, laid)
    parts = ways("V")
    chunks = num_chunks(config, chunk_entries, parts)
    kernel_DVXU = output_kernel(config, params).reshape(config.embed_dim, parts, chunks, -1)
    kernel_XDVU = constrain(jnp.moveaxis(kernel_DVXU, 2, 0), "XDVU", PARAMETERS)
    found = _losses(_unroll(config, chunks), hidden_BLD, kernel_XDVU, laid["targets_BL"])
    nats_BL, normaliser_BL = cast(tuple[jax.Array, jax.Array], found)
    return in_order(constrain(nats_BL, "BL")), in_order(constrain(normaliser_BL, "BL"))


def num_chunks(config: Model, chunk_entries: int, parts: int) -> int:
    """Into how many chunks the entries of each of `parts` parts of the vocabulary are cut.

    The fewest equal ones of at most `chunk_entries` on all parts, where such have half of that at least; else one.
    """
    entries, most = config.vocab_size // parts, -(-chunk_entries // parts)
    fits = [chunk for chunk in range(most, 0, -1) if entries % chunk == 0]
    return entries // fits[0] if fits and 2 * fits[0] >= min(most, entries) else 1


def _unroll(config: Model, chunks: int) -> int:
    """How many chunks an iteration of the compiled loop takes: on CPU all of them, up to `MAX_UNROLLED_CHUNKS`.

    With `--xla_cpu_experimental_onednn_custom_call`, XLA of jaxlib 0.12 takes minutes to compile bfloat16 products
    inside this loop.
    """
    if config.layer_loop == "scan" or chunks > MAX_UNROLLED_CHUNKS:
        return 1
    return chunks if jax.default_backend() == "cpu" else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
    unroll: int, hidden_BLD: jax.Array, kernel_XDVU: jax.Array, targets_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses and log-normalisers over X chunks of the vocabulary, of U entries on each of V parts of the devices."""
    return _losses_forward(unroll, hidden_BLD, kernel_XDVU, targets_BL)[0]


def _losses_forward(
    unroll: int, hidden_BLD: jax.Array, kernel_XDVU: jax.Array, targets_BL: jax.Array
) -> tuple[tuple, tuple]:
    def fold(carry: tuple, chunk: tuple) -> tuple[tuple, None]:
        highest_BLV, total_BLV, target_BLV = carry
        kernel_DVU = constrain(chunk[1].astype(hidden_BLD.dtype), "DVU")
        logits_BLVU, is_target_BLVU = _logits(hidden_BLD, kernel_DVU, targets_BL, kernel_XDVU.shape[0], chunk[0])
        now_BLV = jnp.maximum(highest_BLV, logits_BLVU.max(axis=-1))
        added_BLV = jnp.exp(logits_BLVU - now_BLV[..., None]).sum(axis=-1)
        target_BLV += jnp.where(is_target_BLVU, logits_BLVU, 0).sum(axis=-1)
        return (now_BLV, total_BLV * jnp.exp(highest_BLV - now_BLV) + added_BLV, target_BLV), None

    shape = (*targets_BL.shape, kernel_XDVU.shape[2])
    start = tuple(constrain(jnp.full(shape, value, jnp.float32), "BLV") for value in (-jnp.inf, 0, 0))
    (highest_BLV, total_BLV, target_BLV), _ = jax.lax.scan(fold, start, _chunks(kernel_XDVU), unroll=unroll)
    normaliser_BL = jax.nn.logsumexp(highest_BLV + jnp.log(total_BLV), axis=-1)
    found = (normaliser_BL - target_BLV.sum(axis=-1), normaliser_BL)
    return found, (hidden_BLD, kernel_XDVU, targets_BL, normaliser_BL)


def _losses_backward(unroll: int, kept: tuple, changes: tuple) -> tuple:
    hidden_BLD, kernel_XDVU, targets_BL, normaliser_BL = kept
    of_nats_BL, of_normaliser_BL = changes

    def fold(total_VBLD: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
        kernel_DVU = constrain(chunk[1].astype(hidden_BLD.dtype), "DVU")
        logits_BLVU, is_target_BLVU = _logits(hidden_BLD, kernel_DVU, targets_BL, kernel_XDVU.shape[0], chunk[0])
        probabilities_BLVU = jnp.exp(logits_BLVU - normaliser_BL[:, :, None, None])
        of_logits_BLVU = (of_nats_BL + of_normaliser_BL)[:, :, None, None] * probabilities_BLVU
        of_logits_BLVU -= jnp.where(is_target_BLVU, of_nats_BL[:, :, None, None], 0)
        of_logits_BLVU = of_logits_BLVU.astype(hidden_BLD.dtype)
        total_VBLD += jnp.einsum("BLVU,DVU->VBLD", of_logits_BLVU, kernel_DVU, preferred_element_type=jnp.float32)
        of_part_DVU = scattered(jnp.einsum("BLD,BLVU->DVU", hidden_BLD, of_logits_BLVU), "DVU")
        return constrain(total_VBLD, "VBLD"), of_part_DVU.astype(kernel_XDVU.dtype)

    start_VBLD = constrain(jnp.zeros((kernel_XDVU.shape[2], *hidden_BLD.shape)), "VBLD")
    total_VBLD, of_kernel_XDVU = jax.lax.scan(fold, start_VBLD, _chunks(kernel_XDVU), unroll=unroll)
    return constrain(total_VBLD.sum(axis=0).astype(hidden_BLD.dtype), "BRD"), of_kernel_XDVU, None


_losses.defvjp(_losses_forward, _losses_backward)


def _chunks(kernel_XDVU: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.arange(kernel_XDVU.shape[0]), kernel_XDVU


def _logits(
    hidden_BLD: jax.Array, kernel_DVU: jax.Array, targets_BL: jax.Array, chunks: int, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The logits of a chunk, float32, and which of them is the target's."""
    logits_BLVU = constrain(jnp.einsum("BLD,DVU->BLVU", hidden_BLD, kernel_DVU).astype(jnp.float32), "BLVU")
    _, parts, entries = kernel_DVU.shape
    entries_VU = (jnp.arange(parts)[:, None] * chunks + number) * entries + jnp.arange(entries)
    return logits_BLVU, targets_BL[:, :, None, None] == entries_VU


def sums_by_language(values_BL: Float[Array, "B L"], batch: dict, num_languages: int) -> Float[Array, " M"]:
    """The sum of `values_BL` over the tokens of each language; a product, so that its order is fixed on a GPU too."""
    language_BLM = jax.nn.one_hot(batch["language_ids_BL"], num_languages, dtype=jnp.float32)
    return jnp.einsum("BL,BLM->M", values_BL, language_BLM, precision=jax.lax.Precision.HIGHEST)
