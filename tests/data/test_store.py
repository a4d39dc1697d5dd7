import json

import numpy as np
import pytest

from euroflax.data import store as stores
from euroflax.data.store import StoreWriter, open_store
from euroflax.experiment import ExperimentError


def write(path, lengths, vocab_size=300, shard=None):
    writer = StoreWriter(path, vocab_size)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, sum(lengths)).astype(np.uint32)
    at = 0
    for i, length in enumerate(lengths):
        row = {"id": f"d{i}", "bytes": 3 * length, "provider": None if i % 2 else "p", "licence": None}
        writer.append(tokens[at : at + length], [row], np.array([length]))
        at += length
    writer.finish({"name": "s"})
    return tokens


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_what_was_written_is_read(tmp_path, vocab_size):
    lengths = [5, 3, 1000, 2]
    tokens = write(tmp_path / "s", lengths, vocab_size)
    store = open_store(tmp_path / "s")
    assert (store.num_tokens, store.num_documents, store.num_bytes) == (1010, 4, 3030)
    assert np.array_equal(store.read(0, 1010), tokens)
    assert np.array_equal(store.read(6, 9), tokens[6:9])
    assert [store.document(i) for i in range(4)] == [(0, 5), (5, 8), (8, 1008), (1008, 1010)]
    assert store.documents([3, 0]) == [
        {"id": "d3", "bytes": 6, "provider": None, "licence": None},
        {"id": "d0", "bytes": 15, "provider": "p", "licence": None},
    ]


def test_a_store_larger_than_a_shard_and_a_group_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_SHARD_TOKENS", 2 * stores._CHUNK_TOKENS)
    monkeypatch.setattr(stores, "_DOCUMENTS_PER_GROUP", 3)
    tokens = write(tmp_path / "s", [10_000] * 7)
    store = open_store(tmp_path / "s")
    assert np.array_equal(store.read(0, 70_000), tokens)
    assert [d["id"] for d in store.documents([6, 2, 3])] == ["d6", "d2", "d3"]


def test_an_unfinished_store_is_none(tmp_path):
    writer = StoreWriter(tmp_path / "s", 300)
    writer.append(np.arange(5), [{"id": "a", "bytes": 5, "provider": None, "licence": None}], np.array([5]))
    assert open_store(tmp_path / "s") is None
    assert open_store(tmp_path / "nowhere") is None
    writer.close()


def test_a_store_that_was_cut_or_is_of_another_format_is_refused(tmp_path):
    write(tmp_path / "s", [5, 3])
    ends = tmp_path / "s" / "ends.i64"
    ends.write_bytes(ends.read_bytes()[:-8])
    with pytest.raises(ExperimentError, match="not whole"):
        open_store(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(ExperimentError, match="format 99"):
        open_store(tmp_path / "s")


def test_a_flipped_bit_or_a_vanished_shard_is_an_error(tmp_path):
    write(tmp_path / "s", [5000, 300])
    (shard,) = [path for path in (tmp_path / "s" / "tokens").rglob("*") if path.is_file() and path.name != "zarr.json"]
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ExperimentError, match="cannot be read"):
        open_store(tmp_path / "s").read(0, 64)
    shard.unlink()
    with pytest.raises(ExperimentError, match="cannot be read"):
        open_store(tmp_path / "s").read(0, 64)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_harmed_manifest_is_said_in_a_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ExperimentError, match="its manifest is harmed; delete the folder"):
        open_store(tmp_path)


def test_a_store_without_documents_can_be_opened(tmp_path):
    write(tmp_path / "s", [])
    store = open_store(tmp_path / "s")
    assert store.num_documents == store.num_tokens == len(store.ends) == 0
