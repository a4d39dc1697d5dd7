import dataclasses
import itertools
import json

import numpy as np
import pytest

from euroflax.data import loader
from euroflax.data.loader import BATCH_KEYS, Rows, batches
from euroflax.data.prepare import prepare
from euroflax.experiment import ExperimentError
from tests.conftest import ROOT, small


@pytest.fixture
def declared():
    return small(training__tokens=41 * 64)


@pytest.fixture
def prepared(declared, folders):
    return prepare(declared, folders)


def joined(parts):
    parts = list(parts)
    return {key: np.concatenate([part[key] for part in parts]) for key in BATCH_KEYS}


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in BATCH_KEYS)


def batch(rows, declared, indices):
    return rows.batch(declared.spans[0], indices)


def test_the_order_of_rows_is_the_same_however_they_are_asked_for(declared, prepared):
    rows = Rows(declared, prepared)
    whole = batch(rows, declared, range(41))
    assert same(joined(batch(Rows(declared, prepared), declared, [i]) for i in range(41)), whole)
    backwards = [batch(rows, declared, [i]) for i in reversed(range(41))]
    assert same(joined(reversed(backwards)), whole)
    for batch_rows in (1, 3, 8):
        cut = dataclasses.replace(
            declared, training=dataclasses.replace(declared.training, batch_tokens=batch_rows * 64)
        )
        streamed = joined(batches(cut, rows, 0, range))
        assert same({key: streamed[key][:41] for key in BATCH_KEYS}, whole)


def test_any_position_begins_where_it_should_and_two_processes_make_one(declared, prepared):
    rows = Rows(declared, prepared)
    halves = [list(batches(declared, rows, 5, lambda _, part=part: part)) for part in (range(4), range(4, 8))]
    both = joined(itertools.chain.from_iterable(zip(*halves, strict=True)))
    assert same({key: both[key][:36] for key in BATCH_KEYS}, batch(rows, declared, range(5, 41)))


def test_the_last_batch_is_cut_short_and_masked(declared, prepared):
    last = list(batches(declared, Rows(declared, prepared), 0, range))[-1]
    assert last["loss_weights_BL"][0].sum() > 0
    assert last["loss_weights_BL"][1:].sum() == 0 and last["segment_ids_BL"][1:].sum() == 0


def texts_of(source):
    path = ROOT / "euroflax" / "sample" / source.path.removeprefix("sample:")
    return {r["id"]: r["text"] for r in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_a_row_is_of_one_source_and_names_its_documents(packing, folders):
    declared = small(training__tokens=41 * 64, data__packing=packing)
    prepared = prepare(declared, folders)
    rows = Rows(declared, prepared)
    for index in range(20):
        placed = loader.row(declared, prepared, index)
        found = batch(rows, declared, [index])
        assert set(found["language_ids_BL"].ravel()) == {declared.language_codes.index(placed.source.language)}
        assert np.array_equal(found["tokens_BL"][0], placed.tokens)
        texts = texts_of(placed.source)
        for document, (first, last, length), text in zip(placed.documents, placed.spans, placed.texts, strict=True):
            whole = texts[document["id"]]
            assert text.strip("\ufffd") in whole and document["bytes"] == len(whole.encode())
            assert (first, last) != (0, length) or text == whole
        assert len(placed.documents) == placed.segment_ids.max()


def test_the_target_of_a_token_is_the_next_of_its_document_and_counts_once(folders):
    declared = small(data__packing="best-fit", training__tokens=400 * 64)
    prepared = prepare(declared, folders)
    rows = Rows(declared, prepared)
    for index in range(30):
        placed = rows.row(index)
        follows = placed.segment_ids[1:] == placed.segment_ids[:-1]
        counted = follows & (placed.loss_weights[:-1] == 1)
        assert np.array_equal(placed.targets[:-1][counted], placed.tokens[1:][counted])
        ends = placed.tokens == prepared.tokenizer.eos
        assert not placed.loss_weights[ends].any() and not placed.loss_weights[placed.segment_ids == 0].any()
        assert placed.loss_weights.sum() == (placed.segment_ids > 0).sum() - ends.sum()
        assert all(placed.positions[placed.segment_ids == n][0] == 0 for n in range(1, placed.segment_ids.max() + 1))


def test_the_end_of_a_document_need_not_be_learnt(folders):
    found = []
    for learnt in (True, False):
        declared = small(data__loss_at_document_end=learnt, training__tokens=400 * 64)
        prepared = prepare(declared, folders)
        all_rows = Rows(declared, prepared).batch(declared.spans[0], range(60))
        weights = all_rows["loss_weights_BL"][all_rows["targets_BL"] == prepared.tokenizer.eos]
        found.append((weights.sum(), len(weights), all_rows["loss_weights_BL"].sum()))
    (ends, count, total), (none, _, rest) = found
    assert ends == count > 10 and none == 0 and total - rest == ends


def test_each_epoch_of_a_source_reads_each_of_its_rows_once(prepared):
    rows = Rows(small(training__tokens=1000 * 64), prepared)
    per_epoch = rows.order.stretches[0].sources[0].packing.num_rows
    seen = []
    for index in itertools.count():
        placed = rows.row(index)
        if placed.source is prepared.train[0][0]:
            if placed.epoch == 2:
                break
            seen.append((placed.epoch, placed.tokens.tobytes()))
    assert len(seen) == len(set(seen)) == 2 * per_epoch
    assert {t for epoch, t in seen if epoch == 0} == {t for epoch, t in seen if epoch == 1}
    assert [t for epoch, t in seen if epoch == 0] != [t for epoch, t in seen if epoch == 1]


def test_the_seed_changes_the_order(declared, prepared):
    other = dataclasses.replace(declared, training=dataclasses.replace(declared.training, seed=1))
    mine, others = (batch(Rows(d, prepared), d, range(41)) for d in (declared, other))
    assert not same(mine, others)


def test_a_row_that_the_run_does_not_have_is_refused(declared, prepared):
    rows = Rows(declared, prepared)
    for index in (-1, 41):
        with pytest.raises(ExperimentError, match=f"row={index} is not in the run; use 0 to 40"):
            rows.row(index)
