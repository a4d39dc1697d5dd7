"""Energy as this machine measures it: NVIDIA's counters of its GPUs, and RAPL's of its processors. No jax here.

Where an accelerator takes part that has no counter, there is no figure: that of the processors alone would mislead.
"""

import dataclasses
import os
import pathlib
import socket
import threading
from collections.abc import Callable, Iterable, Mapping

_POWERCAP = pathlib.Path("/sys/class/powercap")
_SECONDS = 60.0
"""Between two looks: RAPL's counters begin anew after a quarter of an hour at the least."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """Joules since the start of one process, as it sees them."""

    host: str
    gpus: float | None
    """Of the GPUs of this process; None where there is no counter or no GPU."""
    processors: float | None
    """Of all processors of the host; None where the counters cannot be read."""


class _Counter:
    """Joules since it was made, of a counter that may begin anew at its range."""

    def __init__(self, read: Callable[[], float], span: float | None = None) -> None:
        self._read, self._span = read, span
        self._last, self.joules = read(), 0.0

    def look(self) -> None:
        now = self._read()
        step = now - self._last
        if step < 0:
            step = step + self._span if self._span is not None else 0.0
        self.joules += step
        self._last = now


class Energy:
    """The counters of a process, watched from its start."""

    def __init__(self, gpus: Iterable[int] = (), powercap: pathlib.Path = _POWERCAP) -> None:
        """Finds the counters.

        Args:
            gpus: the numbers of this process's GPUs among those that CUDA sees.
            powercap: where the kernel shows RAPL's counters.
        """
        self._gpus = _nvidia(list(gpus), os.environ)
        self._processors = _rapl(powercap)
        self._closing, self._lock = threading.Event(), threading.Lock()
        if self._gpus or self._processors:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._closing.wait(_SECONDS):
            self.read()

    def read(self) -> Reading:
        """Joules until now."""
        with self._lock:
            return Reading(socket.gethostname(), _sum(self._gpus), _sum(self._processors))

    def close(self) -> None:
        """Looks no more."""
        self._closing.set()


def _sum(counters: list[_Counter]) -> float | None:
    """Joules of all counters; None where there is none, or once one has failed."""
    try:
        for counter in counters:
            counter.look()
    except Exception:  # whatever the library raises, it is no matter of the run's
        counters.clear()
    return sum(counter.joules for counter in counters) if counters else None


def combine(readings: Iterable[Reading], on_accelerator: bool) -> tuple[float | None, str]:
    """Joules of all processes of a job, and what they are of.

    Args:
        readings: one of each process.
        on_accelerator: whether the steps are computed elsewhere than on processors.
    """
    readings = list(readings)
    gpus = [reading.gpus for reading in readings]
    hosts = {reading.host: reading.processors for reading in readings}
    of_processors = [joules for joules in hosts.values() if joules is not None]
    beside = "not memory, network, storage or cooling"
    whole = len(of_processors) == len(hosts)
    if on_accelerator:
        known = [joules for joules in gpus if joules is not None]
        if not known or len(known) < len(gpus):
            return None, "not measured: there is no counter of the accelerators that can be read"
        if whole:
            return sum(known) + sum(of_processors), f"GPUs (NVML) and whole processors (RAPL), {beside}"
        return sum(known), f"GPUs (NVML), {beside} and not processors"
    if whole and hosts:
        return sum(of_processors), f"whole processors (RAPL), whoever uses them, {beside}"
    return None, "not measured: the processors' counters cannot be read"


def _rapl(powercap: pathlib.Path) -> list[_Counter]:
    """The counters of the packages of this host; none where one of them cannot be read."""
    found = []
    try:
        for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's too
            if (zone / "name").read_text().startswith("package"):  # whose parts are zones of their own
                file, span = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()) / 1e6
                found.append(_Counter(lambda file=file: int(file.read_text()) / 1e6, span))
    except (OSError, ValueError):
        return []
    return found


def _nvidia(numbers: list[int], environment: Mapping[str, str]) -> list[_Counter]:
    """The counters of some GPUs; none where one of them has none."""
    if not numbers:
        return []
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]

        def handle(number: int) -> object:
            name = visible[number] if visible else str(number)
            if name.isdecimal():
                return pynvml.nvmlDeviceGetHandleByIndex(int(name))
            return pynvml.nvmlDeviceGetHandleByUUID(name)

        def counter(device: object) -> _Counter:
            return _Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3)

        return [counter(handle(number)) for number in numbers]
    except Exception:  # no library, no driver, no such counter: whatever it raises, there is no figure
        return []
