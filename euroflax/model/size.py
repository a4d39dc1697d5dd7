"""How large a model is and how much it computes, by arithmetic."""

import functools
import math

import jax

from euroflax.experiment import Model
from euroflax.model.decoder import init


@functools.lru_cache(maxsize=16)  # a step asks for it, and tracing the model takes as long as some steps
def num_parameters(config: Model) -> int:
    """All parameters of the model."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def flops_per_token(config: Model, sequence_length: int) -> int:
    """Floating-point operations of forward and backward pass for one token, recomputation not counted.

    Six for each weight of a matrix product, and 6 N L H K for causal attention over half a row on average
    (Chowdhery et al., "PaLM", 2022, appendix B, halved for the causal mask).
    """
    weights = num_parameters(config) - (0 if config.tied_output else config.vocab_size * config.embed_dim)
    attention = config.num_layers * config.num_heads * config.head_dim * sequence_length
    return 6 * weights + 6 * attention
