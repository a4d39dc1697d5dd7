"""SIGKILL at any moment: the run goes on from the last complete checkpoint and ends as if nothing had been."""

import json
import pathlib
import random
import signal
import time

import pytest

from tests.conftest import run, small, start, write_experiment

STEPS = 120
KEEP = ("step", "loss", "loss_by_language", "grad_norm", "learning_rate", "tokens", "sequences", "eval")


def deterministic(folder):
    lines = (folder / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in KEEP} for line in lines]


def options(folder, cache):
    return ("--devices", "cpu:2", "--runs-dir", folder / "runs", "--cache-dir", cache)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """An experiment that saves at every second step, its cache, and the metrics of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    declared = small(training__tokens=STEPS * 512, evaluation__every_steps=40)
    path = write_experiment(folder / "x.py", declared)
    done = run(path, *options(folder, folder / "cache"))
    assert done.returncode == 0, done.stderr
    return path, folder / "cache", deterministic(folder)


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


def killed(path, folder, cache, moment, seed):
    """Starts the command and kills it at a moment; returns whether it was still alive then."""
    random.seed(seed)
    checkpoints, metrics = folder / "runs" / "x" / "checkpoints", folder / "runs" / "x" / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    process = start(path, *options(folder, cache))
    awaited = random.randrange(1, 4000) if moment is not None else None
    deadline = time.monotonic() + (random.uniform(0.5, 12) if moment is None else 120)
    while process.poll() is None and time.monotonic() < deadline:
        moved = awaited is not None and metrics.exists() and abs(metrics.stat().st_size - size) > awaited
        if moved and moment(checkpoints):
            break
        time.sleep(0.0005)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def survives(undisturbed, folder, moments):
    path, cache, expected = undisturbed
    kills = 0
    for seed, moment in enumerate(moments):
        kills += killed(path, folder, cache, moment, seed)
    done = run(path, *options(folder, cache))
    assert done.returncode == 0, done.stderr
    assert deterministic(folder) == expected
    return kills


def test_five_kills_change_nothing(undisturbed, tmp_path):
    moments = [in_a_save, in_a_deletion, without_manifest, lambda _: True, in_a_save]
    assert survives(undisturbed, tmp_path, moments) >= 3


@pytest.mark.slow
def test_fifty_kills_change_nothing(undisturbed, tmp_path):
    kinds = [in_a_save, in_a_deletion, without_manifest, None, None]
    kills = 0
    for attempt in range(5):
        kills += survives(undisturbed, tmp_path / str(attempt), kinds * 2)
    assert kills >= 35
