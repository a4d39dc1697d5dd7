import errno
import io
import json
import os
import re
import signal
import time

import pytest
from rich.console import Console

from euroflax import run as command
from euroflax import tables
from euroflax.console import ConsoleDisplay
from euroflax.data.ledger import Entry
from euroflax.run import main
from tests.conftest import ROOT, TINY, run, small, start, write_experiment


def options(tmp_path, cache=None):
    return ("--runs-dir", tmp_path / "runs", "--cache-dir", cache or tmp_path / "cache", "--data-root", tmp_path)


def rejected(capsys, *arguments):
    """The error lines of a command that must end with status 2, before JAX is even loaded."""
    assert command.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    return err


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.num_layer=3", "model.num_layer is not a field of Model; its nearest are num_layers"),
        ("model.num_layers=two", "model.num_layers=two has the wrong type; give a whole number"),
        ("model.num_kv_heads=3", "model.num_kv_heads=3 does not divide model.num_heads=4; use one of"),
        (
            'data.mixture.weights={"sample-bg": 0.9}',
            "data.mixture.weights sum to 0.9, not 1; divide each by 0.9: rescaled",
        ),
        ("model.num_layers", "--set model.num_layers has no value; write --set FIELD=VALUE"),
    ],
)
def test_a_wrong_value_is_one_line_and_status_2(capsys, assignment, message):
    assert message in rejected(capsys, TINY, "--set", assignment)


@pytest.mark.parametrize(
    ("text", "message"),
    [("experiment = (", "x.py:1 does not run"), ("x = 1\n", "declares no Experiment"), (None, "cannot be read")],
)
def test_a_file_that_is_no_experiment_is_one_line_and_status_2(capsys, tmp_path, text, message):
    path = tmp_path / "x.py"
    if text is not None:
        path.write_text(text)
    assert message in rejected(capsys, path)


def test_json_is_refused_where_there_is_none(capsys):
    assert "--json is not for train" in rejected(capsys, TINY, "train", "--json")


def test_a_command_that_cannot_be_parsed_is_one_line(capsys):
    assert "invalid choice: 'plna'" in rejected(capsys, TINY, "plna")
    assert "unrecognized arguments: --sett" in rejected(capsys, TINY, "--sett")


def test_debug_shows_the_traceback(capsys):
    assert command.main([str(TINY), "--debug", "--set", "model.num_layers=x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_names_every_verb_and_exit_status(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("train", "check", "plan", "prepare", "evaluate", "75"))


BAD_DATA = {
    "missing": (None, r"error: source sample-el: path=a.jsonl names no file at .*; correct the path or --data-root\n"),
    "empty": ("", r"error: source sample-el: path=a.jsonl holds no document: it is empty; give it text\n"),
    "not JSON": (
        '{"id": "1"\n' * 3,
        r"error: source sample-el: path=a.jsonl holds no document: its 3 lines hold none \(not JSON: 3\); give ",
    ),
    "no text": ('{"id": "1"}\n', r"\(no field text: 1\)"),
    "not UTF-8": (b'{"id": "1", "text": "\xff"}\n', r"\(not UTF-8: 1\)"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_one_line_and_status_2(tmp_path, kind):
    content, message = BAD_DATA[kind]
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    declared = small(data__tokenizer__path=None)
    import dataclasses

    changed = (dataclasses.replace(declared.data.sources[0], path="a.jsonl"), *declared.data.sources[1:])
    declared = dataclasses.replace(declared, data=dataclasses.replace(declared.data, sources=changed))
    done = run(write_experiment(tmp_path / "x.py", declared), "prepare", *options(tmp_path))
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_vocabulary_that_cannot_be_filled_is_one_line_and_status_2(tmp_path):
    done = run(TINY, "prepare", *options(tmp_path), "--set", "model.vocab_size=90000")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: model.vocab_size=90000 is more than the \d+ tokens that the sample can fill; .*\n", done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "cpu:8", "--set", "mesh.data=16"), "does not make up 8 devices; use mesh.data=8"),
        (("--devices", "cpu:8", "--set", "mesh.fsdp=3"), "model.embed_dim=128 does not divide over mesh.fsdp=3"),
        (("--process-count", "2"), "--process-count=2 has no --coordinator; give HOST:PORT of process 0"),
        (
            ("--coordinator", "nonsense", "--process-count", "2"),
            "--coordinator=nonsense is no address; give HOST:PORT of process 0",
        ),
        (("--process-id", "2"), "--process-id=2 is no process of --process-count=1; number processes from 0 to 0"),
        (("--devices", "tpu:8"), "--devices=tpu:8 cannot be simulated; use cpu or cpu:N"),
    ],
)
def test_devices_that_do_not_fit_are_one_line_and_status_2(tmp_path, arguments, message):
    done = run(TINY, *options(tmp_path), *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.startswith("error: ")


def test_a_run_folder_that_cannot_be_written_is_found_before_preparation(tmp_path):
    (tmp_path / "runs").touch()
    done = run(TINY, *options(tmp_path))
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert not (tmp_path / "cache" / "stores").exists()


def test_check_plan_and_prepare_speak_json_or_lines(tmp_path):
    checked = run(TINY, "check", "--json", *options(tmp_path))
    assert checked.returncode == 0 and len(json.loads(checked.stdout)["sources"]) == 48
    planned = run(ROOT / "experiments/7b_eu24.py", "plan", "--json", *options(tmp_path))
    plan = json.loads(planned.stdout)
    assert planned.returncode == 0 and plan["devices"] == 64 and plan["method"] == "analytical"
    lines = run(TINY, "plan", "--devices", "cpu:4", *options(tmp_path)).stdout
    assert "parameters" in lines and "devices     4 devices (data 4), an analytical plan" in lines
    missing = run(ROOT / "experiments/7b_eu24.py", "check", *options(tmp_path))
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 24


def test_interrupting_saves_and_the_same_command_goes_on_to_the_end(tmp_path):
    path = write_experiment(tmp_path / "x.py", small(training__tokens=80 * 512, evaluation__every_steps=50))
    given = ("--devices", "cpu:2", *options(tmp_path / "b", tmp_path / "cache"))
    metrics = tmp_path / "b" / "runs" / "x" / "metrics.jsonl"
    process = start(path, *given)
    while process.poll() is None and not (metrics.exists() and len(metrics.read_bytes()) > 2000):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, (out, err)
    said = r"stopped by SIGTERM after step \d+, which is saved; the same command goes on from there\n"
    assert re.fullmatch(said, err)
    done = run(path, *given)
    assert done.returncode == 0 and "goes on after step" in done.stdout and done.stderr == ""
    assert list((tmp_path / "cache" / "compiled").iterdir())
    spoken = run(path, "evaluate", "--json", *given)
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert json.loads(spoken.stdout) == {"step": 80} | last["eval"]
    other = run(path, "--set", "training.seed=3", *options(tmp_path / "b", tmp_path / "cache"))
    assert other.returncode == 2 and other.stderr.startswith("error: training.seed=3 differs from 0, with which run")
    again = run(path, *given)
    assert again.returncode == 0 and "run x is complete: 80 steps" in again.stdout


def test_a_model_larger_than_the_memory_is_refused_with_the_figures(tmp_path, cache):
    declared = small(model__embed_dim=2**18, model__mlp_dim=2**18)
    path = write_experiment(tmp_path / "large.py", declared)
    done = run(path, "--devices", "cpu:8", "--cache-dir", cache, "--runs-dir", tmp_path / "runs")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: model of [\d,]+ parameters: parameters, optimizer and gradients take .*iB on each of 8 devices, "
        r"which have .*iB; use more .*, or --try-memory to begin all the same\n",
        done.stderr,
    )


def test_out_of_memory_is_status_1(monkeypatch, capsys, tmp_path):
    import jax

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("euroflax.run._dispatch", fail)
    assert main([str(TINY)]) == 1
    assert capsys.readouterr().err.startswith("error: out of memory (RESOURCE_EXHAUSTED: Out of memory")


@pytest.mark.parametrize(
    ("number", "status", "fix"),
    [
        (errno.EMFILE, 75, "raise the limit of open files (ulimit -n)"),
        (errno.ENOSPC, 75, "make room"),
        (errno.EROFS, 75, "have it mounted for writing"),
        (errno.EACCES, 1, "give yourself the right to it"),
        (errno.ENAMETOOLONG, 2, "use a shorter name"),
        (errno.ENOMEM, 1, "give the command more memory"),
        (errno.ENOLCK, 75, "see to the locks"),
        (errno.ENOSYS, 1, "the file system cannot do that"),
    ],
)
def test_an_error_of_the_system_names_path_and_fix_and_has_its_status(monkeypatch, capsys, number, status, fix):
    def fail(*_):
        raise OSError(number, os.strerror(number), "/some/where")

    monkeypatch.setattr("euroflax.run._dispatch", fail)
    assert main([str(TINY)]) == status
    said = capsys.readouterr().err
    assert said.startswith(f"error: /some/where: {os.strerror(number)}; {fix}") and "delete" not in said


@pytest.mark.parametrize("text", ["²", "0", "1000000", "٤", "-1", "1e3", "08"])
def test_devices_that_cannot_be_simulated_are_refused(capsys, text):
    assert main([str(TINY), "--devices", f"cpu:{text}"]) == 2
    assert "cannot be simulated; use cpu or cpu:N" in capsys.readouterr().err


def test_text_from_outside_is_shown_and_not_obeyed(capsys, tmp_path):
    assert main([str(TINY), "--set", "name=\x1b[31m[red]a\nb"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[31m[red]a" in said and "\x1b" not in said and said.count("\n") == 1
    stream = io.StringIO()
    display = ConsoleDisplay(Console(file=stream, markup=False))
    entry = Entry("s", "en", "[/b][red]\x1b[2J", 1, 1, 1, 1, 1.0, 0)
    for each in tables.ledger([entry], "title"):
        display.table(each)
    display.note("[/b]\x1b]0;x\x07")
    assert "[/b][red]\\x1b[2J" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_an_interrupted_experiment_file_ends_at_once(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import time\nprint('begins', flush=True)\ntime.sleep(60)\n")
    process = start(path)
    assert process.stderr.readline() == "begins\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 75 and said.startswith("stopped by SIGTERM")
