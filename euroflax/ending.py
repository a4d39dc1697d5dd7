"""How a process ends other than by returning: the signals that are a wish to stop, last words, and its status."""

import contextlib
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import NoReturn, TextIO

from euroflax.experiment import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers send the last two some minutes before they end a job."""
_LAST_WORDS_SECONDS = 1.0
_EXIT_SECONDS = 30.0


class Tolerant:
    """A text stream whose disk may be full and whose reader may be gone: what cannot be written is left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, where that can be done."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, where that can be done."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def open_streams() -> None:
    """Gives this process a standard output and error where it began without, and such that take any character."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text from outside as a terminal may have it: what would move the cursor, colour or end a line is escaped.

    Args:
        text: the text.
        lines: whether line ends and tabs stay as they are.

    >>> printable("a\x1b[31m b")
    'a\\x1b[31m b'
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line, on stderr unless told where, if that can be done."""
    print(text, file=Tolerant(stream or sys.stderr), flush=True)


def end_at_once(text: str, status: int) -> NoReturn:
    """Ends this process from whatever thread, with a last line on the terminal if that takes what is written."""
    try:
        shown = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
        words = threading.Thread(target=say, args=(shown + text,), daemon=True)
        words.start()
        words.join(_LAST_WORDS_SECONDS)
    finally:
        os._exit(status)


def end(status: int) -> NoReturn:
    """Ends this process in good order, but not later than in half a minute, whatever libraries still wait for."""
    for number in SIGNALS:  # whoever asks again shall have the status of the first time
        signal.signal(number, signal.SIG_IGN)
    late = threading.Timer(_EXIT_SECONDS, os._exit, (status,))
    late.daemon = True
    late.start()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # or Python would try once more, and end with a status of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside it a signal ends this process at once: Python's handlers do not run while JAX waits or compiles.

    For where there is nothing to save, in the main thread.
    """
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)

    def wait() -> None:
        if number := os.read(woken, 1):
            name = signal.Signals(number[0]).name
            end_at_once(f"stopped by {name}; the same command goes on", Interrupted.exit_status)
        os.close(woken)

    before = signal.set_wakeup_fd(wakes)
    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(wakes)
        waiter.join()  # where a signal came, it ends the process: nothing is said or done beside it


@functools.cache
def end_at_second_interrupt() -> None:
    """From here on a second SIGINT ends this process at once, also while no handler of Python's can run."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)

    def wait() -> None:
        interrupts = 0
        while number := os.read(woken, 1):
            interrupts += number[0] == signal.SIGINT
            if interrupts == 2:  # a scheduler may say a thing twice; a person who does means now
                end_at_once("stopped by the second SIGINT; the same command goes on", Interrupted.exit_status)

    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Inside it no signal that is a wish to stop comes; a process that is started there never sees one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # a process of multiprocessing's own: its start lets some of them in again
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
