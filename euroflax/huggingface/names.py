"""One table of names, read in both directions: our parameters, and the tensors of a Hugging Face folder."""

import dataclasses
import json
import typing
from collections.abc import Sequence

import numpy as np

from euroflax.experiment import Experiment, ExperimentError, Model
from euroflax.experiment.codec import shown

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
"""What can be read and written, with the `model_type`: Qwen3 is Llama with QK-norm."""

# Our name, their name (with the number of the layer), their dimensions: those that they merge stand together.
_TABLE = """
embedding_VD                  model.embed_tokens.weight                         V,D
layers/attention_norm_D       model.layers.{}.input_layernorm.weight            D
layers/attention/query_DHK    model.layers.{}.self_attn.q_proj.weight           HK,D
layers/attention/key_DGK      model.layers.{}.self_attn.k_proj.weight           GK,D
layers/attention/value_DGK    model.layers.{}.self_attn.v_proj.weight           GK,D
layers/attention/output_HKD   model.layers.{}.self_attn.o_proj.weight           D,HK
layers/attention/query_norm_K model.layers.{}.self_attn.q_norm.weight           K
layers/attention/key_norm_K   model.layers.{}.self_attn.k_norm.weight           K
layers/mlp_norm_D             model.layers.{}.post_attention_layernorm.weight   D
layers/mlp/gate_DF            model.layers.{}.mlp.gate_proj.weight              F,D
layers/mlp/up_DF              model.layers.{}.mlp.up_proj.weight                F,D
layers/mlp/down_FD            model.layers.{}.mlp.down_proj.weight              D,F
final_norm_D                  model.norm.weight                                 D
output_DV                     lm_head.weight                                    V,D
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a Hugging Face folder and the parameter that it is, or is a layer of."""

    ours: str
    """Name of our parameter: `layers/mlp/gate_DF`."""
    layer: int | None
    """Which layer of the stacked parameter; None where it is not stacked."""
    theirs: str
    """Name of their tensor."""
    sizes: dict[str, int]
    """The size of each dimension by its letter."""
    dims: str
    """Their dimensions: `HK,D` is a matrix whose rows run over heads and the width of a head."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        return tuple(int(np.prod([self.sizes[letter] for letter in part])) for part in self.dims.split(","))

    @property
    def _our_dims(self) -> str:
        return self.ours.rpartition("_")[2]

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Our array, a layer of it where it is stacked, as theirs."""
        order = [self._our_dims.index(letter) for letter in self.dims.replace(",", "")]
        return np.ascontiguousarray(value.transpose(order).reshape(self.shape))

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """Their array as ours."""
        letters = self.dims.replace(",", "")
        order = [letters.index(letter) for letter in self._our_dims]
        return value.reshape([self.sizes[letter] for letter in letters]).transpose(order)


def tensors(config: Model) -> list[Tensor]:
    """Every tensor of a model, in the order in which its layers are used."""
    sizes = {
        "D": config.embed_dim,
        "F": config.mlp_dim,
        "G": config.num_kv_heads,
        "H": config.num_heads,
        "K": config.head_dim,
        "V": config.vocab_size,
    }
    rows = [line.split() for line in _TABLE.strip().splitlines()]
    absent = [] if config.qk_norm else ["query_norm_K", "key_norm_K"]
    absent += ["output_DV"] if config.tied_output else []
    rows = [row for row in rows if row[0].rpartition("/")[2] not in absent]

    def tensor(row: Sequence[str], layer: int | None) -> Tensor:
        return Tensor(ours=row[0], layer=layer, theirs=row[1].format(layer), sizes=sizes, dims=row[2])

    stacked = [row for row in rows if row[0].startswith("layers/")]
    first, last = rows.index(stacked[0]), rows.index(stacked[-1])
    middle = [tensor(row, layer) for layer in range(config.num_layers) for row in stacked]
    return [*(tensor(row, None) for row in rows[:first]), *middle, *(tensor(row, None) for row in rows[last + 1 :])]


def to_config(declared: Experiment, special_ids: dict[str, int], dtype: str) -> dict:
    """The `config.json` of an experiment's model.

    Args:
        declared: the experiment; its sequence length is the context.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
        dtype: the type of the tensors.
    """
    model = declared.model
    architecture = "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "dtype": dtype,
        "hidden_size": model.embed_dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": declared.context_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_output,
        "hidden_act": "silu",
        "attention_bias": False,
        **({"use_sliding_window": False} if model.qk_norm else {"mlp_bias": False}),
        "initializer_range": model.init_std,
        "use_cache": True,
        **special_ids,
    }


def from_config(config: dict, where: str) -> dict[str, object]:
    """The fields of `Model` that a `config.json` states.

    Args:
        config: its content.
        where: what an error message calls it.

    Raises:
        ExperimentError: the architecture, or a part of it, is not one that we compute, or a field is of another type.
    """
    listed = config.get("architectures")
    architecture = listed[0] if isinstance(listed, list) and len(listed) == 1 else listed
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ExperimentError(
            f"{where}: architectures={listed} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    faults: list[str] = []

    def field(name: str, kind: type, default: object = None, among: dict = config) -> typing.Any:
        value: typing.Any = default if among.get(name) is None else among[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is not bool and not value > 0):
            what = {int: "a whole number above 0", float: "a number above 0", bool: "true or false"}[kind]
            faults.append(f"{where}: {name}={value} is not {what}; restore it")
            return kind(1)
        return kind(value)

    is_qwen = architecture == "Qwen3ForCausalLM"
    faults += _unsupported(config, ARCHITECTURES[architecture], where)
    width, heads = field("hidden_size", int), field("num_attention_heads", int)
    found = {
        "num_layers": field("num_hidden_layers", int),
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": field("num_key_value_heads", int, 32 if is_qwen else heads),
        "head_dim": field("head_dim", int, 128 if is_qwen else width // heads),
        "mlp_dim": field("intermediate_size", int),
        "vocab_size": field("vocab_size", int),
        "rope_theta": field("rope_theta", float, 10_000.0),
        "norm_epsilon": field("rms_norm_eps", float, 1e-6),
        "qk_norm": is_qwen,
        "tied_output": field("tie_word_embeddings", bool, False),
    }
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_theta") is not None:
        found["rope_theta"] = field("rope_theta", float, among=rope)
    if faults:
        raise ExperimentError(*faults)
    return found


def _unsupported(config: dict, model_type: str, where: str) -> list[str]:
    """What a configuration asks for that our decoder does not compute."""
    plain = {
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention"] * _length(config.get("layer_types")),
    }
    faults = [
        f"{where}: {name}={shown(config[name])} is not supported; it must be {shown(json.dumps(value))}"
        for name, value in plain.items()
        if config.get(name, value) not in (value, None)
    ]
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind not in (None, "default") or (isinstance(rope, dict) and rope.get("partial_rotary_factor", 1.0) != 1.0):
            faults.append(f"{where}: {name}={rope} is not supported; use a model with plain rotary positions")
    return faults


def _length(value: object) -> int:
    return len(value) if isinstance(value, list) else 0
