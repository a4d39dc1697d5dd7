"""Text from a model: prompts are read at once into a cache of keys and values, then one token a step is drawn."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from euroflax import model
from euroflax.data.tokenizer import Tokenizer
from euroflax.experiment import ExperimentError, Model
from euroflax.sharding import folded, row_ways, shardings

_MAX_ROWS = 64
_MIN_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 64
    """The most tokens to write."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draws from this many of the likeliest tokens only; 0 from all."""
    top_p: float = 1.0
    """Draws from the likeliest tokens only, as few as together have this probability."""
    stop: tuple[str, ...] = ()
    """Texts before which writing ends."""
    seed: int = 0
    """Seeds the draws; those of a prompt depend on it and on the prompt's number, not on the batch."""

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            return [f"stop={self.stop!r} is no tuple of texts; write for example stop=('.',)"]
        whole = ("max_new_tokens", "top_k", "seed")
        if odd := [name for name in whole if not isinstance(getattr(self, name), int)]:
            return [f"{name}={getattr(self, name)!r} is no whole number; give one" for name in odd]
        found = []
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens} writes nothing; use 1 or more")
        if not 0 <= self.temperature < float("inf"):
            found.append(f"temperature={self.temperature} is negative or not finite; use 0 or more")
        if self.top_k < 0:
            found.append(f"top_k={self.top_k} is negative; use 0 for all tokens, or more")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} is not in (0, 1]; use for example 0.9")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed={self.seed} is not in [0, 2^32); use 0 or so")
        if "" in self.stop:
            found.append("stop= is empty; give a text, or leave it out")
        return found


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: str
    text: str
    tokens: list[int]
    """Token ids of what was written, the one that ended it included."""
    prompt_tokens: int
    """Tokens of the prompt with the one that begins a document."""
    finish_reason: str
    """`end` of the document, `stop` text, or `length`: as many tokens as were asked for, or as the context holds."""

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(self.prompt)}<b>{escape(self.text)}</b></p>"


def generate(
    config: Model,
    params: dict,
    tokenizer: Tokenizer,
    context: int,
    prompts: Sequence[str],
    sampling: Sampling,
    on_text: Callable[[int, str], None] = lambda number, text: None,
    proceed: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Continues each prompt; the caller has entered the mesh on which the parameters lie.

    Programs are compiled once for each bucket of batch, prompt and cache length, which are powers of two.

    Args:
        config: the model.
        params: its parameters.
        tokenizer: its tokenizer.
        context: the most tokens of prompt and continuation together.
        prompts: the texts to continue.
        sampling: how.
        on_text: told the number of a prompt and what was just written after it, never half a character.
        proceed: asked before each token; what it raises ends the writing.

    Raises:
        ExperimentError: a value of `sampling` is at fault, or a prompt is longer than the context.
    """
    faults = sampling.faults()
    faults += [
        f"prompt {number} is no text in UTF-8; give one"
        for number, prompt in enumerate(prompts)
        if not isinstance(prompt, str) or prompt.encode(errors="replace").decode() != prompt
    ]
    if faults:
        raise ExperimentError(*faults)
    encoded = [[tokenizer.bos, *ids] for ids in tokenizer.encode(list(prompts))]
    faults += [
        f"prompt {number} has {len(ids)} tokens with the one that begins a document, and the context is {context}; "
        f"use {context - 1} or fewer"
        for number, ids in enumerate(encoded)
        if len(ids) >= context
    ]
    if faults:
        raise ExperimentError(*faults)
    found: list[Completion] = []
    mesh = folded(jax.sharding.get_mesh(), ("replica", "sequence"))
    params = jax.device_put(params, shardings(params, mesh))
    for first in range(0, len(encoded), _MAX_ROWS):
        part = range(first, min(first + _MAX_ROWS, len(encoded)))
        writers = [
            _Writer(tokenizer, prompts[i], encoded[i], context, sampling, functools.partial(on_text, i)) for i in part
        ]
        with jax.set_mesh(mesh):
            _write(config, params, writers, sampling, first, proceed)
        found += [writer.completion() for writer in writers]
    return found


def _write(
    config: Model,
    params: dict,
    writers: list["_Writer"],
    sampling: Sampling,
    first: int,
    proceed: Callable[[], None],
) -> None:
    """Runs one batch of writers until all have ended."""
    mesh = jax.sharding.get_mesh()
    rows = _bucket(len(writers), row_ways(mesh))
    length = _bucket(max(len(writer.prompt_ids) for writer in writers), _MIN_BUCKET)
    wanted = max(writer.limit for writer in writers)
    places = length + _bucket(wanted, _MIN_BUCKET)
    prefill, decode = _programs(config, mesh)
    tokens_BL = np.zeros((rows, length), np.int32)
    lengths_B = np.ones(rows, np.int32)
    for row, writer in enumerate(writers):
        tokens_BL[row, length - len(writer.prompt_ids) :] = writer.prompt_ids
        lengths_B[row] = len(writer.prompt_ids)
    numbers_B = np.arange(first, first + rows, dtype=np.uint32)
    drawing = (numbers_B, np.uint32(sampling.seed), *_knobs(sampling))
    token_B, cache = prefill(params, tokens_BL, lengths_B, places, drawing)
    for step in range(wanted):
        proceed()
        for writer, token in zip(writers, np.asarray(token_B).tolist(), strict=False):
            writer.take(token)
        if all(writer.reason for writer in writers):
            break
        token_B, cache = decode(params, cache, token_B, lengths_B, np.int32(step), drawing)


def _bucket(size: int, least: int) -> int:
    """The smallest of `least`, `2 least`, `4 least`, ... that holds `size`."""
    while least < size:
        least *= 2
    return least


def _knobs(sampling: Sampling) -> tuple[np.float32, np.int32, np.float32]:
    return np.float32(sampling.temperature), np.int32(min(sampling.top_k, 2**31 - 1)), np.float32(sampling.top_p)


@functools.lru_cache(maxsize=4)
def _programs(config: Model, mesh: jax.sharding.Mesh) -> tuple[Callable, Callable]:
    """The two compiled programs of a model on a mesh: read the prompts, and write one token more."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def prefill(params: dict, tokens_BL: jax.Array, lengths_B: jax.Array, places: int, drawing: tuple) -> tuple:
        rows, length = tokens_BL.shape
        positions_BL = jnp.arange(length) - (length - lengths_B[:, None])
        batch = {
            "tokens_BL": tokens_BL,
            "segment_ids_BL": (positions_BL >= 0).astype(jnp.int32),
            "positions_BL": jnp.maximum(positions_BL, 0),
        }
        cache = model.empty_cache(config, rows, places)
        hidden_BLD, cache = model.extend(config, params, cache, batch)
        logits_BLV = model.project(config, params, hidden_BLD[:, -1:])
        return _draw(logits_BLV[:, 0], jnp.int32(0), *drawing), cache

    def decode(
        params: dict, cache: dict, token_B: jax.Array, lengths_B: jax.Array, step: jax.Array, drawing: tuple
    ) -> tuple:
        token_BL = token_B[:, None]
        positions_BL = (lengths_B + step)[:, None]
        batch = {"tokens_BL": token_BL, "segment_ids_BL": jnp.ones_like(token_BL), "positions_BL": positions_BL}
        hidden_BLD, cache = model.extend(config, params, cache, batch)
        logits_BLV = model.project(config, params, hidden_BLD)
        return _draw(logits_BLV[:, 0], step + 1, *drawing), cache

    return (
        jax.jit(prefill, static_argnums=3, out_shardings=(everywhere, None)),
        jax.jit(decode, donate_argnums=1, out_shardings=(everywhere, None)),
    )


def _draw(
    logits_BV: jax.Array,
    step: jax.Array,
    numbers_B: jax.Array,
    seed: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """A token for each row: the likeliest at temperature 0, otherwise drawn from the top k and the nucleus of top p.

    Holtzman et al., "The curious case of neural text degeneration" (2020), for the nucleus.
    """
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
    ranks_V = jnp.arange(logits_BV.shape[-1])
    kept_BV = jnp.where(ranks_V < jnp.where(top_k > 0, top_k, ranks_V.size), sorted_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(kept_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    least_B = jnp.min(jnp.where((before_BV < top_p) & jnp.isfinite(kept_BV), kept_BV, jnp.inf), axis=-1)
    allowed_BV = jnp.where(scaled_BV >= least_B[:, None], scaled_BV, -jnp.inf)

    def draw(number: jax.Array, allowed_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)
        return jax.random.categorical(key, allowed_V)

    likeliest_B = jnp.argmax(logits_BV, axis=-1)
    return jnp.where(temperature > 0, jax.vmap(draw)(numbers_B, allowed_BV), likeliest_B).astype(jnp.int32)


class _Writer:
    """One continuation: takes tokens until it ends, and tells its text as it becomes certain."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        prompt_ids: list[int],
        context: int,
        sampling: Sampling,
        on_text: Callable[[str], None],
    ) -> None:
        self.prompt_ids, self.reason = prompt_ids, ""
        self._tokenizer, self._prompt, self._sampling, self._on_text = tokenizer, prompt, sampling, on_text
        self.limit = min(sampling.max_new_tokens, context - len(prompt_ids))
        self._before = tokenizer.decode(prompt_ids)
        self._ids: list[int] = []
        self._text, self._told = "", 0

    def take(self, token: int) -> None:
        """One token more; after the end it is passed over."""
        if self.reason:
            return
        self._ids.append(token)
        if token == self._tokenizer.eos:
            self.reason = "end"
        else:
            self._text = self._tokenizer.decode([*self.prompt_ids, *self._ids])[len(self._before) :]
            found = [place for stop in self._sampling.stop if (place := self._text.find(stop)) >= 0]
            if found:
                self._text, self.reason = self._text[: min(found)], "stop"
            elif len(self._ids) == self.limit:
                self.reason = "length"
        self._tell(len(self._text) if self.reason else self._certain())

    def _certain(self) -> int:
        """How much of the text can no longer change: not half a character, nor what may become a stop text."""
        certain = len(self._text.rstrip("\ufffd"))
        for stop in self._sampling.stop:
            for size in range(min(len(stop) - 1, certain), 0, -1):
                if self._text[:certain].endswith(stop[:size]):
                    certain -= size
                    break
        return certain

    def _tell(self, certain: int) -> None:
        if certain > self._told:
            self._on_text(self._text[self._told : certain])
            self._told = certain

    def completion(self) -> Completion:
        """What was written, once all is."""
        return Completion(self._prompt, self._text, self._ids, len(self.prompt_ids), self.reason)
