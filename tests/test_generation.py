import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from euroflax import generation, model, sharding, verbs
from euroflax.console import SilentDisplay
from euroflax.data import tokenizer as tokens
from euroflax.experiment import ExperimentError, Interrupted, override
from euroflax.generation import Sampling, generate
from euroflax.training.stop import Stop
from tests.conftest import run, write_experiment

PROMPTS = ["The", "Il-mara fis-suq tbigħ il-ħobż", "Κάθε πρωί", "", "a b c d e f g h i j"]


@pytest.fixture(scope="module")
def write(trained):
    """Continues prompts by the trained run, on eight devices."""
    declared, _, done = trained
    tokenizer = tokens.read(done.path / "tokenizer" / "tokenizer.json")
    mesh = sharding.make_mesh(declared)

    def write(prompts, on_text=lambda number, text: None, context=64, params=done.params, **sampling):
        with jax.set_mesh(mesh):
            return generate(declared.model, params, tokenizer, context, prompts, Sampling(**sampling), on_text)

    write.tokenizer, write.config, write.params, write.mesh = tokenizer, declared.model, done.params, mesh
    return write


@pytest.fixture(scope="module")
def likeliest(write):
    """The likeliest next token by a whole forward pass without a cache."""
    length = 64

    @jax.jit
    def next_token(params, tokens_BL, count):
        places_BL = jnp.arange(length)[None]
        batch = {"tokens_BL": tokens_BL, "segment_ids_BL": (places_BL < count) * 1, "positions_BL": places_BL}
        return jnp.argmax(model.apply(write.config, params, batch)[0, count - 1])

    def continue_(ids, count, params):
        params, found = jax.tree.map(jnp.asarray, jax.device_get(params)), []
        while len(found) < count and (not found or found[-1] != write.tokenizer.eos):
            row = [*ids, *found]
            found.append(int(next_token(params, jnp.array([row + [0] * (length - len(row))]), len(row))))
        return found

    return continue_


def test_greedy_text_is_that_of_the_forward_pass_without_a_cache(write, likeliest):
    wild = model.init(dataclasses.replace(write.config, init_std=0.5), jax.random.key(0))  # heeds every position
    for params in (write.params, wild):
        found = write(PROMPTS, max_new_tokens=20, params=params)
        for prompt, completion in zip(PROMPTS, found, strict=True):
            ids = [write.tokenizer.bos, *write.tokenizer.encode([prompt])[0]]
            assert completion.tokens == likeliest(ids, 20, params) and completion.prompt_tokens == len(ids)
        assert len({tuple(completion.tokens) for completion in found}) > 1


def test_programs_are_compiled_once_for_each_bucket_of_shapes(write):
    generation._programs.cache_clear()
    write(["a", "b"], max_new_tokens=3)
    write(["a b c d", "b", "c"], max_new_tokens=9, temperature=0.7, top_k=3, top_p=0.5, seed=3)
    prefill, decode = generation._programs(write.config, write.mesh)
    assert (prefill._cache_size(), decode._cache_size()) == (1, 1)
    write(["a"], max_new_tokens=17)
    assert (prefill._cache_size(), decode._cache_size()) == (2, 2)


def test_what_is_told_as_it_is_written_is_the_text_in_order(write):
    told = {}
    found = write(
        PROMPTS,
        lambda number, text: told.setdefault(number, []).append(text),
        max_new_tokens=24,
        temperature=1.0,
        seed=1,
    )
    assert {number: "".join(parts) for number, parts in told.items()} == {
        number: completion.text for number, completion in enumerate(found) if completion.text
    }
    assert max(map(len, told.values())) > 3


def test_half_a_character_is_never_told(write):
    told = []
    sampling = Sampling(max_new_tokens=99, stop=("🙂!",))
    writer = generation._Writer(write.tokenizer, "", [write.tokenizer.bos], 128, sampling, told.append)
    ids = write.tokenizer.encode(["ħ🙂🙃"])[0]
    assert len(ids) >= 8
    for token in ids:
        writer.take(token)
    assert told == ["ħ", "🙂🙃"]


def test_writing_ends_before_a_stop_text_which_is_never_told(write):
    (whole,) = write(["The"], max_new_tokens=24, temperature=1.0, seed=5)
    stop = whole.text[6:9]
    assert len(stop) == 3
    told = []
    (found,) = write(
        ["The"], lambda _, text: told.append(text), max_new_tokens=24, temperature=1.0, seed=5, stop=("never", stop)
    )
    assert found.finish_reason == "stop" and found.text == whole.text[: whole.text.index(stop)] == "".join(told)


def test_draws_repeat_with_their_seed_and_do_not_depend_on_the_batch(write):
    def drawn(prompts, seed):
        return [c.tokens for c in write(prompts, max_new_tokens=8, temperature=1.0, seed=seed)]

    assert drawn(PROMPTS, 7) == drawn(PROMPTS, 7) != drawn(PROMPTS, 8)
    assert drawn(PROMPTS[:2], 7) == drawn(PROMPTS, 7)[:2]
    assert drawn(["a", "a"], 7)[0] != drawn(["a", "a"], 7)[1]


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_smallest_choice_is_the_likeliest_token(write, sampling):
    greedy = write(PROMPTS, max_new_tokens=8)
    assert write(PROMPTS, max_new_tokens=8, temperature=1.5, **sampling) == greedy


def test_top_k_and_top_p_draw_from_their_sets_with_their_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits_BV = jnp.tile(jnp.log(probabilities), (4000, 1))

    def shares(top_k, top_p, temperature=1.0):
        arguments = (np.arange(4000, dtype=np.uint32), np.uint32(0), temperature, top_k, top_p)
        return np.bincount(generation._draw(logits_BV, 0, *arguments), minlength=4) / 4000

    np.testing.assert_allclose(shares(0, 1.0), probabilities, atol=0.03)
    np.testing.assert_allclose(shares(2, 1.0), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(0, 0.79), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(
        shares(0, 0.81), probabilities[:3].tolist() / probabilities[:3].sum() @ np.eye(3, 4), atol=0.03
    )
    sharp = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(shares(0, 1.0, 0.5), sharp, atol=0.03)


def test_writing_ends_where_the_context_does(write):
    prompt = "a b c d e f g h i j k l m n"
    size = 1 + len(write.tokenizer.encode([prompt])[0])
    found = write([prompt] * 8, context=size + 5, max_new_tokens=50, temperature=1.0)
    lengths = {len(completion.tokens) for completion in found if completion.finish_reason == "length"}
    assert lengths == {5}
    with pytest.raises(ExperimentError, match=rf"prompt 1 has {size} tokens .* the context is {size}; use {size - 1}"):
        write(["a", prompt], context=size)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"stop": ("",)}, "stop= is empty"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": "en"}, "stop='en' is no tuple of texts"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 is no whole number"),
    ],
)
def test_values_that_mean_nothing_are_refused(write, sampling, message):
    with pytest.raises(ExperimentError, match=message):
        write(["a"], **sampling)


def test_no_more_places_are_kept_than_the_context_has(write):
    generation._programs.cache_clear()
    (few,) = write(["a"], max_new_tokens=60)
    (many,) = write(["a"], max_new_tokens=10**12, top_k=10**12)
    assert many.tokens[:60] == few.tokens and len(many.tokens) <= 64
    assert generation._programs(write.config, write.mesh)[1]._cache_size() == 1


def test_a_prompt_that_is_no_text_is_refused(write):
    for prompt in ("a\udcff", 5):
        with pytest.raises(ExperimentError, match="prompt 1 is no text in UTF-8"):
            write(["a", prompt])


def test_a_wish_to_stop_ends_the_writing(trained):
    declared, folders, _ = trained
    stop, told = Stop(), []

    def on_text(number, text):
        told.append(text)
        stop.request("SIGINT")

    with pytest.raises(Interrupted, match="stopped by SIGINT; the same command goes on"):
        verbs.generate(declared, folders, ["The"], Sampling(temperature=1.0), None, stop, on_text)
    assert len(told) == 1


@pytest.fixture(scope="module")
def command(trained, tmp_path_factory):
    declared, folders, _ = trained
    path = write_experiment(tmp_path_factory.mktemp("command") / "tiny_eu24.py", declared)

    def command(*arguments):
        common = ("--runs-dir", folders.runs_dir, "--cache-dir", folders.cache_dir, "--devices", "cpu:1")
        return run(path, *arguments, *common)

    return command


def test_the_command_line_prints_what_is_written_and_json_says_all(command, write):
    greedy = write(["Il-mara", "The"], max_new_tokens=6)
    arguments = ("generate", "--prompt", "Il-mara", "--prompt", "The", "--max-new-tokens", 6)
    shown = command(*arguments)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == f"Il-mara{greedy[0].text}\n\nThe{greedy[1].text}\n"
    told = json.loads(command(*arguments, "--json").stdout)
    assert [entry["tokens"] for entry in told] == [completion.tokens for completion in greedy]
    assert told[0].keys() == {"prompt", "text", "tokens", "prompt_tokens", "finish_reason"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate",), "generate has nothing to continue; give --prompt TEXT"),
        (("plan", "--prompt", "a"), "--prompt is not for plan; it goes with generate"),
        (("train", "--dtype", "bfloat16"), "--dtype is not for train; it goes with export"),
        (("generate", "--prompt", "a " * 99), "prompt 0 has "),
        (("generate", "--prompt", "a", "--set", "name=other"), "run folder="),
        (("export", "--set", "name=other"), "holds no checkpoint; train first"),
        (("report", "--set", "name=other"), "holds no run; train first"),
        (("export", "--dtype", "int8"), "dtype=int8 cannot be written; use one of float32, bfloat16"),
    ],
)
def test_a_mistake_is_one_line(command, arguments, message):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_the_finished_run_keeps_what_it_writes_in_each_language(trained):
    declared, folders, done = trained
    kept = json.loads((done.path / "samples.json").read_text())
    assert kept["step"] == 6 and [entry["language"] for entry in kept["samples"]] == ["el", "en", "mt"]
    held_out = {"el": "Κάθε πρωί", "en": "Every morning", "mt": "Kull "}
    for entry in kept["samples"]:
        assert entry["prompt"].startswith(held_out[entry["language"]]) and entry["text"]
    before = (done.path / "samples.json").stat().st_mtime_ns
    verbs.train(declared, folders)
    assert (done.path / "samples.json").stat().st_mtime_ns == before


def test_generate_and_evaluate_take_the_devices_that_are_there(trained):
    declared, folders, run = trained
    other = override(declared, {"mesh.data": 1, "mesh.fsdp": 16, "training.batch_tokens": 16 * 64})
    notes = []
    display = SilentDisplay()
    display.note = notes.append
    found = verbs.evaluate(other, folders, display)
    assert found["bits_per_byte.mean"] == pytest.approx(run.bits_per_byte["mean"], rel=1e-5)
    verbs.generate(other, folders, ["a"], Sampling(max_new_tokens=1), display)
    assert notes == ["the mesh of the experiment is not that of these devices; takes fsdp 8"] * 2
