import collections
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tokenizers

from euroflax import tables, verbs
from euroflax.data import prepare as preparation
from euroflax.data.arrays import ArrayWriter
from euroflax.data.prepare import open_prepared, prepare
from euroflax.experiment import (
    Evaluation,
    ExperimentError,
    Interrupted,
    Mixture,
    RunFailed,
    Source,
    override,
    to_json,
)
from euroflax.folders import Folders
from tests.conftest import ROOT, small

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def own(tmp_path, lines=200, **changes):
    """An experiment on a file of its own, and folders with a cache of their own."""
    records = [
        {"id": f"d{i}", "text": " ".join(WORDS[: i % 10 + 1]) + f" {i}", "by": f"p{i % 2}"} for i in range(lines)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fields = {"language": "en", "licence": "x", "provider": "y", "origin": "user", "opt_out": "unknown"}
    source = Source(**({"name": "a", "path": "a.jsonl", **fields} | changes))
    declared = small(model__vocab_size=270)
    data = dataclasses.replace(declared.data, sources=(source,), mixture=Mixture())
    declared = dataclasses.replace(declared, data=data, evaluation=Evaluation())
    return declared, Folders(cache_dir=tmp_path / "cache", runs_dir=tmp_path / "runs", data_root=tmp_path)


def texts(prepared, store):
    tokens = store.read(0, store.num_tokens)
    known = prepared.tokenizer
    for i in range(store.num_documents):
        start, stop = store.document(i)
        assert tokens[start] == known.bos and tokens[stop - 1] == known.eos
        yield known.inner.decode(tokens[start + 1 : stop - 1].tolist())


def test_a_store_holds_every_document_in_order_with_its_provenance(tmp_path):
    declared, folders = own(tmp_path, lines=3000, provider_field="by")
    prepared = prepare(declared, folders)
    ((_, store),) = prepared.train
    written = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert list(texts(prepared, store)) == written
    assert store.num_bytes == sum(len(text.encode()) for text in written)
    assert store.documents([2999]) == [
        {"id": "d2999", "bytes": len(written[-1]), "provider": "p1", "licence": None, "lost": 0}
    ]


def test_preparing_again_makes_nothing(tmp_path, monkeypatch):
    declared, folders = own(tmp_path)
    first = prepare(declared, folders)
    before = {path: path.stat().st_mtime_ns for path in folders.cache_dir.rglob("*")}
    monkeypatch.setattr(preparation, "_make_stores", None)
    monkeypatch.setattr(preparation, "_train_tokenizer", None)
    assert prepare(declared, folders).train[0][1].path == first.train[0][1].path
    assert {path: path.stat().st_mtime_ns for path in folders.cache_dir.rglob("*")} == before


def test_a_half_written_store_is_never_taken_for_a_whole_one(tmp_path):
    declared, folders = own(tmp_path)
    ((_, whole),) = prepare(declared, folders).train
    (whole.path / "manifest.json").unlink()
    with pytest.raises(ExperimentError, match="source a is not prepared; run the verb prepare first"):
        open_prepared(declared, folders)
    whole.path.rename(whole.path.with_suffix(".partial"))
    ((_, again),) = prepare(declared, folders).train
    assert again.num_documents == 200
    assert not whole.path.with_suffix(".partial").exists()


def test_changed_text_makes_another_store_and_the_old_one_stays(tmp_path):
    declared, folders = own(tmp_path)
    ((_, first),) = prepare(declared, folders).train
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"id": "new", "text": "more"}\n')
    ((_, second),) = prepare(declared, folders).train
    assert second.num_documents == 201 and second.path != first.path and first.path.exists()


def test_prepared_data_is_found_where_the_text_is_gone(tmp_path):
    declared, folders = own(tmp_path)
    prepare(declared, folders)
    (tmp_path / "a.jsonl").unlink()
    assert open_prepared(declared, folders).train[0][1].num_documents == 200


def test_held_out_documents_are_evaluated_and_never_trained_on(tmp_path):
    declared, folders = own(tmp_path, holdout_fraction=0.2)
    prepared = prepare(declared, folders)
    ((_, train),), ((_, held),) = prepared.train, prepared.evaluation
    both = [{d["id"] for d in store.documents(list(range(store.num_documents)))} for store in (train, held)]
    assert not both[0] & both[1]
    assert len(both[0] | both[1]) == 200 and 20 < len(both[1]) < 60


def test_a_file_that_is_evaluated_on_is_not_trained_on(tmp_path):
    declared, folders = own(tmp_path)
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    copy = dataclasses.replace(declared.data.sources[0], name="b", path="b.jsonl")
    with pytest.raises(ExperimentError, match=r"evaluation source b: file b.jsonl is also trained on, in source a"):
        prepare(dataclasses.replace(declared, evaluation=Evaluation(sources=(copy,))), folders)


def test_bad_lines_are_counted_set_aside_and_bounded(tmp_path):
    declared, folders = own(tmp_path)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    lines[4], lines[6], lines[7] = b"{broken", b'{"id": "x"}', b'{"id": "y", "text": "\xff"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ExperimentError) as error:
        prepare(declared, folders)
    message = error.value.faults[0]
    assert "3 of 200 lines hold no document (no field text: 1, not JSON: 1, not UTF-8: 1)" in message
    assert "over data.bad_line_fraction=0.001" in message
    aside = pathlib.Path(message.split("see ")[1].split(", then")[0])
    kept = [json.loads(line) for line in aside.read_text().splitlines()]
    assert (kept[0]["line"], kept[0]["reason"], kept[0]["content"]) == (5, "not JSON", "{broken")
    assert [row["line"] for row in kept] == [5, 7, 8]
    lenient = dataclasses.replace(declared, data=dataclasses.replace(declared.data, bad_line_fraction=0.02))
    ((_, store),) = prepare(lenient, folders).train
    assert store.num_documents == 197
    assert store.manifest["bad_lines"] == {"no field text": 1, "not JSON": 1, "not UTF-8": 1}
    with pytest.raises(ExperimentError, match="3 of 200 lines"):
        open_prepared(declared, folders)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_source_is_an_error(tmp_path, content):
    declared, folders = own(tmp_path)
    prepare(declared, folders)
    (tmp_path / "b.jsonl").write_text(content)
    empty = dataclasses.replace(declared.data.sources[0], name="b", path="b.jsonl")
    both = dataclasses.replace(declared.data, sources=(*declared.data.sources, empty))
    with pytest.raises(ExperimentError, match=r"source b: .*b.jsonl holds no document.*; give it text"):
        prepare(dataclasses.replace(declared, data=both), folders)


def test_a_holdout_that_catches_nothing_is_an_empty_store(tmp_path):
    declared, folders = own(tmp_path, lines=10, holdout_fraction=1e-9)
    declared = dataclasses.replace(declared, model=dataclasses.replace(declared.model, vocab_size=262))
    ((_, held),) = prepare(declared, folders).evaluation
    assert held.num_documents == 0


def test_one_file_is_not_held_out_of_in_two_ways(tmp_path):
    declared, folders = own(tmp_path, holdout_fraction=0.1)
    whole = dataclasses.replace(declared.data.sources[0], name="b", holdout_fraction=0.0)
    both = dataclasses.replace(declared.data, sources=(*declared.data.sources, whole))
    with pytest.raises(ExperimentError, match=r"sources a and b both read a.jsonl and hold out different shares"):
        prepare(dataclasses.replace(declared, data=both), folders)


def test_a_declared_tokenizer_that_is_missing_is_not_made(tmp_path):
    declared, folders = own(tmp_path)
    tokenizer = dataclasses.replace(declared.data.tokenizer, path="nowhere.json")
    with pytest.raises(ExperimentError, match=r"nowhere.json cannot be read"):
        prepare(dataclasses.replace(declared, data=dataclasses.replace(declared.data, tokenizer=tokenizer)), folders)
    assert not (tmp_path / "nowhere.json").exists()


def test_a_few_bad_lines_at_the_head_of_a_long_file_are_within_the_bound(tmp_path):
    declared, folders = own(tmp_path, lines=30_000)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    lines[:15] = [b"{"] * 15
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert prepare(declared, folders).train[0][1].num_documents == 29_985
    lines[:20_000] = [b"{"] * 20_000
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ExperimentError, match=r"of 1\d{4} lines hold no document"):
        prepare(declared, folders)


def test_a_missing_file_is_an_error(tmp_path):
    declared, folders = own(tmp_path, path="nowhere.jsonl")
    with pytest.raises(ExperimentError, match=r"source a: path=nowhere.jsonl names no file"):
        prepare(declared, folders)


def test_a_tokenizer_larger_than_the_model_is_an_error(tmp_path):
    declared, folders = own(tmp_path)
    path = prepare(declared, folders).tokenizer_path
    (tmp_path / "t.json").write_bytes(path.read_bytes())
    tokenizer = dataclasses.replace(declared.data.tokenizer, path="t.json")
    declared = dataclasses.replace(declared, data=dataclasses.replace(declared.data, tokenizer=tokenizer))
    assert prepare(declared, folders).tokenizer.vocab_size == 270
    smaller = dataclasses.replace(declared, model=dataclasses.replace(declared.model, vocab_size=260))
    with pytest.raises(ExperimentError, match=r"model.vocab_size=260 is less than the 270 entries"):
        prepare(smaller, folders)


def test_preparation_tells_how_far_it_is(tmp_path):
    declared, folders = own(tmp_path, lines=20_000)
    told = collections.defaultdict(list)
    prepare(declared, folders, lambda task, done, total: told[task].append((done, total)))
    assert told["tokenizer"][-1][0] == told["tokenizer"][-1][1] > 1000
    done = [size for size, _ in told["tokens a"]]
    assert len(set(done)) > 1 and done == sorted(done) and done[-1] == told["tokens a"][-1][1]


MEMORY = """
import json, pathlib, resource, sys
from euroflax.data.prepare import prepare
from euroflax.experiment import from_json
from euroflax.folders import Folders

if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    declared = from_json(json.loads((root / "experiment.json").read_text()))
    prepare(declared, Folders(cache_dir=root / "cache", data_root=root))
    own, workers = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(own, workers)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for lines in (2_000, 40_000):
        folder = tmp_path / str(lines)
        folder.mkdir()
        declared, _ = own(folder, lines=0)
        tokenizer = dataclasses.replace(declared.data.tokenizer, sample_bytes=100_000)
        declared = dataclasses.replace(declared, data=dataclasses.replace(declared.data, tokenizer=tokenizer))
        (folder / "experiment.json").write_text(json.dumps(to_json(declared)))
        (folder / "memory.py").write_text(MEMORY)
        with open(folder / "a.jsonl", "w") as file:
            for i in range(lines):
                file.write(json.dumps({"id": str(i), "text": f"{i} " + " ".join(WORDS * 40)}) + "\n")
        command = [sys.executable, str(folder / "memory.py"), str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append([int(kib) for kib in done.stdout.split()])
    # Twenty times the text, 80 MB against 4: neither the parent nor a worker holds much more.
    assert max(big - small for small, big in zip(*peaks, strict=True)) < 40 * 1024, peaks


def test_text_that_changes_between_its_hash_and_its_reading_is_not_stored_under_that_hash(tmp_path, monkeypatch):
    declared, folders = own(tmp_path)
    file = tmp_path / "a.jsonl"
    known = file.stat()
    made, changed = preparation._make_stores, file.read_text().replace("one", "eno")

    def change(*arguments):
        file.write_text(changed)
        os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
        made(*arguments)

    monkeypatch.setattr(preparation, "_make_stores", change)
    with pytest.raises(Interrupted, match=r"a\.jsonl changed while it was read"):
        prepare(declared, folders)
    assert list((folders.cache_dir / "stores").glob("*/manifest.json")) == []
    monkeypatch.undo()
    prepared = prepare(declared, folders)
    assert next(texts(prepared, prepared.train[0][1])).startswith("eno")


def losing(tmp_path, letters):
    """A tokenizer file without some letters, on which `own` can be prepared."""
    declared, folders = own(tmp_path)
    prepared = prepare(declared, folders)
    inner = tokenizers.Tokenizer.from_str(prepared.tokenizer_path.read_text())
    inner.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(f"[{letters}]"), "")
    inner.save(str(tmp_path / "losing.json"))
    tokenizer = dataclasses.replace(declared.data.tokenizer, path="losing.json")
    return dataclasses.replace(declared, data=dataclasses.replace(declared.data, tokenizer=tokenizer)), folders


def test_a_tokenizer_that_loses_text_is_refused_by_language_and_by_source(tmp_path):
    declared, folders = losing(tmp_path, "ea")
    with pytest.raises(ExperimentError, match=r"loses text in English: its tokens do not give back \d+ of \d+ bytes"):
        prepare(declared, folders)
    declared, folders = losing(tmp_path, "7")
    with pytest.raises(ExperimentError, match=r"source a: the tokens do not give back 40 of \d+ bytes"):
        prepare(declared, folders)
    bounded = override(declared, {"data.tokenizer.max_lost_fraction": 0.05})
    ((_, store),) = prepare(bounded, folders).train
    assert store.num_lost_bytes == sum(line.count("7") for line in map(str, range(200)))


def test_an_empty_shard_among_full_ones_is_passed_over(tmp_path):
    declared, folders = own(tmp_path, path="shards")
    (tmp_path / "shards").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "shards/b.jsonl")
    (tmp_path / "shards/a.jsonl").touch()
    assert prepare(declared, folders).train[0][1].num_documents == 200


def test_a_cache_that_cannot_be_written_is_used_where_it_holds_everything(tmp_path, monkeypatch):
    declared, folders = own(tmp_path)
    prepare(declared, folders)
    monkeypatch.setattr(preparation, "make_folder", lambda *_: pytest.fail("the cache is written"))
    assert prepare(declared, folders).train[0][1].num_documents == 200


def test_a_lock_that_another_process_holds_is_waited_for_with_a_message(tmp_path):
    declared, folders = own(tmp_path)
    key = prepare(declared, folders).train[0][1].path
    shutil.rmtree(key)
    said = []

    def progress(task, done, total):
        if task.startswith("waiting for another process that holds"):
            said.append(task)
            raise Interrupted("stopped")

    with open(key.with_suffix(".lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Interrupted):
            prepare(declared, folders, progress)
    assert len(said) == 1


def test_a_symbolic_link_in_place_of_a_lock_is_refused_and_its_target_whole(tmp_path):
    declared, folders = own(tmp_path)
    path = prepare(declared, folders).train[0][1].path
    shutil.rmtree(path)
    (tmp_path / "precious").write_text("mine")
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunFailed, match="is a symbolic link where a lock should be"):
        prepare(declared, folders)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_tokenizer_that_fails_in_a_worker_is_a_line_with_the_place(tmp_path):
    declared, folders = own(tmp_path)
    vocabulary = {token: i for i, token in enumerate(["<|pad|>", "<|begin_of_text|>", "<|end_of_text|>"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="missing")).save(str(tmp_path / "t.json"))
    declared = override(declared, {"data.tokenizer.path": "t.json", "data.tokenizer.max_lost_fraction": 1.0})
    source = dataclasses.replace(declared.data.sources[0], language="nn")
    declared = dataclasses.replace(declared, data=dataclasses.replace(declared.data, sources=(source,)))
    with pytest.raises(ExperimentError, match=r"source a: lines 1 to 200 of .*a\.jsonl cannot be tokenized"):
        prepare(declared, folders)


def test_bad_lines_below_the_bound_are_told_with_their_file(tmp_path):
    declared, folders = own(tmp_path)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("not json\n")
    prepared = prepare(override(declared, {"data.bad_line_fraction": 0.1}), folders)
    (line,) = tables.about_bad_lines(folders, prepared)
    assert line.startswith("bad lines   source a: not JSON: 1, of 201 lines, see ")
    assert pathlib.Path(line.rpartition("see ")[2]).is_file()


def test_prepared_data_that_was_changed_is_found_at_a_start_or_by_a_deep_check(tmp_path):
    declared, folders = own(tmp_path)
    prepared = prepare(declared, folders)
    ((_, store),) = prepared.train
    verbs.check(declared, folders, deep=True)
    manifest = store.path / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_text(json.dumps(json.loads(whole) | {"bytes": store.num_bytes // 2}))
    with pytest.raises(ExperimentError, match="its manifest was changed; delete"):
        open_prepared(declared, folders)
    manifest.write_bytes(whole)
    reversed_tokens = store.read(0, store.num_tokens)[::-1]
    writer = ArrayWriter(store.path / "tokens", store.manifest["dtype"])
    writer.append(reversed_tokens)
    writer.close()
    verbs.check(declared, folders)
    with pytest.raises(ExperimentError, match="tokens changed; delete the folder and prepare again"):
        verbs.check(declared, folders, deep=True)
    content = prepared.tokenizer_path.read_text()
    vocabulary = json.loads(content)
    a, b = list(vocabulary["model"]["vocab"])[50:52]
    entries = vocabulary["model"]["vocab"]
    entries[a], entries[b] = entries[b], entries[a]
    prepared.tokenizer_path.write_text(json.dumps(vocabulary))
    with pytest.raises(ExperimentError, match=r"tokenizer .* is not as it was made"):
        open_prepared(declared, folders)
