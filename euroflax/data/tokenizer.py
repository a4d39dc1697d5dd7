"""The tokenizer: a byte-level BPE, trained on a sample with the same number of bytes from each language."""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from euroflax.data import documents
from euroflax.experiment import Experiment, ExperimentError, Source
from euroflax.languages import fold

PAD, BOS, EOS = "<|pad|>", "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)

# Words keep the space before them, combining marks stay with their letters, digits go in threes.
_PATTERN = r" ?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the ids that the rest of the program needs."""

    inner: tokenizers.Tokenizer
    pad: int
    bos: int
    eos: int
    fingerprint: str

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs for it: one more than the largest id."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens: markers inside a text are ordinary text."""
        return [encoding.ids for encoding in self.inner.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self.inner.decode(list(ids), skip_special_tokens=True)


def read(path: pathlib.Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    A tokenizer_config.json beside it may say which tokens begin, end and pad a text; otherwise they are ours.

    Raises:
        ExperimentError: the file is not there, is no tokenizer, or lacks the special tokens.
    """
    try:
        content = path.read_bytes()
        inner = tokenizers.Tokenizer.from_buffer(content)
    except OSError as error:
        raise ExperimentError(
            f"data.tokenizer.path={path} cannot be read ({error.strerror}); give a tokenizer.json"
        ) from error
    except Exception as error:  # the tokenizers library raises no narrower type
        raise ExperimentError(f"data.tokenizer.path={path} is no tokenizer.json ({error}); give another") from error
    inner.encode_special_tokens = True
    inner.no_padding()
    inner.no_truncation()
    names = _special_names(path.with_name("tokenizer_config.json"))
    pad, bos, eos = map(inner.token_to_id, names)
    if pad is None or bos is None or eos is None:
        raise ExperimentError(f"data.tokenizer.path={path} lacks {', '.join(names)}; add them to its vocabulary")
    digest = hashlib.sha256(content + repr((pad, bos, eos)).encode())
    return Tokenizer(inner, pad, bos, eos, digest.hexdigest()[:16])


def _special_names(config: pathlib.Path) -> tuple[str, str, str]:
    """The tokens that pad, begin and end a text; one that ends it does what no other is there for.

    Raises:
        ExperimentError: the file is there and names no token that ends a text.
    """
    if not config.is_file():
        return SPECIAL_TOKENS
    try:
        declared = json.loads(config.read_bytes())
        named = [declared.get(role) for role in ("pad_token", "bos_token", "eos_token")]
    except (ValueError, AttributeError) as error:
        raise ExperimentError(f"{config} is no JSON object; restore it") from error
    pad, bos, eos = (token.get("content") if isinstance(token, dict) else token for token in named)
    if not isinstance(eos, str):
        raise ExperimentError(f"{config} names no eos_token; add it, since documents end with it")
    if not isinstance(bos, str | None) or not isinstance(pad, str | None):
        raise ExperimentError(f"{config} names a bos_token or pad_token that is no text; restore it")
    return pad or eos, bos or eos, eos


def train(experiment: Experiment, files: dict[str, list[pathlib.Path]], advance: Callable[[int], None]) -> str:
    """The JSON of a byte-level BPE with `model.vocab_size` entries, trained on a sample balanced over languages.

    Args:
        experiment: its sources and the size of its vocabulary are used.
        files: the files of each source by name.
        advance: told the number of bytes of each text read, and 0 behind the last one.

    Raises:
        ExperimentError: the sample does not fill the vocabulary.
    """
    vocab_size = experiment.model.vocab_size
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, 1)]),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(balanced_sample(experiment, files, advance), trainer=trainer)
    size = inner.get_vocab_size(with_added_tokens=True)
    if size < vocab_size:
        raise ExperimentError(
            f"model.vocab_size={vocab_size} is more than the {size} tokens that the sample can fill; "
            f"use {size} or less, or a larger data.tokenizer.sample_bytes"
        )
    return inner.to_str(pretty=True)


def balanced_sample(
    experiment: Experiment, files: dict[str, list[pathlib.Path]], advance: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """Texts to train a tokenizer on: as many bytes from each language, spread evenly over its sources and files."""
    by_language: dict[str, list[Source]] = {}
    for source in experiment.data.sources:
        by_language.setdefault(fold(source.language) or source.language, []).append(source)
    budget = experiment.data.tokenizer.sample_bytes // len(by_language)
    for sources in by_language.values():
        for i, source in enumerate(sources):
            names = files[source.name]
            share = budget * (i + 1) // len(sources) - budget * i // len(sources)
            for j, file in enumerate(names):
                yield from _first_bytes(source, file, share * (j + 1) // len(names) - share * j // len(names), advance)
    advance(0)


def _first_bytes(source: Source, file: pathlib.Path, budget: int, advance: Callable[[int], None]) -> Iterator[str]:
    for text in _texts(source, file):
        if budget <= 0:
            return
        size = len(text.encode())
        if size > budget:
            text = text.encode()[:budget].decode("utf-8", "ignore")
        budget -= size
        advance(min(size, size + budget))
        yield text


def _texts(source: Source, file: pathlib.Path) -> Iterable[str]:
    found = False
    reasons: collections.Counter[str] = collections.Counter()
    for batch in documents.read_raw(file, source):
        for item in documents.parse(batch, source):
            if isinstance(item, documents.BadLine):
                reasons[item.reason] += 1
                continue
            found = True
            if not documents.is_held_out(item, source.holdout_fraction):
                yield item.text
    if not found:
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        why = f"its {reasons.total()} lines hold none ({counts})" if reasons else "it is empty"
        raise ExperimentError(f"source {source.name}: file {file.name} holds no document, {why}; give it text")
