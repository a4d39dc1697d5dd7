import errno
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from euroflax.data import store as stores
from euroflax.data.store import StoreWriter, open_store
from euroflax.experiment import ExperimentError, Interrupted


def write(path, lengths, vocab_size=300, shard=None):
    writer = StoreWriter(path, vocab_size)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, sum(lengths)).astype(np.uint32)
    at = 0
    for i, length in enumerate(lengths):
        row = {"id": f"d{i}", "bytes": 3 * length, "provider": None if i % 2 else "p", "licence": None, "lost": 0}
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
        {"id": "d3", "bytes": 6, "provider": None, "licence": None, "lost": 0},
        {"id": "d0", "bytes": 15, "provider": "p", "licence": None, "lost": 0},
    ]


def test_a_store_larger_than_a_chunk_and_a_group_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_DOCUMENTS_PER_GROUP", 3)
    tokens = write(tmp_path / "s", [10_000] * 7)
    store = open_store(tmp_path / "s")
    assert np.array_equal(store.read(0, 70_000), tokens)
    for start, stop in ((0, 1), (4095, 4097), (4096, 8192), (69_999, 70_000), (5, 5)):
        assert np.array_equal(store.read(start, stop), tokens[start:stop])
    assert [d["id"] for d in store.documents([6, 2, 3])] == ["d6", "d2", "d3"]
    numbers, unknown = store.find(["d5", "no", "d1"])
    assert numbers.tolist() == [1, 5] and unknown == ["no"]


def test_windows_are_whole_documents_and_cover_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_WINDOW_TOKENS", (1000, 2000))
    monkeypatch.setattr(stores, "_DOCUMENTS_AT_ONCE", 4)
    rng = np.random.default_rng(1)
    lengths = [*rng.integers(2, 300, 200), 5000, *rng.integers(2, 300, 50)]
    write(tmp_path / "s", lengths)
    store = open_store(tmp_path / "s")
    windows = store.windows.read(0, len(store.windows))
    assert windows[0] == 0 and windows[-1] == 251 and (np.diff(windows) > 0).all()
    sizes = np.add.reduceat(lengths, windows[:-1])
    assert len(windows) > 20 and np.median(sizes) < 1400 and sorted(sizes)[-2] < 1700 and sizes[:-1].min() > 300


@pytest.mark.parametrize(("tokens", "windows"), [(3000, 1), (8200, 2), (60_000, 4), (900_000, 4), (1_500_000, 5)])
def test_a_small_store_has_a_few_windows_too(tmp_path, tokens, windows):
    write(tmp_path / "s", [100] * (tokens // 100))
    assert open_store(tmp_path / "s").manifest["windows"] == windows


def test_an_unfinished_store_is_none(tmp_path):
    writer = StoreWriter(tmp_path / "s", 300)
    writer.append(np.arange(5), [{"id": "a", "bytes": 5, "provider": None, "licence": None, "lost": 0}], np.array([5]))
    assert open_store(tmp_path / "s") is None
    assert open_store(tmp_path / "nowhere") is None
    writer.close()


@pytest.mark.parametrize("name", ["tokens", "ends", "bytes", "windows", "providers"])
def test_a_store_with_a_file_that_was_cut_is_refused_when_it_is_opened(tmp_path, name):
    write(tmp_path / "s", [5, 3])
    file = tmp_path / "s" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ExperimentError, match=f"{name} is .* bytes long and not .*; delete the folder"):
        open_store(tmp_path / "s")
    file.unlink()
    with pytest.raises(ExperimentError, match=f"{name} is 0 bytes long"):
        open_store(tmp_path / "s")


def test_a_store_of_another_format_is_refused(tmp_path):
    write(tmp_path / "s", [5, 3])
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(ExperimentError, match="format 99"):
        open_store(tmp_path / "s")


PARAMS = [("tokens", lambda s: s.read(0, 64)), ("ends", lambda s: s.document(1))]


def test_a_table_of_documents_that_is_harmed_is_said_in_a_line(tmp_path):
    write(tmp_path / "s", [50] * 300)
    table = tmp_path / "s" / "documents.parquet"
    whole, store = table.read_bytes(), open_store(tmp_path / "s")
    reads = (lambda: store.documents([0, 299]), lambda: store.find(["d1"]), lambda: store.counts("provider"))
    metadata = pq.read_metadata(table).row_group(0)
    for read, column in zip(reads, (0, 0, 2), strict=True):
        chunk = metadata.column(column)
        at = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2
        for content in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:100]):
            table.write_bytes(content)
            with pytest.raises(ExperimentError, match=r"documents.parquet cannot be read .*; delete the folder"):
                read()
    with pytest.raises(ExperimentError, match=r"documents.parquet does not have its size"):
        open_store(tmp_path / "s")
    table.unlink()
    with pytest.raises(ExperimentError, match=r"documents.parquet does not have its size"):
        open_store(tmp_path / "s")


def test_too_many_open_files_ask_for_a_limit_and_not_to_delete_anything(tmp_path, monkeypatch):
    write(tmp_path / "s", [5, 3])

    def refuse(path, flags):
        raise OSError(errno.EMFILE, "Too many open files")

    store = open_store(tmp_path / "s")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        Interrupted, match=r"tokens cannot be read \(Too many open files\); raise the limit \(ulimit -n"
    ):
        store.read(0, 8)


@pytest.mark.parametrize(("name", "read"), PARAMS)
def test_what_happens_to_a_file_of_an_open_store_is_an_error_and_no_crash(tmp_path, name, read):
    write(tmp_path / "s", [5000, 300])
    file = tmp_path / "s" / name
    whole = file.read_bytes()
    store = open_store(tmp_path / "s")
    read(store)
    file.write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    with pytest.raises(ExperimentError, match=f"{name} does not fit its checksum in chunk 0; delete the folder"):
        read(store)
    file.write_bytes(whole[:10])
    with pytest.raises(ExperimentError, match=f"{name} was cut short; delete the folder"):
        read(store)
    file.unlink()
    with pytest.raises(ExperimentError, match=f"{name} has vanished; delete the folder"):
        read(open_again(store))


def open_again(store):
    """The store as another process has it that opened it before and reads a file for the first time."""
    return stores.Store(store.path, store.manifest)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'])
def test_a_harmed_manifest_is_said_in_a_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ExperimentError, match="its manifest is harmed; delete the folder"):
        open_store(tmp_path)


def test_a_store_without_documents_can_be_opened(tmp_path):
    write(tmp_path / "s", [])
    store = open_store(tmp_path / "s")
    assert store.num_documents == store.num_tokens == len(store.ends) == 0
