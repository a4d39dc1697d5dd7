"""A process that dies ends the others of its job, with its number.

Collectives wait for ever for a process that is gone, and what the libraries do about it differs by platform. So each
process holds a connection to process 0: one that closes, or is silent, without a word of farewell is a death.
"""

import secrets
import socket
import threading
import time
from collections.abc import Callable

from euroflax.ending import end_at_once
from euroflax.experiment import Interrupted
from euroflax.processes import Processes

_BEAT_SECONDS = 5
_SILENT_SECONDS = 30
_GRACE_SECONDS = 4
_VERDICT_SECONDS = 8
_TOKEN_BYTES = 16
_HOST_BYTES = 256


def _host(job: Processes) -> str:
    """Where process 0 runs, as it knows itself where no coordinator was named."""
    if job.coordinator is not None:
        return job.coordinator.rpartition(":")[0]
    return socket.gethostbyname(socket.gethostname()) if job.process_id == 0 else ""


def _hello(connection: socket.socket, token: bytes) -> int | None:
    """The number of the process that has connected; None where it does not know the token."""
    connection.settimeout(_BEAT_SECONDS)
    try:
        said = connection.recv(_TOKEN_BYTES + 4, socket.MSG_WAITALL)
    except OSError:
        return None
    return int.from_bytes(said[_TOKEN_BYTES:], "big") if said[:_TOKEN_BYTES] == token else None


class Watch:
    """Watches over a job of several processes, in threads of its own."""

    def __init__(self, job: Processes) -> None:
        """Connects the processes; every process of the job must call this."""
        import numpy as np
        from jax.experimental import multihost_utils

        number, count = job.process_id, job.process_count
        self._leaving, self._lock = threading.Event(), threading.Lock()
        self._peers: dict[int, socket.socket] = {}
        self._listeners: list[threading.Thread] = []
        self._is_first = number == 0
        token, server = secrets.token_bytes(_TOKEN_BYTES), None
        if number == 0:
            server = socket.create_server(("", 0), backlog=count)
        port = server.getsockname()[1] if server else 0
        told = port.to_bytes(2, "big") + token + _host(job).encode()[:_HOST_BYTES].ljust(_HOST_BYTES)
        told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(told, np.uint8)), np.uint8))
        port, token = int.from_bytes(told[:2], "big"), told[2 : 2 + _TOKEN_BYTES]
        host = told[2 + _TOKEN_BYTES :].decode().strip()
        if server is not None:
            self._start(self._accept, server, token, count)
        else:
            connection = socket.create_connection((host, port), timeout=_SILENT_SECONDS)
            connection.sendall(token + number.to_bytes(4, "big"))
            self._take(0, connection)
        self._start(self._beat)

    @staticmethod
    def _start(function: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        return thread

    def _accept(self, server: socket.socket, token: bytes, count: int) -> None:
        """Takes the connections of all other processes; those of strangers are closed."""
        server.settimeout(_SILENT_SECONDS)
        with server:
            while len(self._peers) < count - 1:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    return self._end(min(set(range(1, count)) - self._peers.keys()), "did not come")
                number = _hello(connection, token)
                if number is None:
                    connection.close()
                else:
                    self._take(number, connection)
        return None

    def _take(self, peer: int, connection: socket.socket) -> None:
        connection.settimeout(_SILENT_SECONDS)
        with self._lock:
            self._peers[peer] = connection
            self._listeners.append(self._start(self._listen, peer, connection))

    def _listen(self, peer: int, connection: socket.socket) -> None:
        """Hears a process out, to the end of its connection, which is its own end."""
        said, farewell = "died", False
        try:
            for line in connection.makefile("rb"):
                kind, *numbers = line.decode().split()
                if kind == "dead":
                    self._end(int(numbers[0]), "died")
                elif kind == "left":
                    farewell = True
                    self._start(self._left, peer, *map(int, numbers))
        except TimeoutError:
            said = f"said nothing for {_SILENT_SECONDS} seconds"
        except OSError:
            pass
        if not farewell:
            self._end(peer, said)

    def _left(self, peer: int, status: int, sure: int) -> None:
        """A process ends by itself; where it does not end well, the others do so too, or are ended.

        With its status where the cause is its own: who runs the job takes one of theirs for that of the job.
        """
        if status != 0:
            time.sleep(_GRACE_SECONDS)
            self._end(peer, f"ended with status {status}", status if sure else Interrupted.exit_status)

    def _beat(self) -> None:
        while not self._leaving.wait(_BEAT_SECONDS):
            self._say("beat")

    def _say(self, line: str, but: int | None = None) -> None:
        with self._lock:
            peers = dict(self._peers)
        for number, connection in peers.items():
            if number != but:
                try:
                    connection.sendall(f"{line}\n".encode())
                except OSError:
                    continue  # its own listener tells

    def _end(self, number: int, how: str, status: int = Interrupted.exit_status) -> None:
        if self._leaving.is_set():
            return
        self._say(f"dead {number}", but=number)
        again = "the same command goes on from the last checkpoint"
        what = again if status == Interrupted.exit_status else "fix what it says"
        end_at_once(f"\nerror: process {number} {how}; {what}", status)

    def leave(self, status: int, sure: bool) -> None:
        """Says that this process is about to end by itself. The first one waits for the ends of the others.

        JAX aborts a process whose coordinator, which lives in the first one, ends before it.

        Args:
            status: with which exit status.
            sure: whether the cause is its own; otherwise it may be another's death, of which word is awaited first.
        """
        if not sure:
            time.sleep(_VERDICT_SECONDS)
        self._say(f"left {status} {sure:d}")
        self._leaving.set()
        deadline = time.monotonic() + _GRACE_SECONDS + _VERDICT_SECONDS
        for listener in self._listeners if self._is_first else ():
            listener.join(max(deadline - time.monotonic(), 0))
