"""The processes of a job: found in what a scheduler says, joined, and held to the same code, experiment and data."""

import collections
import dataclasses
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import re
import socket
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from euroflax.ending import end_at_once, ended_by_signals
from euroflax.experiment import ExperimentError, Interrupted

if TYPE_CHECKING:
    import numpy as np

JOIN_SECONDS = 60
TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_HOST_BYTES = 64
_SAID_BYTES = 1024
_SLURM = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST")
_COORDINATOR = ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS")
_PORT = ("JAX_COORDINATOR_PORT", "COORDINATOR_PORT")
_COUNT = ("JAX_NUM_PROCESSES", "NUM_PROCESSES")
_NUMBER = ("JAX_PROCESS_ID", "PROCESS_ID", "JOB_COMPLETION_INDEX")
_FIXES = {
    "code": "install the same euroflax and packages on each host",
    "experiment": "give each process the same experiment file and flags",
    "data": "let each process read the same --cache-dir and --data-root",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "tensorstore", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a job and this one's place among them."""

    coordinator: str | None = None
    """HOST:PORT of process 0; None for a job of one process."""
    process_id: int = 0
    """Number of this process."""
    process_count: int = 1
    """Number of processes."""
    local_devices: tuple[int, ...] | None = None
    """Which of the accelerators that it sees are this process's; None for all."""
    ask_tpu: bool = False
    """Whether the metadata of a TPU slice say the rest."""


def find(given: Processes, environment: Mapping[str, str]) -> Processes:
    """The processes of the job: those given by flags, or else as Slurm, Kubernetes or a TPU slice has them.

    Args:
        given: what the flags say.
        environment: the variables of this process. Slurm sets its own for each task of `srun`. In Kubernetes an indexed
            Job says JOB_COMPLETION_INDEX, and its author JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES.

    Raises:
        ExperimentError: a variable that should be a number is none.
    """
    if given.coordinator is not None or given.process_count != 1:
        return given
    found = _of_slurm(environment) or _of_kubernetes(environment)
    if found is not None:
        return found if found.process_count > 1 else given
    on_tpu = importlib.util.find_spec("libtpu") is not None and any(glob.glob(file) for file in TPU_FILES)
    return dataclasses.replace(given, ask_tpu=on_tpu)


def _of_slurm(environment: Mapping[str, str]) -> Processes | None:
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None  # no task of srun beside others: a batch script, an interactive shell
    if lacking := [name for name in _SLURM if not environment.get(name)]:
        raise ExperimentError(
            f"SLURM_STEP_NUM_TASKS is set and {lacking[0]} is not; start with srun, or give --coordinator"
        )
    job, number = (_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_PROCID"))
    port = 2**16 - 2**12 + job % 2**12
    return Processes(
        coordinator=f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}",
        process_id=number,
        process_count=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_devices=_local_devices(environment),
    )


def _local_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Which of the GPUs that a Slurm task sees are its own: an equal part of them, unless Slurm shows it no others."""
    sizes = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    tasks = max(map(int, sizes), default=1)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if tasks == 1 or "SLURM_GPUS_PER_TASK" in environment or len(visible) < tasks:
        return None
    each, first = len(visible) // tasks, _number(environment, "SLURM_LOCALID")
    return tuple(range(first * each, (first + 1) * each))


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: `nid[001-004,007],login1` begins with nid001."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\]]*)\]", lambda found: re.split("[-,]", found[1])[0], first)


def _of_kubernetes(environment: Mapping[str, str]) -> Processes | None:
    address, count, number = (_first(environment, names) for names in (_COORDINATOR, _COUNT, _NUMBER))
    if not (address and count):
        return None
    if number is None:
        raise ExperimentError(
            f"{address} and {count} are in the environment and no {_NUMBER[0]}; set it in each process"
        )
    host = environment[address]
    if ":" not in host:
        port = _first(environment, _PORT)
        host = f"{host}:{environment[port] if port else 1234}"
    return Processes(
        coordinator=host, process_id=_number(environment, number), process_count=_number(environment, count)
    )


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if environment.get(name)), None)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ExperimentError(f"{name}={text} in the environment is no number; set it, or give --coordinator")
    return int(text)


def check(processes: Processes) -> None:
    """Looks at what the flags or a scheduler say.

    Raises:
        ExperimentError: it makes no job.
    """
    count, number = processes.process_count, processes.process_id
    if count < 1:
        raise ExperimentError(f"--process-count={count} is no number of processes; use 1 or more")
    if not 0 <= number < count:
        raise ExperimentError(
            f"--process-id={number} is no process of --process-count={count}; number processes from 0 to {count - 1}"
        )
    named = re.fullmatch(r"[^:\s]+:(\d{1,5})", processes.coordinator or "HOST:1")
    if named is None or not 0 < int(named[1]) < 2**16:
        raise ExperimentError(f"--coordinator={processes.coordinator} is no address; give HOST:PORT of process 0")
    if processes.coordinator is None and count > 1:
        raise ExperimentError(f"--process-count={count} has no --coordinator; give HOST:PORT of process 0")


def join(processes: Processes) -> Processes:
    """Joins the job; to be called before JAX is first asked for a device. Returns what is known then.

    Raises:
        ExperimentError: the coordinator cannot be reached, or not all processes come.
    """
    import jax

    if processes.ask_tpu:
        try:
            jax.distributed.initialize()
        except ValueError:  # no slice of several hosts, or its metadata cannot be asked
            return processes
        return dataclasses.replace(processes, process_id=jax.process_index(), process_count=jax.process_count())
    if processes.coordinator is None:
        return processes
    late = threading.Timer(JOIN_SECONDS, _nobody_came, [processes])
    late.daemon = True
    try:
        with ended_by_signals():
            _await_coordinator(processes)
            late.start()
            # Survivors of a death are ended by `watch`, with its number; the library would abort them without.
            jax.config.update("jax_enable_recoverability", True)
            jax.distributed.initialize(
                processes.coordinator,
                processes.process_count,
                processes.process_id,
                local_device_ids=processes.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=10 * JOIN_SECONDS,  # where it ends, JAX aborts the process
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise ExperimentError(
            f"--coordinator={processes.coordinator} cannot be joined ({str(error).splitlines()[0][:160]}); "
            f"check the address and that all {processes.process_count} processes run"
        ) from error
    finally:
        late.cancel()
    return processes


def _nobody_came(processes: Processes) -> None:
    """Ends this process where another one has not joined in time."""
    end_at_once(
        f"error: not all {processes.process_count} processes came to --coordinator={processes.coordinator} in "
        f"{JOIN_SECONDS} seconds; see that each one runs, then give the same command again",
        Interrupted.exit_status,
    )


def _await_coordinator(processes: Processes) -> None:
    """Waits until process 0 listens, whose port must be free: JAX itself would abort the process."""
    host, _, port = (processes.coordinator or "").rpartition(":")
    if processes.process_id == 0:  # JAX would crash on a port that another program has
        socket.create_server(("", int(port))).close()
    deadline = time.monotonic() + JOIN_SECONDS
    while processes.process_id > 0:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def code_fingerprint() -> str:
    """Hash of Euroflax's own files and of the versions of what it computes with."""
    digest = hashlib.sha256(platform.python_version().encode())
    root = pathlib.Path(__file__).parent
    for file in sorted([*root.rglob("*.py"), *root.rglob("*.j2")]):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    for name in _PACKAGES:
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    return digest.hexdigest()


def same_everywhere(parts: dict[str, str]) -> None:
    """Refuses processes that do not all have the same `code`, `experiment` or `data`, each given by a text.

    Raises:
        ExperimentError: in every process; the odd ones are named: those that differ from most, or from process 0.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(text.encode()).digest() for text in parts.values()]
    host = socket.gethostname().encode()[:_HOST_BYTES].ljust(_HOST_BYTES)
    mine = np.frombuffer(b"".join(digests) + host, np.uint8)
    found = [bytes(row) for row in np.asarray(multihost_utils.process_allgather(mine), np.uint8)]
    hosts = [row[-_HOST_BYTES:].decode(errors="replace").strip() for row in found]
    faults = []
    for place, name in enumerate(parts):
        theirs = [row[32 * place : 32 * (place + 1)] for row in found]
        common = collections.Counter(theirs).most_common(1)[0][0]
        odd = [f"{number} on {hosts[number]}" for number, digest in enumerate(theirs) if digest != common]
        if odd:
            than = f"process {theirs.index(common)}" if len(theirs) == 2 else "the others"
            faults.append(f"process {', '.join(odd)} has other {name} than {than}; {_FIXES[name]}")
    if faults:
        raise ExperimentError(*faults)


def agree(wish: bool) -> bool:
    """Whether any process of the job wishes it: the same answer in all of them."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return wish
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(wish))))


def from_first(numbers: "np.ndarray") -> "np.ndarray":
    """Numbers below 2^32 that process 0 says, in every process of the job; all give an array of its shape."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    said = np.asarray(
        multihost_utils.broadcast_one_to_all(numbers.astype(np.int64).reshape(-1).view(np.int32)), np.int32
    )
    return said.view(np.int64).reshape(numbers.shape)


def gather_json(value: object) -> list:
    """What each process of the job has to say, in the order of their numbers: of each, a value that JSON can hold."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    said = json.dumps(value, ensure_ascii=False).encode()
    assert len(said) <= _SAID_BYTES
    padded = np.frombuffer(said.ljust(_SAID_BYTES), np.uint8)
    return [json.loads(bytes(row)) for row in np.asarray(multihost_utils.process_allgather(padded), np.uint8)]
