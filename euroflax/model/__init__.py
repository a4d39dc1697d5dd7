"""The model, as pure functions of a configuration, parameters and a batch."""

from euroflax.model.decoder import apply, empty_cache, extend, hidden, init, project
from euroflax.model.loss import sums_by_language, token_losses
from euroflax.model.size import flops_per_token, num_parameters

__all__ = [
    "apply",
    "empty_cache",
    "extend",
    "flops_per_token",
    "hidden",
    "init",
    "num_parameters",
    "project",
    "sums_by_language",
    "token_losses",
]
