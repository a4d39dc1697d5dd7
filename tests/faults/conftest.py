"""An experiment that saves at every second step, and how it ends when nothing befalls it."""

import dataclasses
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from euroflax.training.record import read_metrics
from tests.conftest import deterministic, run, small, start, write_experiment

STEPS = 60


@dataclasses.dataclass(frozen=True)
class Case:
    """A run of its own in a folder of its own, with a cache that all share."""

    path: pathlib.Path
    """The experiment file."""
    cache: pathlib.Path
    undisturbed: list[dict]
    """The metrics of a run that nothing disturbs."""
    folder: pathlib.Path

    @property
    def run_dir(self) -> pathlib.Path:
        """The run folder."""
        return self.folder / "runs" / self.path.stem

    @property
    def checkpoints(self) -> pathlib.Path:
        """Its checkpoints."""
        return self.run_dir / "checkpoints"

    def options(self) -> tuple:
        """The flags of all its commands."""
        return ("--devices", "cpu:2", "--runs-dir", self.folder / "runs", "--cache-dir", self.cache)

    def start(self, *flags: object, environment: dict | None = None) -> subprocess.Popen:
        """The command in a process of its own."""
        return start(self.path, *flags, *self.options(), environment=environment)

    def run(self, *flags: object, environment: dict | None = None) -> subprocess.CompletedProcess:
        """The command to its end."""
        return run(self.path, *flags, *self.options(), environment=environment)

    def started(self, at: int) -> subprocess.Popen:
        """Starts the command and returns once there are so many lines of metrics."""
        process = self.start()
        while process.poll() is None and self.steps() < at:
            time.sleep(0.001)
        return process

    def steps(self) -> int:
        """Lines in the metrics."""
        file = self.run_dir / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def lines(self) -> list[dict]:
        """The metrics."""
        return read_metrics(self.run_dir)

    def stopped(self, at: int, number: int = signal.SIGTERM, flags: tuple = ()) -> subprocess.CompletedProcess:
        """Starts the command and sends a signal once there are so many lines of metrics."""
        return self.signalled(lambda: self.steps() >= at, number, flags)

    def signalled(
        self, moment: Callable[[], bool], number: int = signal.SIGTERM, flags: tuple = ()
    ) -> subprocess.CompletedProcess:
        """Starts the command and sends a signal at a moment."""
        process = self.start(*flags)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not moment():
            time.sleep(0.0005)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def ends_as_undisturbed(self) -> str:
        """Gives the same command again, to its end, and compares; returns what to say of it."""
        done = self.run()
        assert done.returncode == 0, done.stderr
        assert deterministic(self.run_dir) == self.undisturbed
        return "the same command ends bitwise as if nothing had been"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The experiment, its cache, and the metrics of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    declared = small(training__tokens=STEPS * 512, evaluation__every_steps=20)
    case = Case(write_experiment(folder / "x.py", declared), folder / "cache", [], folder)
    done = case.run()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return dataclasses.replace(case, undisturbed=deterministic(case.run_dir))


@pytest.fixture
def case(undisturbed, tmp_path):
    """A run of the test's own."""
    return dataclasses.replace(undisturbed, folder=tmp_path)


@pytest.fixture
def cold(case, tmp_path):
    """A run of the test's own whose programs are not compiled yet."""
    shutil.copytree(case.cache, tmp_path / "cache", ignore=shutil.ignore_patterns("compiled"))
    return dataclasses.replace(case, cache=tmp_path / "cache")


@pytest.fixture
def disk(tmp_path):
    """A folder that holds six megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            return
