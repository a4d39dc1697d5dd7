"""One table of names, read in both directions: our parameters, and the tensors of a Hugging Face folder."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from euroflax.experiment import Experiment, ExperimentError, Model

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
        "max_position_embeddings": declared.data.sequence_length,
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
        ExperimentError: the architecture, or a part of it, is not one that we compute.
    """
    architecture = next(iter(config.get("architectures") or []), None)
    if architecture not in ARCHITECTURES:
        raise ExperimentError(
            f"{where}: architectures={architecture} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "quantization_config": config.get("quantization_config") is not None,
    }
    faults = [
        f"{where}: {field}={config[field]} is not supported; use a model without"
        for field in unsupported
        if unsupported[field]
    ]
    if rope_type != "default":
        faults.append(f"{where}: rope_type={rope_type} is not supported; use a model with plain rotary positions")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    faults += [f"{where}: {field} is missing; restore it" for field in needed if not isinstance(config.get(field), int)]
    if faults:
        raise ExperimentError(*faults)
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "embed_dim": config["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "mlp_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "qk_norm": architecture == "Qwen3ForCausalLM",
        "tied_output": bool(config.get("tie_word_embeddings", False)),
    }
