"""How fast a step can be at best on a target, and what it is bound by; and what a run then costs."""

import dataclasses
import math

import numpy as np

from euroflax.accelerators import OVERHEAD, estimated_joules
from euroflax.planning.program import Collective
from euroflax.planning.targets import Target

GRAMS_PER_KWH = 210
"""CO2 equivalent of the European Union's electricity in 2023 (European Environment Agency)."""
_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step, each part as if it ran alone at the maker's rates and beside the others."""

    seconds: dict[str, float]
    """Of `compute`, `memory`, and `network AXIS`."""

    @property
    def step_seconds(self) -> float:
        """The longest part."""
        return max(self.seconds.values())

    @property
    def bound_by(self) -> str:
        """The name of the longest part."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def roofline(
    target: Target, mesh: dict[str, int], flops: float, memory_bytes: float | None, messages: list[Collective]
) -> Roofline:
    """The least time of a step.

    Args:
        target: the hardware.
        mesh: the size of each axis, in the order of the devices.
        flops: operations of one device.
        memory_bytes: bytes that one device reads and writes, None where that is not known.
        messages: what one device sends.
    """
    device = target.accelerator
    seconds = {"compute": flops / device.peak_flops}
    if memory_bytes is not None:
        seconds["memory"] = memory_bytes / device.memory_bandwidth
    for message in messages:
        part = f"network {message.axis}"
        seconds[part] = seconds.get(part, 0) + message.bytes / bandwidth(target, mesh, message.axis)
    return Roofline(seconds)


def bandwidth(target: Target, mesh: dict[str, int], axis: str) -> float:
    """Bytes a second that a device can send to those that it differs from along mesh axes, `fsdp+sequence` say.

    Where they lie in several nodes, the devices of a node share the work of the network: what one sends over it is a
    part of what they all gather.
    """
    index = tuple(slice(None) if name in axis.split("+") else 0 for name in mesh)
    group = np.arange(target.num_devices).reshape(tuple(mesh.values()))[index].ravel()
    together = int((group // target.node_devices == group[0] // target.node_devices).sum())
    device = target.accelerator
    if together == len(group):
        return device.link_bandwidth
    return min(device.link_bandwidth, together * device.network_bandwidth) if together > 1 else device.network_bandwidth


def cost(target: Target, days: float) -> dict[str, float | None]:
    """Device-hours, and energy and CO2 where the power of the devices is known."""
    hours = days * _DAY / 3600 * target.num_devices
    joules = estimated_joules(target.accelerator, hours * 3600)
    kwh = None if joules is None else joules / 3.6e6
    return {"device_hours": hours, "kwh": kwh, "co2_kg": None if kwh is None else kwh * GRAMS_PER_KWH / 1000}


def days(tokens: int, tokens_per_second: float) -> float:
    """Days to read so many tokens."""
    return math.inf if tokens_per_second == 0 else tokens / tokens_per_second / _DAY


def assumptions(target: Target) -> list[str]:
    """What times and costs rest on, in sentences."""
    device = target.accelerator
    said = [
        "time is a roofline: the longest of computing, memory and each network at the makers' rates, all at once",
        f"{device.name}: {device.peak_flops / 1e12:.0f} TFLOP/s in bfloat16, memory at "
        f"{device.memory_bandwidth / 1e12:.2f} TB/s, {device.link_bandwidth / 1e9:.0f} GB/s to devices of its "
        f"{'node' if device.platform == 'cuda' else 'slice'}, {device.network}",
    ]
    if device.derived is not None:
        said.append(f"the compiler was given a derived description: {device.derived}")
    if device.watts is None:
        said.append("the maker does not state this device's power, so energy is not known")
    else:
        said.append(
            f"{device.watts:.0f} W a device, times {OVERHEAD} for hosts, network and cooling; {GRAMS_PER_KWH} g CO2 a "
            "kWh, the European Union's mean of 2023"
        )
    return said
