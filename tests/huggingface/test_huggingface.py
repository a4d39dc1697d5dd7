import dataclasses
import json
import math
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from euroflax import huggingface, model, sharding, verbs
from euroflax.data import tokenizer as tokens
from euroflax.experiment import ExperimentError, override
from euroflax.folders import Folders
from euroflax.huggingface import Folder, writer
from euroflax.huggingface.card import model_card
from euroflax.huggingface.names import tensors
from euroflax.training.record import read_metrics
from euroflax.training.step import abstract_state
from tests.conftest import assert_trees_close, run, write_experiment

VARIANTS = [{}, {"qk_norm": True}, {"tied_output": True}, {"qk_norm": True, "tied_output": True}]


@pytest.fixture(scope="module")
def exported(trained):
    """The experiment of a run, its folders, the run, and the folder that its export wrote."""
    declared, folders, done = trained
    return declared, folders, done, verbs.export(declared, folders)


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the folder, and an experiment of its own that continues from it."""
    shutil.copytree(exported[3], tmp_path / "hf")
    declared = dataclasses.replace(exported[0], name="next", continue_from="hf")
    return tmp_path / "hf", override(declared, {"training.tokens": 2 * 512, "training.schedule.warmup_tokens": 256})


def placed(declared, folder):
    mesh = sharding.make_mesh(override(declared, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}))
    return huggingface.Folder.open(folder).place(declared.model, abstract_state(declared, mesh).params)


def reader(params):
    def read(name, index):
        leaf = params
        for key in name.split("/"):
            leaf = leaf[key]
        return np.asarray(leaf)[index]

    return read


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", huggingface.DTYPES)
def test_what_is_imported_is_exported_bit_for_bit(changes, dtype, trained, tmp_path):
    declared = dataclasses.replace(trained[0], model=dataclasses.replace(trained[0].model, **changes))
    tokenizer = trained[2].path / "tokenizer" / "tokenizer.json"
    params = model.init(declared.model, jax.random.key(1))
    huggingface.export(declared, reader(params), tmp_path / "a", tokenizer, "card", dtype, shard_bytes=40_000)
    again = placed(declared, tmp_path / "a")
    huggingface.export(declared, reader(again), tmp_path / "b", tokenizer, "card", dtype, shard_bytes=40_000)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 2
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    if dtype == "float32":
        assert_trees_close(params, again, 0)
    else:
        rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), params)
        assert_trees_close(rounded, again, 0)


def test_names_and_shapes_are_those_of_the_format(exported):
    _, _, done, folder = exported
    found = load_file(folder / "model.safetensors")
    assert found["model.layers.1.self_attn.k_proj.weight"].shape == (2 * 16, 32)
    assert found["model.layers.0.self_attn.o_proj.weight"].shape == (32, 4 * 16)
    key_NDGK = np.asarray(done.params["layers"]["attention"]["key_DGK"])
    head, width = 1, 5
    np.testing.assert_array_equal(
        found["model.layers.1.self_attn.k_proj.weight"][head * 16 + width], key_NDGK[1, :, head, width]
    )
    output_NHKD = np.asarray(done.params["layers"]["attention"]["output_HKD"])
    np.testing.assert_array_equal(found["model.layers.0.self_attn.o_proj.weight"][:, 3 * 16 + 2], output_NHKD[0, 3, 2])
    config = json.loads((folder / "config.json").read_bytes())
    beside = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert beside["model_input_names"] == ["input_ids", "attention_mask"] and beside["bos_token"] == "<|begin_of_text|>"
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["max_position_embeddings"] == 64
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_the_card_says_what_the_record_of_the_run_says(exported):
    declared, _, done, folder = exported
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlanguage:\n- "el"\n- "en"\n- "mt"\n')
    assert "| sample-mt | Maltese | CC0-1.0 | Euroflax | public | not applicable | 10 |" in card
    for code, name in (("mt", "Maltese"), ("mean", "mean")):
        assert f"| {name} | {done.bits_per_byte[code]:.4f} |" in card
    assert f"{model.num_parameters(declared.model):,} parameters in 3 languages" in card
    assert "on 3,072 tokens" in card and "6 steps, the last of 512 tokens" in card


def test_an_export_over_an_older_one_replaces_it_whole(exported, tmp_path):
    declared, _, done, _ = exported
    tokenizer = done.path / "tokenizer" / "tokenizer.json"
    for card in ("one", "two"):
        huggingface.export(declared, reader(done.params), tmp_path / "hf", tokenizer, card, shard_bytes=40_000)
        assert (tmp_path / "hf" / "README.md").read_text() == card

    def read(name, index):
        if name == "layers/mlp_norm_D":
            raise OSError("disk")
        return reader(done.params)(name, index)

    with pytest.raises(OSError, match="disk"):
        huggingface.export(declared, read, tmp_path / "hf", tokenizer, "three")
    assert (tmp_path / "hf" / "README.md").read_text() == "two"
    huggingface.Folder.open(tmp_path / "hf")


def test_writing_holds_no_more_than_a_shard_and_a_tensor(trained, tmp_path):
    declared = override(trained[0], {"model.embed_dim": 512, "model.mlp_dim": 1024, "model.num_layers": 12})
    tokenizer = trained[2].path / "tokenizer" / "tokenizer.json"
    sizes = [4 * int(np.prod(tensor.shape)) for tensor in tensors(declared.model)]
    shapes = {tensor.ours: tensor for tensor in tensors(declared.model)}

    def read(name, index):
        tensor = shapes[name]
        return np.zeros([tensor.sizes[letter] for letter in name.rpartition("_")[2]], np.float32)

    shard = 8_000_000
    huggingface.export(declared, read, tmp_path / "warm", tokenizer, "", shard_bytes=shard)
    tracemalloc.start()
    huggingface.export(declared, read, tmp_path / "hf", tokenizer, "", shard_bytes=shard)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(sizes) > 6 * shard
    assert peak < shard + 2 * max(sizes) + 1_000_000


def test_a_run_begins_from_published_weights_and_says_so(exported, copied):
    _, folders, done, _ = exported
    folder, declared = copied
    here = dataclasses.replace(folders, data_root=folder.parent)
    began = verbs.train(declared, here)
    first = next(line["eval"] for line in began.metrics if "eval" in line)
    assert first["bits_per_byte.mt"] == pytest.approx(done.bits_per_byte["mt"], rel=1e-6)
    assert began.bits_per_byte["mt"] != first["bits_per_byte.mt"]
    record = json.loads((began.path / "manifest.json").read_bytes())["continue_from"]
    assert record["path"] == "hf" and set(record["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert "weights of hf" in (verbs.export(declared, here) / "README.md").read_text()
    shutil.rmtree(folder / "..", ignore_errors=True)


def test_a_run_whose_checkpoints_are_moved_away_since_none_is_whole_begins_from_the_weights_again(exported, copied):
    _, folders, _, _ = exported
    folder, declared = copied
    here = dataclasses.replace(folders, data_root=folder.parent, runs_dir=folder.parent / "runs")
    first = verbs.train(declared, here)
    for file in first.path.glob("checkpoints/*/state/manifest.ocdbt"):
        file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ExperimentError, match=r"none of its checkpoints .* is whole; restore one, begin from scratch"):
        verbs.train(declared, here)
    (first.path / "checkpoints").rename(first.path / "away")
    with pytest.raises(ExperimentError, match=r"its checkpoints are gone; restore one, begin from scratch"):
        verbs.train(declared, here)
    again = verbs.train(declared, here, from_scratch=True)
    (aside,) = here.runs_dir.glob(f"{declared.name}.aside-*")
    assert read_metrics(aside) == first.metrics
    losses = [[line["loss"] for line in run.metrics if "loss" in line] for run in (first, again)]
    assert losses[0] == losses[1]


def test_the_card_counts_what_was_read_when_the_batch_changed(exported, tmp_path):
    declared, folders, done, _ = exported
    shutil.copytree(folders.runs_dir, tmp_path / "runs")
    here = dataclasses.replace(folders, runs_dir=tmp_path / "runs")
    longer = override(declared, {"training.batch_tokens": 1024, "training.tokens": 8 * 512})
    verbs.train(longer, here)
    card = (verbs.export(override(longer, {"training.batch_tokens": 512}), here) / "README.md").read_text()
    assert "on 4,096 tokens" in card and "7 steps, the last of 1,024 tokens" in card
    edited = json.loads((done.path / "manifest.json").read_bytes())
    edited["sources"][0]["licence"] = "<script> | x"
    assert "| &lt;script&gt; \\| x" in model_card(
        longer, edited, [], {"step": 7, "position": 64, "ledger": edited["ledger"]}
    )


def test_two_exports_at_once_do_not_mix(exported, tmp_path):
    declared, _, done, _ = exported
    tokenizer = done.path / "tokenizer" / "tokenizer.json"

    def read(name, index):
        with pytest.raises(ExperimentError, match="is being written by another process"):
            huggingface.export(declared, reader(done.params), tmp_path / "hf", tokenizer, "second")
        return reader(done.params)(name, index)

    huggingface.export(declared, read, tmp_path / "hf", tokenizer, "first")
    assert (tmp_path / "hf" / "README.md").read_text() == "first"
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(ExperimentError, match="is not a folder of its own; move it away"):
        huggingface.export(declared, reader(done.params), tmp_path / "hf", tokenizer, "third")


def test_a_tokenizer_with_other_special_tokens_is_read_by_its_own_configuration(copied):
    folder, _ = copied
    text = (folder / "tokenizer.json").read_text()
    for ours, theirs in (("<|begin_of_text|>", "<s>"), ("<|end_of_text|>", "</s>"), ("<|pad|>", "<unk>")):
        text = text.replace(ours, theirs)
    (folder / "tokenizer.json").write_text(text)
    config = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": None, "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    known = tokens.read(folder / "tokenizer.json")
    assert (known.pad, known.bos, known.eos) == (0, 2, 2)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ExperimentError, match="names no eos_token"):
        tokens.read(folder / "tokenizer.json")


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_bytes()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_weights(change):
    def edit(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return edit


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def larger_tokenizer(folder):
    text = json.loads((folder / "tokenizer.json").read_bytes())
    text["model"]["vocab"] |= {"extra": 5000}
    (folder / "tokenizer.json").write_text(json.dumps(text))


def outside(folder):
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lacking(folder):
    index = {"weight_map": {"ghost.weight": "model.safetensors", "model.norm.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:100])


def unpair(held):
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("harm", "messages"),
    [
        (shutil.rmtree, ["is no folder"]),
        (lambda f: (f / "config.json").unlink(), ["holds no config.json"]),
        (lambda f: (f / "config.json").write_text("["), ["config.json is no JSON object"]),
        (
            edit_config(architectures=["MixtralForCausalLM"]),
            ["['MixtralForCausalLM'] is not supported; supported are LlamaForCausalLM, Qwen3ForCausalLM"],
        ),
        (edit_config(architectures=5), ["architectures=5 is not supported"]),
        (edit_config(architectures=[{}]), ["architectures=[{}] is not supported"]),
        (edit_config(model_type="mistral"), ["model_type=mistral is not supported"]),
        (
            edit_config(rope_parameters={"rope_type": "yarn"}),
            ["rope_parameters={'rope_type': 'yarn'} is not supported"],
        ),
        (edit_config(rope_parameters="x"), ["rope_parameters=x is not supported"]),
        (edit_config(rope_scaling={"type": "linear"}), ["rope_scaling={'type': 'linear'} is not supported"]),
        (edit_config(rope_parameters=None, rope_theta="abc"), ["rope_theta=abc is not a number above 0"]),
        (edit_config(num_attention_heads=0), ["num_attention_heads=0 is not a whole number above 0"]),
        (edit_config(hidden_size=True), ["hidden_size=True is not a whole number"]),
        (edit_config(head_dim=None), ["model.head_dim=16 is not the 128 of"]),
        (edit_config(rms_norm_eps="a"), ["rms_norm_eps=a is not a number above 0"]),
        (edit_config(tie_word_embeddings="false"), ["tie_word_embeddings=false is not true or false"]),
        (edit_config(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5 is not supported; it must be 1.0"]),
        (edit_config(rope_parameters={"partial_rotary_factor": 0.5}), ["is not supported; use a model with plain"]),
        (edit_config(layer_types=["full_attention", "sliding_attention"]), ["layer_types="]),
        (edit_config(hidden_act="gelu"), ["hidden_act=gelu is not supported"]),
        (edit_config(quantization_config={}), ["quantization_config={} is not supported"]),
        (edit_config(num_hidden_layers=3), ["model.num_layers=2 is not the 3 of"]),
        (
            edit_weights(lambda w: [w.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)]),
            ["lacks model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight"],
        ),
        (
            edit_weights(lambda w: w.update({"model.layers.0.bias": w["model.norm.weight"]})),
            ["holds model.layers.0.bias, which"],
        ),
        (
            edit_weights(lambda w: w.update({"model.norm.weight": np.zeros(7, np.float32)})),
            ["other shapes: model.norm.weight [7] and not [32]"],
        ),
        (
            edit_weights(lambda w: w.update({"model.norm.weight": np.zeros(32, np.int8)})),
            ["model.norm.weight I8; give weights that are not quantised"],
        ),
        (edit_weights(unpair), ["holds lm_head.weight, which"]),
        (pickled, ["pytorch_model.bin and no safetensors; a pickle can run any code"]),
        (lambda f: (f / "model.safetensors").unlink(), ["holds no model.safetensors"]),
        (cut_short, ["is no whole safetensors file"]),
        (outside, ["names ../elsewhere.safetensors outside its folder"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["holds no tokenizer.json; declare data.tokenizer.path"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["is no tokenizer.json"]),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), ["is no JSON object"]),
        (lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": "a", "bos_token": 5}'), ["that is no text"]),
        (larger_tokenizer, ["tokenizer.json needs 5001 rows and the embedding has 512"]),
        (lacking, ["names ghost.weight in files that do not hold them"]),
    ],
)
def test_a_folder_that_does_not_agree_is_refused(copied, harm, messages):
    folder, declared = copied
    harm(folder)
    with pytest.raises(ExperimentError) as caught:
        huggingface.check_agreement(declared, folder.parent)
    for message in messages:
        assert any(message in fault for fault in caught.value.faults), caught.value.faults


def test_a_tied_model_may_carry_its_embedding_twice(copied):
    folder, declared = copied
    edit_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))(folder)
    assert huggingface.check_agreement(declared, folder.parent).path == folder


def test_another_tokenizer_than_that_of_the_weights_is_refused_with_the_first_token_that_differs(copied):
    folder, declared = copied
    text = (folder / "tokenizer.json").read_text()
    (folder.parent / "mine.json").write_text(text)
    declared = override(declared, {"data.tokenizer.path": "mine.json"})
    huggingface.check_agreement(declared, folder.parent, tokens.read(folder.parent / "mine.json"))
    swapped = json.loads(text)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["Ġa"], vocabulary["Ġi"] = vocabulary["Ġi"], vocabulary["Ġa"]
    (folder.parent / "mine.json").write_text(json.dumps(swapped))
    with pytest.raises(
        ExperimentError, match=r"is not the tokenizer of continue_from=.*'Ġa' is \d+ here and \d+ there"
    ):
        huggingface.check_agreement(declared, folder.parent, tokens.read(folder.parent / "mine.json"))


def test_another_normalizer_with_the_same_vocabulary_is_refused_too(copied):
    folder, declared = copied
    declared = override(declared, {"data.tokenizer.path": "mine.json"})
    text = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder.parent / "mine.json").write_text(json.dumps(text))
    with pytest.raises(ExperimentError, match="its normalizer differs"):
        huggingface.check_agreement(declared, folder.parent, tokens.read(folder.parent / "mine.json"))


def test_check_and_train_refuse_before_anything_is_prepared(copied, tmp_path):
    folder, declared = copied
    pickled(folder)
    path = write_experiment(tmp_path / "next.py", declared)
    for verb in ("check", "train"):
        done = run(path, verb, "--data-root", tmp_path, "--runs-dir", tmp_path / "r", "--cache-dir", tmp_path / "c")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a pickle can run any code" in done.stderr
        assert not (tmp_path / "c" / "stores").exists()


def test_the_command_exports_in_the_asked_type(exported, tmp_path):
    declared, folders, _, _ = exported
    path = write_experiment(tmp_path / "tiny_eu24.py", declared)
    shutil.copytree(folders.runs_dir, tmp_path / "runs")
    done = run(path, "export", "--dtype", "bfloat16", "--runs-dir", tmp_path / "runs", "--cache-dir", folders.cache_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"exported    {tmp_path / 'runs' / 'tiny_eu24' / 'hf'}\n")
    held = load_file(tmp_path / "runs" / "tiny_eu24" / "hf" / "model.safetensors")
    assert {str(value.dtype) for value in held.values()} == {"bfloat16"}


@pytest.mark.slow
def test_a_checkpoint_of_any_mesh_is_exported_alike(exported, cache, tmp_path):
    declared = override(exported[0], {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "training.tokens": 1024})
    folders = Folders(cache_dir=cache, runs_dir=tmp_path, data_root=tmp_path)
    done = verbs.train(declared, folders)
    found = load_file(verbs.export(declared, folders) / "model.safetensors")
    gate_NDF = np.asarray(done.params["layers"]["mlp"]["gate_DF"])
    np.testing.assert_array_equal(found["model.layers.1.mlp.gate_proj.weight"], gate_NDF[1].T)


def test_an_export_deletes_nothing_that_it_did_not_write(exported, tmp_path):
    declared, folders, _, _ = exported
    shutil.copytree(folders.runs_dir, tmp_path / "runs")
    run_dir = tmp_path / "runs" / declared.name
    for name in ("hf", "hf.old-mine", "hf.partial", "hf.partial-mine"):
        (run_dir / name).mkdir(exist_ok=True)
        (run_dir / name / "precious.txt").write_text("mine")
    verbs.export(declared, dataclasses.replace(folders, runs_dir=tmp_path / "runs"))
    assert len(list(run_dir.glob("hf*/precious.txt"))) == 4 and not (run_dir / "hf" / "precious.txt").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_tensor(copied, value):
    folder, declared = copied
    held = load_file(folder / "model.safetensors")
    name = next(name for name in held if name.endswith("down_proj.weight"))
    held[name] = held[name].copy()
    held[name][0, 0] = value
    save_file(held, folder / "model.safetensors")
    opened = Folder.open(folder)
    abstract = jax.eval_shape(lambda: model.init(declared.model, jax.random.key(0)))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), abstract)
    with pytest.raises(ExperimentError, match=rf"{name} holds 1 values that are NaN or infinite"):
        opened.place(declared.model, placed)


def test_buffers_in_a_folder_are_not_superfluous(copied):
    folder, declared = copied
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(held, folder / "model.safetensors")
    assert Folder.open(folder).faults(declared.model) == []


def test_an_export_puts_the_begin_token_where_training_did_and_keeps_what_came_with_the_tokenizer(exported, tmp_path):
    declared, folders, _, _ = exported
    shutil.copytree(folders.runs_dir, tmp_path / "runs")
    beside = tmp_path / "runs" / declared.name / "tokenizer"
    inner = tokenizers.Tokenizer.from_file(str(beside / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    known = tokens.read(beside / "tokenizer.json")
    inner.save(str(beside / "tokenizer.json"))
    assert not tokens.read(beside / "tokenizer.json").begins_texts
    (beside / "chat_template.jinja").write_text("{{ messages }}")
    (beside / "generation_config.json").write_text(json.dumps({"eos_token_id": [known.eos, 7]}))
    extra = {
        "bos_token": tokens.BOS,
        "eos_token": tokens.EOS,
        "additional_special_tokens": ["<x>"],
        "tokenizer_class": "LlamaTokenizer",
    }
    (beside / "tokenizer_config.json").write_text(json.dumps(extra))
    folder = tmp_path / "hf"
    folder.mkdir()
    writer._write_rest(declared, folder, beside / "tokenizer.json", "float32")
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert written.encode("one").ids == [known.bos, *known.encode(["one"])[0]]
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [known.eos, 7]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<x>"] and config["tokenizer_class"] == "PreTrainedTokenizerFast"
