import numpy as np
import pytest

from euroflax.data.packing import cut_row, epoch_keys, num_rows, permute
from euroflax.data.store import StoreWriter, open_store

PAD = 0


@pytest.fixture
def store(tmp_path):
    writer = StoreWriter(tmp_path / "s", 300)
    lengths = [5, 3, 9, 2]
    rows = [{"id": str(i), "bytes": 1, "provider": None, "licence": None} for i in range(4)]
    writer.append(np.arange(1, 20), rows, np.array(lengths))
    writer.finish({})
    return open_store(tmp_path / "s")


def test_a_row_marks_documents_positions_and_loss(store):
    row = cut_row(store, 0, 10, PAD)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert row.targets.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 3, 3]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    assert row.loss_weights.tolist() == [1, 1, 1, 1, 0, 1, 1, 0, 1, 1]
    assert row.documents == range(0, 3)


def test_the_last_row_is_padded_and_begins_within_a_document(store):
    assert num_rows(store, 10) == 2
    row = cut_row(store, 1, 10, PAD)
    assert row.tokens.tolist() == [11, 12, 13, 14, 15, 16, 17, 18, PAD, PAD]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]
    assert row.loss_weights.tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    assert row.documents == range(2, 4)


@pytest.mark.parametrize("length", [2, 3, 4, 6, 7, 18, 19, 50])
def test_every_target_within_a_document_counts_once(store, length):
    seen = []
    for index in range(num_rows(store, length)):
        row = cut_row(store, index, length, PAD)
        seen += row.targets[row.loss_weights == 1].tolist()
    # All tokens but the first of each document: 1, 6, 9 and 18.
    assert seen == [t for t in range(1, 20) if t not in (1, 6, 9, 18)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_an_epoch_passes_each_row_once_in_an_order_of_its_own(size):
    orders = [[permute(i, size, epoch_keys(3, "s", epoch)) for i in range(size)] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(size))
    if size > 7:
        assert orders[0] != orders[1] and orders[0] != list(range(size))


def test_the_permutation_spreads_and_is_the_same_on_every_machine():
    size = 10**12
    found = [permute(i, size, epoch_keys(0, "sample-mt", 0)) for i in range(1000)]
    assert len(set(found)) == 1000 and 0.45 < np.mean(found) / size < 0.55
    assert [permute(i, 100, epoch_keys(0, "sample-mt", 0)) for i in range(5)] == [11, 18, 50, 97, 65]
