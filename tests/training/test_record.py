import contextlib
import dataclasses
import errno
import json
import shutil

import pytest

from euroflax import report
from euroflax.data.loader import Rows
from euroflax.data.prepare import prepare
from euroflax.experiment import ExperimentError, Stage, to_json
from euroflax.folders import Folders
from euroflax.training.record import Record, differences, read_metrics
from tests.conftest import small


@pytest.fixture(scope="module", autouse=True)
def _prepared(cache):
    opened.prepared = prepare(small(), Folders(cache_dir=cache))
    opened.order = Rows(small(), opened.prepared).order


def line(step, loss, **more):
    names = ("sequences", "tokens", "grad_norm", "learning_rate", "step_seconds", "tokens_per_second")
    return {"step": step, "loss": loss, **dict.fromkeys(names, 1), "loss_by_language": {}, **more}


@contextlib.contextmanager
def opened(path, declared=None, prepared=None):
    with contextlib.closing(Record(path, declared or small(), writes=True)) as record:
        record.begin({"devices": 1}, prepared or opened.prepared, opened.order, 0)
        yield record


def test_metrics_are_cut_back_to_a_step_and_lose_a_torn_line(tmp_path):
    with opened(tmp_path) as record:
        cut_back(tmp_path, record)


def cut_back(tmp_path, record):
    record.append([{"step": 0, "eval": {"bits_per_byte.mean": 1.0}}])
    record.append(line(step, 1 / 3) for step in (1, 2, 3))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]
    record.cut_back(2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    assert read_metrics(tmp_path)[1]["loss"] == 1 / 3
    assert record.evaluated(0) and not record.evaluated(2)


def test_lines_that_a_full_disk_refuses_are_held_back_and_written_once(tmp_path, monkeypatch):
    with opened(tmp_path) as record:
        record.append([line(1, 1.0)])
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            record.append([line(2, 2.0)])
            assert record.holds_back and [line["step"] for line in read_metrics(tmp_path)] == [1]
            with pytest.raises(OSError, match="full"):
                record.flush()
        record.append([line(3, 3.0)])
        assert not record.holds_back and [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
            with pytest.raises(OSError, match="broken"):
                record.append([line(4, 4.0)])


def test_a_tokenizer_that_was_not_copied_whole_is_copied_again(tmp_path):
    file = tmp_path / "tokenizer" / "tokenizer.json"
    with opened(tmp_path):
        whole = file.read_bytes()
    file.write_bytes(b"")
    with opened(tmp_path):
        assert file.read_bytes() == whole


@pytest.mark.parametrize("content", ["{}", '{"a": 1}', '{"sessions": 3}'])
def test_a_manifest_that_is_no_record_is_refused_with_a_way_on(tmp_path, content):
    with opened(tmp_path):
        pass
    (tmp_path / "manifest.json").write_text(content)
    said = "is not the record of a run .*; restore it, or move it away"
    with pytest.raises(ExperimentError, match=said), opened(tmp_path):
        pass
    (tmp_path / "manifest.json").unlink()
    with opened(tmp_path) as record:
        told = {"number": 4, "steps": 2, "flops": 1, "seconds": {"step": 1.0}}
        record.append([{"step": 1, "loss": 1.0, "session": told}, {"step": 3, "loss": 1.0, "session": told}])
        assert record.cut_back(3, begins=True) == {} and record.missing_steps == 1
        assert record.manifest["sessions"][0]["number"] == 5


def test_what_is_not_finite_is_null(tmp_path):
    with opened(tmp_path) as record:
        record.append([line(1, float("nan"), loss_by_language={"en": float("inf")}, mfu=None)])
    (found,) = read_metrics(tmp_path)
    assert (found["loss"], found["loss_by_language"], found["mfu"]) == (None, {"en": None}, None)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_second_start_on_a_folder_is_refused_and_a_dead_ones_lock_is_not(tmp_path):
    with (
        opened(tmp_path),
        pytest.raises(ExperimentError, match="is in use by another process"),
        opened(tmp_path),
    ):
        pass
    assert (tmp_path / "lock").exists()
    with opened(tmp_path) as second:
        assert len(second.manifest["sessions"]) == 2


def with_list(path):
    return tuple(dataclasses.replace(source, block_list=path) for source in small().data.sources)


def staged(**changes):
    return (Stage(**({"from_tokens": 1024, "sequence_length": 128, "batch_tokens": 512} | changes)),)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"mesh__fsdp": 2}, None),
        ({"training__batch_tokens": 1024}, None),
        ({"training__accumulation_steps": 2}, None),
        ({"checkpoint__every_steps": 9}, None),
        ({"evaluation__every_steps": 9}, None),
        ({"training__tokens": 10**6}, None),
        ({"data__sources": with_list("ids.txt")}, None),
        ({"stages": staged(batch_tokens=1024)}, None),
        ({"stages": staged(sequence_length=32)}, "stages[0].sequence_length=32 differs from 128"),
        ({"training__tokens": 2048}, "training.tokens=2048 differs from 3072"),
        ({"model__num_layers": 3}, "model.num_layers=3 differs from 2"),
        ({"training__seed": 1}, "training.seed=1 differs from 0"),
        ({"training__schedule__peak_learning_rate": 1.0}, "training.schedule.peak_learning_rate=1.0 differs"),
        ({"data__sequence_length": 32}, "data.sequence_length=32 differs from 64"),
        ({"languages": ("el", "en")}, "data.sources[2].id_field=nothing differs from id"),
    ],
)
def test_only_mesh_batch_checkpoint_evaluation_and_more_tokens_may_differ(tmp_path, changes, refused):
    earlier = small(stages=staged()) if "stages" in changes else small()
    found = differences(to_json(earlier), to_json(small(**changes)), tmp_path)
    assert (found == []) if refused is None else any(refused in fault for fault in found), found


def test_a_run_folder_of_another_experiment_is_refused(tmp_path):
    with opened(tmp_path):
        pass
    with pytest.raises(ExperimentError, match=r"model.num_layers=3 differs from 2, with which run folder .* began"):
        Record(tmp_path, small(model__num_layers=3), writes=False)


def test_data_that_changed_since_the_run_began_is_refused(tmp_path):
    train = [
        (s, dataclasses.replace(store, path=tmp_path / "x") if s.language == "en" else store)
        for s, store in opened.prepared.train
    ]
    changed = dataclasses.replace(opened.prepared, train=tuple(train))
    with opened(tmp_path):
        pass
    with (
        pytest.raises(ExperimentError, match="sample-en changed since the run began"),
        opened(tmp_path, prepared=changed),
    ):
        pass


@pytest.mark.parametrize("name", ["experiment.json", "manifest.json"])
def test_a_harmed_record_is_the_users_to_restore(tmp_path, name):
    (tmp_path / name).write_text('{"sess')
    with pytest.raises(ExperimentError, match=f"{name} is not a JSON object; restore it"):
        Record(tmp_path, small(), writes=False)


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExperimentError, match=r"run folder=.* cannot be written \(Not a directory\)"):
        Record(tmp_path / "file" / "run", small(), writes=True)


def test_the_manifest_says_with_what_and_from_when(tmp_path):
    with opened(tmp_path):
        pass
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["versions"]["jax"] and manifest["versions"]["euroflax"]
    session = manifest["sessions"][0]
    assert {"from", "to", "steps", "flops", "energy_joules", "devices"} <= session.keys()
    assert json.loads((tmp_path / "experiment.json").read_text()) == to_json(small())


def test_the_manifest_says_where_the_text_is_from_and_what_the_tokenizer_costs(tmp_path):
    with opened(tmp_path) as record:
        manifest = record.manifest
    names = [(source["name"], source["split"]) for source in manifest["sources"]]
    assert ("sample-mt", "train") in names and ("sample-mt", "all") in names
    assert manifest["sources"][0]["licence"] == "CC0-1.0" and manifest["sources"][0]["bytes"] > 1000
    english = manifest["tokenizer"]["en"]
    assert english["tokens_vs_english"] == 1 < manifest["tokenizer"]["mt"]["tokens_vs_english"]
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def changes(value, path=""):
    """A JSON value with each part in turn replaced by another type, or taken out."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}.{key} gone", {name: part for name, part in value.items() if name != key}
            for name, changed in changes(item, f"{path}.{key}"):
                yield name, value | {key: changed}
    elif isinstance(value, list) and value:
        yield f"{path}[] added", [*value, "x"]
        for name, changed in changes(value[0], f"{path}[0]"):
            yield name, [changed, *value[1:]]
    for other in ("x", 7, [], {}, None):
        if type(other) is not type(value):
            yield f"{path}={other!r}", other


@pytest.mark.slow
def test_a_manifest_spoilt_anywhere_is_refused_or_reported(trained, tmp_path):
    _, _, run = trained
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    manifest = json.loads((run.path / "manifest.json").read_bytes())
    for name in ("sources", "sessions"):
        manifest[name] = manifest[name][:1]
    manifest["ledger"]["entries"] = manifest["ledger"]["entries"][:1]
    outcomes, broken = {"written": 0, "refused": 0}, []
    for what, changed in changes(manifest):
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(changed))
        try:
            report.write(tmp_path / "run")
            outcomes["written"] += 1
        except ExperimentError:
            outcomes["refused"] += 1
        except Exception as error:
            broken.append(f"{what}: {error!r}")
    assert broken == []
    assert min(outcomes.values()) > 50


@pytest.mark.slow
def test_metrics_and_samples_spoilt_anywhere_are_left_out_of_the_report(trained, tmp_path):
    _, _, run = trained
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    lines = [json.loads(text) for text in (run.path / "metrics.jsonl").read_text().splitlines()]
    kinds = [next(one for one in lines if key in one) for key in ("loss", "eval")]
    for one in kinds:
        for what, changed in changes(one):
            (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines[:3], changed, ""])))
            try:
                report.write(tmp_path / "run")
            except Exception as error:
                pytest.fail(f"{what}: {error!r}")
    (tmp_path / "run" / "metrics.jsonl").write_bytes((run.path / "metrics.jsonl").read_bytes())
    for what, changed in changes(json.loads((run.path / "samples.json").read_bytes())):
        (tmp_path / "run" / "samples.json").write_text(json.dumps(changed))
        try:
            report.write(tmp_path / "run")
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
