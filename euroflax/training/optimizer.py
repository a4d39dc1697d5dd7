"""The optimizer and its learning rate over tokens."""

import math

import jax
import jax.numpy as jnp
import optax

from euroflax.experiment import Experiment, Schedule, Training
from euroflax.sharding import letters_of


def learning_rate(schedule: Schedule, total_tokens: int, tokens: jax.Array | float) -> jax.Array:
    """The learning rate once `tokens` of `total_tokens` have been read, float32.

    Linear warm-up from 0. `wsd` then holds the peak and decays over the last `decay_tokens`: linearly, as half a
    cosine, or as 1 - sqrt (Hägele et al., "Scaling laws and compute-optimal training beyond fixed training
    durations", 2024). `cosine` decays from the warm-up to the end (Loshchilov and Hutter, 2017).
    """
    tokens = jnp.asarray(tokens, jnp.float32)
    warmup = jnp.minimum(1.0, tokens / float(max(schedule.warmup_tokens, 1)))
    is_cosine = schedule.kind == "cosine"
    decay_tokens = total_tokens - schedule.warmup_tokens if is_cosine else schedule.decay_tokens
    progress = jnp.clip((tokens - float(total_tokens - decay_tokens)) / float(max(decay_tokens, 1)), 0.0, 1.0)
    shape = "cosine" if is_cosine else schedule.decay
    falls = {
        "linear": progress,
        "cosine": 0.5 - 0.5 * jnp.cos(math.pi * progress),
        "1-sqrt": jnp.sqrt(progress),
    }
    remaining = 1.0 - (1.0 - schedule.final_fraction) * falls[shape] if decay_tokens else 1.0
    return jnp.float32(schedule.peak_learning_rate) * warmup * remaining


def about_longer(declared: Experiment, before: int, tokens: int) -> list[str]:
    """What the schedule does in a run that is made longer once its learning rate has begun to decay; else nothing.

    Args:
        declared: the experiment as it is now.
        before: its `training.tokens` so far.
        tokens: tokens read.
    """
    schedule, total = declared.training.schedule, declared.training.tokens
    decay_began = schedule.warmup_tokens if schedule.kind == "cosine" else before - schedule.decay_tokens
    if total == before or tokens <= decay_began:
        return []
    was, is_now = (float(learning_rate(schedule, end, float(tokens))) for end in (before, total))
    return [
        f"training.tokens was {before:,} and is {total:,}: the learning rate goes from {was:.3g} to {is_now:.3g} and "
        "decays at the new end",
        f"to extend the phase before the decay, copy the run folder, move the checkpoints after {decay_began:,} "
        "tokens out of its folder checkpoints, and run the same command again",
    ]


def make_optimizer(training: Training) -> optax.GradientTransformation:
    """AdamW but for the learning rate: clipping, moments, decoupled decay (Loshchilov and Hutter, 2019).

    The decay is on matrices only: parameters with two dimensions or more, the stacked layers not counted.
    """
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.scale_by_adam(training.adam_beta1, training.adam_beta2, training.adam_epsilon),
        optax.add_decayed_weights(training.weight_decay, mask=_is_matrix),
    )


def _is_matrix(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: len(letters_of(path).lstrip("N")) >= 2, params)
