"""Several real processes, joined by jax.distributed, are one run."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from euroflax import processes
from euroflax.experiment import ExperimentError, load
from euroflax.processes import Processes
from tests.conftest import ROOT, run, small, start, write_experiment

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


@pytest.mark.slow
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


def awaited(processes, file, steps):
    """Waits until so many steps are in the metrics of a job that runs."""
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text().count("loss_by") >= steps):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [p.poll() for p in processes]
        time.sleep(0.01)


@pytest.mark.parametrize("dies", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others_with_its_number_and_the_next_start_goes_on(alone, tmp_path, dies):
    path, folder = alone
    started = job(path, tmp_path, folder / "cache", 2, 4)
    awaited(started, tmp_path / "runs" / "x" / "metrics.jsonl", 25)
    started[dies].kill()
    killed = time.monotonic()
    codes, outputs = ended(started)
    assert time.monotonic() - killed < 60
    assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == 75, outputs
    said = outputs[1 - dies][1].strip().splitlines()
    assert said[-1] == f"error: process {dies} died; the same command goes on from the last checkpoint", said
    assert "Traceback" not in outputs[1 - dies][1]
    done = run(path, "--runs-dir", tmp_path / "runs", "--cache-dir", folder / "cache", "--devices", "cpu:8")
    assert done.returncode == 0, done.stderr
    assert "goes on after step 20" in done.stdout
    assert_agree(metrics(tmp_path), metrics(folder))


@pytest.mark.slow
def test_four_processes_stop_and_two_go_on_upon_another_mesh(alone, tmp_path):
    path, folder = alone
    started = job(path, tmp_path, folder / "cache", 4, 2)
    awaited(started, tmp_path / "runs" / "x" / "metrics.jsonl", 5)
    started[2].send_signal(signal.SIGTERM)
    codes, outputs = ended(started)
    assert codes == [75] * 4, outputs
    other = ("--set=mesh.fsdp=1", "--set=mesh.tensor=1", "--set=mesh.sequence=2", "--set=mesh.replica=2")
    codes, outputs = ended(job(path, tmp_path, folder / "cache", 2, 4, *other))
    assert codes == [0, 0], outputs
    assert_agree(metrics(tmp_path), metrics(folder))


def odd_one(alone, folder, *more, root=ROOT):
    """A job of two whose second process has other flags or another package."""
    path, begun = alone
    at = ("--coordinator", f"127.0.0.1:{free_port()}", "--process-count", 2, "--devices", "cpu:4")
    common = ("--runs-dir", folder / "runs", *at)
    first = start(path, *common, "--cache-dir", begun / "cache", "--process-id", 0)
    second = start(path, *common, "--cache-dir", begun / "cache", "--process-id", 1, *more, root=root)
    codes, outputs = ended([first, second])
    assert codes == [2, 2], outputs
    (said,) = {err for _, err in outputs}
    assert said.startswith("error: process 1 on ") and said.count("\n") == 1, said
    return said


def test_a_process_with_another_experiment_is_named_and_all_are_refused(alone, tmp_path):
    said = odd_one(alone, tmp_path, "--set", "training.seed=5")
    assert "has other experiment than process 0; give each process the same experiment file and flags" in said


@pytest.mark.slow
def test_a_process_with_other_data_or_code_is_named_and_all_are_refused(alone, tmp_path):
    said = odd_one(alone, tmp_path, "--cache-dir", tmp_path / "empty")
    assert "has other data than process 0; let each process read the same --cache-dir" in said
    root = tmp_path / "copy"
    shutil.copytree(ROOT / "euroflax", root / "euroflax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(root / "euroflax" / "languages.py", "a") as file:
        file.write("# one line more\n")
    assert "has other code than process 0; install the same euroflax" in odd_one(alone, tmp_path, root=root)


@pytest.mark.slow
def test_slurms_variables_make_a_job(alone, tmp_path):
    path, folder = alone
    common = ("--runs-dir", tmp_path / "runs", "--cache-dir", folder / "cache", "--devices", "cpu:4")
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
    numbers = [slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    started = [start(path, *common, "--set=training.tokens=1024", environment=given) for given in numbers]
    codes, outputs = ended(started)
    assert codes == [0, 0], outputs
    session = json.loads((tmp_path / "runs" / "x" / "manifest.json").read_text())["sessions"][0]
    assert (session["processes"], session["devices"]) == (2, 8)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("nid001", "nid001"),
        ("nid[001-004,007],login1", "nid001"),
        ("a1,a2", "a1"),
        ("jwb[0021,0025]", "jwb0021"),
        ("r[1-3]n[2,4]", "r1n[2,4]"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert processes.first_host(nodes) == first.replace("[2,4]", "2")


SLURM = {
    "SLURM_JOB_ID": "5000", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "n[10-11]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Processes()),
        (SLURM, Processes(coordinator="n10:62344", process_id=5, process_count=8)),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            Processes(coordinator="n10:62344", process_id=5, process_count=8, local_devices=(1,)),
        ),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"},
            Processes(coordinator="n10:62344", process_id=5, process_count=8, local_devices=(2, 3)),
        ),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"},
            Processes(coordinator="n10:62344", process_id=5, process_count=8),
        ),
        ({name: SLURM[name] for name in SLURM if "STEP" not in name}, Processes()),  # a batch script, not a task
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Processes()),
        (
            {"JAX_COORDINATOR_ADDRESS": "x-0.x:99", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"},
            Processes(coordinator="x-0.x:99", process_id=3, process_count=4),
        ),
        ({"JOB_COMPLETION_INDEX": "3"}, Processes()),
    ],
)
def test_the_processes_of_a_job_are_found_in_the_environment(environment, found):
    assert processes.find(Processes(), environment) == found


def test_flags_go_before_a_scheduler():
    given = Processes(coordinator="a:1", process_id=1, process_count=2)
    assert processes.find(given, SLURM) == given


def test_a_variable_that_is_no_number_is_one_line():
    with pytest.raises(ExperimentError, match=r"SLURM_PROCID=x in the environment is no number"):
        processes.find(Processes(), SLURM | {"SLURM_PROCID": "x"})


def test_a_coordinator_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr(processes, "JOIN_SECONDS", 0)
    given = Processes(coordinator=f"127.0.0.1:{free_port()}", process_id=1, process_count=2)
    with pytest.raises(ExperimentError, match=r"--coordinator=127.0.0.1:\d+ cannot be joined .*; check the address"):
        processes.join(given)


def test_a_signal_ends_a_process_that_waits_for_the_others(alone, tmp_path):
    port = free_port()
    first = start(alone[0], "--runs-dir", tmp_path, "--coordinator", f"127.0.0.1:{port}", "--process-count", 2)
    waits = False
    while not waits:
        assert first.poll() is None
        time.sleep(0.1)
        with socket.socket() as client:
            waits = client.connect_ex(("127.0.0.1", port)) == 0
    first.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM; the same command goes on" in first.communicate(timeout=100)[1]
    assert first.returncode == 75


def test_a_port_that_another_program_has_is_one_line():
    with socket.create_server(("", 0)) as server:
        given = Processes(coordinator=f"localhost:{server.getsockname()[1]}", process_count=2)
        with pytest.raises(ExperimentError, match=r"cannot be joined \(.*in use"):
            processes.join(given)


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_that_does_not_exist_is_refused(port):
    with pytest.raises(ExperimentError, match="is no address; give HOST:PORT"):
        processes.check(Processes(coordinator=f"localhost:{port}", process_count=2))


def test_a_pod_without_its_number_is_refused():
    with pytest.raises(ExperimentError, match="no JAX_PROCESS_ID; set it in each process"):
        processes.find(Processes(), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"})


def test_a_process_that_never_comes_ends_the_others_in_good_order(alone, tmp_path):
    code = (
        "import sys\nfrom euroflax import processes, run\nprocesses.JOIN_SECONDS = 3\n"
        f"sys.exit(run.main([{str(alone[0])!r}, '--runs-dir', {str(tmp_path)!r}, '--devices', 'cpu:4', "
        f"'--coordinator', 'localhost:{free_port()}', '--process-count', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75 and done.stderr.startswith("error: not all 2 processes came"), done
    assert done.stderr.count("\n") == 1


def test_a_task_of_slurm_without_its_nodes_is_refused():
    with pytest.raises(ExperimentError, match="SLURM_STEP_NODELIST is not; start with srun"):
        processes.find(Processes(), {name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"})


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(alone, tmp_path):
    path, folder = alone
    started = job(path, tmp_path, folder / "cache", 2, 4)
    awaited(started, tmp_path / "runs" / "x" / "metrics.jsonl", 5)
    started[1].send_signal(signal.SIGSTOP)
    _, err = started[0].communicate(timeout=60)
    started[1].kill()
    started[1].communicate()
    assert started[0].returncode == 75
    assert err.strip() == (
        "error: process 1 said nothing for 30 seconds; the same command goes on from the last checkpoint"
    )
