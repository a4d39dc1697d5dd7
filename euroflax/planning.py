"""The plan of a run by arithmetic: parameters, tokens, mixture and memory, before anything is computed."""

import dataclasses
import html
import math

import jax

from euroflax import model, sharding
from euroflax.data.mixture import Resolved
from euroflax.experiment import Experiment
from euroflax.training.step import init_state

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will be."""

    name: str
    parameters: int
    tokens: int
    steps: int
    flops_per_step: int
    method: str
    devices: int
    mesh: dict[str, int]
    memory_bytes: dict[str, int]
    """Bytes on one device: parameters, optimizer, gradients exactly; temporaries estimated; their total."""
    mixture: list[dict]
    """Each source with its language, share, and where it is known its size and epochs."""

    def to_json(self) -> dict:
        """The plan as JSON."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        rows = (line.partition(" ") for line in lines(self))
        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(text.strip())}</td></tr>" for name, _, text in rows)
        return f"<table style='text-align:left'>{''.join(cells)}</table>"


def make_plan(declared: Experiment, num_devices: int, resolved: Resolved | None = None) -> Plan:
    """The plan of an experiment on a number of devices, which need not be there.

    Args:
        declared: the experiment.
        num_devices: devices of the job.
        resolved: the mixture over opened stores; without it sizes are the declared ones.

    Raises:
        ExperimentError: the mesh does not make up the devices, or the model or batch does not divide over it.
    """
    mesh = sharding.make_mesh(declared, num_devices)
    state = jax.eval_shape(lambda: init_state(declared))
    params = sharding.bytes_per_device(state.params, sharding.shardings(state.params, mesh))
    optimizer = sharding.bytes_per_device(state.optimizer, sharding.shardings(state.optimizer, mesh))
    memory = {"parameters": params, "optimizer": optimizer, "gradients": params}
    memory["temporaries"] = _temporaries(declared, dict(mesh.shape))
    memory["total"] = sum(memory.values())
    batch_tokens = declared.batch_rows * declared.data.sequence_length
    return Plan(
        name=declared.name,
        parameters=model.num_parameters(declared.model),
        tokens=declared.total_rows * declared.data.sequence_length,
        steps=declared.total_steps,
        flops_per_step=batch_tokens * model.flops_per_token(declared.model, declared.data.sequence_length),
        method="analytical",
        devices=num_devices,
        mesh=dict(mesh.shape),
        memory_bytes=memory,
        mixture=_mixture(declared, resolved),
    )


def _temporaries(declared: Experiment, mesh: dict[str, int]) -> int:
    """Estimated bytes of activations kept for the backward pass, and of one chunk of logits, on one device."""
    config, training = declared.model, declared.training
    rows = declared.batch_rows // training.accumulation_steps // (mesh["data"] * mesh["fsdp"])
    tokens = rows * declared.data.sequence_length
    width = 2 if config.compute_dtype == "bfloat16" else 4
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    matrix_outputs = (heads + config.num_heads * config.head_dim + 2 * config.mlp_dim) // mesh["tensor"]
    kept = {
        "full": config.embed_dim,
        "dots": 3 * config.embed_dim + matrix_outputs,
        "none": 6 * config.embed_dim + 2 * matrix_outputs + config.mlp_dim // mesh["tensor"],
    }[config.remat]
    chunk = min(declared.data.sequence_length, training.loss_chunk_tokens)
    logits = 3 * rows * chunk * config.vocab_size // mesh["tensor"] * _FLOAT32
    return config.num_layers * tokens * kept * width + logits


def _mixture(declared: Experiment, resolved: Resolved | None) -> list[dict]:
    sources, weights = declared.data.sources, declared.data.mixture.weights
    sizes = [source.expected_bytes for source in sources]
    if not weights and all(size is not None for size in sizes):
        known = [size or 0 for size in sizes]
        weights = {source.name: size / sum(known) for source, size in zip(sources, known, strict=True)}
    drawn = resolved.drawn(declared.total_rows) if resolved else None
    table = []
    for i, source in enumerate(sources):
        entry = {"source": source.name, "language": source.language, "share": weights.get(source.name)}
        if drawn is not None and resolved is not None:
            entry |= {"rows": drawn[i], "epochs": drawn[i] / resolved.rows_per_epoch[i], "size": "measured"}
        else:
            entry |= {"rows": None, "epochs": None, "size": "declared" if source.expected_bytes else "unknown"}
        table.append(entry | {"expected_bytes": source.expected_bytes})
    return table


def lines(plan: Plan) -> list[str]:
    """The plan in a few lines."""
    memory = plan.memory_bytes
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    shares = sorted(((row["share"] or 0, row["source"]) for row in plan.mixture), reverse=True)
    epochs = [row["epochs"] for row in plan.mixture if row["epochs"] is not None]
    languages = len({row["language"] for row in plan.mixture})
    read = f", {min(epochs):.2g} to {max(epochs):.2g} epochs each" if epochs else ""
    top, least = shares[0], shares[-1]
    if top[0] == 0:
        spread = "in proportion to their sizes"
    elif math.isclose(top[0], least[0], rel_tol=1e-9):
        spread = f"{100 * top[0]:.2f}% each"
    else:
        spread = f"{100 * top[0]:.2f}% ({top[1]}) to {100 * least[0]:.3g}% ({least[1]})"
    return [
        f"parameters  {plan.parameters:,}",
        f"tokens      {plan.tokens:,} in {plan.steps:,} steps, {plan.flops_per_step:.3g} FLOPs a step",
        f"mixture     {len(plan.mixture)} sources in {languages} languages, {spread}{read}",
        f"memory      {size(memory['total'])} a device: parameters {size(memory['parameters'])}, optimizer "
        f"{size(memory['optimizer'])}, gradients {size(memory['gradients'])}, temporaries about "
        f"{size(memory['temporaries'])}",
        f"devices     {plan.devices} ({mesh}), {plan.method} plan",
    ]


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
