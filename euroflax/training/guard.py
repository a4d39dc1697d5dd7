"""The guard: a step whose loss or gradient is out of all proportion is not applied. It is decided on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from euroflax import experiment
from euroflax.data.skipping import Range

FINE, LOSS_NOT_FINITE, GRADIENT_NOT_FINITE, LOSS_HIGH, GRADIENT_HIGH = range(5)
REASONS = {
    LOSS_NOT_FINITE: "its loss is not finite",
    GRADIENT_NOT_FINITE: "its gradient is not finite",
    LOSS_HIGH: "its loss is far above those before it",
    GRADIENT_HIGH: "its gradient is far above those before it",
}
NOT_FINITE = (LOSS_NOT_FINITE, GRADIENT_NOT_FINITE)
_NEVER = -(2**30)


class GuardState(NamedTuple):
    """What the guard knows of the steps so far: scalars, and steps of the last ones that were not applied."""

    applied: jax.Array
    """Steps that were applied, int32."""
    loss_mean: jax.Array
    loss_variance: jax.Array
    norm_mean: jax.Array
    norm_variance: jax.Array
    skipped: jax.Array
    """Steps that were not applied, int32."""
    last_skips_I: jax.Array
    """Their numbers, the latest `max_skipped + 1` of them, oldest first, int32."""
    last_rows_I: jax.Array
    """The first row of each of them, uint32."""


class BadStretch(Exception):
    """Too many steps were not applied."""

    def __init__(self, rows: Range, why: str) -> None:
        super().__init__(why)
        self.rows = rows
        """From the first row of the first of them to the last row of the last one."""


def init_guard(guard: experiment.Guard) -> GuardState:
    """What the guard knows before the first step."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    kept = guard.max_skipped + 1
    never, rows = jnp.full(kept, _NEVER, jnp.int32), jnp.zeros(kept, jnp.uint32)
    return GuardState(none, zero, zero, zero, zero, none, never, rows)


def judge(
    guard: experiment.Guard, state: GuardState, step: jax.Array, row: jax.Array, loss: jax.Array, norm: jax.Array
) -> tuple[GuardState, jax.Array, jax.Array]:
    """Judges a step by its loss and the norm of its gradient.

    Mean and variance are running ones over `window_steps` applied steps, with exponential weights (West, "Updating
    mean and variance estimates: an improved method", 1979); a step is far above them from so many steps on.

    Args:
        guard: its bounds.
        state: what it knows.
        step: the number of the step, int32.
        row: its first row, uint32.
        loss: of the step, in nats.
        norm: of its gradient.

    Returns:
        The new state; the reason not to apply the step, int32, 0 where it is fine; whether now more than
        `max_skipped` of the last `window_steps` steps, or most of all steps, were not applied.
    """
    reason = jnp.int32(FINE)
    if guard.deviations is not None:
        seen = state.applied >= guard.window_steps
        norm_high = norm > state.norm_mean + guard.deviations * jnp.sqrt(state.norm_variance)
        loss_high = loss > state.loss_mean + guard.deviations * jnp.sqrt(state.loss_variance)
        reason = jnp.where(seen & norm_high, GRADIENT_HIGH, reason)
        reason = jnp.where(seen & loss_high, LOSS_HIGH, reason)
    reason = jnp.where(jnp.isfinite(norm), reason, GRADIENT_NOT_FINITE)
    reason = jnp.where(jnp.isfinite(loss), reason, LOSS_NOT_FINITE).astype(jnp.int32)
    fine = reason == FINE
    weight = 1.0 / jnp.minimum(state.applied + 1, guard.window_steps).astype(jnp.float32)
    loss_change, norm_change = loss - state.loss_mean, norm - state.norm_mean
    applied = state._replace(
        applied=state.applied + 1,
        loss_mean=state.loss_mean + weight * loss_change,
        loss_variance=(1 - weight) * (state.loss_variance + weight * loss_change**2),
        norm_mean=state.norm_mean + weight * norm_change,
        norm_variance=(1 - weight) * (state.norm_variance + weight * norm_change**2),
    )
    last_skips_I = jnp.append(state.last_skips_I[1:], step)
    last_rows_I = jnp.append(state.last_rows_I[1:], row)
    refused = state._replace(skipped=state.skipped + 1, last_skips_I=last_skips_I, last_rows_I=last_rows_I)
    many = (step - last_skips_I[0] < guard.window_steps) | (2 * refused.skipped > step + 1)
    return optax.tree.where(fine, applied, refused), reason, ~fine & many


def first_refused_row(guard: experiment.Guard, state: GuardState, step: jax.Array) -> jax.Array:
    """The first row of those of the last `window_steps` steps that were not applied; of none, the greatest number."""
    counted_I = step - state.last_skips_I < guard.window_steps
    return jnp.min(jnp.where(counted_I, state.last_rows_I, jnp.uint32(2**32 - 1)))
