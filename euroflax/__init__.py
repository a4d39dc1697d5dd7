"""Euroflax trains open multilingual base models: JAX, Flax, and one Python file per experiment.

Names are imported when they are first used, so that `import euroflax` loads no JAX.
"""

import importlib

_NAMES = {
    "load": "euroflax.experiment",
    "Experiment": "euroflax.experiment",
    "ExperimentError": "euroflax.experiment",
    "model": "euroflax",
}


def __getattr__(name: str) -> object:
    if name == "model":
        return importlib.import_module("euroflax.model")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module euroflax has no attribute {name}")
