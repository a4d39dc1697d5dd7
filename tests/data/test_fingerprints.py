import json

import pytest

from euroflax import verbs
from euroflax.data import fingerprints
from euroflax.data.fingerprints import digests
from euroflax.data.prepare import open_prepared, prepare
from euroflax.data.store import NotPrepared
from euroflax.experiment import ExperimentError
from tests.data.test_prepare import own


def test_only_prepare_reads_files_through(tmp_path, monkeypatch):
    declared, folders = own(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints.hashlib, "file_digest", None)
        with pytest.raises(NotPrepared, match="source a is not prepared"):
            open_prepared(declared, folders)
        assert verbs.check(declared, folders)["stages"][0]["sources"][0]["size"] == "unknown"
        assert verbs.plan(declared, folders).ledger is None
    prepare(declared, folders)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints.hashlib, "file_digest", None)
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
