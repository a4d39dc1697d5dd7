"""The plan of a run by arithmetic: parameters, tokens, mixture and memory, before anything is computed."""

import dataclasses
import html
import math
from collections.abc import Sequence

import jax

from euroflax import model, sharding
from euroflax.data.ledger import Entry, ledger
from euroflax.data.order import Order
from euroflax.data.shares import DENOMINATOR, Size, declared_shares, declared_size, row_weights
from euroflax.experiment import Experiment, Span
from euroflax.languages import fold
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
    stages: list[dict]
    """Each stage with its rows and, for each source, natural share, share, rows and epochs, where they are known."""
    ledger: list[dict] | None
    """What the run will have read at its end, by source and provider; None where a size is not known."""

    def to_json(self) -> dict:
        """The plan as JSON."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        rows = (line.partition(" ") for line in lines(self))
        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(text.strip())}</td></tr>" for name, _, text in rows)
        return f"<table style='text-align:left'>{''.join(cells)}</table>"


def make_plan(declared: Experiment, num_devices: int, order: Order | None = None) -> Plan:
    """The plan of an experiment on a number of devices, which need not be there.

    Args:
        declared: the experiment.
        num_devices: devices of the job.
        order: the order of rows over opened stores; without it sizes are the declared ones.

    Raises:
        ExperimentError: the mesh does not make up the devices, the model or batch does not divide over it, or the
            mixture cannot be met.
    """
    mesh = sharding.make_mesh(declared, num_devices)
    state = jax.eval_shape(lambda: init_state(declared))
    params = sharding.bytes_per_device(state.params, sharding.shardings(state.params, mesh))
    optimizer = sharding.bytes_per_device(state.optimizer, sharding.shardings(state.optimizer, mesh))
    memory = {"parameters": params, "optimizer": optimizer, "gradients": params}
    memory["temporaries"] = _temporaries(declared, dict(mesh.shape))
    memory["total"] = sum(memory.values())
    batch_tokens = declared.batch_rows * declared.data.sequence_length
    stages = describe_stages(declared, order)
    read = _declared_ledger(declared, stages) if order is None else ledger(declared, order, declared.total_rows)
    return Plan(
        name=declared.name,
        parameters=model.num_parameters(declared.model),
        tokens=declared.total_tokens,
        steps=declared.total_steps,
        flops_per_step=batch_tokens * model.flops_per_token(declared.model, declared.data.sequence_length),
        method="analytical",
        devices=num_devices,
        mesh=dict(mesh.shape),
        memory_bytes=memory,
        stages=stages,
        ledger=None if read is None else [dataclasses.asdict(entry) for entry in read],
    )


def _temporaries(declared: Experiment, mesh: dict[str, int]) -> int:
    """Estimated bytes of activations kept for the backward pass, and of one chunk of logits, on one device."""
    config, training = declared.model, declared.training
    span = max(declared.spans, key=lambda span: span.batch_rows * span.sequence_length)
    rows = span.batch_rows // training.accumulation_steps // (mesh["replica"] * mesh["data"] * mesh["fsdp"])
    tokens = rows * span.sequence_length // mesh["sequence"]
    width = 2 if config.compute_dtype == "bfloat16" else 4
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    matrix_outputs = (heads + config.num_heads * config.head_dim + 2 * config.mlp_dim) // mesh["tensor"]
    kept = {
        "full": config.embed_dim,
        "dots": 3 * config.embed_dim + matrix_outputs,
        "none": 6 * config.embed_dim + 2 * matrix_outputs + config.mlp_dim // mesh["tensor"],
    }[config.remat]
    logits = 3 * tokens * min(config.vocab_size, training.loss_chunk_entries) // mesh["tensor"] * _FLOAT32
    return config.num_layers * tokens * kept * width + logits


def describe_stages(declared: Experiment, order: Order | None) -> list[dict]:
    """Each stage with what is read in it of each source: natural share, share asked, rows, epochs.

    Without the order of rows over opened stores the sizes are those that the sources declare, None where they do not.

    Raises:
        ExperimentError: the mixture cannot be met.
    """
    sources = declared.data.sources
    read = [0.0] * len(sources)
    stages = []
    for span in declared.spans:
        rows = span.stop_row - span.first_row
        sizes: list[Size | None]
        if order is None:
            sizes = [declared_size(source, span.sequence_length) for source in sources]
            known = [entry for entry in sizes if entry is not None]
            drawn: list[float] | None = None
            shares: Sequence[float | None] = [span.mixture.weights.get(source.name) for source in sources]
            if len(known) == len(sources):
                shares = declared_shares(span, sources, known, rows, read)
                weights = row_weights(span, sources, known, rows, read)
                drawn = [rows * weight / DENOMINATOR for weight in weights]
        else:
            mine = [stretch for stretch in order.stretches if stretch.span == span]
            sizes = [Size.of(packed.packing) for packed in mine[-1].sources]
            shares = mine[-1].shares
            ends = (stretch.numbers_at(stretch.stop_row) for stretch in mine)
            pairs = [[e - b for b, e in zip(s.begins, end, strict=True)] for s, end in zip(mine, ends, strict=True)]
            drawn = [float(sum(counts)) for counts in zip(*pairs, strict=True)]
        stages.append(_stage(declared, span, sizes, shares, drawn, read))
        if drawn is not None:
            read = [
                before + count / (size.rows if size else 1)
                for before, count, size in zip(read, drawn, sizes, strict=True)
            ]
    return stages


def _stage(
    declared: Experiment,
    span: Span,
    sizes: Sequence[Size | None],
    shares: Sequence[float | None],
    drawn: Sequence[float] | None,
    read: Sequence[float],
) -> dict:
    unit = span.mixture.unit
    total = sum(getattr(size, unit) for size in sizes if size) if all(sizes) else None
    table = []
    for i, source in enumerate(declared.data.sources):
        size = sizes[i]
        rows = None if drawn is None else drawn[i]
        table.append(
            {
                "source": source.name,
                "language": fold(source.language) or source.language,
                "size": "unknown" if size is None else "measured" if size.measured else "declared",
                "bytes": None if size is None else round(size.bytes),
                "tokens": None if size is None else round(size.tokens),
                "natural": getattr(size, unit) / total if size and total else None,
                "share": shares[i],
                "rows": None if rows is None else round(rows),
                "epochs": None if rows is None or size is None else rows / size.rows,
                "epochs_so_far": None if rows is None or size is None else read[i] + rows / size.rows,
            }
        )
    return {
        "stage": span.number,
        "first_row": span.first_row,
        "first_token": span.first_token,
        "sequence_length": span.sequence_length,
        "batch_rows": span.batch_rows,
        "unit": unit,
        "sources": table,
    }


def _declared_ledger(declared: Experiment, stages: list[dict]) -> list[Entry] | None:
    """What the run will have read by declared sizes; None where one is not declared."""
    entries = []
    for i, source in enumerate(declared.data.sources):
        lines = [stage["sources"][i] for stage in stages]
        if any(line["epochs"] is None for line in lines):
            return None
        epochs = lines[-1]["epochs_so_far"]
        entries.append(
            Entry(
                source=source.name,
                language=fold(source.language) or source.language,
                provider=source.provider,
                rows=sum(line["rows"] for line in lines),
                documents=None,
                bytes=round(epochs * lines[0]["bytes"]),
                tokens=round(epochs * lines[0]["tokens"]),
                epochs=epochs,
                left_over_tokens=None,
                size="declared",
            )
        )
    return entries


def lines(plan: Plan) -> list[str]:
    """The plan in a few lines."""
    memory = plan.memory_bytes
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    table = plan.stages[-1]["sources"]
    shares = sorted(((row["share"] or 0, row["source"]) for row in table), reverse=True)
    epochs = [row["epochs_so_far"] for row in table if row["epochs_so_far"] is not None]
    languages = len({row["language"] for row in table})
    read = f", {min(epochs):.2g} to {max(epochs):.2g} epochs each" if epochs else ""
    top, least = shares[0], shares[-1]
    if top[0] == 0:
        spread = "sizes not known yet"
    elif math.isclose(top[0], least[0], rel_tol=1e-9):
        spread = f"{100 * top[0]:.2f}% each"
    else:
        spread = f"{100 * top[0]:.2f}% ({top[1]}) to {100 * least[0]:.3g}% ({least[1]})"
    first = " of the first stage" if len(plan.stages) > 1 else ""
    stages = f" in {len(plan.stages)} stages" if len(plan.stages) > 1 else ""
    return [
        f"parameters  {plan.parameters:,}",
        f"tokens      {plan.tokens:,} in {plan.steps:,} steps, {plan.flops_per_step:.3g} FLOPs a step{first}",
        f"mixture     {len(table)} sources in {languages} languages{stages}, {spread}{read}",
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
