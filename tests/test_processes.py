"""Several real processes, joined by jax.distributed, are one run."""

import json
import signal
import socket
import time

import numpy as np
import pytest

from euroflax.experiment import load
from tests.conftest import run, small, start, write_experiment

STEPS = 80


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def job(path, folder, cache, count, devices, *more):
    port = free_port()
    common = ("--runs-dir", folder / "runs", "--cache-dir", cache, "--devices", f"cpu:{devices}", *more)
    return [
        start(path, *common, "--coordinator", f"127.0.0.1:{port}", "--process-id", i, "--process-count", count)
        for i in range(count)
    ]


def ended(processes):
    outputs = [process.communicate(timeout=200) for process in processes]
    return [process.returncode for process in processes], outputs


def metrics(folder):
    return [json.loads(line) for line in (folder / "runs" / "x" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    often = {"checkpoint__every_steps": 20, "evaluation__every_steps": 40}
    declared = small(training__tokens=STEPS * 512, mesh__fsdp=2, mesh__tensor=2, **often)
    path = write_experiment(folder / "x.py", declared)
    done = run(path, "--runs-dir", folder / "runs", "--cache-dir", folder / "cache", "--devices", "cpu:8")
    assert done.returncode == 0, done.stderr
    return path, folder


def assert_agree(found, expected):
    assert [(m["step"], m.get("sequences")) for m in found] == [(m["step"], m.get("sequences")) for m in expected]
    for a, b in zip(found, expected, strict=True):
        if "loss" in a:
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
            assert a["loss_by_language"].keys() == b["loss_by_language"].keys()
        else:
            np.testing.assert_allclose(list(a["eval"].values()), list(b["eval"].values()), rtol=1e-4)


def test_two_processes_give_the_losses_of_one_and_one_goes_on_where_two_stopped(alone, tmp_path):
    path, folder = alone
    codes, outputs = ended(job(path, tmp_path, folder / "cache", 2, 4))
    assert codes == [0, 0], outputs
    assert [err for _, err in outputs] == ["", ""], outputs
    ours = [line for line in outputs[0][0].splitlines() if line.startswith(("tokenizer ", "  parameters ", "step "))]
    assert ours and not any(line in outputs[1][0] for line in ours), outputs  # Gloo's threads print in both
    assert_agree(metrics(tmp_path), metrics(folder))
    session = json.loads((tmp_path / "runs" / "x" / "manifest.json").read_text())["sessions"]
    assert len(session) == 1 and session[0]["processes"] == 2


def test_a_signal_to_one_process_stops_all_at_one_step_and_another_number_goes_on(alone, tmp_path):
    path, folder = alone
    processes = job(path, tmp_path, folder / "cache", 2, 4)
    file = tmp_path / "runs" / "x" / "metrics.jsonl"
    while all(p.poll() is None for p in processes) and not (file.exists() and file.read_text().count("loss_by") >= 2):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = ended(processes)
    assert codes == [75, 75], outputs
    assert metrics(tmp_path)[-1]["step"] < STEPS
    done = run(path, "--runs-dir", tmp_path / "runs", "--cache-dir", folder / "cache", "--devices", "cpu:8")
    assert done.returncode == 0, done.stderr
    assert_agree(metrics(tmp_path), metrics(folder))


def test_preparation_inside_a_job_is_refused_with_the_command_to_run(alone, tmp_path):
    path, _ = alone
    codes, outputs = ended(job(path, tmp_path, tmp_path / "cache", 2, 4))
    assert codes == [2, 2], outputs
    command = f"python -m euroflax.run {path} prepare --cache-dir {tmp_path / 'cache'} --runs-dir {tmp_path / 'runs'}"
    assert outputs[0][1] == (
        f"error: source sample-el is not prepared, and a job of 2 processes does not prepare; run first: {command}\n"
    )


@pytest.mark.slow
def test_two_processes_begin_from_published_weights_as_one_does(alone, tmp_path):
    path, folder = alone
    common = ("--runs-dir", folder / "runs", "--cache-dir", folder / "cache", "--devices", "cpu:8")
    assert run(path, "export", *common).returncode == 0
    declared = load(path, {"continue_from": "runs/x/hf", "training.tokens": 1024})
    onward = write_experiment(tmp_path / "x.py", declared)
    data = ("--data-root", folder)
    done = run(onward, *data, "--runs-dir", tmp_path / "one" / "runs", *common[2:])
    assert done.returncode == 0, done.stderr
    codes, outputs = ended(job(onward, tmp_path, folder / "cache", 2, 4, *data))
    assert codes == [0, 0], outputs
    assert_agree(metrics(tmp_path), metrics(tmp_path / "one"))
    last = [line["eval"] for line in metrics(folder) if "eval" in line][-1]
    assert metrics(tmp_path)[0]["eval"]["bits_per_byte.mean"] == pytest.approx(last["bits_per_byte.mean"], rel=1e-4)
