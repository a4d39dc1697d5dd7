import dataclasses
import json
import os

import pytest

from euroflax.experiment import (
    ExperimentError,
    Mixture,
    Model,
    Source,
    from_json,
    load,
    override,
    to_json,
    validate,
)
from euroflax.training.record import leaves
from tests.conftest import ROOT, TINY, small

HEAD = "from euroflax.experiment import *\n"


def faults(error):
    return "\n".join(error.value.faults)


def test_json_reads_back_equal():
    declared = load(TINY)
    assert from_json(json.loads(json.dumps(to_json(declared)))) == declared


def test_json_with_an_unknown_or_missing_field_is_refused():
    value = to_json(small())
    value["model"]["depth"] = 3
    del value["training"]["tokens"]
    with pytest.raises(ExperimentError) as error:
        from_json(value)
    assert "model.depth is not a field of Model" in faults(error)
    assert "training.tokens is missing; give a whole number" in faults(error)


def test_experiments_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().model.num_layers = 3
    with pytest.raises(TypeError):
        Mixture({"a": 1.0})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model.num_layers=3", 3),
        ("training.tokens=1_000_000", 1_000_000),
        ("training.tokens=1e6", 1_000_000),
        ("training.schedule.peak_learning_rate=1e-3", 1e-3),
        ("model.qk_norm=true", True),
        ("model.compute_dtype=bfloat16", "bfloat16"),
        ("checkpoint.keep_every_steps=none", None),
        ("checkpoint.keep_every_steps=7", 7),
        ("data.tokenizer.path=a=b.json", "a=b.json"),
        ('data.mixture.weights={"a": 1}', {"a": 1.0}),
        ("name=12", "12"),
    ],
)
def test_set_is_typed_by_the_dataclass(text, value):
    field, _, given = text.partition("=")
    changed = override(small(), {field: given})
    for part in field.split("."):
        changed = getattr(changed, part)
    assert changed == value and type(changed) is type(value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.num_layer", "3", "model.num_layer is not a field of Model; its nearest are num_layers"),
        ("modle.num_layers", "3", "modle is not a field of Experiment; its nearest are model"),
        ("model.num_layers", "2.5", "model.num_layers=2.5 has the wrong type; give a whole number"),
        ("model.num_layers", "true", "model.num_layers=true has the wrong type"),
        ("model.qk_norm", "1", "model.qk_norm=1 has the wrong type; give true or false"),
        ("model.remat", "some", "give one of none, dots, full"),
        ("model.num_layers.x", "1", "has no fields; set it as a whole"),
        ("model", "3", "model=3 has the wrong type"),
    ],
)
def test_a_wrong_override_names_field_and_fix(field, value, message):
    with pytest.raises(ExperimentError) as error:
        override(small(), {field: value})
    assert message in faults(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4; use one of 1, 2, 4"),
        ({"model__head_dim": 15}, "model.head_dim=15 is odd"),
        ({"model__vocab_size": 100}, "model.vocab_size=100 cannot hold 256 bytes"),
        ({"model__num_layers": 0}, "model.num_layers=0 is less than 1"),
        ({"model__norm_epsilon": 0.0}, "model.norm_epsilon=0.0 is not a positive number"),
        ({"training__batch_tokens": 500}, "not a multiple of data.sequence_length=64; use 448 or 512"),
        ({"training__accumulation_steps": 3}, "does not divide the 8 rows of a batch; use one of 1, 2, 4, 8"),
        ({"training__tokens": 0}, "training.tokens=0 is less than 1"),
        ({"training__tokens": 2**40}, "rows; use"),
        ({"training__schedule__warmup_tokens": 10**9}, "together exceed training.tokens=3072"),
        ({"training__schedule__peak_learning_rate": 0.0}, "peak_learning_rate=0.0 is not positive"),
        ({"training__schedule__kind": "cosine"}, "decay_tokens=512 is not used by kind=cosine"),
        ({"training__adam_beta2": 1.0}, "training.adam_beta2=1.0 is not in [0, 1)"),
        ({"mesh__tensor": 4, "mesh__data": 1}, "model.num_kv_heads=2 does not divide over mesh.tensor=4"),
        ({"mesh__fsdp": 3}, "model.embed_dim=32 does not divide over mesh.fsdp=3"),
        (
            {"mesh__data": 1, "mesh__tensor": 3},
            "model.num_heads=4 does not divide over mesh.tensor=3; use mesh.tensor=2",
        ),
        ({"mesh__fsdp": -1}, "mesh.data=mesh.fsdp=-1 asks for what is left more than once"),
        ({"mesh__data": 0}, "mesh.data=0 is no number of devices"),
        ({"mesh__data": 16}, "training.batch_tokens=512 is 8 rows and does not divide over"),
        ({"checkpoint__every_steps": 0}, "checkpoint.every_steps=0 is less than 1"),
        ({"data__bad_line_fraction": 1.5}, "data.bad_line_fraction=1.5 is not a fraction"),
        ({"training__seed": 2**40}, "training.seed=1099511627776 is too large"),
        ({"model__num_layers": 10**18}, "model.num_layers=1000000000000000000 is more than any model has"),
        ({"model__num_heads": 65_535, "model__num_kv_heads": 2}, "use one of 1, 3, 5, 15, 17, 51, 85, 255"),
        ({"mesh__data": 1, "training__accumulation_steps": 0}, "training.accumulation_steps=0 is less than 1"),
        ({"name": "../x"}, "name=../x is no folder name"),
        ({"data__mixture__weights": {"sample-el": 0.5, "sample-en": 0.3, "sample-mt": 0.1}}, "sum to 0.9, not 1"),
        ({"data__mixture__weights": {"sample-el": 0.5, "sample-en": 0.5}}, "has no share for sample-mt"),
        ({"data__mixture__weights": {"sample-el": 1.0, "x": 0.0}}, "data.mixture.weights[x]=0.0 names no source"),
    ],
)
def test_validate_says_field_value_rule_and_fix(changes, message):
    assert message in "\n".join(validate(small(**changes)))


def with_source(**changes):
    declared = small()
    sources = declared.data.sources
    changed = (dataclasses.replace(sources[0], **changes), *sources[1:])
    return dataclasses.replace(declared, data=dataclasses.replace(declared.data, sources=changed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "malti"}, "is not a known language; the nearest are mt"),
        ({"name": "sample-en"}, "data.sources has 2 sources named sample-en"),
        ({"licence": " "}, "data.sources[0].licence= is empty; state it, or write unknown"),
        ({"origin": "synthetic"}, "origin=synthetic needs a generator"),
        ({"generator": "x"}, "has a generator, which only synthetic text has"),
        ({"holdout_fraction": 1.0}, "holdout_fraction=1.0 is not in [0, 1)"),
        ({"holdout_fraction": 0.1, "id_field": None}, "leaves nothing to hold documents out by"),
        ({"origin": "stolen"}, "give one of public, licensed, crawled, user, synthetic, unknown"),
        ({"expected_bytes": 0}, "expected_bytes=0 is less than 1"),
    ],
)
def test_a_source_states_what_must_be_known(changes, message):
    assert message in "\n".join(validate(with_source(**changes)))


def test_a_source_without_its_provenance_cannot_be_made():
    with pytest.raises(TypeError, match="licence"):
        Source(name="a", language="en", path="a.jsonl", provider="x", origin="public", opt_out="unknown")


def test_rescaled_weights_are_offered():
    text = "\n".join(validate(small(data__mixture__weights={"sample-el": 0.2, "sample-en": 0.2, "sample-mt": 0.1})))
    assert "rescaled they are {sample-el: 0.4, sample-en: 0.4, sample-mt: 0.2}" in text


def test_wrong_types_in_a_file_are_all_named():
    declared = dataclasses.replace(small(), model=dataclasses.replace(small().model, num_layers="2", qk_norm=1))
    assert len(validate(declared)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("experiment = ", "x.py:1 does not run (SyntaxError"),
        ("y = 1\n", "declares no Experiment; end it with"),
        ("experiment = 3\n", "holds no Experiment"),
        (HEAD + "m = Model(num_layerz=3)\n", "x.py:2 num_layerz is not a field of Model; its nearest are num_layers"),
        ("import nothing_of_this_name\n", "x.py:1 does not run (ModuleNotFoundError"),
        (HEAD + "1 / 0\n", "x.py:2 does not run (ZeroDivisionError"),
    ],
)
def test_a_file_that_does_not_load_says_where_and_why(tmp_path, text, message):
    path = tmp_path / "x.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ExperimentError) as error:
        load(path)
    assert message in faults(error)


def test_the_name_is_the_stem_of_the_file_and_other_experiments_load_by_path(tmp_path):
    path = tmp_path / "9 lives.py"
    path.write_text(f"import dataclasses\n{HEAD}experiment = dataclasses.replace(load({str(TINY)!r}), name='')\n")
    with pytest.raises(ExperimentError, match="no folder name"):
        load(path)
    path = path.rename(tmp_path / "9b_lives.py")
    assert load(path).name == "9b_lives"


def test_a_list_in_a_file_is_as_good_as_a_tuple_and_an_empty_name_is_not(tmp_path):
    path = tmp_path / "x.py"
    change = "experiment = dataclasses.replace(e, data=dataclasses.replace(e.data, sources=list(e.data.sources)))"
    path.write_text(f"import dataclasses\n{HEAD}e = load({str(TINY)!r})\n{change}\n")
    assert load(path) == load(TINY)
    with pytest.raises(ExperimentError, match="name= is empty"):
        load(path, {"name": ""})


def test_rows_and_steps_round_up():
    declared = small(training__tokens=8 * 64 * 2 + 1)
    assert (declared.batch_rows, declared.total_rows, declared.total_steps) == (8, 17, 3)


def test_language_codes_fold_aliases_and_count_evaluation_sources():
    declared = with_source(language="ekk")
    assert declared.language_codes == ("el", "en", "et", "mt")


def test_model_defaults_need_only_sizes():
    model = Model(num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16, vocab_size=300)
    assert model.compute_dtype == "bfloat16" and not model.qk_norm


def test_every_shipped_experiment_loads():
    for path in (ROOT / "experiments").glob("*.py"):
        assert load(path).name == path.stem


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**63])
def test_a_number_that_no_computer_word_holds_is_refused_in_every_field(value):
    def replace(tree, path):
        if isinstance(tree, dict):
            return {key: replace(item, f"{path}.{key}") for key, item in tree.items()}
        if isinstance(tree, list):
            return [replace(item, f"{path}[]") for item in tree]
        return value if isinstance(tree, int | float) and not isinstance(tree, bool) else tree

    with pytest.raises(ExperimentError) as error:
        from_json(replace(to_json(small()), ""))
    numbers = [path for path, leaf in leaves(to_json(small()), "") if type(leaf) in (int, float)]
    assert len(error.value.faults) == len(numbers) > 30
    assert all("is too large; use a number below 2^63" in fault for fault in error.value.faults)


@pytest.mark.parametrize(("text", "rule"), [("a\0b", "holds a NUL"), ("\ud800", "holds half a surrogate pair")])
def test_a_text_that_no_file_takes_is_refused(text, rule):
    with pytest.raises(ExperimentError, match=rule):
        override(small(), {"continue_from": text})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(0)\n", "x.py:2 ends the process (SystemExit: 0); take that line out"),
        ("import beside\n", "imports beside, a file beside it, and experiment files are no modules"),
        ("def f(): f()\nf()\n", "does not run (RecursionError"),
        ("\0", "does not run"),
    ],
)
def test_an_experiment_file_that_ends_recurses_or_imports_is_a_fault(tmp_path, text, message):
    (tmp_path / "beside.py").touch()
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(ExperimentError) as error:
        load(tmp_path / "x.py")
    assert message in faults(error)


def test_an_experiment_file_may_hold_dataclasses_with_postponed_annotations_and_prints_on_stderr(tmp_path, capsys):
    text = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    b: int = 1\n"
    (tmp_path / "x.py").write_text(text + f"print('hello')\n{HEAD}experiment = load({str(TINY)!r})\n")
    assert load(tmp_path / "x.py").name == "tiny_eu24"
    assert capsys.readouterr() == ("", "hello\n")


def test_an_experiment_that_is_a_fifo_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.py")
    with pytest.raises(ExperimentError, match="is not a regular file"):
        load(tmp_path / "x.py")


def test_brackets_nested_deeply_are_a_value_of_the_wrong_type():
    with pytest.raises(ExperimentError, match="has the wrong type"):
        override(small(), {"data.sources": "[" * 100_000})
