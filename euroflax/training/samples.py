"""What the finished model writes after the beginning of a held-out text in each language."""

from collections.abc import Callable

import jax

from euroflax import generation
from euroflax.data.prepare import Prepared
from euroflax.experiment import Experiment
from euroflax.generation import Sampling
from euroflax.languages import fold
from euroflax.training.record import Record

_PROMPT_TOKENS = 16
_TEMPERATURE = 0.7
_TOP_P = 0.9


def write_samples(
    declared: Experiment, prepared: Prepared, params: dict, record: Record, step: int, proceed: Callable[[], None]
) -> None:
    """Writes `samples.json` into the run folder: language, document, prompt and continuation.

    The prompt is the first sixteen tokens of the first document that is evaluated on. All processes of a job take part.
    `proceed` is called now and then, and may raise.
    """
    prompts: dict[str, tuple[str, str]] = {}
    for source, store in prepared.evaluation:
        code = fold(source.language) or source.language
        first = next(prepared.held_out(source, store), None)
        if code in prompts or first is None:
            continue
        start, stop = store.document(first)
        stop = min(stop - 1, start + 1 + _PROMPT_TOKENS, start + declared.data.sequence_length // 2)
        text = prepared.tokenizer.decode(store.read(start + 1, stop).tolist()).rstrip("\ufffd")
        prompts[code] = (store.documents([first])[0]["id"], text)
    sampling = Sampling(
        max_new_tokens=declared.evaluation.sample_tokens,
        temperature=_TEMPERATURE,
        top_p=_TOP_P,
        seed=declared.training.seed,
    )
    texts = [text for _, text in prompts.values()]
    length = declared.context_length
    found = generation.generate(declared.model, params, prepared.tokenizer, length, texts, sampling, proceed=proceed)
    rows = [
        {"language": code, "document": document, "prompt": text, "text": written.text}
        for (code, (document, text)), written in zip(prompts.items(), found, strict=True)
    ]
    drawn = {"temperature": _TEMPERATURE, "top_p": _TOP_P, "seed": sampling.seed}
    if jax.process_index() == 0:
        record.keep_samples({"step": step, **drawn, "samples": rows})
