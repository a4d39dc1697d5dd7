"""How a process ends: what it says last, and its status, whatever becomes of its output."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from euroflax.ending import Tolerant
from tests.conftest import ROOT


def ends(program, **streams):
    """Runs a program that ends, by itself, in a process of its own."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    command = [sys.executable, program] if isinstance(program, pathlib.Path) else [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, text=True, timeout=60, env=buffered, **streams)


def test_a_signal_in_the_last_moment_of_such_a_section_ends_the_process_and_is_said_once():
    program = """
import os, signal
from euroflax.ending import ended_by_signals
signal.signal(signal.SIGTERM, lambda *_: None)
with ended_by_signals():
    os.kill(os.getpid(), signal.SIGTERM)
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == "stopped by SIGTERM; the same command goes on\n"


def test_what_cannot_be_written_is_left_out():
    with open(os.open("/dev/full", os.O_WRONLY), "w", closefd=False) as full:
        stream = Tolerant(full)
        print("a" * 100_000, file=stream, flush=True)
        assert stream.encoding == full.encoding and not stream.isatty()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_process_ends_at_once_though_nobody_can_be_told():
    program = "from euroflax import ending; ending.end_at_once('words', 75); print('alive')"
    with open("/dev/full", "w") as full:
        assert ends(program, stderr=full).returncode == 75
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"0" * 1024)
    os.set_blocking(writer, True)  # whoever writes now waits for ever
    assert ends(program, stderr=writer).returncode == 75
    os.close(reader)
    os.close(writer)
    assert ends(program).stderr == "words\n"


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_the_status_is_kept_where_the_output_cannot_be_written(status):
    program = f"from euroflax import ending; print('lost'); ending.end({status})"
    with open("/dev/full", "w") as full:
        assert ends(program, stdout=full, stderr=full).returncode == status


def test_a_library_that_waits_for_ever_at_the_end_does_not_keep_the_process():
    program = """
import atexit, time
from euroflax import ending
ending._EXIT_SECONDS = 0.5
atexit.register(time.sleep, 1000)
ending.end(75)
"""
    assert ends(program).returncode == 75


def test_a_second_interrupt_ends_the_process_also_while_python_runs_no_handler():
    program = """
import hashlib, signal
from euroflax import ending
signal.signal(signal.SIGINT, lambda *_: None)
ending.end_at_second_interrupt()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err == "stopped by the second SIGINT; the same command goes on\n"


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_worker_of_a_group_that_is_signalled_as_it_starts_works_on(tmp_path, number):
    (tmp_path / "program.py").write_text(f"""
import multiprocessing, os, signal, threading, time
from euroflax.data.tokenize import _serve
from euroflax.ending import signals_held
noted = []
def work(sender):
    _serve()
    time.sleep(0.2)
    sender.send("done")
def signals():
    for _ in range(100):
        os.killpg(0, signal.{number})
        time.sleep(0.01)
if __name__ == "__main__":
    signal.signal(signal.{number}, lambda *_: noted.append(1))
    os.setpgid(0, 0)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(sender,))
    threading.Thread(target=signals).start()
    with signals_held():
        worker.start()
    sender.close()
    print(receiver.recv(), bool(noted))
""")
    done = ends(tmp_path / "program.py")
    assert (done.stdout, done.stderr) == ("done True\n", "")


def test_a_process_that_began_without_output_is_given_one_that_takes_all_characters():
    program = """
import sys
from euroflax import ending
ending.open_streams()
print("\u00fc", file=sys.stdout)
print("\u00fc", file=sys.stderr)
file = open(sys.argv[1], "w")
assert file.fileno() > 2, "what libraries write to stderr would go into it"
ending.end(75)
"""
    for closed in (">&- 2>&-", ">&-", "2>&-"):
        command = f'exec "$0" -c "$1" "$2" {closed}'
        given = ["sh", "-c", command, sys.executable, program, os.devnull]
        assert subprocess.run(given, capture_output=True, timeout=60).returncode == 75
    ascii_only = subprocess.run(
        [sys.executable, "-c", program, os.devnull], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (ascii_only.returncode, ascii_only.stdout) == (75, b"\\xfc\n")
