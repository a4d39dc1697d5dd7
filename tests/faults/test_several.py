"""Faults that befall a job of several processes."""

import dataclasses
import os
import re
import shutil
import time

import pytest

from euroflax.checkpoint import latest_step, verify
from euroflax.experiment import Guard
from euroflax.training.record import read_manifest
from tests.conftest import small, start, write_experiment
from tests.faults.conftest import fill
from tests.test_processes import ended, free_port, job

pytestmark = pytest.mark.faults


def test_two_processes_go_back_as_one_does(case, tmp_path, fault):
    fault.expected("too many steps are refused in a job of two processes", "both go back, as one process does")
    guard = Guard(deviations=1.5, window_steps=8, max_skipped=3, max_returns=2)
    declared = small(training__tokens=60 * 512, training__guard=guard, checkpoint__every_steps=4)
    path = write_experiment(tmp_path / "x.py", declared)
    mine = dataclasses.replace(case, path=path, folder=tmp_path / "alone")
    alone = mine.run()
    expected = read_manifest(mine.run_dir)["skipped_ranges"]
    assert expected and "goes back to step" in alone.stdout, alone.stdout
    folder = tmp_path / "two"
    statuses, outputs = ended(job(path, folder, case.cache, 2, 1))
    assert statuses == [alone.returncode] * 2, outputs
    assert read_manifest(folder / "runs" / "x")["skipped_ranges"] == expected
    assert "goes back to step" in outputs[0][0] and "goes back" not in outputs[1][0]
    fault.happened(f"both skip rows {expected} and end with {alone.returncode}, as one does")


def test_a_disk_that_is_full_for_two_processes_costs_nothing(case, disk, fault):
    fault.expected("the disk of two processes fills, and has room again", "said, tried again, the run ends well")
    declared = small(training__tokens=300 * 512, checkpoint__every_steps=20, evaluation__every_steps=300)
    mine = dataclasses.replace(case, path=write_experiment(case.folder / "x.py", declared), folder=disk)
    processes = job(mine.path, disk, case.cache, 2, 1)
    while processes[0].poll() is None and latest_step(mine.checkpoints) is None:
        time.sleep(0.01)
    fill(disk)
    began, said = mine.steps(), None
    while said is None and (line := processes[0].stdout.readline()):
        said = re.search(r"a checkpoint could not be written \(No space left on device\)[^;]*", line)
    (disk / "filler").unlink()
    statuses, outputs = ended(processes)
    assert statuses == [0, 0], outputs
    assert said and latest_step(mine.checkpoints) == 300 and verify(mine.checkpoints, 300) is None
    assert mine.steps() == 302 > began
    fault.happened(f"{said[0]}; then exit 0 in both, checkpoint 300 whole")


def test_a_fault_of_one_process_ends_all_with_its_status(case, tmp_path, fault):
    fault.expected("a data shard is cut short under one of two processes", "exit 2 in both, with the file and the fix")
    declared = small(training__tokens=100_000 * 512, checkpoint__every_steps=20, evaluation__every_steps=10**6)
    path = write_experiment(tmp_path / "x.py", declared)
    caches = [tmp_path / "first", tmp_path / "second"]
    for cache in caches:
        shutil.copytree(case.cache, cache)
    port = free_port()
    at = ("--coordinator", f"127.0.0.1:{port}", "--process-count", 2, "--devices", "cpu:1", "--runs-dir", tmp_path)
    processes = [start(path, *at, "--cache-dir", cache, "--process-id", i) for i, cache in enumerate(caches)]
    metrics = tmp_path / "x" / "metrics.jsonl"
    while processes[0].poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 25):
        time.sleep(0.01)
    for file in caches[1].glob("stores/*/tokens"):
        os.truncate(file, 10)
    statuses, outputs = ended(processes)
    assert statuses == [2, 2], outputs
    said = outputs[0][1].strip()
    assert said == "error: process 1 ended with status 2; fix what it says", said
    assert re.fullmatch(r"error: \S+/tokens was cut short; delete the folder \S+ and prepare again\n", outputs[1][1])
    fault.happened(f"exit 2 in both; the other one: {said}")
