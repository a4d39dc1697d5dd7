"""Every reader of outside input, given anything: the result is a value, or an error of the contract, soon.

In CI for a short time; longer with `python -m pytest -m hostile --hypothesis-profile=long`.
"""

import contextlib
import copy
import io
import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from euroflax import comparison, report, run
from euroflax.checkpoint import listed_steps, verify
from euroflax.data import documents, tokenizer
from euroflax.data.documents import BadLine, Document
from euroflax.data.files import find_files, not_read
from euroflax.data.withdrawals import read_history, read_lists
from euroflax.ending import printable
from euroflax.experiment import (
    ExperimentError,
    Interrupted,
    RunFailed,
    Source,
    from_json,
    load,
    override,
    to_json,
    validate,
)
from euroflax.folders import Folders
from euroflax.huggingface import Folder
from euroflax.planning import parse_target
from euroflax.training.record import read_manifest, read_metrics, read_samples
from euroflax.training.stop import time_limit
from tests.conftest import TINY, small

pytestmark = pytest.mark.hostile

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**18, 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "\0", "\ud800", "../x", "[/b]", "\x1b[2J", "cpu:²", "٤٢", "a\nb"]),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
DEEP = b"[" * 100_000


@contextlib.contextmanager
def of_the_contract():
    """Inside it nothing is raised but the errors of the contract, whose lines a terminal can show."""
    try:
        yield
    except (ExperimentError, Interrupted, RunFailed) as error:
        assert str(error).strip()


def paths_of(value, path=()):
    """The path of each part of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(item, (*path, key))


def replaced(value, path, other):
    """A JSON value with one part replaced."""
    if not path:
        return other
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], other)
    return changed


EXPERIMENT = to_json(small(languages=("en",)))
PATHS = [path for path in paths_of(EXPERIMENT) if path]
FIELDS = [".".join(path) for path in PATHS if all(isinstance(part, str) for part in path)]


NUMBERS = st.sampled_from([10**400, -(10**400), 2**63, 10**18, 0, -1, math.inf, math.nan, True])


@given(st.sampled_from(PATHS), NUMBERS | JSON)
def test_an_experiment_out_of_json(path, value):
    with of_the_contract():
        assert all(isinstance(fault, str) for fault in validate(from_json(replaced(EXPERIMENT, path, value))))


@given(st.sampled_from(FIELDS) | st.text(max_size=20), st.text(max_size=20) | JSON.map(lambda v: json.dumps(v)[:2000]))
def test_set(field, text):
    with of_the_contract():
        validate(override(small(languages=("en",)), {field: text}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the examples of a test share."""
    return tmp_path_factory.mktemp("hostile")


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_an_experiment_file(folder, content):
    (folder / "x.py").write_bytes(content)
    with of_the_contract(), contextlib.redirect_stderr(io.StringIO()):
        load(folder / "x.py")


FLAGS = ["--devices", "--on", "--row", "--position", "--rows", "--time-limit", "--hang-minutes", "--prompt", "--seed"]


@given(
    st.sampled_from([*run.VERBS, "nothing"]),
    st.lists(st.tuples(st.sampled_from([*FLAGS, "--json", "--ledger", "--set"]), st.text(max_size=12)), max_size=3),
)
def test_flags(verb, pairs):
    parser = run._parser()
    with of_the_contract():
        options = parser.parse_intermixed_args([str(TINY), verb, *(part for pair in pairs for part in pair)])
        run._check_flags(options)


@given(st.text(max_size=20) | st.from_regex(r"(v5p|h100|tpu7x)?:?[0-9x²٤]{0,12}", fullmatch=True))
def test_names_of_targets_and_times(text):
    for reader in (parse_target, time_limit):
        with of_the_contract():
            reader(text)


SOURCE = Source(
    name="s", language="en", path="x", licence="x", provider="y", origin="user", opt_out="unknown", provider_field="by"
)
LINE = st.one_of(
    st.binary(max_size=80),
    JSON.map(lambda value: json.dumps(value, ensure_ascii=True).encode() if finite(value) else b"NaN"),
    st.fixed_dictionaries({"text": JSON, "id": JSON, "by": JSON}).map(
        lambda value: json.dumps(value).encode() if finite(value) else b"{}"
    ),
    st.just(DEEP),
    st.just(b'{"id": ' + b"9" * 5000 + b', "text": "a"}'),
)


def finite(value):
    """Whether Python writes a value out: it refuses whole numbers of more than 4,300 digits."""
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not (isinstance(value, int) and abs(value) > 10**300) and not (
        isinstance(value, float) and math.isnan(value)
    )


@given(lines=st.lists(LINE, max_size=6), bom=st.booleans(), ending=st.sampled_from([b"\n", b"\r\n"]))
def test_data_lines(folder, lines, bom, ending):
    path = folder / "lines.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + ending.join(lines))
    found = [item for batch in documents.read_raw(path, SOURCE, 1000) for item in documents.parse(batch, SOURCE, 1000)]
    for item in found:
        if isinstance(item, Document):
            assert len((item.text + item.id + (item.provider or "")).encode()) >= 1 and len(item.text.encode()) <= 1000
        else:
            assert isinstance(item, BadLine) and item.reason and json.dumps(item.content)


@given(st.binary(max_size=200), st.sampled_from(["jsonl.gz", "jsonl.zst", "parquet"]))
def test_files_of_other_formats(folder, content, ending):
    path = folder / f"other.{ending}"
    path.write_bytes(content)
    with of_the_contract():
        for batch in documents.read_raw(path, SOURCE, 1000):
            list(documents.parse(batch, SOURCE, 1000))


COLUMNS = st.sampled_from(
    [pa.string(), pa.large_string(), pa.binary(), pa.int64(), pa.float32(), pa.timestamp("ns"), pa.list_(pa.string())]
)


@given(COLUMNS, COLUMNS, st.booleans())
def test_parquet_columns_of_any_type(folder, text, identifier, has_id):
    table = pa.table({"text": pa.nulls(3, text)} | ({"id": pa.nulls(3, identifier)} if has_id else {}))
    values = {pa.string(): "a", pa.large_string(): "a", pa.binary(): b"\xff", pa.int64(): 1, pa.float32(): 0.5}
    if text in values:
        table = table.set_column(0, "text", pa.array([values[text], None, values[text]], text))
    pq.write_table(table, folder / "columns.parquet")
    path = folder / "columns.parquet"
    found = [item for batch in documents.read_raw(path, SOURCE, 1000) for item in documents.parse(batch, SOURCE, 1000)]
    assert len(found) == 3
    with of_the_contract():
        documents.first_fault(path, SOURCE, 1000)


@given(st.text(max_size=30).filter(lambda text: "/proc" not in text and not text.startswith("/")))
def test_paths_of_sources(folder, path):
    source = Source(**(vars(SOURCE) | {"path": path or "x"}))
    with of_the_contract():
        find_files(source, folder)
        not_read(source, folder)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """A copy of a finished run with its export, of which the examples spoil files."""
    from euroflax import verbs

    declared, folders, done = trained
    hf = verbs.export(declared, folders)
    root = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(done.path, root / "run")
    return declared, root / "run", hf


def spoil(content, at, part):
    """Bytes with some of them replaced."""
    at %= len(content) + 1
    return content[:at] + part + content[at + len(part) :]


TOKENIZER = st.sampled_from(["tokenizer.json", "tokenizer_config.json"])


@given(name=TOKENIZER, at=st.integers(0, 10**6), part=st.binary(min_size=1, max_size=8), deep=st.booleans())
def test_a_tokenizer(folder, whole, name, at, part, deep):
    target = folder / "t"
    target.mkdir(exist_ok=True)
    source = whole[1] / "tokenizer" / "tokenizer.json"
    contents = {"tokenizer.json": source.read_bytes(), "tokenizer_config.json": b'{"eos_token": "<|end_of_text|>"}'}
    contents[name] = DEEP if deep and at % 5 == 0 else spoil(contents[name], at, part)
    for file, content in contents.items():
        (target / file).write_bytes(content)
    with of_the_contract():
        tokenizer.read(target / "tokenizer.json")


CONFIG = ["architectures", "hidden_size", "num_attention_heads", "rope_parameters", "rope_scaling", "vocab_size", "x"]


@given(key=st.sampled_from(CONFIG), value=JSON)
def test_the_configuration_of_a_hugging_face_folder(folder, whole, key, value):
    declared, _, hf = whole
    target = folder / "hf"
    target.mkdir(exist_ok=True)
    shutil.copyfile(hf / "model.safetensors", target / "model.safetensors")
    config = json.loads((hf / "config.json").read_bytes()) | {key: value}
    if not finite(config):
        return
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    with of_the_contract():
        Folder.open(target).faults(declared.model)


@given(at=st.integers(0, 5000), part=st.binary(min_size=1, max_size=8))
def test_the_weights_of_a_hugging_face_folder(folder, whole, at, part):
    declared, _, hf = whole
    target = folder / "weights"
    target.mkdir(exist_ok=True)
    shutil.copyfile(hf / "config.json", target / "config.json")
    (target / "model.safetensors").write_bytes(spoil((hf / "model.safetensors").read_bytes(), at, part))
    with of_the_contract():
        Folder.open(target).faults(declared.model)


RECORD = ["manifest.json", "metrics.jsonl", "samples.json", "experiment.json", "withdrawn.json"]


@given(name=st.sampled_from(RECORD), at=st.integers(0, 10**6), part=st.binary(min_size=1, max_size=8))
def test_a_run_folder(whole, name, at, part):
    _, path, _ = whole
    before = (path / name).read_bytes() if (path / name).exists() else b"[]"
    try:
        (path / name).write_bytes(DEEP if at % 7 == 0 else spoil(before, at, part))
        for reader in (read_manifest, read_metrics, read_samples, read_history, report.write):
            with of_the_contract():
                reader(path)
        with of_the_contract():
            comparison.write(path, [])
    finally:
        (path / name).write_bytes(before)


@given(name=st.text(max_size=6), content=st.binary(max_size=30))
def test_a_folder_of_checkpoints(folder, name, content):
    target = folder / "checkpoints"
    for part in ("manifests", "3"):
        (target / part).mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, ValueError):
        (target / name).mkdir(exist_ok=True)
    (target / "manifests" / "3.json").write_bytes(content)
    assert all(isinstance(step, int) for step in listed_steps(target))
    assert verify(target, 3) is not None


@given(content=st.binary(max_size=60))
def test_a_block_list(folder, content):
    (folder / "list").write_bytes(content)
    declared = override(small(languages=("en",)), {})
    source = to_json(declared)["data"]["sources"][0] | {"block_list": "list"}
    with of_the_contract():
        read_lists(override(declared, {"data.sources": [source]}), Folders(data_root=folder))


@given(st.text())
def test_what_a_terminal_shows_is_printable(text):
    assert (
        printable(text).isprintable() and printable(text, lines=True).replace("\n", "").replace("\t", "").isprintable()
    )
