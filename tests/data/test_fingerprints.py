import collections
import hashlib
import json
import threading

import pytest

from euroflax import verbs
from euroflax.data import fingerprints
from euroflax.data.fingerprints import digests
from euroflax.data.prepare import open_prepared, prepare
from euroflax.data.store import NotPrepared
from euroflax.experiment import ExperimentError, Interrupted
from tests.data.test_prepare import own


def test_only_prepare_reads_files_through(tmp_path, monkeypatch):
    declared, folders = own(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_digest", None)
        with pytest.raises(NotPrepared, match="source a is not prepared"):
            open_prepared(declared, folders)
        assert verbs.check(declared, folders)["stages"][0]["sources"][0]["size"] == "unknown"
        assert verbs.plan(declared, folders).ledger is None
    prepare(declared, folders)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_digest", None)
        open_prepared(declared, folders)
        prepare(declared, folders)
        assert verbs.check(declared, folders)["stages"][0]["sources"][0]["size"] == "measured"
        with open(tmp_path / "a.jsonl", "a") as file:
            file.write(json.dumps({"id": "new", "text": "more"}) + "\n")
        with pytest.raises(NotPrepared):
            open_prepared(declared, folders)


def test_what_was_prepared_is_found_where_the_text_is_not(tmp_path):
    declared, folders = own(tmp_path)
    prepare(declared, folders)
    (tmp_path / "a.jsonl").unlink()
    assert len(digests(declared, folders, None)["a.jsonl"]) == 1 and open_prepared(declared, folders).train
    (tmp_path / "other").mkdir()
    declared, folders = own(tmp_path / "other")
    (tmp_path / "other" / "a.jsonl").unlink()
    with pytest.raises(NotPrepared):
        digests(declared, folders, None)
    with pytest.raises(ExperimentError, match="names no file"):
        digests(declared, folders, lambda *_: None)


def test_a_long_file_is_a_sign_of_life_and_can_be_stopped_midway(tmp_path, monkeypatch):
    declared, folders = own(tmp_path)
    told = []

    def endless(file, parts, ended):
        while not ended.wait(0.01):
            parts.append(None)
        return "half"

    def progress(*given):
        told.append(given)
        if len(told) == 3:
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "_digest", endless)
        with pytest.raises(Interrupted):
            digests(declared, folders, progress)
    assert told == [("fingerprint a", 0, 1)] * 3
    with pytest.raises(NotPrepared):
        digests(declared, folders, None)


def test_a_file_that_is_read_tells_of_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "_PART_BYTES", 1000)
    content = bytes(range(250)) * 10
    (tmp_path / "a").write_bytes(content)
    parts, ended = collections.deque(), threading.Event()
    assert fingerprints._digest(tmp_path / "a", parts, ended) == hashlib.sha256(content).hexdigest()
    assert len(parts) == 3
    ended.set()
    assert fingerprints._digest(tmp_path / "a", parts, ended) == hashlib.sha256().hexdigest() and len(parts) == 3
