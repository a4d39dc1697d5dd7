"""Exported folders beside PyTorch and transformers; needs the extra `parity`, and fails without it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from euroflax import generation, huggingface, model, sharding, verbs
from euroflax.data import tokenizer as tokens
from euroflax.experiment import override
from euroflax.generation import Sampling
from euroflax.huggingface import writer
from euroflax.languages import EU24
from tests.conftest import ROOT, small

pytestmark = pytest.mark.parity

VARIANTS = {
    "llama": {},
    "qwen3": {"model__qk_norm": True},
    "tied": {"model__tied_output": True, "model__qk_norm": False},
}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tmp_path_factory, cache):
    """A run of a few steps, its parameters, and the folder that `export` wrote."""
    from euroflax.folders import Folders

    folder = tmp_path_factory.mktemp(request.param)
    changes = {"model__qk_norm": False, "model__tied_output": False} | VARIANTS[request.param]
    declared = small(languages=EU24, training__schedule__peak_learning_rate=3e-2, **changes)
    folders = Folders(cache_dir=cache, runs_dir=folder / "runs", data_root=folder)
    run = verbs.train(declared, folders)
    return declared, run.params, verbs.export(declared, folders)


def transformers_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def prompts():
    texts = []
    for code in EU24:
        lines = (ROOT / f"euroflax/sample/{code}.heldout.jsonl").read_text().splitlines()
        texts.append(json.loads(lines[0])["text"][: 30 + len(texts)])
    return texts


def our_logits(declared, params, ids):
    tokens_BL = jnp.array([ids])
    batch = {
        "tokens_BL": tokens_BL,
        "segment_ids_BL": jnp.ones_like(tokens_BL),
        "positions_BL": jnp.arange(len(ids))[None],
    }
    params = jax.tree.map(jnp.asarray, jax.device_get(params))
    return np.asarray(model.apply(declared.model, params, batch)[0])


def test_logits_agree_on_prompts_in_24_languages_padded_and_unpadded(exported):
    import torch
    from transformers import AutoTokenizer

    declared, params, path = exported
    theirs, tokenizer = transformers_model(path), AutoTokenizer.from_pretrained(path)
    known = tokens.read(path / "tokenizer.json")
    texts = prompts()
    padded = tokenizer(texts, return_tensors="pt", padding=True)
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert (padded["attention_mask"] == 0).any()
    with torch.no_grad():
        together = theirs(**padded, position_ids=positions).logits.numpy()
        for i, text in enumerate(texts):
            ids = [known.bos, *known.encode([text])[0]]
            assert tokenizer(text)["input_ids"] == ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            expected = our_logits(declared, params, ids)
            alone = theirs(torch.tensor([ids])).logits[0].numpy()
            np.testing.assert_allclose(alone, expected, atol=1e-4)
            np.testing.assert_allclose(together[i, -len(ids) :], expected, atol=1e-4)
    assert np.abs(expected).max() > 0.5


def test_greedy_text_is_that_of_transformers(exported):
    import torch
    from transformers import AutoTokenizer

    declared, params, path = exported
    theirs, tokenizer = transformers_model(path), AutoTokenizer.from_pretrained(path)
    texts = prompts()
    mesh = sharding.make_mesh(override(declared, {"mesh.data": 8}))
    with jax.set_mesh(mesh):
        found = generation.generate(
            declared.model, params, tokens.read(path / "tokenizer.json"), 64, texts, Sampling(max_new_tokens=12)
        )
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        written = theirs.generate(**encoded, max_new_tokens=12)[:, encoded["input_ids"].shape[1] :].tolist()
    for completion, ids in zip(found, written, strict=True):
        expected = ids[: ids.index(2) + 1] if 2 in ids else ids
        assert completion.tokens == expected, completion.prompt


def test_a_folder_that_transformers_wrote_is_read_and_gives_its_logits(exported, tmp_path):
    import torch

    declared, _, path = exported
    theirs = transformers_model(path)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes())
    declared = dataclasses.replace(declared, continue_from=".")
    folder = huggingface.check_agreement(declared, tmp_path)
    assert len(set(folder.files.values())) > 1
    mesh = sharding.make_mesh(override(declared, {"mesh.data": 8}))
    from euroflax.training.step import abstract_state

    params = folder.place(declared.model, abstract_state(declared, mesh).params)
    ids = list(range(1, 40))
    with torch.no_grad():
        expected = transformers_model(tmp_path)(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(our_logits(declared, params, ids), expected, atol=1e-4)


def byte_level(trainer):
    """As GPT-2's: no token before a text, and one name for all roles."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return inner, trainer("Bpe", ["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}


def prefixed(trainer):
    """As Llama 2's: a prefix before the text, bytes for what is unknown, and an end token behind the text."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    parts = [("Replace", "▁", " "), ("ByteFallback",), ("Fuse",), ("Strip", " ", 1, 0)]
    inner.decoder = tokenizers.decoders.Sequence([getattr(tokenizers.decoders, n)(*a) for n, *a in parts])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    return inner, trainer("Bpe", ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]), names


def pieces(trainer):
    """As T5's: a unigram model, whose template puts the end token behind the text."""
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "T5Tokenizer"}
    return inner, trainer("Unigram", ["<pad>", "</s>", "<unk>"], unk_token="<unk>"), names


@pytest.mark.parametrize("make", [byte_level, prefixed, pieces])
def test_a_foreign_tokenizer_gives_transformers_the_tokens_of_training(exported, tmp_path, make):
    from transformers import AutoTokenizer

    declared, _, _ = exported

    def trainer(kind, special, **more):
        found = getattr(tokenizers.trainers, f"{kind}Trainer")
        return found(vocab_size=600, special_tokens=special, show_progress=False, **more)

    inner, how, names = make(trainer)
    inner.train_from_iterator(prompts() * 3, trainer=how)
    path = tmp_path / "theirs" / "tokenizer.json"
    path.parent.mkdir()
    inner.save(str(path))
    path.with_name("tokenizer_config.json").write_text(json.dumps(names))
    known = tokens.read(path)
    (tmp_path / "hf").mkdir()
    writer._write_rest(declared, tmp_path / "hf", path, "float32")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in prompts():
        assert theirs(text)["input_ids"] == [known.bos, *known.encode([text])[0]]
