"""A run's parameters as a Hugging Face folder: written shard by shard, with a card from the run's record."""

import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from euroflax.data import tokenizer as tokens
from euroflax.experiment import Experiment, ExperimentError
from euroflax.folders import open_lock, parse_json, replace_file, replace_json
from euroflax.huggingface.names import Tensor, tensors, to_config

DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""Types in which tensors can be written."""
SHARD_BYTES = 5_000_000_000

Read = Callable[[str, tuple[int, ...]], np.ndarray]
"""Gives a parameter by our name, or, with an index, one layer of it."""


def export(
    declared: Experiment,
    read: Read,
    folder: pathlib.Path,
    tokenizer: pathlib.Path,
    card: str,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> pathlib.Path | None:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    One that is there is renamed when the new one is whole, and never deleted: returns its new name. Memory holds one
    shard and one tensor.

    Args:
        declared: the experiment.
        read: gives its parameters.
        folder: what to write.
        tokenizer: the tokenizer.json of the run.
        card: the text of its README.md.
        dtype: the type of the tensors, one of `DTYPES`.
        shard_bytes: the most that one file of weights holds; one tensor at least.
        advance: told the tensors written and in all.

    Raises:
        ExperimentError: another process writes the same folder, or something else stands in its place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ExperimentError(f"{folder} is not a folder of its own; move it away")
    with open_lock(folder.with_name(f"{folder.name}.lock")) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExperimentError(f"{folder} is being written by another process; wait for it") from error
        partial = folder.with_name(f"{folder.name}.partial-{os.urandom(4).hex()}")
        partial.mkdir()
        try:
            _write_weights(declared, read, partial, dtype, shard_bytes, advance)
            _write_rest(declared, partial, tokenizer, dtype)
            (partial / "README.md").write_text(card, encoding="utf-8")
            old = folder.with_name(f"{folder.name}.old-{os.urandom(4).hex()}") if folder.exists() else None
            if old is not None:
                folder.rename(old)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return old


def _write_weights(
    declared: Experiment,
    read: Read,
    folder: pathlib.Path,
    dtype: str,
    shard_bytes: int,
    advance: Callable[[int, int], None],
) -> None:
    """The tensors in safetensors files, with an index where there are several."""
    shards = list(_shards(tensors(declared.model), DTYPES[dtype].itemsize, shard_bytes))
    done, total = 0, sum(map(len, shards))
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        written = {}
        for tensor in shard:
            value = read(tensor.ours, () if tensor.layer is None else (tensor.layer,))
            written[tensor.theirs] = tensor.to_theirs(value.astype(DTYPES[dtype], copy=False))
            weight_map[tensor.theirs] = file
            done += 1
            advance(done, total)
        save_file(written, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library writes it for its owner alone
    if len(shards) > 1:
        size = sum(_bytes(tensor, DTYPES[dtype].itemsize) for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        replace_json(folder / "model.safetensors.index.json", index)


def _bytes(tensor: Tensor, width: int) -> int:
    return int(np.prod(tensor.shape)) * width


def _shards(listed: list[Tensor], width: int, shard_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors in order, as many in a shard as it holds."""
    shard: list[Tensor] = []
    filled = 0
    for tensor in listed:
        if shard and filled + _bytes(tensor, width) > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += _bytes(tensor, width)
    yield shard


def _write_rest(declared: Experiment, folder: pathlib.Path, tokenizer: pathlib.Path, dtype: str) -> None:
    """The configuration of model, generation and tokenizer, and what the tokenizer came with."""
    known = tokens.read(tokenizer)
    ids: dict[str, int] = {"bos_token_id": known.bos, "eos_token_id": known.eos, "pad_token_id": known.pad}
    replace_json(folder / "config.json", to_config(declared, ids, dtype))
    generation = _read_json(tokenizer.with_name("generation_config.json"))
    ends = generation.get("eos_token_id")
    several = {"eos_token_id": ends} if isinstance(ends, list) and known.eos in ends else {}
    replace_json(folder / "generation_config.json", {"do_sample": False} | generation | ids | several)
    replace_file(folder / "tokenizer.json", tokens.with_begin_token(tokenizer, known))
    declared_config = _read_json(tokenizer.with_name("tokenizer_config.json"))
    named = (("bos_token", known.bos), ("eos_token", known.eos), ("pad_token", known.pad))
    defaults = {
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": declared.context_length,
        **{role: known.inner.id_to_token(number) for role, number in named},
    }
    # Other classes make a tokenizer of their own out of the vocabulary, which may leave the begin token out.
    as_trained = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False}
    replace_json(folder / "tokenizer_config.json", defaults | declared_config | as_trained)
    for name in tokens.BESIDE:
        if name not in WRITTEN and tokenizer.with_name(name).is_file():
            replace_file(folder / name, tokenizer.with_name(name).read_bytes())


WRITTEN = ("tokenizer_config.json", "generation_config.json")


def _read_json(file: pathlib.Path) -> dict:
    return parse_json(file.read_bytes()) if file.is_file() else {}
