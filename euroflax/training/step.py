"""The training step: a pure function `(state, batch) -> (state, metrics)`, and the state."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from euroflax import model
from euroflax.data.skipping import Range, next_position
from euroflax.experiment import Experiment, Span
from euroflax.sharding import constrain, per_replica, shardings
from euroflax.training.guard import FINE, GuardState, first_refused_row, init_guard, judge
from euroflax.training.objectives import next_token
from euroflax.training.optimizer import learning_rate, make_optimizer


@flax.struct.dataclass
class TrainState:
    """All that training carries from step to step."""

    step: jax.Array
    """Completed steps, int32."""
    position: jax.Array
    """Rows consumed, uint32."""
    params: dict
    optimizer: optax.OptState
    guard: GuardState
    skipped_ranges_PQ: jax.Array
    """First row and row after the last of each range that is skipped, uint32; `NO_ROW` where there is none yet."""


NO_ROW = 2**32 - 1

Step = Callable[[TrainState, dict], tuple[TrainState, dict]]


def init_state(declared: Experiment) -> TrainState:
    """The state before the first step, a function of the experiment alone."""
    params = model.init(declared.model, jax.random.key(declared.training.seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        position=jnp.zeros((), jnp.uint32),
        params=params,
        optimizer=make_optimizer(declared.training).init(params),
        guard=init_guard(declared.training.guard),
        skipped_ranges_PQ=jnp.full((max(declared.training.guard.max_returns, 1), 2), jnp.uint32(NO_ROW)),
    )


def abstract_state(declared: Experiment, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> TrainState:
    """Shape, type and sharding of each leaf of the state on a mesh, without computing any."""
    shapes = jax.eval_shape(functools.partial(init_state, declared))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings(shapes, mesh),
    )


def train_step(declared: Experiment, span: Span, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    """One step of a stage on a batch of the contract's arrays, `[B, L]` each.

    A step that the guard refuses consumes its rows and leaves parameters and optimizer as they were.

    Returns:
        The new state, and `loss`, `loss_sum_M`, `weight_M`, `padding`, `grad_norm`, `learning_rate`, `skipped` (the
        guard's reason, 0 for none), `too_many`, `refused_from` (the first row of the steps that it counts).
    """
    training = declared.training
    total_weight = jnp.maximum(jnp.sum(batch["loss_weights_BL"]), 1.0)
    gradients, metrics = per_replica(functools.partial(_gradients, declared), state.params, batch, total_weight)
    stop, position = _consume(span, state.position, state.skipped_ranges_PQ)
    # In float32, since int32 ends at 2^31 tokens; at 10^13 tokens the clock of the schedule advances by 2^20.
    tokens = float(span.first_token) + (stop - jnp.uint32(span.first_row)).astype(jnp.float32) * span.sequence_length
    rate = learning_rate(training.schedule, declared.total_tokens, tokens)
    updates, optimizer = make_optimizer(training).update(gradients, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": rate}
    judged = (state.step + 1, state.position, metrics["loss"], metrics["grad_norm"])
    guard, reason, too_many = judge(training.guard, state.guard, *judged)
    refused_from = first_refused_row(training.guard, guard, state.step + 1)
    metrics |= {"skipped": reason, "too_many": too_many, "refused_from": refused_from}
    params, optimizer = optax.tree.where(reason == FINE, (params, optimizer), (state.params, state.optimizer))
    return TrainState(state.step + 1, position, params, optimizer, guard, state.skipped_ranges_PQ), metrics


def _consume(span: Span, position: jax.Array, skipped_ranges_PQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The end of the batch that begins at a position, and the row that is read next: as in `data.skipping`."""
    starts_P = skipped_ranges_PQ[:, 0]
    ahead = jnp.min(jnp.where(starts_P > position, starts_P, jnp.uint32(NO_ROW)))
    rows = jnp.uint32(min(span.batch_rows, span.stop_row - span.first_row))
    left = jnp.minimum(jnp.uint32(span.stop_row), ahead) - position
    stop = following = position + jnp.minimum(rows, left)
    for start, end in skipped_ranges_PQ:  # in order
        following = jnp.where((start <= following) & (following < end), end, following)
    return stop, following


def skipped_ranges(state: TrainState) -> list[Range]:
    """The ranges of rows that are skipped, in order."""
    pairs = jax.device_get(state.skipped_ranges_PQ).tolist()
    return [(start, stop) for start, stop in pairs if start != NO_ROW]


def skip(state: TrainState, ranges: list[Range]) -> TrainState:
    """The state with these ranges of rows to skip, which begin at its position or later."""
    rows = sorted(ranges)
    padded = np.full(state.skipped_ranges_PQ.shape, NO_ROW, np.uint32)
    padded[: len(rows)] = np.array(rows, np.uint32).reshape(-1, 2)
    position = np.uint32(next_position(int(state.position), rows))

    def like(leaf: jax.Array, value: np.ndarray | np.uint32) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.asarray(value)[index])

    return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        position=like(state.position, position), skipped_ranges_PQ=like(state.skipped_ranges_PQ, padded)
    )


def compile_step(declared: Experiment, span: Span, shardings_of_state: TrainState) -> jax.stages.Wrapped:
    """The step of a stage as a program, which takes over the memory of the state that it is given."""
    function = functools.partial(train_step, declared, span)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings_of_state, None))


def _gradients(declared: Experiment, params: dict, batch: dict, total_weight: jax.Array) -> tuple[dict, dict]:
    """Gradients and metrics of a batch, in `accumulation_steps` parts one after the other."""
    objective = functools.partial(next_token, declared)
    value_and_grad = jax.grad(objective, has_aux=True)
    parts = declared.training.accumulation_steps
    if parts == 1:
        return value_and_grad(params, batch, total_weight)

    def split(values_BL: jax.Array) -> jax.Array:
        # Part p takes rows p, p + parts, ...: each device keeps its own rows.
        values_BAL = values_BL.reshape(values_BL.shape[0] // parts, parts, -1)
        return constrain(jnp.moveaxis(values_BAL, 1, 0), "ABL")

    def add(total: tuple, part: dict) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, part, total_weight)), None

    batch_ABL = jax.tree.map(split, batch)
    first = jax.tree.map(lambda values: values[0], batch_ABL)
    shapes = jax.eval_shape(value_and_grad, params, first, total_weight)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, batch_ABL)
    return total
