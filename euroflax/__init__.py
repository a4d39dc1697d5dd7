"""Euroflax trains open multilingual base models: JAX, Flax, and one Python file per experiment.

Names are imported when they are first used, so that `import euroflax` loads no JAX.
"""

import importlib
import os
import typing

if typing.TYPE_CHECKING:
    from euroflax import model
    from euroflax.data.loader import row
    from euroflax.experiment import Experiment, ExperimentError, load
    from euroflax.generation import Sampling
    from euroflax.interface import check, evaluate, export, generate, plan, prepare, train

_ROOMS = {
    "euroflax.experiment": ("Experiment", "ExperimentError", "load"),
    "euroflax.interface": ("check", "evaluate", "export", "generate", "plan", "prepare", "train"),
    "euroflax.generation": ("Sampling",),
    "euroflax.data.loader": ("row",),
}

__all__ = [
    "Experiment",
    "ExperimentError",
    "Sampling",
    "check",
    "evaluate",
    "export",
    "generate",
    "load",
    "model",
    "plan",
    "prepare",
    "row",
    "train",
]


def __getattr__(name: str) -> object:
    if name == "model":
        return importlib.import_module("euroflax.model")
    for room, names in _ROOMS.items():
        if name in names:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, when JAX is loaded
            return getattr(importlib.import_module(room), name)
    raise AttributeError(f"module euroflax has no attribute {name}")


def __dir__() -> list[str]:
    return __all__
