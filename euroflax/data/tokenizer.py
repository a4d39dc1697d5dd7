"""The tokenizer: a byte-level BPE, trained on a sample with the same number of bytes from each language."""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from euroflax.data import documents
from euroflax.experiment import Experiment, ExperimentError, Source
from euroflax.folders import parse_json
from euroflax.languages import fold

PAD, BOS, EOS = "<|pad|>", "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)

# Words keep the space before them, combining marks stay with their letters, digits go in threes.
_PATTERN = r" ?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

_PIECE = 1 << 16
_LONG_RUN = re.compile(r"\S{1024}(?=\S)|\s{1024}(?=\s)")
_SPACE_IN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


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
        """Token ids of each text, without special tokens: markers inside a text are ordinary text.

        A text longer than `_PIECE` characters is encoded piece by piece, since an encoding takes some 250 times the
        memory of its text; the pieces are cut where this changes no token, if there is such a place.
        """
        found: list[list[int]] = [[] for _ in texts]
        short = [i for i, text in enumerate(texts) if len(text) <= _PIECE or not self._cuts_before_spaces]
        for i, encoding in zip(short, self._encode_batch([texts[i] for i in short]), strict=True):
            found[i] = encoding
        for i in set(range(len(texts))) - set(short):
            for piece in split(texts[i], _PIECE):
                found[i] += self._encode_batch([piece])[0]
        return found

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.inner.encode_batch(texts, add_special_tokens=False)]

    @functools.cached_property
    def _cuts_before_spaces(self) -> bool:
        """Whether a text cut before a space between two letters gives the same tokens: not where text is prefixed."""
        whole, left, right = self._encode_batch(["one two", "one", " two"])
        return whole == left + right

    def lost_bytes(self, text: str, ids: Sequence[int]) -> int:
        """UTF-8 bytes of the characters of a text that its tokens do not give back, 0 for a lossless tokenizer."""
        back = self.decode(ids)
        if back == text:
            return 0
        lost = collections.Counter(text) - collections.Counter(back)
        return sum(len(character.encode()) * count for character, count in lost.items())

    @functools.cached_property
    def begins_texts(self) -> bool:
        """Whether the tokenizer.json itself puts the begin token before a text, and no token behind it."""
        return self.inner.encode("a b").ids == [self.bos, *self._encode_batch(["a b"])[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self.inner.decode(list(ids), skip_special_tokens=True)


BESIDE = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files beside a tokenizer.json that belong to it; a run keeps them, and its export has them."""


def with_begin_token(path: pathlib.Path, known: Tokenizer) -> str:
    """The tokenizer.json in a file such that the begin token stands before a text and nothing behind it.

    That is what the model was trained on; it is left as it is where it does so.
    """
    if known.begins_texts:
        return path.read_text(encoding="utf-8")
    inner = tokenizers.Tokenizer.from_file(str(path))
    begin = known.inner.id_to_token(known.bos)
    template = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B:1", special_tokens=[(begin, known.bos)]
    )
    inner.post_processor = template
    return inner.to_str(pretty=True)


def split(text: str, size: int) -> list[str]:
    """A text in pieces of at most `size` characters, cut before a space between two letters where there is one.

    >>> split("one two three", 8)
    ['one two', ' three']
    """
    pieces, start = [], 0
    while len(text) - start > size:
        window = text[start : start + size + 1]
        cuts = [found.start() for found in _SPACE_IN_WORDS.finditer(window)]
        stop = start + (cuts[-1] if cuts and cuts[-1] > 0 else size)
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def sample_texts(code: str) -> list[str]:
    """The embedded texts in one of the 24 official languages."""
    lines = (resources.files("euroflax.sample") / f"{code}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in lines.splitlines()]


def read(path: pathlib.Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    A tokenizer_config.json beside it may say which tokens begin, end and pad a text; otherwise they are ours.

    Raises:
        ExperimentError: the file is not there, is no tokenizer, or lacks the special tokens.
    """
    try:
        if path.exists() and not path.is_file():
            raise ExperimentError(f"data.tokenizer.path={path} is not a regular file; give a tokenizer.json")
        content = path.read_bytes()
        inner = tokenizers.Tokenizer.from_buffer(content)
    except OSError as error:
        raise ExperimentError(
            f"data.tokenizer.path={path} cannot be read ({error.strerror}); give a tokenizer.json"
        ) from error
    except ExperimentError:
        raise
    except Exception as error:  # the tokenizers library raises no narrower type
        raise ExperimentError(f"data.tokenizer.path={path} is no tokenizer.json ({error}); give another") from error
    inner.encode_special_tokens = True
    inner.no_padding()
    inner.no_truncation()
    names = _special_names(path.with_name("tokenizer_config.json"))
    pad, bos, eos = map(inner.token_to_id, names)
    if pad is None or bos is None or eos is None:
        lacking = ", ".join(name for name in dict.fromkeys(names) if inner.token_to_id(name) is None)
        raise ExperimentError(
            f"data.tokenizer.path={path} lacks {lacking}; name its own as bos_token, eos_token and pad_token in "
            "a tokenizer_config.json beside it"
        )
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
        declared = parse_json(config.read_bytes())
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
    by_each = experiment.data.tokenizer.sample_bytes // len(by_language)
    for sources in by_language.values():
        for i, source in enumerate(sources):
            share = by_each * (i + 1) // len(sources) - by_each * i // len(sources)
            yield from _sample_of(experiment, source, files[source.name], share, advance)
    advance(0)


def _sample_of(
    experiment: Experiment, source: Source, files: list[pathlib.Path], share: int, advance: Callable[[int], None]
) -> Iterator[str]:
    """The first texts of each file of a source, as many bytes of each.

    Raises:
        ExperimentError: the source holds no document.
    """
    bad: collections.Counter[str] = collections.Counter()
    num_documents = 0
    for j, file in enumerate(files):
        budget = share * (j + 1) // len(files) - share * j // len(files)
        for item in _items(experiment, source, file):
            if isinstance(item, documents.BadLine):
                bad[item.reason] += 1
                continue
            num_documents += 1
            if documents.is_held_out(item, source.holdout_fraction):
                continue
            if budget <= 0:
                break
            text = item.text.encode()[:budget].decode("utf-8", "ignore")
            budget -= len(item.text.encode())
            advance(len(text.encode()))
            yield from _without_long_runs(text)
    if not num_documents:
        raise ExperimentError(documents.no_document(source, bad))


def _without_long_runs(text: str) -> Iterator[str]:
    """A text in parts, cut within runs of over 1,024 characters with no white space in them or nothing else.

    The time to train on such a run is not linear in its length.
    """
    start = 0
    for found in _LONG_RUN.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _items(
    experiment: Experiment, source: Source, file: pathlib.Path
) -> Iterator[documents.Document | documents.BadLine]:
    most = experiment.data.max_document_bytes
    for batch in documents.read_raw(file, source, most):
        yield from documents.parse(batch, source, most)
