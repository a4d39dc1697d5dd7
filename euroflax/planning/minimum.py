"""What a step must move and hold at least, by arithmetic: what the compiled program is measured against."""

import dataclasses
import math

import jax

from euroflax import sharding
from euroflax.experiment import Experiment, Span
from euroflax.model.loss import num_chunks
from euroflax.sharding import letters_of, name_of
from euroflax.training.step import init_state

_FLOAT32 = 4
Least = dict[tuple[str, str], float]
"""Bytes that a device sends in a step, by kind of message and mesh axis."""


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a step's messages are made of, on one device."""

    width: int
    """Bytes of a number of the compute type."""
    tokens: float
    """Tokens of one part of the batch on a device."""
    parts: int
    matrices: float
    """Entries of the matrices that are gathered, on the devices of one place along the tensor axis."""
    table: float
    """Entries of the embedding, likewise."""
    vectors: float
    """Entries of the vectors that are split over the length of the model."""


def _sizes(declared: Experiment, span: Span, mesh: dict[str, int]) -> _Sizes:
    model, parts = declared.model, declared.training.accumulation_steps
    params = jax.eval_shape(lambda: init_state(declared)).params
    matrices = table = vectors = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        letters = letters_of(path)
        size = math.prod(leaf.shape) / (mesh["tensor"] if set(letters) & set("HGFV") else 1)
        if name_of(path) == "embedding_VD":
            table = size
            matrices += size if model.tied_output else 0
        elif len(letters.lstrip("N")) > 1:
            matrices += size
        elif "D" in letters:
            vectors += size
    rows = span.batch_rows / parts / (mesh["replica"] * mesh["data"] * mesh["fsdp"])
    width = 2 if model.compute_dtype == "bfloat16" else _FLOAT32
    return _Sizes(width, rows * span.sequence_length / mesh["sequence"], parts, matrices, table, vectors)


def least_messages(declared: Experiment, span: Span, mesh: dict[str, int]) -> Least:
    """The bytes that each device must send in a step, by kind and axis, if parameters lie as the tables say.

    Each matrix is gathered for the forward and for the backward pass and its gradient scattered, one axis after the
    other, in the compute type (Rajbhandari et al., "ZeRO", 2020, section 7.2.2), in each part of the batch. Embeddings
    are looked up where they lie and exchanged likewise. Copies of the parameters add up their gradients: over `data`
    in each part in the compute type, over `replica` once in float32. Devices that share rows gather keys and values
    for each pass and scatter their gradients. Over `tensor` each block gathers and scatters the residual stream in
    each pass (Korthikanti et al., 2022). What a pass leaves behind is not gathered again, and what `remat` computes
    again is: without it weights, keys and values are gathered once; with it both blocks gather the stream three times,
    and under "full" the first of them scatters it three times.
    """
    found: Least = {}

    def add(kind: str, axes: tuple[str, ...], size: float) -> None:
        devices = math.prod(mesh[axis] for axis in axes)
        if devices > 1:
            key = (kind, "+".join(axis for axis in axes if mesh[axis] > 1))
            moved = size * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)
            found[key] = found.get(key, 0) + moved

    model, s = declared.model, _sizes(declared, span, mesh)
    split = ("fsdp", "sequence")
    ways = mesh["fsdp"] * mesh["sequence"]
    passes = 1 if model.remat == "none" else 2
    output = model.embed_dim * model.vocab_size / mesh["tensor"]
    again = output if num_chunks(model, declared.training.loss_chunk_entries, mesh["tensor"]) > 1 else 0
    add("all-gather", split, (passes * (s.matrices - output) + output + again) * s.width * s.parts)
    add("reduce-scatter", ("fsdp",), s.matrices * s.width * s.parts)
    add("reduce-scatter", ("sequence",), s.matrices / mesh["fsdp"] * s.width * s.parts)
    stream = s.tokens * model.embed_dim * s.width * s.parts
    for axis in split:
        add("all-to-all", (axis,), 2 * stream)
    held = (s.matrices + (0 if model.tied_output else s.table) + s.vectors) / ways
    add("all-reduce", ("data",), held * s.width * s.parts)
    add("all-reduce", ("replica",), held * _FLOAT32)
    keys = s.tokens * mesh["sequence"] * 2 * model.num_kv_heads / mesh["tensor"] * model.head_dim
    add("all-gather", ("sequence",), passes * keys * s.width * model.num_layers * s.parts)
    add("reduce-scatter", ("sequence",), keys * s.width * model.num_layers * s.parts)
    gathers, scatters = {"none": (4, 4), "dots": (6, 4), "full": (6, 5)}[model.remat]
    add("all-gather", ("tensor",), (gathers * model.num_layers + 2) * stream)
    add("reduce-scatter", ("tensor",), (scatters * model.num_layers + 2) * stream)
    return found


def temporaries(declared: Experiment, span: Span, mesh: dict[str, int]) -> int:
    """Estimated bytes of what a step holds beside its state and gradients on one device, at its peak.

    What the layers keep for the backward pass and, of what is larger, what one layer holds in it with its gathered
    weights and their gradients, or a chunk of logits with its gradient; and the layers in the compute type.
    """
    config, s = declared.model, _sizes(declared, span, mesh)
    tensor = mesh["tensor"]
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    outputs = (heads + config.num_heads * config.head_dim + 2 * config.mlp_dim) / tensor
    residual = config.embed_dim / tensor
    kept = {
        "full": residual,
        "dots": 3 * residual + outputs,
        "none": 6 * residual + 2 * outputs + config.mlp_dim / tensor,
    }[config.remat]
    again = heads + config.num_heads * config.head_dim + 3 * config.mlp_dim if config.remat == "full" else 0
    layer = s.tokens * (5 * config.embed_dim + (again + 3 * config.mlp_dim) / tensor) * s.width
    output = config.embed_dim * config.vocab_size / tensor
    weights = (s.matrices - output) * s.width
    layer += 2 * weights / config.num_layers
    logits = 3 * s.tokens * min(config.vocab_size, declared.training.loss_chunk_entries) / tensor * _FLOAT32
    stream = s.tokens * config.embed_dim * _FLOAT32
    copies = weights / (mesh["fsdp"] * mesh["sequence"]) if s.width < _FLOAT32 else 0
    return int(config.num_layers * s.tokens * kept * s.width + copies + max(layer, logits + stream))


def state_bytes(declared: Experiment, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict[str, int]:
    """Bytes of the parameters and of the optimizer's state on one device, exactly."""
    state = jax.eval_shape(lambda: init_state(declared))
    return {
        "parameters": sharding.bytes_per_device(state.params, sharding.shardings(state.params, mesh)),
        "optimizer": sharding.bytes_per_device(state.optimizer, sharding.shardings(state.optimizer, mesh)),
    }
