import dataclasses
import math

import jax
import numpy as np
import pytest

from euroflax import evaluation, model, sharding
from euroflax.data.prepare import prepare
from euroflax.data.store import Store
from tests.conftest import small


def plain(declared, prepared, params, documents=1000):
    """Bits per byte by the definition, a window at a time."""
    sums = {}
    apply = jax.jit(model.apply, static_argnums=0)
    for source, store in prepared.evaluation:
        for index in range(min(documents, store.num_documents)):
            start, stop = store.document(index)
            text = store.read(start + 1, stop - 1)
            size = store.documents([index])[0]["bytes"]
            for first in range(0, len(text), declared.data.sequence_length):
                window = text[first : first + declared.data.sequence_length]
                inputs = np.array([[prepared.tokenizer.bos, *window[:-1]]], np.int32)
                fields = {"segment_ids_BL": np.ones_like(inputs), "positions_BL": np.arange(inputs.size)[None]}
                logits = np.asarray(apply(declared.model, params, {"tokens_BL": inputs, **fields})[0], np.float64)
                nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(window)), window]
                entry = sums.setdefault(source.language, [0.0, 0])
                entry[0] += nats.sum()
            entry[1] += size
    found = {f"bits_per_byte.{code}": nats / (math.log(2) * size) for code, (nats, size) in sums.items()}
    return found | {"bits_per_byte.mean": np.mean(list(found.values()))}


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("mesh", [{"mesh__data": 8}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}], ids=str)
def test_it_agrees_with_a_plain_computation(folders, mesh, length):
    declared = small(
        **mesh, data__sequence_length=length, training__batch_tokens=8 * length, training__tokens=16 * length
    )
    prepared = prepare(declared, folders)
    # Short rows cut documents into windows, long ones hold several documents.
    assert any(len(row) > 1 for row in evaluation._rows(declared, prepared)) == (length == 512)
    params = jax.tree.map(lambda p: 4 * p, jax.jit(model.init, static_argnums=0)(declared.model, jax.random.key(0)))
    placed = sharding.make_mesh(declared)
    with jax.set_mesh(placed):
        found = evaluation.bits_per_byte(declared, prepared, params, placed)
    expected = plain(declared, prepared, params)
    assert found.keys() == expected.keys()
    for key in found:
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_a_bound_on_documents_takes_the_first_ones(folders):
    declared = small(evaluation__max_documents=1)
    prepared = prepare(declared, folders)
    params = jax.jit(model.init, static_argnums=0)(declared.model, jax.random.key(0))
    mesh = sharding.make_mesh(declared)
    with jax.set_mesh(mesh):
        found = evaluation.bits_per_byte(declared, prepared, params, mesh)
    expected = plain(declared, prepared, params, documents=1)
    assert found["bits_per_byte.el"] == pytest.approx(expected["bits_per_byte.el"], rel=1e-5)


def test_what_the_tokens_do_not_give_back_costs_eight_bits_a_byte(folders, monkeypatch):
    declared = small()
    prepared = prepare(declared, folders)
    params = jax.jit(model.init, static_argnums=0)(declared.model, jax.random.key(0))
    mesh = sharding.make_mesh(declared)
    with jax.set_mesh(mesh):
        lossless = evaluation.bits_per_byte(declared, prepared, params, mesh)
        known = Store.documents
        monkeypatch.setattr(Store, "documents", lambda s, n: [d | {"lost": d["bytes"] / 4} for d in known(s, n)])
        losing = evaluation.bits_per_byte(declared, prepared, params, mesh)
    for name, value in lossless.items():
        assert losing[name] == pytest.approx(value + 8 / 4, rel=1e-6)


def test_code_stands_behind_the_mean_and_an_empty_held_out_part_is_not_a_number(folders):
    declared = small()
    first, *others = declared.evaluation.sources
    sources = (dataclasses.replace(first, language="code"), *others)
    declared = dataclasses.replace(declared, evaluation=dataclasses.replace(declared.evaluation, sources=sources))
    prepared = prepare(declared, folders)
    left_out = {others[0].name: frozenset(range(100))}
    prepared = dataclasses.replace(prepared, left_out=left_out)
    params = jax.jit(model.init, static_argnums=0)(declared.model, jax.random.key(0))
    mesh = sharding.make_mesh(declared)
    with jax.set_mesh(mesh):
        found = evaluation.bits_per_byte(declared, prepared, params, mesh)
    assert list(found) == [f"bits_per_byte.{name}" for name in ("en", "mt", "mean", "code")]
    assert math.isnan(found["bits_per_byte.en"]) and found["bits_per_byte.mean"] == found["bits_per_byte.mt"]
