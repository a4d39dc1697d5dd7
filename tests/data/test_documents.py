import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from euroflax.data.documents import BadLine, Document, find_files, is_held_out, parse, read_raw
from euroflax.experiment import ExperimentError, Source

RECORDS = [{"id": f"d{i}", "text": f"γράμμα {i}", "meta": {"by": "me"}} for i in range(3000)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def source(path, **changes):
    known = {"name": "s", "language": "el", "licence": "x", "provider": "y", "origin": "user", "opt_out": "unknown"}
    return Source(**(known | {"path": str(path)} | changes))


def write(folder, name):
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES))
    elif name.endswith(".zst"):
        path.write_bytes(pa.compress(LINES[:50], "zstd", asbytes=True) + pa.compress(LINES[50:], "zstd", asbytes=True))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        path.write_bytes(LINES)
    return path


def read(path, declared):
    return [item for batch in read_raw(path, declared) for item in parse(batch, declared)]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_documents(tmp_path, ending):
    path = write(tmp_path, f"a.{ending}")
    found = read(path, source(path, provider_field="meta.by"))
    assert found == [Document(record["id"], record["text"], "me", None) for record in RECORDS]


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_cut_short_is_an_error_and_never_a_shorter_file(tmp_path, ending):
    path = write(tmp_path, f"a.{ending}")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ExperimentError, match="cannot be read to its end"):
        read(path, source(path))


def test_lines_without_a_document_are_named_with_number_and_reason(tmp_path):
    lines = [
        b'{"id": "1", "text": "good"}',
        b"{not json",
        b'{"id": "2"}',
        b'{"id": "3", "text": 5}',
        b'{"id": "4", "text": ""}',
        b'{"text": "no id"}',
        b'["a list"]',
        b'{"id": "5", "text": "\xff\xfe"}',
        b"",
        b'{"id": "6", "text": "\\ud800"}',
        b'{"id": 7, "text": "whole numbers are ids too"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = read(path, source(path))
    assert [(item.line, item.reason) for item in found if isinstance(item, BadLine)] == [
        (2, "not JSON"),
        (3, "no field text"),
        (4, "field text is not a text"),
        (5, "field text is empty"),
        (6, "no field id"),
        (7, "not a JSON object"),
        (8, "not UTF-8"),
        (10, "lone surrogates"),
    ]
    assert [item.id for item in found if isinstance(item, Document)] == ["1", "7"]


def test_without_an_id_field_documents_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [item.id for item in read(path, source(path, id_field=None))] == ["a.jsonl:1", "a.jsonl:3"]


def test_folders_and_patterns_are_read_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name)
    (tmp_path / "notes.txt").touch()
    assert [f.name for f in find_files(source("."), tmp_path)] == ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    assert [f.name for f in find_files(source("*.jsonl*"), tmp_path)] == ["a.jsonl.gz", "b.jsonl"]
    with pytest.raises(ExperimentError, match=r"names notes\.txt, which is not read"):
        find_files(source("notes.txt"), tmp_path)
    with pytest.raises(ExperimentError, match=r"names no file at .*; mend the path or --data-root"):
        find_files(source("missing.jsonl"), tmp_path)


def test_the_held_out_share_is_decided_by_the_id_alone():
    held = [is_held_out(Document(str(i), "text"), 0.1) for i in range(10_000)]
    assert 900 < sum(held) < 1100
    assert held == [is_held_out(Document(str(i), "other text"), 0.1) for i in range(10_000)]
    assert not any(is_held_out(Document(str(i), "t"), 0.0) for i in range(100))
