"""Hardware that is not here: its names, and the step through its real compiler."""

import json

import pytest

from euroflax import planning
from euroflax.accelerators import ACCELERATORS
from euroflax.experiment import ExperimentError, load
from euroflax.planning import plan, targets
from tests.conftest import ROOT, TINY, run, small

SEVEN = ROOT / "experiments/7b_eu24.py"
HAS_CUDA = targets.compiler_version(planning.parse_target("h100:1x1")) is not None
CUDA = pytest.mark.skipif(not HAS_CUDA, reason="the extra cuda is not installed")


def analytical(monkeypatch, declared, target):
    with monkeypatch.context() as without:
        without.setattr(plan, "compiler_version", lambda target: None)
        return planning.make_plan(declared, target.num_devices, None, target)


@pytest.mark.parametrize(
    ("text", "devices", "node"),
    [("v5p:8x8x8", 512, 512), ("v5e:16x16", 256, 256), ("tpu7x:4x4x4", 128, 128), ("H100:64x4", 256, 4)],
)
def test_a_target_has_devices_and_nodes(text, devices, node):
    target = planning.parse_target(text)
    assert (target.num_devices, target.node_devices) == (devices, node)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:16x17", "is no slice that exists; the nearest are v5e:16x16"),
        ("v5p:8x8", "is no slice that exists; the nearest are v5p:4x4x4"),
        ("h100:64", "does not say nodes x GPUs in each; use h100:16x4"),
        ("h100:4x64", "nodes hold 1 to 8 GPUs.*the nearest are h100:64x4 or h100:32x8"),
        ("h1000:2x4", "names no accelerator that is known; use one of v4, v5e"),
        ("v5p", "has no arrangement; use v5p:"),
        ("v5p:0x4x4", "is no arrangement of sizes of 1 or more; use v5p:"),
        ("h100:-1x4", "is no arrangement of sizes of 1 or more; use h100:64x4"),
        ("h100:100000x4", "jobs up to 16384 nodes; the nearest are h100:16384x4 or h100:16384x8"),
    ],
)
def test_a_target_that_does_not_exist_is_refused_with_the_nearest(text, message):
    with pytest.raises(ExperimentError, match=message):
        planning.parse_target(text)


@pytest.mark.parametrize("name", sorted(ACCELERATORS))
def test_every_accelerator_has_an_analytical_plan_that_says_so(monkeypatch, name):
    shape = "16x4" if ACCELERATORS[name].platform == "cuda" else "8x8" if name in ("v5e", "v6e") else "4x4x4"
    target = planning.parse_target(f"{name}:{shape}")
    made = analytical(monkeypatch, load(SEVEN), target)
    assert made.method == "analytical" and made.compiler is None and made.step_seconds > 0
    assert made.flops_per_step["program"] is None and all(row["bytes"] is None for row in made.collectives)
    assert made.fits == (made.memory_bytes["total"] <= made.memory_bytes["capacity"])
    text = "\n".join(planning.plan_lines(made))
    assert "an analytical plan" in text and f"pip install -e '.[{ACCELERATORS[name].platform}]'" in text
    assert (made.kwh is None) == (ACCELERATORS[name].watts is None)
    assert (made.derived is not None) == ("derived description" in text)


def test_what_does_not_divide_over_a_target_is_one_line(tmp_path):
    folders = ("--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache")
    done = run(TINY, "plan", "--on", "v5e:16x16", *folders)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "does not divide over" in done.stderr and "256" in done.stderr


def within_a_fifth(made, without):
    assert {k: made.memory_bytes[k] for k in ("parameters", "optimizer", "gradients")} == {
        k: without.memory_bytes[k] for k in ("parameters", "optimizer", "gradients")
    }
    assert made.memory_bytes["total"] == pytest.approx(without.memory_bytes["total"], rel=0.2)


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2"])
def test_a_step_compiles_for_tpus(monkeypatch, name):
    target, declared = planning.parse_target(name), small(mesh__data=2, mesh__fsdp=4, model__compute_dtype="bfloat16")
    made = planning.make_plan(declared, 8, None, target)
    assert made.method == "compiled" and made.compiler.startswith("libtpu ") and made.fits
    assert made.flops_per_step["program"] >= 0.9 * made.flops_per_step["model"]
    least = {(row["kind"], row["axis"]): row["minimum_bytes"] for row in made.collectives}
    for (
        row
    ) in made.collectives:  # libtpu scatters, and for some meshes gathers, by an all-reduce; on v5e it gathers twice
        allowed = row["minimum_bytes"]
        if row["kind"] == "all-reduce":
            allowed += 2 * (least.get(("reduce-scatter", row["axis"]), 0) + least.get(("all-gather", row["axis"]), 0))
        assert row["bytes"] <= 2.2 * allowed + 2_000, row


@pytest.mark.compiler
def test_a_plan_by_a_compiler_is_json_on_a_quiet_terminal(tmp_path):
    folders = ("--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache")
    for _ in range(2):  # the second one finds what the first has left
        done = run(TINY, "plan", "--json", "--on", "v5e:2x2", *folders)
        assert done.returncode == 0 and not any(word in done.stderr for word in ("Warning", "Error", "WARNING", "E0"))
    made = json.loads(done.stdout)
    assert made["method"] == "compiled" and made["target"] == "v5e:2x2" and made["devices"] == 4
    assert {"parameters", "optimizer", "gradients", "temporaries", "total", "capacity"} == made["memory_bytes"].keys()


@pytest.mark.compiler
def test_a_step_too_large_for_its_device_is_an_answer(monkeypatch):
    target = planning.parse_target("v5e:2x2")
    declared = load(SEVEN, {"mesh.fsdp": "4", "model.num_layers": "4", "training.batch_tokens": "262144"})
    made = planning.make_plan(declared, 4, None, target)
    assert made.method == "compiled" and made.fits is False
    assert made.memory_bytes["total"] > made.memory_bytes["capacity"] and made.step_seconds is None
    assert "does not fit" in "\n".join(planning.plan_lines(made))


@pytest.mark.compiler
def test_7b_fits_64_chips_of_v5p(monkeypatch):
    target, declared = planning.parse_target("v5p:4x4x4"), load(SEVEN)
    made = planning.make_plan(declared, 64, None, target)
    assert made.fits and 6.7e9 < made.parameters < 6.8e9
    within_a_fifth(made, analytical(monkeypatch, declared, target))


@CUDA
@pytest.mark.compiler
@pytest.mark.parametrize("name", ["h100:16x4", "a100-64:16x4", "h100:256x4"])
def test_7b_fits_gpus_and_moves_what_fsdp_must(monkeypatch, name):
    target, declared = planning.parse_target(name), load(SEVEN)
    made = planning.make_plan(declared, target.num_devices, None, target)
    assert made.fits and made.compiler.startswith("XLA for CUDA")
    within_a_fifth(made, analytical(monkeypatch, declared, target))
    sent, least = (sum(row[key] for row in made.collectives) for key in ("bytes", "minimum_bytes"))
    assert sent <= 1.1 * least


@CUDA
@pytest.mark.compiler
@pytest.mark.parametrize(("sequence", "tensor"), [(4, 1), (1, 4), (2, 2)])
def test_7b_moves_what_other_meshes_must(sequence, tensor):
    mesh = {"mesh.fsdp": "16", "mesh.sequence": str(sequence), "mesh.tensor": str(tensor)}
    target, declared = planning.parse_target("h100:16x4"), load(SEVEN, mesh)
    made = planning.make_plan(declared, 64, None, target)
    for row in made.collectives:  # the sums of embeddings over tensor are not among the least
        beside = 4e9 if row["kind"] == "all-reduce" else 3e7
        assert 0.99 * row["minimum_bytes"] <= row["bytes"] <= 1.01 * row["minimum_bytes"] + beside, row


def test_the_names_of_extras_exist():
    project = (ROOT / "pyproject.toml").read_text()
    for target in ("v5p:4x4x4", "h100:1x1"):
        extra = targets.how_to_compile(planning.parse_target(target)).partition("[")[2].partition("]")[0]
        assert f"\n{extra} = [" in project
