"""A process that hangs, a clock that jumps, and a limit of time."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest

from euroflax import verbs
from euroflax.checkpoint import latest_step, manager, verify
from euroflax.experiment import Interrupted
from euroflax.training.stop import Stop
from tests.conftest import deterministic, small

pytestmark = pytest.mark.faults

JUMPS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static double begun = -1;
static double shift(void) {  // a day back after three seconds, ten days on after six
    static int (*genuine)(clockid_t, struct timespec *);
    if (!genuine) genuine = dlsym(RTLD_NEXT, "clock_gettime");
    struct timespec t; genuine(CLOCK_MONOTONIC, &t);
    double now = t.tv_sec + 1e-9 * t.tv_nsec;
    if (begun < 0) begun = now;
    return now - begun < 3 ? 0 : now - begun < 6 ? -86400 : 864000;
}
int clock_gettime(clockid_t clock, struct timespec *t) {
    static int (*genuine)(clockid_t, struct timespec *);
    if (!genuine) genuine = dlsym(RTLD_NEXT, "clock_gettime");
    int status = genuine(clock, t);
    if (clock == CLOCK_REALTIME) t->tv_sec += (long)shift();
    return status;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


COMPILERS_ALARM = re.compile(r"(E\d{4} .*slow_operation_alarm.cc.*|\*+|\[Compiling module .*|)\n")
"""XLA times its own compilations by the wall clock, and says that one took ten days where the jump falls into it."""


def test_a_wall_clock_that_jumps_changes_nothing(case, tmp_path, fault):
    fault.expected(
        "the wall clock jumps a day back and ten days on, under a time limit of ten minutes",
        "nothing: the run counts time by a clock that does not jump",
    )
    if shutil.which("cc") is None:
        pytest.skip("there is no compiler to make a clock that jumps")
    (tmp_path / "jumps.c").write_text(JUMPS)
    command = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "jumps.so"), str(tmp_path / "jumps.c"), "-ldl"]
    subprocess.run(command, check=True)
    done = case.run("--time-limit", "0:10", environment={"LD_PRELOAD": str(tmp_path / "jumps.so")})
    assert done.returncode == 0 and COMPILERS_ALARM.sub("", done.stderr) == "", done.stderr
    assert deterministic(case.run_dir) == case.undisturbed
    (session,) = json.loads((case.run_dir / "manifest.json").read_text())["sessions"]
    assert abs(int(session["to"][8:10]) - int(session["from"][8:10])) > 0 or session["to"][:7] != session["from"][:7]
    assert all(seconds >= 0 for seconds in session["seconds"].values()) and 3 < sum(session["seconds"].values()) < 600
    assert all(0 < line["step_seconds"] < 60 for line in case.lines() if "loss" in line)
    fault.happened(
        f"exit 0; the record says from {session['from']} to {session['to']} and "
        f"{sum(session['seconds'].values()):.0f} s; the metrics are bitwise as if nothing had been"
    )


def test_a_process_that_hangs_shows_its_stacks_and_ends(case, fault):
    fault.expected("a read that never returns", "the watchdog prints all stacks and exits 75")
    assert case.stopped(20).returncode == 75
    manifest = case.checkpoints / "manifests" / f"{latest_step(case.checkpoints)}.json"
    content = manifest.read_bytes()
    manifest.unlink()
    os.mkfifo(manifest)  # reading it waits for a writer that does not come
    began = time.monotonic()
    hung = case.run("--hang-minutes", "0.3")
    assert hung.returncode == 75 and time.monotonic() - began < 100, hung.stderr
    assert "in verify" in hung.stderr and hung.stderr.lower().count("thread 0x") > 1, hung.stderr
    said = hung.stderr.strip().splitlines()[-1]
    assert re.match(r"error: nothing has moved for \d+ s \(--hang-minutes\), the stacks are above", said)
    manifest.unlink()
    manifest.write_bytes(content)
    fault.happened(
        f"exit 75: {hung.stderr.lower().count('thread 0x')} stacks, then: {said}; {case.ends_as_undisturbed()}"
    )


@pytest.mark.parametrize("whose", ["--time-limit", "Slurm"])
def test_a_time_limit_saves_and_ends_in_time(case, fault, whose):
    fault.expected(f"the time limit of {whose}", "the state is saved and exit 75 comes before it")
    limit = 30 if whose == "Slurm" else 25
    long = ("--set", f"training.tokens={100_000 * 512}")
    flags = (*long, "--time-limit", "0:00:25") if whose != "Slurm" else long
    began = time.monotonic()
    environment = {"SLURM_JOB_END_TIME": str(int(time.time() + limit))} if whose == "Slurm" else {}
    done = case.run(*flags, environment=environment)
    took = time.monotonic() - began
    assert done.returncode == 75, done.stderr
    assert re.fullmatch(r"stopped by the time limit after step \d+, which is saved; .*\n", done.stderr), done.stderr
    assert took < limit
    step = latest_step(case.checkpoints)
    assert f"after step {step}," in done.stderr
    fault.happened(f"exit 75 after {took:.0f} s of {limit}: {done.stderr.strip()}")


def test_a_time_limit_is_kept_though_each_save_takes_long(folders, fault, monkeypatch):
    fault.expected("a time limit, and saves of three seconds one after the other", "the state is saved in time")
    genuine = manager.hash_files

    def slow(folder):
        time.sleep(3)
        return genuine(folder)

    monkeypatch.setattr(manager, "hash_files", slow)
    stop = Stop()
    stop.limit(45.0)
    declared = small(training__tokens=100_000 * 512, checkpoint__every_steps=5, evaluation__every_steps=10**6)
    with pytest.raises(Interrupted, match=r"stopped by the time limit after step .*, which is saved") as stopped:
        verbs.train(declared, folders, None, stop)
    took = time.monotonic() - stop.began
    checkpoints = folders.run_dir(declared.name) / "checkpoints"
    assert took < 45 and verify(checkpoints, latest_step(checkpoints)) is None
    fault.happened(f"after {took:.0f} s of 45: {stopped.value}")


def test_a_step_that_does_not_end_by_the_limit_is_cut_short(case, fault):
    fault.expected("a command that hangs at its time limit", "exit 75 at the limit")
    assert case.stopped(20).returncode == 75
    manifest = case.checkpoints / "manifests" / f"{latest_step(case.checkpoints)}.json"
    manifest.unlink()
    os.mkfifo(manifest)
    began = time.monotonic()
    done = case.run("--time-limit", "0:00:24")
    assert done.returncode == 75 and 23 < time.monotonic() - began < 100, done.stderr
    assert done.stderr.startswith("the time limit came before the command could end in good order"), done.stderr
    fault.happened(f"exit 75: {done.stderr.strip()}")
