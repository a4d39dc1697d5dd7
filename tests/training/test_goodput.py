"""Where the wall-clock of a run went, over sessions that ended well, were killed, or went back."""

import json
import signal
import time

import pytest

from euroflax import verbs
from euroflax.training import goodput
from euroflax.training.clock import Clock
from euroflax.training.record import read_manifest, read_metrics
from tests.conftest import run, small, start, write_experiment


def line(at, number, **seconds):
    return {"step": at, "session": {"number": number, "steps": at, "seconds": seconds}}


def test_each_second_counts_once_for_the_innermost():
    clock = Clock(time.monotonic() - 5)
    with clock.on("evaluate"), clock.on("save"):
        time.sleep(0.02)
    spent = clock.read()
    assert spent["restart"] >= 5 and spent["save"] >= 0.02 and spent["evaluate"] < 0.02
    clock.lose({"save": spent["save"], "restart": 1.0})
    assert clock.read()["lost"] == pytest.approx(1 + spent["save"], abs=2e-3) and clock.read()["save"] < 1e-3


def test_the_share_of_steps_is_that_over_all_sessions():
    sessions = [{"seconds": {"step": 30.0, "lost": 5.0}}, {"seconds": {"step": 10.0, "compile": 5.0}}, {}]
    assert goodput.goodput(sessions) == 0.8 and goodput.goodput([{}]) is None
    assert goodput.totals(sessions)["step"] == 40.0 and set(goodput.totals([])) == set(goodput.KINDS)


def test_a_session_that_was_killed_is_known_up_to_its_last_line():
    sessions = [{"steps": 2, "seconds": {"step": 2.0}}, {"steps": 9, "seconds": {"step": 9.0}}]
    goodput.recover(
        dict(enumerate(sessions)), [line(1, 0, step=1.0), line(3, 0, step=3.0, save=1.0), line(4, 1, step=4.0)]
    )
    assert sessions[0] == {"steps": 3, "seconds": {"step": 3.0, "save": 1.0}}
    assert sessions[1] == {"steps": 9, "seconds": {"step": 9.0}}


def test_lines_that_say_nothing_of_their_session_are_left_out():
    lines = [{"step": 1}, {"step": 2, "session": {"number": 1}}, {"step": 3, "session": 7}, line(4, 2, step=1.0)]
    assert goodput.lost(lines, 0) == {2: {"step": 1.0}} and goodput.next_number(lines) == 3
    assert goodput.next_number([]) == 0


def test_work_behind_the_step_from_which_a_run_goes_on_is_lost_and_compiling_is_not():
    lines = [
        line(1, 0, step=1.0, compile=7.0),
        line(2, 0, step=2.0, compile=7.0),
        line(3, 1, step=1.5, compile=6.0, restart=3.0),
        line(4, 1, step=2.5, compile=6.0, restart=3.0, data=0.5),
    ]
    assert goodput.lost(lines, 1) == {0: {"step": 1.0}, 1: {"step": 2.5, "data": 0.5}}
    assert goodput.lost(lines, 3) == {1: {"step": 1.0, "data": 0.5}} and goodput.lost(lines, 4) == {}


@pytest.mark.slow
def test_every_second_of_two_sessions_is_accounted_for_and_what_a_kill_costs_is_lost_work(tmp_path):
    declared = small(training__tokens=60 * 512, checkpoint__every_steps=25, evaluation__every_steps=100)
    path = write_experiment(tmp_path / "x.py", declared)
    options = ("--devices", "cpu:2", "--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache")
    folder = tmp_path / "runs" / "x"
    process = start(path, *options)
    while process.poll() is None and not (folder.is_dir() and len(read_metrics(folder)) > 40):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = read_metrics(folder)[-1]
    began = time.monotonic()
    done = run(path, *options)
    took = time.monotonic() - began
    assert done.returncode == 0 and "goes on after step 25" in done.stdout, done.stderr
    manifest = read_manifest(folder)
    first, second = manifest["sessions"]
    told = reached["session"]
    assert first["steps"] == told["steps"] == reached["step"] and first["flops"] == told["flops"]
    assert sum(first["seconds"].values()) == pytest.approx(sum(told["seconds"].values()), abs=0.01)
    assert first["seconds"]["lost"] > 0 and first["seconds"]["step"] < told["seconds"]["step"]
    assert second["seconds"].get("lost", 0) == 0
    assert sum(second["seconds"].values()) == pytest.approx(took, abs=8)  # the interpreter's start, and its end
    spent = manifest["goodput"]["seconds"]
    assert sum(spent.values()) == pytest.approx(sum(sum(s["seconds"].values()) for s in (first, second)), abs=0.01)
    assert manifest["goodput"]["fraction"] == pytest.approx(spent["step"] / sum(spent.values()), abs=1e-3)
    assert second["saves"]["count"] == 2 and 0 < second["saves"]["blocking_seconds"] < spent["save"] + 0.01
    assert second["saves"]["longest_seconds"] > 0
    last = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()][-2]
    assert last["session"]["number"] == 1 and 0 < last["goodput"] < 1


def test_a_run_shorter_than_the_interval_saves_once_and_says_for_how_long_it_was_held_up(folders):
    manifest = read_manifest(verbs.train(small(checkpoint__every_steps=500), folders).path)
    (session,) = manifest["sessions"]
    assert session["saves"]["count"] == 1
    assert session["seconds"]["save"] == pytest.approx(session["saves"]["blocking_seconds"], abs=0.05)
