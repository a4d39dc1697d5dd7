"""Devices and processes, set up once before anything computes: platform, compiler flags, compiled-program cache."""

import contextlib
import glob
import importlib.metadata
import os
import pathlib
import re
import sys

from euroflax.accelerators import GPU_SHARE, MAX_UNROLLED_CHUNKS
from euroflax.experiment import Experiment, ExperimentError
from euroflax.processes import TPU_FILES, Processes, check, join

_ONEDNN = "--xla_cpu_experimental_onednn_custom_call"
_COUNT = re.compile(r"[1-9][0-9]{0,5}")
_MOST_DEVICES = 4096


def set_up(declared: Experiment, devices: str | None, cache_dir: pathlib.Path, processes: Processes) -> Processes:
    """Configures JAX for this process; to be called before JAX is first asked for a device. Returns the job joined.

    Args:
        declared: its compute type and determinism choose compiler flags.
        devices: `cpu:8` simulates eight devices on the CPU; None takes what the machine has.
        cache_dir: compiled programs are kept below it.
        processes: the job that this process belongs to.

    Raises:
        ExperimentError: `devices` names nothing that can be simulated, or the coordinator cannot be reached.
    """
    check(processes)
    _set_flags(declared)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))
    import jax

    if devices is not None:
        platform, _, count = devices.partition(":")
        if platform != "cpu" or not _COUNT.fullmatch(count or "1") or int(count or 1) > _MOST_DEVICES:
            raise ExperimentError(f"--devices={devices} cannot be simulated; use cpu or cpu:N, N to {_MOST_DEVICES}")
        try:
            jax.config.update("jax_num_cpu_devices", int(count or 1))
            jax.config.update("jax_platforms", "cpu")
        except RuntimeError as error:  # JAX has its devices already
            if (jax.default_backend(), jax.device_count()) != ("cpu", int(count or 1)):
                raise ExperimentError(
                    f"devices={devices} comes too late: JAX already has {jax.device_count()} {jax.default_backend()} "
                    "devices; ask for it first, in a fresh interpreter"
                ) from error
    elif jax.config.jax_platforms is None and not _has_accelerator():  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")
    joined = join(processes)
    # A CPU program with oneDNN calls cannot be serialised, and trying has been seen to take a minute.
    if jax.default_backend() != "cpu" or f"{_ONEDNN}=true" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return joined


def memory_bytes() -> int | None:
    """Memory of one device of this process, of a CPU device its part of what the process may use; None if not known."""
    import jax

    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            most = min(most, int(pathlib.Path(file).read_text()))
    return most // jax.local_device_count()


def _has_accelerator() -> bool:
    """Whether this machine may have one. JAX need not look where there is none: extras for plans would complain."""
    files = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd", *TPU_FILES)
    return sys.platform != "linux" or any(glob.glob(file) for file in files)


def _set_flags(declared: Experiment) -> None:
    """Adds our XLA flags to those in the environment, and changes none that the user has set."""
    flags = []
    chunks = declared.model.vocab_size / declared.training.loss_chunk_entries
    has_loop = chunks > (
        1 if declared.model.layer_loop == "scan" else MAX_UNROLLED_CHUNKS
    )  # which XLA takes minutes to compile with this flag
    if declared.model.compute_dtype == "bfloat16" and _jax_version() >= (0, 12) and not has_loop:
        flags.append(f"{_ONEDNN}=true")  # bfloat16 products on CPU three times as fast
    if declared.training.deterministic:
        flags.append("--xla_gpu_deterministic_ops=true")
    present = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in flags if flag.split("=")[0] not in present]
    if ours:
        os.environ["XLA_FLAGS"] = " ".join([present, *ours]).strip()


def _jax_version() -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version("jax").split(".")[:2]))
