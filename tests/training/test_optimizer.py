import jax
import jax.numpy as jnp
import numpy as np
import pytest

from euroflax import model
from euroflax.experiment import Schedule, override
from euroflax.training.optimizer import about_longer, learning_rate, make_optimizer
from tests.conftest import small


def rates(total, at, **changes):
    schedule = Schedule(**({"peak_learning_rate": 1.0} | changes))
    return [float(learning_rate(schedule, total, tokens)) for tokens in at]


@pytest.mark.parametrize(
    ("decay", "middle"), [("linear", 0.5), ("cosine", 0.5 + 0.5 * np.cos(np.pi / 2)), ("1-sqrt", 1 - 0.5**0.5)]
)
def test_wsd_rises_holds_and_decays(decay, middle):
    found = rates(1000, [0, 50, 100, 500, 800, 900, 1000], warmup_tokens=100, decay_tokens=200, decay=decay)
    np.testing.assert_allclose(found, [0, 0.5, 1, 1, 1, middle, 0], atol=1e-6)


def test_the_shapes_differ_a_quarter_of_the_way_down():
    found = [rates(1000, [850], decay_tokens=200, decay=decay)[0] for decay in ("linear", "cosine", "1-sqrt")]
    np.testing.assert_allclose(found, [0.75, 0.5 + 0.5 * np.cos(np.pi / 4), 0.5], atol=1e-6)


def test_cosine_decays_from_the_warm_up_to_the_final_fraction():
    found = rates(1000, [100, 550, 1000], kind="cosine", warmup_tokens=100, final_fraction=0.1)
    np.testing.assert_allclose(found, [1, 0.55, 0.1], atol=1e-6)


def test_without_a_decay_the_rate_holds_to_the_last_step_and_beyond():
    assert rates(1000, [999, 1000, 1064]) == [1, 1, 1]


def test_a_long_run_still_moves_its_rate():
    tokens = 10_000_000_000_000
    found = rates(tokens, [0.9 * tokens, 0.9 * tokens + 4e9], decay_tokens=tokens // 5)
    assert found[1] < found[0]


def params():
    return jax.jit(model.init, static_argnums=0)(small(model__tied_output=False).model, jax.random.key(0))


def test_decay_is_on_matrices_only_and_decoupled():
    training = small(training__weight_decay=0.5).training
    weights = params()
    optimizer = make_optimizer(training)
    zero = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(weights), weights)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = path[-1].key
        weight = weights
        for key in path:
            weight = weight[key.key]
        expected = 0 * weight if name.endswith(("norm_D", "norm_K")) else 0.5 * weight
        np.testing.assert_allclose(update, expected, err_msg=name)


def test_the_gradient_is_clipped_by_its_global_norm_before_the_moments():
    training = small(training__clip_norm=0.5, training__weight_decay=0.0).training
    weights = params()
    optimizer = make_optimizer(training)
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 3.0), weights)
    _, state = jax.jit(optimizer.update)(gradient, jax.jit(optimizer.init)(weights), weights)
    moments = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state[1].mu)))
    np.testing.assert_allclose(moments, 0.5 * (1 - training.adam_beta1), rtol=1e-4)


def test_one_step_of_adamw_is_its_formula():
    training = small(training__clip_norm=1e9).training
    w = {"w_DF": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
    g = {"w_DF": jnp.array([[0.1, -0.2], [0.3, 0.4]])}
    optimizer = make_optimizer(training)
    updates, _ = optimizer.update(g, optimizer.init(w), w)
    expected = np.sign(g["w_DF"]) + training.weight_decay * np.asarray(w["w_DF"])
    np.testing.assert_allclose(updates["w_DF"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("before", "tokens", "says"),
    [
        (1000, 1000, "goes from 0 to 0.01 and"),
        (1000, 801, "goes from 0.00995 to 0.01 and"),
        (1000, 700, None),
        (2000, 1900, None),
    ],
)
def test_a_run_made_longer_behind_its_stable_phase_says_what_the_rate_does(before, tokens, says):
    schedule = {"training.schedule.decay_tokens": 200, "training.schedule.warmup_tokens": 100}
    schedule |= {"training.schedule.decay": "linear", "training.schedule.final_fraction": 0.0}
    declared = override(small(training__tokens=2000), {**schedule, "training.schedule.peak_learning_rate": 0.01})
    said = about_longer(declared, before, tokens)
    assert (said == []) if says is None else (says in said[0] and "move the checkpoints after 800 tokens" in said[1])


def test_the_moments_decay_by_their_betas_and_epsilon_stands_under_the_gradient():
    changes = {"adam_beta1": 0.6, "adam_beta2": 0.7, "adam_epsilon": 0.25, "weight_decay": 0.0, "clip_norm": 1e9}
    training = small(**{f"training__{name}": value for name, value in changes.items()}).training
    optimizer = make_optimizer(training)
    weights = {"scale_D": jnp.ones(1)}
    state, first, second = optimizer.init(weights), 0.0, 0.0
    for step, gradient in enumerate((0.5, -1.0, 2.0), start=1):
        updates, state = optimizer.update({"scale_D": jnp.full(1, gradient)}, state, weights)
        first, second = 0.6 * first + 0.4 * gradient, 0.7 * second + 0.3 * gradient**2
        expected = first / (1 - 0.6**step) / ((second / (1 - 0.7**step)) ** 0.5 + 0.25)
        assert float(updates["scale_D"][0]) == pytest.approx(expected, rel=1e-5)
