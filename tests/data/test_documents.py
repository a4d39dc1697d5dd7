import datetime
import gzip
import hashlib
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from euroflax.data.documents import BadLine, Document, first_fault, is_held_out, parse, read_raw
from euroflax.data.files import find_files, not_read
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


def read(path, declared, most=2**24):
    return [item for batch in read_raw(path, declared, most) for item in parse(batch, declared, most)]


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
    with pytest.raises(ExperimentError, match=r"names no file that is read, but 1 \.txt \(notes\.txt\)"):
        find_files(source("notes.txt"), tmp_path)
    with pytest.raises(ExperimentError, match=r"names no file at .*; correct the path or --data-root"):
        find_files(source("missing.jsonl"), tmp_path)


def test_the_held_out_share_is_decided_by_the_id_alone():
    held = [is_held_out(Document(str(i), "text"), 0.1) for i in range(10_000)]
    assert 900 < sum(held) < 1100
    assert held == [is_held_out(Document(str(i), "other text"), 0.1) for i in range(10_000)]
    assert not any(is_held_out(Document(str(i), "t"), 0.0) for i in range(100))


def test_a_folder_is_read_through_links_without_hidden_files_and_what_is_not_read_is_listed(tmp_path):
    folder, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    for name in ("text/a.jsonl", "text/B.JSONL", "text/.copies/a.jsonl", "elsewhere/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(LINES)
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "notes.txt").touch()
    os.mkfifo(folder / "pipe.jsonl")
    assert [file.name for file in find_files(source("text"), tmp_path)] == ["B.JSONL", "a.jsonl", "c.jsonl"]
    line = not_read(source("text"), tmp_path)
    assert line is not None and "1 .txt, 1 hidden, 1 not regular files" in line and "notes.txt" in line


def test_a_path_that_exists_is_no_pattern(tmp_path):
    for name in ("a[1].jsonl", "a1.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    assert [file.name for file in find_files(source("a[1].jsonl"), tmp_path)] == ["a[1].jsonl"]


@pytest.mark.parametrize("path", ["a\0b", "a/**x/*", "x" * 5000])
def test_a_path_that_cannot_be_looked_up_is_an_error(tmp_path, path):
    with pytest.raises(ExperimentError, match="source s: path="):
        find_files(source(path), tmp_path)


def test_a_line_longer_than_the_bound_is_set_aside_in_little_memory(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    long = b'{"id": "2", "text": "' + b"a" * 300_000_000 + b'"}'
    path.write_bytes(
        pa.compress(b'{"id": "1", "text": "x"}\n' + long + b'\n{"id": "3", "text": "y"}\n', "zstd", asbytes=True)
    )
    del long
    tracemalloc.start()
    found = read(path, source(path), most=10_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [item.id for item in found if isinstance(item, Document)] == ["1", "3"]
    assert [(item.line, item.reason) for item in found if isinstance(item, BadLine)] == [(2, "longer than 10000 bytes")]
    assert peak < 20_000_000


def test_a_text_of_a_parquet_file_longer_than_the_bound_is_set_aside(tmp_path):
    pq.write_table(pa.table({"id": ["1", "2"], "text": ["x" * 101, "x" * 100]}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", source("a.parquet"), most=100)
    assert [getattr(item, "reason", "") for item in found] == ["longer than 100 bytes", ""]


def test_a_byte_order_mark_is_accepted_and_utf16_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"))
    assert len([item for item in read(path, source(path)) if isinstance(item, Document)]) == len(RECORDS)
    path.write_bytes('{"id": "1", "text": "a"}\n'.encode("utf-16"))
    assert read(path, source(path))[0].reason == "UTF-16 and not UTF-8"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": [["a"]], "id": ["1"]}, "field text is not a text"),
        ({"text": ["a"], "id": [datetime.datetime(2026, 1, 1)]}, "field id is not a text or a whole number"),
        ({"text": [b"a"], "id": ["1"]}, "field text is not a text"),
    ],
)
def test_a_column_of_another_type_is_named_as_such(tmp_path, values, reason):
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    assert [item.reason for item in read(tmp_path / "a.parquet", source("a.parquet"))] == [reason]


@pytest.mark.parametrize(
    ("record", "fix"),
    [
        ({"content": "a", "id": 1}, "name the field of the text in text_field"),
        ({"text": "a"}, "name the field of the id in id_field, or set id_field=None"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_first_lines_tell_which_field_to_name(tmp_path, record, fix, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record))
    assert (first_fault(path, source(path), 1000) or "").endswith(fix)


def test_all_bytes_of_a_file_are_hashed_as_they_are_read(tmp_path):
    for ending in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet"):
        path, hashed = write(tmp_path, f"a.{ending}"), hashlib.sha256()
        for _ in read_raw(path, source(path), 2**24, hashed.update):
            pass
        assert hashed.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
