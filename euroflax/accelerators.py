"""Accelerators as their makers describe them: what one device computes, holds and moves."""

import dataclasses
from typing import Literal

_GIB = 2**30
OVERHEAD = 1.5
"""Power of hosts, network and cooling, as a factor on that of the devices: assumed."""
MAX_UNROLLED_CHUNKS = 32
"""The most chunks of the loss that are compiled without a loop on CPU."""
GPU_SHARE = 0.92
"""Of a GPU's memory, what JAX is told to take for the program: the rest is for CUDA, its libraries and NCCL."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device as JAX counts them. Rates are the makers' figures at best, one way, a second."""

    name: str
    """As a target names it."""
    kind: str
    """How JAX's `device_kind` begins."""
    platform: Literal["tpu", "cuda"]
    peak_flops: float
    """Dense bfloat16 operations."""
    memory_bytes: int
    """What a program can use."""
    memory_bandwidth: float
    link_bandwidth: float
    """Bytes to other devices of the slice (all links of a torus), or of the node (NVLink)."""
    network_bandwidth: float
    """Bytes to other nodes or slices: this device's share of the node's network."""
    network: str
    """What network that is."""
    watts: float | None
    """Power at its limit; None where the maker does not say."""
    derived: str | None = None
    """What of the compiler's description was not read from a device; None where all was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What XLA must know of a GPU to compile for it without having it."""

    description: str
    capability: int
    """Major version of the compute capability."""
    core_count: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int
    l2_cache_size: int
    clock_rate_ghz: float
    device_memory_size: int
    memory_bandwidth: int

    def config(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        fields = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared_memory_per_core,
            "threads_per_core_limit": 2048,
            "core_count": self.core_count,
            "fpus_per_core": self.fpus_per_core,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": self.memory_bandwidth,
            "l2_cache_size": self.l2_cache_size,
            "clock_rate_ghz": self.clock_rate_ghz,
            "device_memory_size": self.device_memory_size,
            "shared_memory_per_block_optin": self.shared_memory_per_block_optin,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
        }
        versions = {"driver": "13.0.0", "runtime": "13.0.0", "compile_time_toolkit": "13.0.0", "dnn": "9.10.0"}
        lines = [f"{name}: {value}" for name, value in fields.items()]
        lines += [f'{name}_version: "{value}"' for name, value in versions.items()]
        return (
            f"gpu_device_info {{ {' '.join(lines)} cuda_compute_capability {{ major: {self.capability} }} }}\n"
            'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
            f'device_description_str: "{self.description}"'
        )


_HOPPER = Gpu(
    description="NVIDIA H100 80GB HBM3",
    capability=9,
    core_count=132,
    fpus_per_core=128,
    shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448,
    l2_cache_size=52_428_800,
    clock_rate_ghz=1.98,
    device_memory_size=84_942_979_072,
    memory_bandwidth=3_352_320_000_000,
)
_AMPERE = Gpu(
    description="NVIDIA A100-SXM4-40GB",
    capability=8,
    core_count=108,
    fpus_per_core=64,
    shared_memory_per_core=167936,
    shared_memory_per_block_optin=166912,
    l2_cache_size=41_943_040,
    clock_rate_ghz=1.41,
    device_memory_size=42_331_013_120,
    memory_bandwidth=1_555_200_000_000,
)
_CUSTOM_AMPERE = dataclasses.replace(
    _AMPERE,
    description="NVIDIA A100-SXM-64GB",
    core_count=124,
    device_memory_size=68_100_000_000,
    memory_bandwidth=1_640_000_000_000,
)
_GRACE_HOPPER = dataclasses.replace(
    _HOPPER,
    description="NVIDIA GH200 120GB",
    device_memory_size=97_871 * 2**20,
    memory_bandwidth=4_000_000_000_000,
)
_H200 = dataclasses.replace(
    _HOPPER,
    description="NVIDIA H200 141GB HBM3e",
    device_memory_size=151_397_597_184,
    memory_bandwidth=4_800_000_000_000,
)
_BLACKWELL = dataclasses.replace(
    _HOPPER,
    description="NVIDIA B200",
    capability=10,
    core_count=148,
    l2_cache_size=132_644_864,
    clock_rate_ghz=1.965,
    device_memory_size=191_514_411_008,
    memory_bandwidth=7_672_320_000_000,
)

GPUS = {
    "h100": _HOPPER,
    "h200": _H200,
    "a100-40": _AMPERE,
    "a100-64": _CUSTOM_AMPERE,
    "gh200": _GRACE_HOPPER,
    "b200": _BLACKWELL,
}


def _tpu(
    name: str,
    kind: str,
    teraflops: float,
    gib: float,
    bandwidth: float,
    link: float,
    network: float,
    watts: float | None = None,
) -> Accelerator:
    """A TPU by the figures of Google's documentation: rates in GB/s, the network in Gb/s a device."""
    return Accelerator(
        name=name,
        kind=kind,
        platform="tpu",
        peak_flops=teraflops * 1e12,
        memory_bytes=int(gib * _GIB),
        memory_bandwidth=bandwidth * 1e9,
        link_bandwidth=link * 1e9,
        network_bandwidth=network / 8 * 1e9,
        network=f"the data centre's network at {network:g} Gb/s a device",
        watts=watts,
    )


def _gpu(
    name: str, kind: str, teraflops: float, link: float, network: float, watts: float, derived: str | None = None
) -> Accelerator:
    """An NVIDIA GPU by its data sheet: NVLink in GB/s one way, the network in Gb/s a GPU."""
    gpu = GPUS[name]
    return Accelerator(
        name=name,
        kind=kind,
        platform="cuda",
        peak_flops=teraflops * 1e12,
        memory_bytes=int(gpu.device_memory_size * GPU_SHARE),
        memory_bandwidth=float(gpu.memory_bandwidth),
        link_bandwidth=link * 1e9,
        network_bandwidth=network / 8 * 1e9,
        network=f"InfiniBand at {network:g} Gb/s a GPU",
        watts=watts,
        derived=derived,
    )


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        # The power of TPU v4 is from Jouppi et al., "TPU v4" (2023); Google states none for the later ones.
        _tpu("v4", "TPU v4", 275, 30.75, 1228, 300, 50, 192),
        _tpu("v5e", "TPU v5 lite", 197, 15.75, 819, 200, 50),
        _tpu("v5p", "TPU v5", 459, 95.74, 2765, 600, 50),
        _tpu("v6e", "TPU v6 lite", 918, 31.25, 1638, 400, 100),
        _tpu("tpu7x", "TPU7x", 2307 / 2, 94.75, 7380 / 2, 600 / 2, 100 / 2),
        _gpu("h100", "NVIDIA H100", 989, 450, 400, 700),
        _gpu("h200", "NVIDIA H200", 989, 450, 400, 700),
        _gpu("b200", "NVIDIA B200", 2250, 900, 400, 1000),
        _gpu("a100-40", "NVIDIA A100", 312, 300, 200, 400),
        _gpu(
            "a100-64",
            "NVIDIA A100-SXM-64GB",
            358,
            300,
            100,
            440,
            derived="the A100 of 40 GB with the 124 cores, 64 GB and 1.64 TB/s of Leonardo's custom one",
        ),
        _gpu(
            "gh200",
            "NVIDIA GH200",
            989,
            150,
            200,
            680,
            derived="the H100 with the 96 GB and 4 TB/s of the Grace Hopper that JUPITER has",
        ),
    )
}


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator that JAX calls so; None where it is not known."""
    matches = [found for found in ACCELERATORS.values() if device_kind.startswith(found.kind)]
    return max(matches, key=lambda found: len(found.kind)) if matches else None


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of a device, by its maker's data sheet; None where it is not known."""
    found = accelerator_of(device_kind)
    return None if found is None else found.peak_flops


def estimated_joules(accelerator: Accelerator | None, device_seconds: float) -> float | None:
    """What devices take at the limit of their power, with hosts, network and cooling; None where it is not known."""
    if accelerator is None or accelerator.watts is None:
        return None
    return device_seconds * accelerator.watts * OVERHEAD
