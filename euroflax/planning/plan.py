"""The plan of a run: parameters, tokens, mixture, memory, messages and time, before anything is computed."""

import dataclasses
import html
from typing import Any, Literal

from euroflax import model, sharding
from euroflax.data.ledger import ledger
from euroflax.data.order import Order
from euroflax.experiment import Experiment, Span
from euroflax.planning import minimum, roofline
from euroflax.planning.compiled import Compiled, compiled_step
from euroflax.planning.program import Collective, Program
from euroflax.planning.stages import declared_ledger, describe_stages
from euroflax.planning.targets import Target, compiler_version

_TIMES = ("step_seconds", "bound_by", "tokens_per_second", "mfu", "days", "device_hours", "kwh", "co2_kg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will be. What is not known, or has no meaning without a target, is None."""

    name: str
    parameters: int
    tokens: int
    steps: int
    method: Literal["compiled", "analytical"]
    """Whether the real compiler has seen the step, or all is arithmetic."""
    compiler: str | None
    """The compiler and its version."""
    target: str | None
    derived: str | None
    """What of the target's description was not read from a device."""
    devices: int
    mesh: dict[str, int]
    memory_bytes: dict[str, int | None]
    """Bytes on one device: parameters, optimizer, gradients, temporaries, their total, and the capacity."""
    fits: bool | None
    flops_per_step: dict[str, float | None]
    """Operations of all devices in a step: those that the model needs, and those that the program does."""
    collectives: list[dict] | None
    """Messages by kind and mesh axis: what a device sends in a step, and the least that it must."""
    step_seconds: float | None
    """The least time of a step, by the longest of its parts."""
    seconds: dict[str, float]
    """The least time of each part of a step: compute, memory, and each network."""
    bound_by: str | None
    tokens_per_second: float | None
    mfu: float | None
    days: float | None
    device_hours: float | None
    kwh: float | None
    co2_kg: float | None
    assumptions: list[str]
    stages: list[dict]
    """Each stage with its rows and, for each source, natural share, share, rows and epochs, where they are known."""
    ledger: list[dict] | None
    """What the run will have read at its end, by source and provider; None where a size is not known."""

    def to_json(self) -> dict:
        """The plan as JSON."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        from euroflax.planning.lines import plan_lines

        rows = (line.partition(" ") for line in plan_lines(self))
        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(text.strip())}</td></tr>" for name, _, text in rows)
        return f"<table style='text-align:left'>{''.join(cells)}</table>"


def make_plan(declared: Experiment, num_devices: int, order: Order | None = None, target: Target | None = None) -> Plan:
    """The plan of an experiment on a number of devices, which need not be there.

    Memory, messages and time are those of the stage with the largest batch.

    Args:
        declared: the experiment.
        num_devices: devices of the job.
        order: the order of rows over opened stores; without it sizes are the declared ones.
        target: the hardware; where its compiler is installed, the step is compiled.

    Raises:
        ExperimentError: the mesh does not make up the devices, the model or batch does not divide over it, or the
            mixture cannot be met.
        RunFailed: the compiler failed, and not for memory.
    """
    placed = sharding.make_mesh(declared, num_devices)
    mesh = dict(placed.shape)
    span = max(declared.spans, key=lambda span: span.batch_rows * span.sequence_length)
    stages = describe_stages(declared, order)
    compiler = None if target is None else compiler_version(target)
    compiled = None if target is None or compiler is None else compiled_step(declared, span, target)
    state = minimum.state_bytes(declared, placed)
    read = declared_ledger(declared, stages) if order is None else ledger(declared, order, declared.total_rows)
    memory = _memory(declared, span, mesh, state, target, compiled)
    capacity, total = memory["capacity"], memory["total"]
    flops = span.batch_rows * span.sequence_length * model.flops_per_token(declared.model, span.sequence_length)
    program = None if compiled is None else compiled.program
    return Plan(
        name=declared.name,
        parameters=model.num_parameters(declared.model),
        tokens=declared.total_tokens,
        steps=declared.total_steps,
        method="analytical" if compiled is None else "compiled",
        compiler=compiler,
        target=None if target is None else target.name,
        derived=None if target is None else target.accelerator.derived,
        devices=num_devices,
        mesh=mesh,
        memory_bytes=memory,
        fits=None if capacity is None or total is None else total <= capacity,
        flops_per_step={"model": flops, "program": None if program is None else program.flops * num_devices},
        stages=stages,
        ledger=None if read is None else [dataclasses.asdict(entry) for entry in read],
        **_speed(declared, span, mesh, target, compiled),
    )


def _memory(
    declared: Experiment,
    span: Span,
    mesh: dict[str, int],
    state: dict[str, int],
    target: Target | None,
    compiled: Compiled | None,
) -> dict[str, int | None]:
    """Bytes on one device. The gradients count at the size of the parameters, and are part of what a program holds."""
    held = {**state, "gradients": state["parameters"]}
    if compiled is None:
        temporaries = minimum.temporaries(declared, span, mesh)
    else:
        temporaries = max(compiled.memory_bytes - sum(held.values()), 0)
    total = compiled.memory_bytes if compiled else sum(held.values()) + temporaries
    capacity = None if target is None else target.accelerator.memory_bytes
    return {**held, "temporaries": temporaries, "total": total, "capacity": capacity}


def _speed(
    declared: Experiment, span: Span, mesh: dict[str, int], target: Target | None, compiled: Compiled | None
) -> dict[str, Any]:
    """The fields of a plan that speak of messages, time and cost."""
    least = minimum.least_messages(declared, span, mesh)
    program = None if compiled is None else compiled.program
    fields: dict[str, Any] = dict.fromkeys((*_TIMES, "collectives"))
    fields |= {"seconds": {}, "assumptions": []}
    if compiled is None or program is not None:
        fields["collectives"] = _collectives(program, least)
    if target is None or fields["collectives"] is None:
        return fields
    tokens = span.batch_rows * span.sequence_length
    flops = tokens * model.flops_per_token(declared.model, span.sequence_length)
    if program is None:
        again = 4 / 3 if declared.model.remat == "full" else 1
        messages = [Collective(kind, axis, round(size), 1) for (kind, axis), size in least.items()]
        found = roofline.roofline(target, mesh, again * flops / target.num_devices, None, messages)
    else:
        messages = list(program.collectives)
        found = roofline.roofline(target, mesh, program.flops, program.memory_bytes, messages)
    per_second = tokens / found.step_seconds
    days = roofline.days(declared.total_tokens, per_second)
    fields |= {
        "seconds": found.seconds,
        "step_seconds": found.step_seconds,
        "bound_by": found.bound_by,
        "tokens_per_second": per_second,
        "mfu": flops / found.step_seconds / target.num_devices / target.accelerator.peak_flops,
        "days": days,
        **roofline.cost(target, days),
        "assumptions": roofline.assumptions(target),
    }
    return fields


def _collectives(program: Program | None, least: minimum.Least) -> list[dict]:
    """Messages of the program beside the least ones; without a program only the latter."""
    found = {} if program is None else {(c.kind, c.axis): c.bytes for c in program.collectives}
    return [
        {
            "kind": kind,
            "axis": axis,
            "bytes": None if program is None else found.get((kind, axis), 0),
            "minimum_bytes": round(least.get((kind, axis), 0)),
        }
        for kind, axis in sorted(found.keys() | least.keys(), key=lambda key: (key[1], key[0]))
    ]
