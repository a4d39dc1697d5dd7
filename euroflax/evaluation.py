"""Bits per byte of held-out text, for each language.

Nats of every text token of a document, over ln 2 x the document's UTF-8 bytes. A document is read in windows of the
sequence length without overlap, each beginning with the beginning-of-document token; the end-of-document token is not
counted. A language's figure is the sum of its nats over the sum of its bytes; `mean` is the plain mean of those. A byte
of text that the tokens do not give back costs 8 bits.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from euroflax import model
from euroflax.data.loader import empty_batch
from euroflax.data.prepare import Prepared
from euroflax.data.store import Store
from euroflax.experiment import Experiment, Model, Source
from euroflax.languages import LANGUAGES, fold
from euroflax.sharding import folded, local_rows, place_batch, shardings


def bits_per_byte(
    declared: Experiment,
    prepared: Prepared,
    params: dict,
    mesh: jax.sharding.Mesh,
    proceed: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """`{"bits_per_byte.<code>": ..., "bits_per_byte.mean": ...}`; empty where nothing is held out.

    A language whose held-out part holds no document is NaN, and not in the mean; code and text in several languages
    come after the mean and are not in it.

    Args:
        declared: the experiment.
        prepared: its stores.
        params: parameters, placed on the mesh.
        mesh: the mesh, entered by the caller.
        proceed: told the batches done and in all; what it raises ends the evaluation.
    """
    codes = declared.language_codes
    nats, sizes = _lost_and_all_bytes(declared, prepared)
    if not sizes.any():
        return {}
    nats *= 8 * math.log(2)  # what the tokens do not give back would otherwise cost nothing
    rows = list(_rows(declared, prepared))
    batch_rows = declared.batch_rows // declared.training.accumulation_steps
    mesh = folded(mesh, ("replica",))
    params = jax.device_put(params, shardings(params, mesh))
    mine = local_rows(mesh, batch_rows)
    total = -(-len(rows) // batch_rows)
    step = _compiled_step(declared.model, declared.training.loss_chunk_entries, len(codes))
    with jax.set_mesh(mesh):
        for done in range(total):
            proceed(done, total)
            wanted = [done * batch_rows + offset for offset in mine]
            batch = place_batch(_batch(declared, prepared, rows, wanted), mesh, mine, batch_rows)
            nats += np.asarray(step(params, batch), np.float64)
    proceed(total, total)
    wanted = {fold(source.language) or source.language for source, _ in prepared.evaluation}
    found = {
        code: float(nats[i] / (math.log(2) * sizes[i])) if sizes[i] else math.nan
        for i, code in enumerate(codes)
        if code in wanted
    }
    of_one = {code: value for code, value in found.items() if LANGUAGES[code].is_one}
    mean = {"mean": float(np.nanmean(list(of_one.values())))} if of_one else {}
    return {f"bits_per_byte.{name}": value for name, value in (of_one | mean | found).items()}


@functools.lru_cache(maxsize=4)
def _compiled_step(config: Model, chunk_entries: int, num_languages: int) -> Callable[[dict, dict], jax.Array]:
    def step(params: dict, batch: dict) -> jax.Array:
        nats_BL, _ = model.token_losses(config, params, batch, chunk_entries)
        return model.sums_by_language(nats_BL * batch["loss_weights_BL"], batch, num_languages)

    return jax.jit(step)


def _documents(declared: Experiment, prepared: Prepared, source: Source, store: Store) -> list[int]:
    """The numbers of the documents that are read of a source: its first ones that are not withdrawn."""
    return list(itertools.islice(prepared.held_out(source, store), declared.evaluation.max_documents))


def _lost_and_all_bytes(declared: Experiment, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Bytes by language that tokens do not give back, and bytes, `[languages]` each."""
    lost, sizes = np.zeros(len(declared.language_codes)), np.zeros(len(declared.language_codes))
    for source, store in prepared.evaluation:
        numbers = _documents(declared, prepared, source, store)
        language = declared.language_codes.index(fold(source.language) or source.language)
        for document in store.documents(numbers):
            sizes[language] += document["bytes"]
            lost[language] += document.get("lost") or 0
    return lost, sizes


Window = tuple[int, int, int]
"""A piece of a document: number of its store, first and last-plus-one position of its text tokens."""


def _rows(declared: Experiment, prepared: Prepared) -> Iterator[list[Window]]:
    """Windows packed into rows in order: a row is closed when the next window does not fit."""
    length = declared.data.sequence_length
    row: list[Window] = []
    filled = 0
    for number, (source, store) in enumerate(prepared.evaluation):
        for index in _documents(declared, prepared, source, store):
            start, stop = store.document(index)
            for first in range(start + 1, stop - 1, length):
                last = min(first + length, stop - 1)
                if filled + last - first > length:
                    yield row
                    row, filled = [], 0
                row.append((number, first, last))
                filled += last - first
    if row:
        yield row


def _batch(declared: Experiment, prepared: Prepared, rows: list[list[Window]], wanted: list[int]) -> dict:
    batch = empty_batch(len(wanted), declared.data.sequence_length, prepared.tokenizer.pad)
    for at, index in enumerate(wanted):
        place = 0
        for segment, (number, first, last) in enumerate(rows[index] if index < len(rows) else [], start=1):
            source, store = prepared.evaluation[number]
            text = store.read(first, last)
            part = (at, slice(place, place + len(text)))
            batch["tokens_BL"][part] = [prepared.tokenizer.bos, *text[:-1]]
            batch["targets_BL"][part] = text
            batch["loss_weights_BL"][part] = 1
            batch["segment_ids_BL"][part] = segment
            batch["positions_BL"][part] = np.arange(len(text))
            batch["language_ids_BL"][part] = declared.language_codes.index(fold(source.language) or source.language)
            place += len(text)
    return batch
