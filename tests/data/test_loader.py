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


def test_the_order_of_rows_is_the_same_however_they_are_asked_for(declared, prepared):
    rows = Rows(declared, prepared)
    whole = rows.batch(range(41))
    assert same(joined(Rows(declared, prepared).batch([i]) for i in range(41)), whole)
    backwards = [rows.batch([i]) for i in reversed(range(41))]
    assert same(joined(reversed(backwards)), whole)
    for batch_rows in (1, 3, 8):
        cut = dataclasses.replace(
            declared, training=dataclasses.replace(declared.training, batch_tokens=batch_rows * 64)
        )
        streamed = joined(batches(cut, rows, 0, range(batch_rows)))
        assert same({key: streamed[key][:41] for key in BATCH_KEYS}, whole)


def test_any_position_begins_where_it_should_and_two_processes_make_one(declared, prepared):
    rows = Rows(declared, prepared)
    halves = [list(batches(declared, rows, 5, mine)) for mine in (range(4), range(4, 8))]
    both = joined(itertools.chain.from_iterable(zip(*halves, strict=True)))
    assert same({key: both[key][:36] for key in BATCH_KEYS}, rows.batch(range(5, 41)))


def test_the_last_batch_is_cut_short_and_masked(declared, prepared):
    last = list(batches(declared, Rows(declared, prepared), 0, range(8)))[-1]
    assert last["loss_weights_BL"][0].sum() > 0
    assert last["loss_weights_BL"][1:].sum() == 0 and last["segment_ids_BL"][1:].sum() == 0


def test_a_row_is_of_one_source_and_names_its_documents(declared, prepared):
    rows = Rows(declared, prepared)
    for index in range(20):
        placed = loader.row(declared, prepared, index)
        batch = rows.batch([index])
        assert set(batch["language_ids_BL"].ravel()) == {declared.language_codes.index(placed.source.language)}
        assert np.array_equal(batch["tokens_BL"][0], placed.row.tokens)
        path = ROOT / "euroflax" / "sample" / placed.source.path.removeprefix("sample:")
        texts = {r["id"]: r["text"] for r in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        text = prepared.tokenizer.inner.decode(placed.row.tokens[placed.row.segment_ids == 1].tolist())
        assert text.removeprefix("<|begin_of_text|>").strip("\ufffd") in texts[placed.documents[0]["id"]]
        assert len(placed.documents) == placed.row.segment_ids.max()


def test_each_epoch_of_a_source_reads_each_of_its_rows_once(prepared):
    rows = Rows(small(training__tokens=1000 * 64), prepared)
    per_epoch = rows.mixture.rows_per_epoch[0]
    seen = []
    for index in itertools.count():
        placed = rows.row(index)
        if placed.source is prepared.train[0][0]:
            if placed.epoch == 2:
                break
            seen.append((placed.epoch, placed.row.tokens.tobytes()))
    assert len(seen) == len(set(seen)) == 2 * per_epoch
    assert {t for epoch, t in seen if epoch == 0} == {t for epoch, t in seen if epoch == 1}
    assert [t for epoch, t in seen if epoch == 0] != [t for epoch, t in seen if epoch == 1]


def test_the_seed_changes_the_order(declared, prepared):
    other = dataclasses.replace(declared, training=dataclasses.replace(declared.training, seed=1))
    assert not same(Rows(declared, prepared).batch(range(41)), Rows(other, prepared).batch(range(41)))


def test_a_row_that_the_run_does_not_have_is_refused(declared, prepared):
    rows = Rows(declared, prepared)
    for index in (-1, 41):
        with pytest.raises(ExperimentError, match=f"row={index} is not in the run; use 0 to 40"):
            rows.row(index)
