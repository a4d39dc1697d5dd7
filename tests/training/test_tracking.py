"""Metrics shown elsewhere: the same figures, and no failure there stops or holds up a run."""

import threading
import time

import pytest

from euroflax import verbs
from euroflax.console import SilentDisplay
from euroflax.experiment import ExperimentError
from euroflax.training import tracking
from euroflax.training.record import read_manifest
from euroflax.training.tracking import Tracking, figures
from tests.conftest import small


class Notes(SilentDisplay):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def tracker(monkeypatch):
    """Stands for TensorBoard; what `fails` names raises, what `hangs` names never returns."""

    class Fake:
        written, fails, hangs, closed, slow = [], None, None, False, 0.0

        def __init__(self, *given):
            self.befall("open")

        def befall(self, where):
            if Fake.fails == where:
                raise ConnectionError(f"no {where}\nand more")
            if Fake.hangs == where:
                threading.Event().wait()

        def write(self, step, found):
            self.befall("write")
            time.sleep(Fake.slow)
            Fake.written.append((step, found))

        def close(self):
            self.befall("close")
            Fake.closed = True

    monkeypatch.setattr(tracking, "_TensorBoard", Fake)
    monkeypatch.setattr(tracking, "check", lambda names: None)
    return Fake


def test_a_tracker_gets_the_figures_of_the_metrics(folders, tracker):
    run = verbs.train(small(), folders, track=("tensorboard",))
    assert tracker.closed and [step for step, _ in tracker.written] == [line["step"] for line in run.metrics]
    for (_, found), line in zip(tracker.written, run.metrics, strict=True):
        assert found == dict(figures(line))
    _, found = tracker.written[1]
    assert found["loss"] == run.metrics[1]["loss"] and "loss_by_language/mt" in found and "mfu" not in found
    assert tracker.written[0][1]["bits_per_byte/mean"] == run.metrics[0]["eval"]["bits_per_byte.mean"]
    assert all(isinstance(value, float | int) for _, found in tracker.written for value in found.values())


def test_a_slow_tracker_has_all_lines_when_the_run_ends(folders, tracker):
    tracker.slow = 0.1
    run = verbs.train(small(), folders, track=("tensorboard",))
    assert tracker.closed and len(tracker.written) == len(run.metrics)


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(folders, tracker, where):
    tracker.fails = where
    display = Notes()
    run = verbs.train(small(), folders, display, track=("tensorboard",))
    assert run.metrics[-1]["step"] == 6
    said = [note for note in display.notes if "tracking" in note]
    assert said == [f"tracking with tensorboard ended (no {where}); the run goes on without it"]


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_tracker_that_hangs_holds_up_no_run(folders, tracker, where, monkeypatch):
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_LINES", 3)
    tracker.hangs = where
    assert verbs.train(small(), folders, track=("tensorboard",)).metrics[-1]["step"] == 6


def test_a_tracker_that_is_not_there_is_the_users_mistake(monkeypatch):
    with pytest.raises(ExperimentError, match="--track=mlflow is not known; use tensorboard or wandb"):
        tracking.check(["mlflow"])
    monkeypatch.setitem(tracking.TRACKERS, "wandb", "no_such_package")
    with pytest.raises(ExperimentError, match="--track=wandb needs a package; install euroflax with the extra track"):
        tracking.check(["wandb"])


@pytest.mark.track
def test_tensorboard_reads_what_was_written(folders):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = verbs.train(small(), folders, track=("tensorboard",))
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    read = [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors("loss")]
    assert read == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in run.metrics if "loss" in line]


@pytest.mark.track
def test_weights_and_biases_keeps_an_offline_run_and_knows_it_again(folders, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    display = Notes()
    run = verbs.train(small(), folders, display, track=("wandb",))
    assert not [note for note in display.notes if "tracking" in note]
    run_id = read_manifest(run.path)["tracking_id"]
    (kept,) = (run.path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    assert kept.stat().st_size > 1000
    verbs.train(small(training__tokens=8 * 512), folders, display, track=("wandb",))
    assert read_manifest(run.path)["tracking_id"] == run_id


@pytest.mark.track
def test_weights_and_biases_out_of_reach_stops_no_run(folders, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 3.0)
    display = Notes()
    assert verbs.train(small(), folders, display, track=("wandb",)).metrics[-1]["step"] == 6


def test_lines_wait_for_no_tracker(tmp_path, tracker, monkeypatch):
    monkeypatch.setattr(tracking, "_LINES", 2)
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 0.1)
    tracker.hangs = "write"
    tracked = Tracking(("tensorboard",), small(), tmp_path, "1", pytest.fail)
    for step in range(1000):
        tracked.log({"step": step})
    tracked.close()
