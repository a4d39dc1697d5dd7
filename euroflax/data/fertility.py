"""What a tokenizer costs each language: characters a token, tokens a word, tokens beside English on parallel text."""

from euroflax.data.prepare import Prepared
from euroflax.data.tokenizer import Tokenizer, sample_texts
from euroflax.experiment import Experiment
from euroflax.languages import EU24, fold

_DOCUMENTS = 100
_TOKENS = 100_000


def tokenizer_figures(declared: Experiment, prepared: Prepared) -> dict[str, dict]:
    """For each language of the run: `characters_per_token`, `tokens_per_word`, `bytes_per_token`, `tokens_vs_english`.

    The first three are measured on the first documents that are evaluated on, or where there are none trained on;
    the last one on the embedded text, which is parallel, and None for a language that it does not have.
    Words are what stands between white space.
    """
    parallel = {code: _parallel_tokens(prepared.tokenizer, code) for code in EU24}
    figures: dict[str, dict] = {}
    stores = [*prepared.evaluation, *prepared.train]
    for code in declared.language_codes:
        tokens = characters = words = size = 0
        for source, store in stores:
            if fold(source.language) != code:
                continue
            for index in range(min(_DOCUMENTS, store.num_documents)):
                start, stop = store.document(index)
                stop = min(stop - 1, start + 1 + _TOKENS - tokens)
                if stop <= start + 1:
                    break
                text = prepared.tokenizer.decode(store.read(start + 1, stop).tolist())
                tokens += stop - start - 1
                characters, words, size = characters + len(text), words + len(text.split()), size + len(text.encode())
            if tokens:
                break
        figures[code] = {
            "characters_per_token": characters / tokens if tokens else None,
            "tokens_per_word": tokens / words if words else None,
            "bytes_per_token": size / tokens if tokens else None,
            "tokens_vs_english": parallel[code] / parallel["en"] if code in parallel else None,
        }
    return figures


def _parallel_tokens(tokenizer: Tokenizer, code: str) -> int:
    return sum(map(len, tokenizer.encode(sample_texts(code))))
