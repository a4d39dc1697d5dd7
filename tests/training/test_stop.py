"""Wishes to stop, limits of time, and the signs of life that the watchdog looks for."""

import contextlib
import time
from types import SimpleNamespace
from typing import cast

import pytest

from euroflax.experiment import ExperimentError, Interrupted
from euroflax.training.job import Job
from euroflax.training.saving import Saver
from euroflax.training.stop import Stop, slurm_limit, time_limit
from euroflax.training.watchdog import Watchdog


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("23:50", 85_800), ("1-00:00", 86_400), ("2-01:02:03", 176_523), ("0:00:30", 30), ("120:00", 432_000)],
)
def test_a_limit_is_hours_and_minutes(text, seconds):
    assert time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "0:00", "0:60", "1:2", "-1:00", "1:00:99", "1h"])
def test_what_is_no_limit_is_the_users_mistake(text):
    with pytest.raises(ExperimentError, match=f"--time-limit={text} is no time; write HOURS:MINUTES, 23:50 say"):
        time_limit(text)


def test_slurm_says_when_it_ends_the_job():
    assert slurm_limit({"SLURM_JOB_END_TIME": "1000"}, 400.5) == 599.5
    assert slurm_limit({}, 400.0) is None and slurm_limit({"SLURM_JOB_END_TIME": "Unknown"}, 400.0) is None


def test_a_limit_is_a_wish_to_stop_as_long_before_it_as_ending_takes():
    stop = Stop()
    stop.limit(100.0)
    stop.began -= 60
    stop.deadline -= 60
    stop.reserve_seconds = 30.0
    assert stop.reason is None
    stop.reserve_seconds = 36.0
    assert stop.reason == "the time limit"
    stop.reserve_seconds = 0.0
    assert stop.reason == "the time limit"  # a wish stays


def test_a_save_that_once_took_for_ever_takes_half_of_the_time_at_most():
    stop = Stop()
    stop.limit(100.0)
    stop.reserve_seconds = 7200.0
    assert stop.reason is None
    stop.began -= 51
    stop.deadline -= 51
    assert stop.reason == "the time limit"


def test_the_reserve_is_by_the_saves_of_the_last_two_sessions_that_saved():
    sessions = [{"saves": {"longest_seconds": seconds}} for seconds in (7200.0, 3.0, 0.0, 4.0)]
    record, checkpoints = SimpleNamespace(manifest={"sessions": sessions}), SimpleNamespace(is_saving=False)
    job = SimpleNamespace(record=record, checkpoints=checkpoints)
    assert Saver(cast(Job, job)).reserve_seconds(None) == 8.0
    checkpoints.is_saving = True
    assert Saver(cast(Job, job)).reserve_seconds(None) == 12.0


def test_the_watchdog_looks_at_the_deadline_and_not_behind_it(ended):
    stop = Stop()
    stop.limit(3600.0)
    watchdog = Watchdog(stop, 0.0)
    assert watchdog._until(1.0) == 1.0
    stop.limit(0.5)
    assert watchdog._until(1.0) <= 0.5
    watchdog.close()


def test_the_first_wish_stays_and_more_of_them_change_nothing():
    stop = Stop()
    for reason in ("SIGTERM", "SIGTERM", "SIGUSR1"):
        stop.request(reason)
    assert stop.reason == "SIGTERM"
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the same command goes on"):
        stop.check()


def test_a_wish_that_comes_as_a_section_without_saving_begins_is_not_forgotten(monkeypatch):
    stop = Stop()
    stop.listens = True

    @contextlib.contextmanager
    def late():
        stop.request("SIGTERM")
        yield

    monkeypatch.setattr("euroflax.training.stop.ended_by_signals", late)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), stop.at_once():
        raise AssertionError("it began nevertheless")


@pytest.fixture
def ended(monkeypatch):
    """What the watchdog would have ended the process with."""
    found = []
    monkeypatch.setattr("euroflax.training.watchdog.end_at_once", lambda *given: found.append(given))
    return found


def wait(found, seconds):
    deadline = time.monotonic() + seconds
    while not found and time.monotonic() < deadline:
        time.sleep(0.01)


def test_questions_keep_the_watchdog_quiet_and_silence_does_not(ended, capfd):
    stop = Stop()
    watchdog = Watchdog(stop, 1.0)
    for _ in range(30):
        assert stop.reason is None and not ended
        time.sleep(0.05)
    wait(ended, 5)
    assert ended[0][0].startswith("error: nothing has moved for 1 s (--hang-minutes)") and ended[0][1] == 75
    assert "in wait" in capfd.readouterr().err
    watchdog.close()


def test_a_process_that_was_suspended_does_not_hang(ended, monkeypatch):
    stop = Stop()
    genuine, gap = time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: genuine() + sum(gap))
    watchdog = Watchdog(stop, 3.0)
    time.sleep(0.3)
    gap.append(60.0)
    time.sleep(0.3)
    assert ended == []
    wait(ended, 10)
    assert len(ended) == 1  # and then it does, since nobody asks
    watchdog.close()


def test_zero_minutes_never_end_a_process_and_a_closed_watchdog_sees_nothing(ended):
    stop = Stop()
    for watchdog in (Watchdog(stop, 0.0), Watchdog(stop, 0.3)):
        watchdog.close()
    wait(ended, 0.6)
    assert ended == []
