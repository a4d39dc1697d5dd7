"""Devices and processes, set up once before anything computes: platform, compiler flags, compiled-program cache."""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import socket
import time

from euroflax.accelerators import GPU_SHARE
from euroflax.experiment import Experiment, ExperimentError

_JOIN_SECONDS = 60
_ONEDNN = "--xla_cpu_experimental_onednn_custom_call"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a job, where no scheduler says them."""

    coordinator: str | None = None
    """HOST:PORT of process 0; None for a job of one process."""
    process_id: int = 0
    """Number of this process."""
    process_count: int = 1
    """Number of processes."""


def set_up(declared: Experiment, devices: str | None, cache_dir: pathlib.Path, processes: Processes) -> None:
    """Configures JAX for this process; to be called before JAX is first asked for a device.

    Args:
        declared: its compute type and determinism choose compiler flags.
        devices: `cpu:8` simulates eight devices on the CPU; None takes what the machine has.
        cache_dir: compiled programs are kept below it.
        processes: the job that this process belongs to.

    Raises:
        ExperimentError: `devices` names nothing that can be simulated, or the coordinator cannot be reached.
    """
    _check(processes)
    _set_flags(declared)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))
    import jax

    if devices is not None:
        platform, _, count = devices.partition(":")
        if platform != "cpu" or not (count or "1").isdigit() or int(count or 1) < 1:
            raise ExperimentError(f"--devices={devices} cannot be simulated; use cpu or cpu:N, for example cpu:8")
        try:
            jax.config.update("jax_num_cpu_devices", int(count or 1))
            jax.config.update("jax_platforms", "cpu")
        except RuntimeError as error:  # JAX has its devices already
            if (jax.default_backend(), jax.device_count()) != ("cpu", int(count or 1)):
                raise ExperimentError(
                    f"devices={devices} comes too late: JAX already has {jax.device_count()} {jax.default_backend()} "
                    "devices; ask for it first, in a fresh interpreter"
                ) from error
    if processes.coordinator is not None:
        _join(processes)
    # A CPU program with oneDNN calls cannot be serialised, and trying has been seen to take a minute.
    if jax.default_backend() != "cpu" or f"{_ONEDNN}=true" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _check(processes: Processes) -> None:
    count, number = processes.process_count, processes.process_id
    if count < 1 or not 0 <= number < count:
        raise ExperimentError(
            f"--process-id={number} is no process of --process-count={count}; number processes from 0 to {count - 1}"
        )
    if processes.coordinator is not None and not re.fullmatch(r"[^:\s]+:\d{1,5}", processes.coordinator):
        raise ExperimentError(f"--coordinator={processes.coordinator} is no address; give HOST:PORT of process 0")
    if processes.coordinator is None and count > 1:
        raise ExperimentError(f"--process-count={count} has no --coordinator; give HOST:PORT of process 0")


def _join(processes: Processes) -> None:
    import jax

    try:
        _await_coordinator(processes)
        jax.distributed.initialize(
            processes.coordinator,
            processes.process_count,
            processes.process_id,
            initialization_timeout=_JOIN_SECONDS,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ExperimentError(
            f"--coordinator={processes.coordinator} cannot be joined ({str(error).splitlines()[0][:160]}); "
            "check the address and that process 0 runs"
        ) from error


def _await_coordinator(processes: Processes) -> None:
    """Waits until process 0 listens: JAX itself would abort the process where it never does."""
    host, _, port = (processes.coordinator or "").rpartition(":")
    deadline = time.monotonic() + _JOIN_SECONDS
    while processes.process_id > 0:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _set_flags(declared: Experiment) -> None:
    """Adds our XLA flags to those in the environment, and changes none that the user has set."""
    flags = []
    if declared.model.compute_dtype == "bfloat16" and _jax_version() >= (0, 12):
        flags.append(f"{_ONEDNN}=true")  # bfloat16 products on CPU three times as fast
    if declared.training.deterministic:
        flags.append("--xla_gpu_deterministic_ops=true")
    present = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in flags if flag.split("=")[0] not in present]
    if ours:
        os.environ["XLA_FLAGS"] = " ".join([present, *ours]).strip()


def _jax_version() -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version("jax").split(".")[:2]))
