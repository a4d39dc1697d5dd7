"""SIGKILL at any moment; SIGTERM, and what schedulers send, in each phase; two starts; a folder that moves."""

import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from euroflax.checkpoint import latest_step
from tests.conftest import ROOT, deterministic, small, start, user_environment, write_experiment

pytestmark = pytest.mark.faults


def names(folder):
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def in_a_save(checkpoints):
    return any("tmp" in name for name in names(checkpoints))


def in_a_deletion(checkpoints):
    return bool(names(checkpoints / "trash"))


def without_manifest(checkpoints):
    steps = {name for name in names(checkpoints) if name.isdigit()}
    return bool(steps - {pathlib.Path(name).stem for name in names(checkpoints / "manifests")})


def killed(case, moment, seed):
    """Starts the command and kills it at a moment; returns whether it was still alive then."""
    random.seed(seed)
    metrics = case.run_dir / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    process = case.start()
    awaited = random.randrange(1, 8000) if moment is not None else None
    deadline = time.monotonic() + (random.uniform(0.5, 8) if moment is None else 120)
    while process.poll() is None and time.monotonic() < deadline:
        moved = awaited is not None and metrics.exists() and abs(metrics.stat().st_size - size) > awaited
        if moved and moment(case.checkpoints):
            break
        time.sleep(0.0005)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def test_kills_change_nothing(case, tmp_path, fault, full):
    wanted = 50 if full else 5
    fault.expected(
        f"SIGKILL at {wanted} moments: in saves, in deletions, before a manifest, at random",
        "each start goes on from the last whole checkpoint; the run ends bitwise as if nothing had been",
    )
    kinds = [in_a_save, in_a_deletion, without_manifest, None, lambda _: True]
    kills = runs = 0
    while kills < wanted:
        mine = dataclasses.replace(case, folder=tmp_path / str(runs))
        while killed(mine, kinds[kills % len(kinds)], seed=kills):
            kills += 1
        mine.ends_as_undisturbed()
        runs += 1
        assert runs <= wanted
    fault.happened(f"{kills} kills of a living process in {runs} runs, each ended bitwise as if nothing had been")


def has_begun(case):
    manifest = case.run_dir / "manifest.json"
    return manifest.exists() and bool(json.loads(manifest.read_text())["sessions"])


PHASES = {
    "the untrained evaluation": lambda case: has_begun(case) and case.steps() == 0,
    "compile": lambda case: case.steps() == 1,
    "step": lambda case: case.steps() > 12,
    "save": lambda case: case.steps() > 4 and in_a_save(case.checkpoints),
    "evaluate": lambda case: case.steps() == 21,
}


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_a_phase_ends_with_75_and_loses_nothing(cold, fault, phase):
    fault.expected(f"SIGTERM in {phase}", "exit 75 in good order, what was learnt is saved; the same command goes on")
    for attempt in range(3):  # a machine under load may be late for an evaluation of a fifth of a second
        case = dataclasses.replace(cold, folder=cold.folder / str(attempt))
        stopped = case.signalled(lambda case=case: PHASES[phase](case))
        if phase != "evaluate" or case.steps() == 21:
            break
    assert stopped.returncode == 75 and "Traceback" not in stopped.stderr, stopped.stderr
    assert re.fullmatch("stopped by SIGTERM.*; the same command goes on.*\n", stopped.stderr)
    trained = [line for line in case.lines() if "loss" in line]
    assert (latest_step(case.checkpoints) or 0) == len(trained)
    if phase == "evaluate":
        assert case.steps() == 21
    if phase == "compile":
        assert trained == []
    said = stopped.stderr.strip()
    fault.happened(f"exit 75: {said}; {case.ends_as_undisturbed()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name)
def test_what_schedulers_and_keyboards_send_is_a_wish_to_stop(case, fault, number, full):
    if number != signal.SIGUSR1 and not full:
        pytest.skip("one stands for all; with --full")
    fault.expected(f"{number.name} in a step", "as SIGTERM")
    stopped = case.stopped(20, number)
    assert stopped.returncode == 75, stopped.stderr
    said = rf"stopped by {number.name} after step \d+, which is saved; the same command .*\n"
    assert re.fullmatch(said, stopped.stderr)
    fault.happened(f"exit 75: {stopped.stderr.strip()}; {case.ends_as_undisturbed()}")


def test_a_scheduler_that_says_it_again_and_again_changes_nothing(case, fault):
    fault.expected("SIGTERM every twentieth of a second until the end", "as one: saved, said once, exit 75")
    process = case.started(20)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    _, err = process.communicate()
    assert process.returncode == 75, (process.returncode, err)
    assert re.fullmatch(r"stopped by SIGTERM after step \d+, which is saved; the same command .*\n", err)
    fault.happened(f"exit 75: {err.strip()}; {case.ends_as_undisturbed()}")


def test_a_second_interrupt_from_the_keyboard_ends_at_once(case, fault):
    fault.expected("SIGINT twice", "exit 75 at once; what was saved before holds")
    process = case.started(20)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err == "stopped by the second SIGINT; the same command goes on\n", err
    fault.happened(f"exit 75: {err.strip()}; {case.ends_as_undisturbed()}")


def preparing(folder, text, vocab_size):
    """Starts a run whose first source is a text of its own; gives the process and the cache."""
    (folder / "big.jsonl").write_text(text)
    declared = small(model__vocab_size=vocab_size, data__tokenizer__sample_bytes=16_000_000)
    changed = (dataclasses.replace(declared.data.sources[0], path="big.jsonl"), *declared.data.sources[1:])
    declared = dataclasses.replace(declared, data=dataclasses.replace(declared.data, sources=changed))
    path = write_experiment(folder / "x.py", declared)
    flags = ("--data-root", folder, "--cache-dir", folder / "cache", "--runs-dir", folder / "runs")
    return start(path, *flags), folder / "cache"


def test_sigterm_in_preparation_leaves_nothing_half(tmp_path, fault):
    fault.expected("SIGTERM in prepare", "exit 75, no store is half there, the same command goes on")
    text = "".join(json.dumps({"id": str(i), "text": f"word {i} " * 300}) + "\n" for i in range(20_000))
    process, cache = preparing(tmp_path, text, 512)
    while process.poll() is None and not list(cache.glob("stores/*.partial/ends")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err.startswith("stopped by SIGTERM; the same command goes on"), err
    assert not list(cache.glob("stores/*.partial"))
    fault.happened(f"exit 75: {err.strip()}; no partial store")


def test_sigterm_in_the_training_of_the_tokenizer_does_not_wait_for_its_end(tmp_path, fault):
    fault.expected("SIGTERM while a tokenizer is trained", "exit 75 at once, and no tokenizer")
    letters = random.Random(0)
    words = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz  ", k=4_000_000))
    lines = (json.dumps({"id": str(i), "text": words[i : i + 1000]}) + "\n" for i in range(0, len(words), 1000))
    process, cache = preparing(tmp_path, "".join(lines), 400_000)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.01)
    time.sleep(2)  # it has read the sample, and counts pairs
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err == "stopped by SIGTERM; the same command goes on\n", err
    assert not list(cache.glob("tokenizers/*/tokenizer.json"))
    fault.happened(f"exit 75 after {time.monotonic() - began:.1f} s: {err.strip()}")


def reading(case, file, *flags):
    """The command in the midst of reading a file, which never ends."""
    file.unlink()
    os.mkfifo(file)
    process = case.start(*flags)
    while process.poll() is None:
        try:
            os.open(file, os.O_WRONLY | os.O_NONBLOCK)  # and left open: it waits for what is written there
            break
        except OSError:  # ENXIO: nobody reads it yet
            time.sleep(0.01)
    return process


def test_sigterm_while_checkpoints_are_read_does_not_wait_for_it(case, fault):
    fault.expected("SIGTERM while the checkpoint to go on from is read", "exit 75 at once; the same command goes on")
    assert case.stopped(20).returncode == 75
    manifest = case.checkpoints / "manifests" / f"{latest_step(case.checkpoints)}.json"
    content = manifest.read_bytes()
    process = reading(case, manifest)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err == "stopped by SIGTERM; the same command goes on\n", err
    manifest.unlink()
    manifest.write_bytes(content)
    fault.happened(f"exit 75: {err.strip()}; {case.ends_as_undisturbed()}")


@pytest.mark.parametrize("verb", ["report", "train"])
def test_sigterm_in_the_report_leaves_the_page_whole_or_as_it_was(undisturbed, tmp_path, fault, verb):
    where = "report" if verb == "report" else "the report behind a run"
    fault.expected(f"SIGTERM in {where}", "exit 75; the page is the one before, or whole")
    case = dataclasses.replace(undisturbed, folder=tmp_path)
    shutil.copytree(undisturbed.run_dir, case.run_dir)
    lines = (case.run_dir / "metrics.jsonl").read_text().splitlines()
    (case.run_dir / "metrics.jsonl").write_text("\n".join(lines * 2000) + "\n")
    before = (case.run_dir / "report.html").read_bytes()
    process = case.start(verb) if verb == "train" else reading(case, case.run_dir / "manifest.json", verb)
    while verb == "train" and "run folder" not in (line := process.stdout.readline()):
        assert line
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err == "stopped by SIGTERM; the same command goes on\n", err
    assert (case.run_dir / "report.html").read_bytes() == before
    fault.happened(f"exit 75: {err.strip()}; the page is the one before")


@pytest.mark.parametrize("fault_of", ["full", "gone"])
def test_output_that_cannot_be_written_does_not_end_a_run(case, fault, fault_of):
    what = {"full": "the output is a file on a full disk", "gone": "who reads the output goes away"}[fault_of]
    fault.expected(what, "the run goes on as if nothing had been")
    if fault_of == "full":
        command = [sys.executable, "-m", "euroflax.run", str(case.path), *map(str, case.options())]
        with open("/dev/full", "w") as full:
            status = subprocess.run(command, cwd=ROOT, env=user_environment(), stdout=full, stderr=full).returncode
    else:
        process = case.start()
        process.stdout.close()
        process.stderr.close()
        status = process.wait()
    assert status == 0 and deterministic(case.run_dir) == case.undisturbed
    fault.happened("exit 0; the metrics are bitwise as if nothing had been")


def test_two_starts_on_one_folder_and_the_lock_of_a_dead_process(case, fault):
    fault.expected("two starts on one run folder", "the second is refused; the lock of a dead process is none")
    first = case.started(5)
    first.send_signal(signal.SIGSTOP)  # or it may have ended before the other one comes
    second = case.run()
    assert second.returncode == 2 and "is in use by another process" in second.stderr, second.stderr
    first.kill()
    first.communicate()
    assert (case.run_dir / "lock").exists()
    said = second.stderr.strip().replace(str(case.folder), "")
    fault.happened(f"exit 2: {said}; behind SIGKILL {case.ends_as_undisturbed()}")


def test_a_run_folder_may_move_between_two_starts(case, tmp_path, fault):
    fault.expected("the run folder is moved between two starts", "with --runs-dir it goes on from where it is")
    assert case.stopped(20).returncode == 75
    (tmp_path / "elsewhere").mkdir()
    (case.folder / "runs").rename(tmp_path / "elsewhere" / "runs")
    moved = dataclasses.replace(case, folder=tmp_path / "elsewhere")
    said = moved.ends_as_undisturbed()
    assert not (tmp_path / "runs").exists() and deterministic(moved.run_dir) == case.undisturbed
    fault.happened(f"it went on there; {said}")
