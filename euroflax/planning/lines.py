"""A plan in a few lines of text."""

import math

from euroflax.planning.plan import Plan
from euroflax.planning.targets import how_to_compile, parse_target


def plan_lines(plan: Plan) -> list[str]:
    """The plan in a few lines."""
    flops = plan.flops_per_step
    first = " of the largest batch" if len(plan.stages) > 1 else ""
    work = f"{flops['model']:.3g} FLOPs a step{first}" + (
        "" if flops["program"] is None else f", {flops['program']:.3g} by the program"
    )
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    where = f"{plan.devices} devices" if plan.target is None else f"{plan.target}, {plan.devices} devices"
    method = f"compiled by {plan.compiler}" if plan.method == "compiled" else "an analytical plan"
    if plan.target is not None and plan.compiler is None:
        method += f": the compiler for it is not installed; {how_to_compile(parse_target(plan.target))} has it compiled"
    lines = [
        f"parameters  {plan.parameters:,}",
        f"tokens      {plan.tokens:,} in {plan.steps:,} steps, {work}",
        f"mixture     {_mixture_line(plan.stages)}",
        f"devices     {where} ({mesh}), {method}",
        f"memory      {_memory_line(plan)}",
    ]
    return lines + _time_lines(plan)


def _mixture_line(stages: list[dict]) -> str:
    table = stages[-1]["sources"]
    epochs = [row["epochs_so_far"] for row in table if row["epochs_so_far"] is not None]
    read = f", {min(epochs):.2g} to {max(epochs):.2g} epochs each" if epochs else ""
    if epochs and f"{min(epochs):.2g}" == f"{max(epochs):.2g}":
        read = f", {min(epochs):.2g} epochs each"
    spreads = [_spread(stage["sources"]) for stage in stages]
    if len(stages) > 1:
        spreads = [f"stage {stage['stage']}: {spread}" for stage, spread in zip(stages, spreads, strict=True)]
    languages = len({row["language"] for row in table})
    return f"{_counted(len(table), 'source')} in {_counted(languages, 'language')}, {'; '.join(spreads)}{read}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _spread(table: list[dict]) -> str:
    """The largest and the smallest share of a stage."""
    shares = sorted(((row["share"] or 0, row["source"]) for row in table), reverse=True)
    top, least = shares[0], shares[-1]
    if top[0] == 0:
        return "sizes not known yet"
    if math.isclose(top[0], least[0], rel_tol=1e-9):
        return f"{100 * top[0]:.2f}% each"
    return f"{100 * top[0]:.2f}% ({top[1]}) to {100 * least[0]:.3g}% ({least[1]})"


def _memory_line(plan: Plan) -> str:
    memory = {name: count or 0 for name, count in plan.memory_bytes.items()}
    about = "" if plan.method == "compiled" else "about "
    parts = ", ".join(f"{name} {size(memory[name])}" for name in ("parameters", "optimizer", "gradients"))
    line = f"{size(memory['total'])} a device: {parts}, temporaries {about}{size(memory['temporaries'])}"
    if plan.fits is None:
        return line
    over = abs(memory["capacity"] - memory["total"])
    verdict = f"fits, {size(over)} to spare" if plan.fits else f"does not fit, {size(over)} too much"
    return f"{line}; {verdict} of {size(memory['capacity'])}"


def _time_lines(plan: Plan) -> list[str]:
    if plan.step_seconds is None or plan.days is None:
        return []
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.seconds.items())
    energy = "energy not known" if plan.kwh is None else f"{plan.kwh:,.0f} kWh, {plan.co2_kg:,.0f} kg CO2"
    return [
        f"step        {plan.step_seconds:.3g} s at best, bound by {plan.bound_by}: {parts}",
        f"speed       {plan.tokens_per_second:,.0f} tokens/s, MFU {100 * (plan.mfu or 0):.1f}%, at best",
        f"cost        {plan.days:,.2f} days, {plan.device_hours:,.0f} device-hours, {energy}, at best",
        *(f"assumed     {line}" for line in plan.assumptions),
    ]


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
