"""Objectives: the loss of a batch and its parts by language."""

import jax
import jax.numpy as jnp

from euroflax import model
from euroflax.experiment import Experiment


def next_token(declared: Experiment, params: dict, batch: dict, total_weight: jax.Array) -> tuple[jax.Array, dict]:
    """Next-token cross entropy plus z-loss, over the weighted targets.

    Args:
        declared: the experiment.
        params: the parameters.
        batch: a batch, or a part of one.
        total_weight: sum of the loss weights of the whole batch, so that losses of parts add up to that of the whole.

    Returns:
        The objective, and `loss` (nats, without z-loss), `loss_sum_M` and `weight_M` by language.
    """
    nats_BL, normaliser_BL = model.token_losses(declared.model, params, batch, declared.training.loss_chunk_entries)
    weights_BL = batch["loss_weights_BL"]
    num_languages = len(declared.language_codes)
    loss = jnp.sum(nats_BL * weights_BL) / total_weight
    z_loss = declared.training.z_loss * jnp.sum(normaliser_BL**2 * weights_BL) / total_weight
    metrics = {
        "loss": loss,
        "loss_sum_M": model.sums_by_language(nats_BL * weights_BL, batch, num_languages),
        "weight_M": model.sums_by_language(weights_BL, batch, num_languages),
        "padding": jnp.sum(batch["segment_ids_BL"] == 0),
    }
    return loss + z_loss, metrics
