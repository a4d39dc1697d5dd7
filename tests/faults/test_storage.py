"""A full disk, harmed checkpoints, and data that is harmed under a running job."""

import dataclasses
import re
import shutil
import signal
import time

import pytest

from euroflax.checkpoint import latest_step, listed_steps, verify
from tests.conftest import small, write_experiment
from tests.faults.conftest import fill

pytestmark = pytest.mark.faults


def filled_under_a_run(case, disk, what):
    """Starts a run with its folder or its checkpoints on the disk, and fills that behind the first checkpoint."""
    declared = small(training__tokens=400 * 512, checkpoint__every_steps=20, evaluation__every_steps=400)
    path = write_experiment(case.folder / "disk.py", declared)
    mine = dataclasses.replace(case, path=path, folder=disk if what == "the run folder" else case.folder)
    if what == "the checkpoints":
        mine.run_dir.mkdir(parents=True)
        mine.checkpoints.symlink_to(disk)
    process = mine.start()
    while process.poll() is None and latest_step(mine.checkpoints) is None:
        time.sleep(0.01)
    fill(disk)
    return mine, process


@pytest.mark.parametrize("what", ["the run folder", "the checkpoints"])
def test_a_disk_that_is_full_for_a_while_costs_nothing(case, disk, fault, what):
    fault.expected(f"the disk of {what} fills in a save, and has room again", "said, tried again, the run ends well")
    mine, process = filled_under_a_run(case, disk, what)
    time.sleep(6)
    assert process.poll() is None
    assert verify(mine.checkpoints, latest_step(mine.checkpoints)) is None
    (disk / "filler").unlink()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "", err
    said = re.search(r"a checkpoint could not be written \(No space left on device\).*", out)
    assert said and latest_step(mine.checkpoints) == 400 and verify(mine.checkpoints, 400) is None
    assert mine.steps() == 402 and not list(mine.checkpoints.glob("*tmp*"))
    fault.happened(f"{said[0]}; then exit 0, checkpoint 400 whole, each step in the metrics once")


def test_a_signal_on_a_full_disk_ends_the_run_soon(case, disk, fault):
    fault.expected("SIGTERM while the disk is full", "one more attempt, then exit 75; the checkpoint before it is kept")
    mine, process = filled_under_a_run(case, disk, "the run folder")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode == 75 and err.startswith("error: the checkpoint cannot be written (No space left"), err
    assert took < 30 and verify(mine.checkpoints, latest_step(mine.checkpoints)) is None
    fault.happened(f"exit 75 after {took:.0f} s: {err.strip()}")


def test_a_disk_that_stays_full_ends_the_run_with_75(case, disk, fault, full):
    if not full:
        pytest.skip("it takes the minute and a half that the run tries for; with --full")
    fault.expected("the disk fills in a save, and stays full", "exit 75, the checkpoints before it untouched")
    mine, process = filled_under_a_run(case, disk, "the run folder")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 75 and err.startswith("error: the checkpoint cannot be written (No space left"), err
    kept = latest_step(mine.checkpoints)
    assert verify(mine.checkpoints, kept) is None
    (disk / "filler").unlink()
    done = mine.run()
    assert done.returncode == 0 and f"goes on after step {kept}" in done.stdout and mine.steps() == 402
    fault.happened(f"exit 75: {err.strip()}; with room again it went on after step {kept}")


def flip(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def half_delete(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()


@pytest.mark.parametrize("harm", [flip, cut, half_delete], ids=lambda harm: harm.__name__)
def test_a_harmed_checkpoint_is_passed_over_for_the_one_before(case, fault, harm):
    what = {"flip": "has a flipped bit", "cut": "is cut short", "half_delete": "is half deleted"}[harm.__name__]
    fault.expected(f"the latest checkpoint {what}", "said, and the one before is used")
    assert case.stopped(20).returncode == 75
    latest = latest_step(case.checkpoints)
    before = max(step for step in listed_steps(case.checkpoints) if step < latest)
    harm(case.checkpoints / str(latest))
    done = case.stopped(case.steps() + 3)
    assert done.returncode == 75
    (said,) = re.findall(rf"checkpoint {latest} is passed over: .*", done.stdout)
    assert f"goes on after step {before} " in done.stdout
    fault.happened(f"{said}; went on after step {before}; {case.ends_as_undisturbed()}")


@pytest.mark.parametrize("harm", ["cut", "changed"])
def test_data_that_is_harmed_under_a_running_job_ends_it_with_its_line(cold, fault, harm):
    what = "cut short" if harm == "cut" else "changed"
    fault.expected(f"a data shard is {what} under a running job", "exit 2 with the file and the fix, the state saved")
    files = list((cold.cache / "stores").glob("*/tokens"))
    whole = [file.read_bytes() for file in files]
    process = cold.start("--set", "checkpoint.every_steps=1000")
    while process.poll() is None and cold.steps() < 12:
        time.sleep(0.001)
    for path in files:
        with open(path, "r+b") as file:
            file.truncate(10) if harm == "cut" else file.write(b"xx")
    _, err = process.communicate(timeout=120)
    said = {"cut": "was cut short", "changed": "does not fit its checksum in chunk 0"}[harm]
    assert process.returncode == 2, err
    assert re.fullmatch(rf"error: \S+/tokens {said}; delete the folder \S+ and prepare again\n", err), err
    trained = sum("loss" in line for line in cold.lines())
    assert latest_step(cold.checkpoints) == trained
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content)
    told = err.strip().replace(str(cold.cache), "CACHE")
    fault.happened(f"exit 2: {told}; step {trained} saved; fixed, {cold.ends_as_undisturbed()}")
    shutil.rmtree(cold.cache)
