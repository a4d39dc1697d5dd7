"""Whether a tokenizer gives text back: what it loses would otherwise make a model look better than it is."""

import pathlib

from euroflax.data.tokenizer import Tokenizer, sample_texts
from euroflax.experiment import Experiment, ExperimentError, Source
from euroflax.languages import EU24, LANGUAGES


def check_languages(experiment: Experiment, known: Tokenizer, path: pathlib.Path) -> None:
    """Refuses a tokenizer that does not give back the embedded text of a language."""
    faults = []
    for code in experiment.language_codes:
        if code not in EU24:
            continue
        texts = sample_texts(code)
        lost = sum(known.lost_bytes(text, ids) for text, ids in zip(texts, known.encode(texts), strict=True))
        size = sum(len(text.encode()) for text in texts)
        if lost > experiment.data.tokenizer.max_lost_fraction * size:
            faults.append(
                f"data.tokenizer.path={path} loses text in {LANGUAGES[code].name}: its tokens do not give back {lost} "
                f"of {size} bytes, over data.tokenizer.max_lost_fraction={experiment.data.tokenizer.max_lost_fraction}"
                "; give a tokenizer that covers the language, or raise the bound"
            )
    if faults:
        raise ExperimentError(*faults)


def check_source(experiment: Experiment, source: Source, lost: int, size: int) -> None:
    """Refuses a tokenizer that does not give back more of a source's text than is allowed."""
    bound = experiment.data.tokenizer.max_lost_fraction
    if lost > bound * size:
        raise ExperimentError(
            f"source {source.name}: the tokens do not give back {lost} of {size} bytes ({lost / size:.2g} of them), "
            f"over data.tokenizer.max_lost_fraction={bound}; give a tokenizer that covers the text, or raise the bound"
        )
