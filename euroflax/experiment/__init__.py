"""What a run is: the dataclasses of an experiment, their rules, and their way from a file and to JSON.

Only the standard library is used here, so that an experiment can be read and checked anywhere in no time.
"""

from euroflax.experiment.codec import fingerprint, from_json, override, to_json
from euroflax.experiment.errors import ExperimentError, Interrupted, RunFailed
from euroflax.experiment.loading import load
from euroflax.experiment.schema import (
    Checkpoint,
    Data,
    Evaluation,
    Experiment,
    Guard,
    Mesh,
    Mixture,
    Model,
    Schedule,
    Source,
    Span,
    Stage,
    Tokenizer,
    Training,
)
from euroflax.experiment.validation import validate

__all__ = [
    "Checkpoint",
    "Data",
    "Evaluation",
    "Experiment",
    "ExperimentError",
    "Guard",
    "Interrupted",
    "Mesh",
    "Mixture",
    "Model",
    "RunFailed",
    "Schedule",
    "Source",
    "Span",
    "Stage",
    "Tokenizer",
    "Training",
    "fingerprint",
    "from_json",
    "load",
    "override",
    "to_json",
    "validate",
]
