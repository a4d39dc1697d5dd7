"""The training step: a pure function `(state, batch) -> (state, metrics)`, and the state."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from euroflax import model
from euroflax.experiment import Experiment, Span
from euroflax.sharding import constrain, per_replica, shardings
from euroflax.training.guard import FINE, GuardState, init_guard, judge
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
        guard's reason, 0 for none), `too_many`.
    """
    training = declared.training
    total_weight = jnp.maximum(jnp.sum(batch["loss_weights_BL"]), 1.0)
    gradients, metrics = per_replica(functools.partial(_gradients, declared), state.params, batch, total_weight)
    rows = min(span.batch_rows, span.stop_row - span.first_row)
    left = jnp.uint32(span.stop_row) - state.position
    position = state.position + jnp.minimum(jnp.uint32(rows), left)
    tokens = span.first_token + (position - jnp.uint32(span.first_row)).astype(jnp.float32) * span.sequence_length
    rate = learning_rate(training.schedule, declared.total_tokens, tokens)
    updates, optimizer = make_optimizer(training).update(gradients, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": rate}
    guard, reason, too_many = judge(training.guard, state.guard, state.step + 1, metrics["loss"], metrics["grad_norm"])
    metrics |= {"skipped": reason, "too_many": too_many}
    params, optimizer = optax.tree.where(reason == FINE, (params, optimizer), (state.params, state.optimizer))
    return TrainState(state.step + 1, position, params, optimizer, guard), metrics


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
