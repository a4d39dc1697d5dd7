import numpy as np
import pytest

from euroflax.data import store as stores
from euroflax.data.loader import empty_batch, fill_row
from euroflax.data.packing import Recipe, best_fit, make_packing, open_packing
from euroflax.data.store import StoreWriter, open_store
from euroflax.experiment import ExperimentError

PAD = 0
LENGTHS = [5, 3, 9, 2]
PACKINGS = [(packing, long) for packing in ("concat", "best-fit") for long in ("continue", "cut")]


def make_store(path, lengths):
    writer = StoreWriter(path, 60_000)
    names = (None, "a", "b")
    rows = [
        {"id": f"d{i}", "bytes": 7 * n, "provider": names[i % 3], "licence": None, "lost": 0}
        for i, n in enumerate(lengths)
    ]
    writer.append(np.arange(1, sum(lengths) + 1), rows, np.array(lengths))
    writer.finish({})
    return open_store(path)


def packed(store, length, packing="concat", long="continue", withdrawn=()):
    recipe = Recipe(length, packing, long, tuple(withdrawn))
    path = store.path.parent / recipe.key(store)
    make_packing(path, store, recipe, lambda done: None)
    return open_packing(path, store)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s", LENGTHS)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A store of several windows, with documents shorter and longer than a row."""
    monkeypatch.setattr(stores, "_WINDOW_TOKENS", (3000, 3000))
    lengths = np.random.default_rng(3).lognormal(4.0, 1.2, 400).astype(int) + 2
    return make_store(tmp_path / "l", lengths.tolist())


def row(packing, index, length):
    batch = empty_batch(1, length, PAD)
    pieces = fill_row(batch, 0, packing, index)
    return {key: values[0].tolist() for key, values in batch.items()}, pieces


def test_a_row_marks_documents_positions_and_loss(store):
    packing = packed(store, 10)
    assert packing.num_rows == 2 and packing.num_tokens == 19
    first, pieces = row(packing, 0, 10)
    assert first["tokens_BL"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert first["targets_BL"] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert first["segment_ids_BL"] == [1, 1, 1, 1, 1, 2, 2, 2, 3, 3]
    assert first["positions_BL"] == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    assert first["loss_weights_BL"] == [1, 1, 1, 1, 0, 1, 1, 0, 1, 1]
    assert pieces["document"].tolist() == [0, 1, 2] and pieces["bytes"].tolist() == [35, 21, 14]


def test_the_last_row_is_padded_and_goes_on_with_a_document(store):
    second, pieces = row(packed(store, 10), 1, 10)
    assert second["tokens_BL"] == [11, 12, 13, 14, 15, 16, 17, 18, 19, PAD]
    assert second["segment_ids_BL"] == [1, 1, 1, 1, 1, 1, 1, 2, 2, 0]
    assert second["positions_BL"] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 0]
    assert second["loss_weights_BL"] == [1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    assert pieces["begins"].tolist() == [0, 1] and pieces["ends"].tolist() == [1, 1]


def test_best_fit_keeps_documents_whole_where_they_fit(store):
    packing = packed(store, 10, "best-fit")
    rows = [row(packing, index, 10)[0]["tokens_BL"] for index in range(packing.num_rows)]
    assert rows == [[*range(9, 18), PAD], [*range(1, 9), 18, 19]] or rows == [
        [*range(1, 9), 18, 19], [*range(9, 18), PAD]
    ]  # fmt: skip


def test_best_fit_fills_the_fullest_row_that_has_room():
    assert best_fit(np.array([3, 6, 4, 5]), 9).tolist() == [0, 0, 1, 1]
    assert best_fit(np.array([7, 5, 3]), 10).tolist() == [0, 1, 0]
    counts = np.random.default_rng(0).integers(1, 100, 3000)
    rows = best_fit(counts, 100)
    filled = np.bincount(rows, counts)
    assert filled.max() <= 100 and len(filled) <= np.ceil(counts.sum() / 100) * 1.03


@pytest.mark.parametrize(("packing", "long"), PACKINGS)
@pytest.mark.parametrize("length", [2, 3, 7, 64, 500])
def test_every_token_is_in_one_row_once_and_no_other_is(large, packing, long, length):
    made = packed(large, length, packing, long)
    seen = []
    for index in range(made.num_rows):
        values, pieces = row(made, index, length)
        used = np.array(values["segment_ids_BL"]) > 0
        seen += np.array(values["tokens_BL"])[used].tolist()
        assert used.sum() == pieces["count"].sum() and 0 < used.sum() <= length
        for piece in pieces:
            start, stop = large.document(int(piece["document"]))
            assert start <= piece["start"] and piece["start"] + piece["count"] <= stop
            if packing == "best-fit" and stop - start <= length:
                assert piece["begins"] and piece["ends"]
    kept = []
    for document in range(large.num_documents):
        start, stop = large.document(document)
        kept += range(start + 1, (min(stop, start + length) if long == "cut" else stop) + 1)
    assert sorted(seen) == kept and made.num_tokens == len(kept)


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_a_document_that_is_cut_learns_the_token_after_the_cut_and_has_no_end(tmp_path, packing):
    store = make_store(tmp_path / "s", [25, 3])
    for long, tokens in (("cut", 13), ("continue", 28)):
        made = packed(store, 10, packing, long)
        found = [row(made, index, 10) for index in range(made.num_rows)]
        first = next(values for values, pieces in found if pieces["start"][0] == 0)
        assert first["targets_BL"] == list(range(2, 12)) and first["loss_weights_BL"] == [1] * 10
        assert made.num_tokens == tokens
        assert sum(pieces["ends"].sum() for _, pieces in found) == (1 if long == "cut" else 2)


@pytest.mark.parametrize(("packing", "long"), PACKINGS)
def test_windows_sum_to_what_their_rows_hold(large, packing, long):
    made = packed(large, 64, packing, long)
    totals = made.totals.read(0, len(made.totals))
    assert made.num_windows > 5 and made.first_rows[0] == 0 and made.first_rows[-1] == made.num_rows
    for window in range(made.num_windows):
        pieces, _ = made.pieces_of(*made.first_rows[window : window + 2].tolist())
        first, last = large.windows.read(window, window + 2)
        assert set(pieces["document"].tolist()) == set(range(first, last))
        mine = totals[totals["window"] == window]
        assert mine["provider"].tolist() == [-1, 0, 1] and mine["documents"].sum() == last - first
        providers = made.providers_of(pieces)
        for total in mine:
            among = pieces[providers == total["provider"]]
            assert total["tokens"] == among["count"].sum() and total["bytes"] == among["bytes"].sum()
            assert total["documents"] == among["begins"].sum()
    if long == "continue":
        assert (made.num_bytes, made.manifest["documents"]) == (large.num_bytes, large.num_documents)


@pytest.mark.parametrize(("packing", "long"), PACKINGS)
def test_withdrawn_documents_are_in_no_row_and_unknown_ids_are_named(large, packing, long):
    whole = packed(large, 64, packing, long)
    made = packed(large, 64, packing, long, ["d0", "d17", "d399", "other"])
    pieces, _ = made.pieces_of(0, made.num_rows)
    assert set(range(400)) - set(pieces["document"].tolist()) == {0, 17, 399}
    assert made.manifest["unknown"] == ["other"] and made.path != whole.path
    gone = sum(large.document(i)[1] - large.document(i)[0] for i in (0, 17, 399))
    if long == "continue":
        assert whole.num_tokens - made.num_tokens == gone and whole.num_bytes - made.num_bytes == 7 * gone


def test_a_packing_that_was_not_finished_is_none_and_a_harmed_one_is_refused(store):
    made = packed(store, 10)
    (made.path / "pieces").write_bytes(b"")
    with pytest.raises(ExperimentError, match="pieces is 0 bytes long"):
        open_packing(made.path, store)
    (made.path / "manifest.json").write_text("{")
    with pytest.raises(ExperimentError, match="its manifest is harmed"):
        open_packing(made.path, store)
    (made.path / "manifest.json").unlink()
    assert open_packing(made.path, store) is None
