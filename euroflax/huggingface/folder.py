"""A Hugging Face folder, read piece by piece. Only safetensors: nothing is unpickled, no code in it is run."""

import collections
import dataclasses
import hashlib
import json
import pathlib
from typing import TypeVar

import jax
import numpy as np
import safetensors

from euroflax.data.tokenizer import Tokenizer
from euroflax.data.tokenizer import read as read_tokenizer
from euroflax.experiment import Experiment, ExperimentError, Model
from euroflax.folders import parse_json
from euroflax.huggingface.names import Tensor, from_config, tensors
from euroflax.sharding import name_of

T = TypeVar("T")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names of what older folders hold besides parameters: PyTorch's buffers, which follow from config.json."""
_FLOATS = ("F32", "BF16", "F16")
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Folder:
    """The weights of a model in a folder, which has been checked: every tensor is there, and no other."""

    path: pathlib.Path
    config: dict
    files: dict[str, pathlib.Path]
    """The file of each tensor."""

    @classmethod
    def open(cls, path: pathlib.Path) -> "Folder":
        """Opens a folder with `config.json` and safetensors, one file or several with an index.

        Raises:
            ExperimentError: it is no such folder, holds pickles only, or its architecture is not supported.
        """
        if not path.is_dir():
            raise ExperimentError(f"continue_from={path} is no folder; give a Hugging Face folder below --data-root")
        if not (path / "config.json").is_file():
            raise ExperimentError(f"continue_from={path} holds no config.json; give a Hugging Face folder")
        config = _read_json(path / "config.json")
        from_config(config, str(path / "config.json"))
        return cls(path, config, _find_files(path))

    @property
    def fields(self) -> dict[str, object]:
        """The fields of `Model` that the folder states."""
        return from_config(self.config, str(self.path / "config.json"))

    def faults(self, config: Model) -> list[str]:
        """Why these are not the weights of `config`: fields that differ, or else tensors that do not fit."""
        differing = [
            f"model.{field}={getattr(config, field)} is not the {value} of continue_from={self.path}; set it to that"
            for field, value in self.fields.items()
            if getattr(config, field) != value
        ]
        return differing or self._tensor_faults(config)

    def _tensor_faults(self, config: Model) -> list[str]:
        expected = {tensor.theirs: tensor for tensor in tensors(config)}
        found = {name: file for name, file in self.files.items() if not name.endswith(_BUFFERS)}
        if config.tied_output and "lm_head.weight" in found and "model.embed_tokens.weight" in found:
            head = found.pop("lm_head.weight")  # some tied models carry the embedding twice
            if not np.array_equal(_tensor(head, "lm_head.weight"), self._raw("model.embed_tokens.weight")):
                found["lm_head.weight"] = head
        missing, superfluous = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        faults = []
        if missing:
            faults.append(f"continue_from={self.path} lacks {_listed(missing)}; restore them")
        if superfluous:
            faults.append(
                f"continue_from={self.path} holds {_listed(superfluous)}, which its config.json does not speak of; "
                "take them out, or fix it"
            )
        shapes, kinds = [], []
        for name in sorted(expected.keys() & found.keys()):
            shape, kind = self._header(name)
            if shape != expected[name].shape:
                shapes.append(f"{name} {list(shape)} and not {list(expected[name].shape)}")
            if kind not in _FLOATS:
                kinds.append(f"{name} {kind}")
        if shapes:
            faults.append(f"continue_from={self.path} has other shapes: {_listed(shapes)}; fix config.json or them")
        if kinds:
            faults.append(
                f"continue_from={self.path} has tensors of other types than {', '.join(_FLOATS)}: {_listed(kinds)}; "
                "give weights that are not quantised"
            )
        return faults

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        with _opened(self.files[name]) as file:
            part = file.get_slice(name)
            return tuple(part.get_shape()), part.get_dtype()

    def _raw(self, name: str) -> np.ndarray:
        return _tensor(self.files[name], name)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that the model is read from."""
        read = {*self.files.values(), self.path / "config.json", self.path / "tokenizer.json"}
        found = {}
        for file in sorted(path for path in read if path.is_file()):
            with open(file, "rb") as opened:
                found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
        return found

    def place(self, config: Model, abstract_params: T) -> T:
        """The parameters in float32, onto the shardings of `abstract_params`; memory holds a tensor at a time."""
        by_name: dict[str, list[Tensor]] = collections.defaultdict(list)
        for tensor in tensors(config):
            by_name[tensor.ours].append(tensor)

        def read(path: tuple, index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = by_name[name_of(path)]
            if wanted[0].layer is None:
                return self._ours(wanted[0])[index]
            return np.stack([self._ours(tensor)[index[1:]] for tensor in wanted[index[0]]])

        def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: read(path, index))

        return jax.tree_util.tree_map_with_path(place, abstract_params)

    def _ours(self, tensor: Tensor) -> np.ndarray:
        value = tensor.to_ours(self._raw(tensor.theirs)).astype(np.float32)
        if not np.isfinite(value).all():
            count = int(np.size(value) - np.isfinite(value).sum())
            raise ExperimentError(
                f"continue_from={self.path}: {tensor.theirs} holds {count} values that are NaN or infinite; restore it"
            )
        return value


def check_agreement(declared: Experiment, data_root: pathlib.Path, known: Tokenizer | None = None) -> Folder:
    """The folder that an experiment continues from, whose tensors, tokenizer and embedding agree with it.

    Args:
        declared: an experiment with `continue_from`.
        data_root: where relative paths start.
        known: the tokenizer of the run, where it is known by now.

    Raises:
        ExperimentError: with all that does not agree.
    """
    assert declared.continue_from is not None
    folder = Folder.open(data_root / declared.continue_from)
    faults = folder.faults(declared.model)
    theirs = folder.path / "tokenizer.json"
    if not theirs.is_file() and declared.data.tokenizer.path is None:
        faults.append(f"continue_from={folder.path} holds no tokenizer.json; declare data.tokenizer.path")
    if theirs.is_file():
        published = read_tokenizer(theirs)
        if published.vocab_size > declared.model.vocab_size:
            faults.append(
                f"continue_from={folder.path}: tokenizer.json needs {published.vocab_size} rows and the embedding has "
                f"{declared.model.vocab_size}; give the tokenizer that belongs to the weights"
            )
        if known is not None and (odd := _difference(known, published)):
            faults.append(
                f"data.tokenizer.path={declared.data.tokenizer.path} is not the tokenizer of continue_from="
                f"{folder.path}: {odd}; leave it out"
            )
    if faults:
        raise ExperimentError(*faults)
    return folder


def _difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """What two tokenizers do differently; None where they give the same tokens for every text."""
    here, there = (one.inner.get_vocab(with_added_tokens=True) for one in (ours, theirs))
    if here != there:
        odd = min(token for token in here.keys() | there.keys() if here.get(token) != there.get(token))
        return f"{odd!r} is {here.get(odd)} here and {there.get(odd)} there"
    if (ours.pad, ours.bos, ours.eos) != (theirs.pad, theirs.bos, theirs.eos):
        return "other tokens begin, end or pad a text"
    mine, published = (json.loads(one.inner.to_str()) for one in (ours, theirs))
    parts = ("normalizer", "pre_tokenizer", "model", "added_tokens", "decoder")
    return next((f"its {part} differs" for part in parts if mine.get(part) != published.get(part)), None)


def _find_files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each tensor, by the index where there is one.

    Raises:
        ExperimentError: there are no safetensors, or the index names a file that is not there.
    """
    index = path / "model.safetensors.index.json"
    listed: dict[str, str] = {}
    if index.is_file():
        listed = _read_json(index).get("weight_map") or {}
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ExperimentError(f"{index} has no weight_map; restore it")
        if outside := sorted({name for name in listed.values() if pathlib.PurePath(name).name != name}):
            raise ExperimentError(f"{index} names {_listed(outside)} outside its folder; restore it")
        if absent := sorted({name for name in listed.values() if not (path / name).is_file()}):
            raise ExperimentError(f"continue_from={path} lacks {_listed(absent)}; restore them")
        files = [path / name for name in sorted(set(listed.values()))]
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    else:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise ExperimentError(
                f"continue_from={path} holds {_listed(pickles)} and no safetensors; a pickle can run any code when it "
                "is read and is refused: convert it to safetensors where you trust it"
            )
        raise ExperimentError(f"continue_from={path} holds no model.safetensors; give a Hugging Face folder")
    found: dict[str, pathlib.Path] = {}
    for file in files:
        with _opened(file) as opened:
            found |= dict.fromkeys(opened.keys(), file)
    if index.is_file() and (odd := sorted(name for name in listed if found.get(name) != path / listed[name])):
        raise ExperimentError(f"{index} names {_listed(odd)} in files that do not hold them; restore it")
    return found


def _opened(file: pathlib.Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise ExperimentError(f"{file} is no whole safetensors file ({error}); restore it") from error


def _tensor(file: pathlib.Path, name: str) -> np.ndarray:
    with _opened(file) as opened:
        return opened.get_tensor(name)


def _read_json(file: pathlib.Path) -> dict:
    try:
        value = parse_json(file.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ExperimentError(f"{file} is no JSON object; restore it")
    return value


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
