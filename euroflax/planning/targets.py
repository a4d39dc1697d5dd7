"""The hardware that a plan is for: named as `v5p:8x8x8` or `h100:64x4`, and made known to the compiler."""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import math
import os

from euroflax.accelerators import ACCELERATORS, GPUS, Accelerator
from euroflax.experiment import ExperimentError

_MAX_GPUS_PER_NODE = 8
_MAX_NODES = 16_384
_FLAT = [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
_CUBES = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
_LARGEST = {"v4": (16, 16, 16), "v5p": (16, 16, 24), "tpu7x": (16, 24, 24)}
_EXTRAS = {"tpu": "tpu", "cuda": "cuda"}
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a chip has one owner; a compiler need not
}
_COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}


@dataclasses.dataclass(frozen=True)
class Target:
    """Accelerators of one kind, arranged as they are connected."""

    name: str
    accelerator: Accelerator
    shape: tuple[int, ...]
    """Chips along each side of a slice, or nodes and GPUs in each."""

    @property
    def num_devices(self) -> int:
        """Devices as JAX counts them: a TPU7x chip is two."""
        return math.prod(self.shape) * (2 if self.accelerator.name == "tpu7x" else 1)

    @property
    def node_devices(self) -> int:
        """Devices that the fast network connects: a node's GPUs, a whole slice of TPUs."""
        return self.shape[1] if self.accelerator.platform == "cuda" else self.num_devices


def parse_target(text: str) -> Target:
    """The target of a name such as `v5e:16x16`.

    Raises:
        ExperimentError: there is no such kind or no such arrangement; the nearest are named.
    """
    kind, _, arrangement = text.strip().lower().partition(":")
    accelerator = ACCELERATORS.get(kind)
    if accelerator is None:
        raise ExperimentError(f"--on={text} names no accelerator that is known; use one of {', '.join(ACCELERATORS)}")
    example = "64x4 (nodes x GPUs in each)" if accelerator.platform == "cuda" else _name(_slices(kind)[4])
    sides = arrangement.split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides) or len(arrangement) > 20:
        fault = "is no arrangement of sizes of 1 or more" if arrangement else "has no arrangement"
        raise ExperimentError(f"--on={text} {fault}; use {kind}:{example}, for example")
    shape = tuple(map(int, sides))
    if accelerator.platform == "cuda":
        _check_nodes(text, kind, shape)
    elif shape not in _slices(kind):
        near = ", ".join(f"{kind}:{_name(found)}" for found in _nearest(shape, _slices(kind)))
        raise ExperimentError(f"--on={text} is no slice that exists; the nearest are {near}")
    return Target(f"{kind}:{_name(shape)}", accelerator, shape)


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _check_nodes(text: str, kind: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise ExperimentError(
            f"--on={text} does not say nodes x GPUs in each; use {kind}:{math.prod(shape) // 4 or 1}x4"
        )
    nodes, gpus = shape
    if gpus > _MAX_GPUS_PER_NODE or nodes > _MAX_NODES:
        near = " or ".join(f"{kind}:{min(max(nodes * gpus // size, 1), _MAX_NODES)}x{size}" for size in (4, 8))
        raise ExperimentError(
            f"--on={text} does not exist: nodes hold 1 to {_MAX_GPUS_PER_NODE} GPUs, jobs up to {_MAX_NODES} nodes; "
            f"the nearest are {near}"
        )


def _slices(kind: str) -> list[tuple[int, ...]]:
    """The slices of a TPU generation that can be had, by size."""
    if kind not in _LARGEST:
        return list(_FLAT)
    sides = range(4, max(_LARGEST[kind]) + 1, 4)
    cubes = [s for s in itertools.combinations_with_replacement(sides, 3) if math.prod(s) <= math.prod(_LARGEST[kind])]
    return sorted(_CUBES + cubes, key=math.prod)


def _nearest(shape: tuple[int, ...], slices: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The three slices most like a shape: its sides in another order, or nearest in chips."""
    chips = math.prod(shape)
    return sorted(slices, key=lambda s: (sorted(s) != sorted(shape), abs(math.log(math.prod(s) / chips)), s))[:3]


def compiler_version(target: Target) -> str | None:
    """The compiler of a target with its version, or None where it is not installed."""
    jaxlib = f"jaxlib {importlib.metadata.version('jaxlib')}"
    for module in _COMPILERS[target.accelerator.platform]:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if found is not None and target.accelerator.platform == "tpu":
            return f"libtpu {importlib.metadata.version('libtpu')}, {jaxlib}"
        if found is not None:
            return f"XLA for CUDA of {jaxlib}"
    return None


def how_to_compile(target: Target) -> str:
    """The command that installs the compiler of a target."""
    return f"pip install -e '.[{_EXTRAS[target.accelerator.platform]}]'"


def devices_of(target: Target) -> list:
    """The target's devices as the compiler sees them, in the order of their links; none of them needs to be here."""
    from jax.experimental import topologies

    if target.accelerator.platform == "tpu":
        # The library looks for the machine that it is on, and says so, unless it is told that there is none.
        for name, value in _NO_TPU_HERE.items():
            os.environ.setdefault(name, value)
        options = {"chip_config_name": "megacore"} if target.accelerator.name == "v4" else {}
        found = topologies.get_topology_desc(topology_name=target.name, platform="tpu", **options)
    else:
        config = GPUS[target.accelerator.name].config()
        found = topologies.get_topology_desc(
            platform="cuda", target_config=config, topology=f"1x{target.shape[0]}x{target.shape[1]}"
        )
    return list(found.devices)
