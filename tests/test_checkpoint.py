import contextlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from euroflax import sharding
from euroflax.checkpoint import (
    Checkpoints,
    SaveFailed,
    hash_files,
    latest_step,
    listed_steps,
    manager,
    open_latest,
    verify,
)
from euroflax.experiment import Checkpoint, ExperimentError, Interrupted
from euroflax.training.step import abstract_state, init_state
from tests.conftest import assert_trees_close, small

DECLARED = small(mesh__fsdp=4, mesh__data=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 1 and 2, and the state that they hold."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    mesh = sharding.make_mesh(DECLARED)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(DECLARED, mesh))
    state = jax.jit(lambda: init_state(DECLARED), out_shardings=shardings)()
    checkpoints = Checkpoints(path, Checkpoint(keep_last=2), pytest.fail)
    for step in (1, 2):
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    return path, jax.device_get(state)


@pytest.fixture
def copied(saved, tmp_path):
    path = tmp_path / "checkpoints"
    shutil.copytree(saved[0], path)
    return path, saved[1]


def opened(path, keep=None):
    notes = []
    return Checkpoints(path, keep or Checkpoint(keep_last=2), notes.append), notes


def restored(checkpoints, declared=DECLARED):
    facts = []
    state = checkpoints.restore(abstract_state(declared, sharding.make_mesh(declared)), facts.append)
    return state, facts[0]


def test_what_was_saved_is_restored_bit_for_bit(copied):
    checkpoints, notes = opened(copied[0])
    state, facts = restored(checkpoints)
    assert facts == {"step": 2} and notes == [] and checkpoints.latest == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), copied[1])
    checkpoints.close()


def test_another_mesh_restores_it_onto_its_own_shards(copied):
    declared = small(mesh__tensor=2, mesh__fsdp=2, mesh__data=2)
    checkpoints, _ = opened(copied[0])
    state, _ = restored(checkpoints, declared)
    assert state.params["layers"]["mlp"]["gate_DF"].addressable_shards[0].data.shape == (2, 16, 32)
    assert_trees_close(copied[1], jax.device_get(state), 0)
    checkpoints.close()


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"replica": 2, "data": 2, "fsdp": 2}, {"sequence": 8}, {"sequence": 2, "tensor": 2, "fsdp": 2}],
)
def test_any_mesh_restores_it_and_each_device_holds_its_part_alone(copied, mesh):
    declared = small(**{f"mesh__{axis}": mesh.get(axis, 1) for axis in sharding.AXES})
    checkpoints, _ = opened(copied[0])
    state, _ = restored(checkpoints, declared)
    wanted = abstract_state(declared, sharding.make_mesh(declared))
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == like.sharding
        assert leaf.addressable_shards[0].data.shape == like.sharding.shard_shape(like.shape)
    assert_trees_close(copied[1], jax.device_get(state), 0)
    checkpoints.close()


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder):
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:-1])


def half_delete(folder):
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file()][::2]:
        path.unlink()


def forget(folder):
    (folder.parent / "manifests" / f"{folder.name}.json").unlink()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip, "1 of its files have changed"),
        (cut, "1 of its files have changed"),
        (half_delete, "of its files are missing"),
        (forget, "its save was not finished"),
    ],
)
def test_a_harmed_checkpoint_is_passed_over_for_the_one_before(copied, harm, reason):
    path, expected = copied
    harm(path / "2")
    checkpoints, notes = opened(path)
    assert len(notes) == 1 and notes[0].startswith("checkpoint 2 is passed over: ") and reason in notes[0]
    aside = [entry.name.split("-")[0] for entry in path.glob("harmed/*")]
    assert aside == ["2"]
    state, facts = restored(checkpoints)
    assert facts == {"step": 1}
    assert_trees_close(expected, jax.device_get(state), 0)
    checkpoints.save(2, state, {"step": "again"})
    checkpoints.close()
    assert verify(path, 2) is None and listed_steps(path) and latest_step(path) == 2


def test_reading_the_latest_changes_nothing_that_a_running_job_may_own(copied):
    path, expected = copied
    flip(path / "2")
    shutil.copytree(path / "1", path / "3.orbax-checkpoint-tmp")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    notes = []
    abstract = abstract_state(DECLARED, sharding.make_mesh(DECLARED))
    facts = []
    saved = open_latest(path, facts.append, notes.append)
    assert facts == [{"step": 1}] and saved.step == 1 and len(notes) == 1
    assert_trees_close(expected.params, jax.device_get(saved.place(abstract.params)), 0)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_a_first_save_that_was_not_finished_is_nothing(copied):
    shutil.rmtree(copied[0] / "1")
    forget(copied[0] / "2")
    checkpoints, notes = opened(copied[0])
    assert checkpoints.latest is None and len(notes) == 1 and listed_steps(copied[0]) == []
    checkpoints.close()


def harm_all(path):
    for step in (1, 2):
        flip(path / str(step))


@pytest.mark.parametrize("harm", [harm_all, lambda path: shutil.rmtree(path / "manifests")], ids=["flip", "forget"])
def test_checkpoints_of_which_none_is_whole_are_refused_and_stay(copied, harm):
    harm(copied[0])
    with pytest.raises(
        ExperimentError, match=r"none of its checkpoints \(1, 2\) is whole; restore one, begin from scratch"
    ):
        opened(copied[0])
    assert listed_steps(copied[0]) == [1, 2]


@pytest.mark.parametrize("content", ["[]", "{}", "{"])
def test_a_manifest_that_is_harmed_vouches_for_nothing(copied, content):
    (copied[0] / "manifests" / "2.json").write_text(content)
    (copied[0] / "manifests" / "1 (copy).json").write_text("{}")
    checkpoints, notes = opened(copied[0])
    assert checkpoints.latest == 1 and notes == ["checkpoint 2 is passed over: its manifest is harmed"]
    checkpoints.close()


@pytest.fixture
def three(saved, tmp_path):
    """Checkpoints 1 to 3, each of as many rows as its number."""
    state = jax.device_put(saved[1])
    checkpoints, notes = opened(tmp_path / "checkpoints", Checkpoint(keep_last=3))
    for step in (1, 2, 3):
        checkpoints.save(step, state, {"step": step, "position": step})
    checkpoints.wait()
    yield checkpoints, notes, tmp_path / "checkpoints", state
    checkpoints.close()


def test_going_back_throws_later_ones_away_and_saves_go_on(three):
    checkpoints, notes, path, state = three
    assert checkpoints.go_back(2) and checkpoints.latest == 2 and listed_steps(path) == [1, 2] and notes == []
    checkpoints.save(3, state, {"step": 3, "position": 30})
    checkpoints.wait()
    assert verify(path, 3) is None and not (path / "harmed").exists()


def test_going_back_to_before_the_first_one_changes_nothing(three):
    checkpoints, _, path, state = three
    assert (
        not checkpoints.go_back(0)
        and listed_steps(path) == [1, 2, 3]
        and checkpoints.settle() == "checkpoint 3 is kept"
    )
    checkpoints.save(4, state, {"step": 4, "position": 4})
    checkpoints.wait()
    assert verify(path, 4) is None


def test_a_checkpoint_is_said_to_be_kept_once_it_is_whole(three, monkeypatch):
    checkpoints, _, _, state = three

    def fails(folder):
        raise OSError("no disk")

    with monkeypatch.context() as patch:
        patch.setattr("euroflax.checkpoint.manager.hash_files", fails)
        checkpoints.save(4, state, {"step": 4, "position": 4})
        assert checkpoints.settle() == "checkpoint 3 is kept"


@pytest.mark.parametrize("harm", [flip, lambda folder: (folder / "facts" / "metadata").write_text("{")])
def test_going_back_passes_a_harmed_one_over_and_puts_it_aside(three, harm):
    checkpoints, notes, path, state = three
    harm(path / "2")
    assert checkpoints.go_back(2) and checkpoints.latest == 1 and listed_steps(path) == [1]
    assert [entry.name.split("-")[0] for entry in (path / "harmed").iterdir()] == ["2"] and len(notes) == 1
    checkpoints.save(2, state, {"step": 2, "position": 2})
    checkpoints.wait()
    assert verify(path, 2) is None


def test_a_save_that_died_midway_leaves_nothing_in_the_way(copied):
    path = copied[0]
    shutil.copytree(path / "2", path / "3.orbax-checkpoint-tmp-7")
    shutil.copytree(path / "2", path / "trash" / "1-dead")
    checkpoints, notes = opened(path)
    assert checkpoints.latest == 2 and notes == []
    assert {entry.name for entry in path.iterdir()} == {"1", "2", "manifests"}
    checkpoints.close()


def test_the_last_ones_and_every_kth_are_kept_and_deleted_ones_go_through_the_trash(copied, monkeypatch):
    path, state = copied[0], jax.device_put(copied[1])
    removed = []
    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda target, **k: (removed.append(pathlib.Path(target)), real(target, **k)))
    checkpoints, _ = opened(path, Checkpoint(keep_last=2, keep_every_steps=4))
    for step in range(3, 9):
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    assert sorted(listed_steps(path)) == [4, 7, 8]
    assert all(target.name == "trash" or "trash" in target.parts for target in removed if path in target.parents)
    for step in (4, 7, 8):
        assert verify(path, step) is None
    opened(path)[0].close()
    assert {file.stem for file in (path / "manifests").iterdir()} == {"4", "7", "8"}


def test_one_is_kept_from_before_the_steps_that_a_run_may_want_to_go_back(copied):
    path, state = copied[0], jax.device_put(copied[1])
    kept = {}
    with contextlib.closing(Checkpoints(path, Checkpoint(keep_last=2), pytest.fail, return_steps=3)) as checkpoints:
        for step in range(3, 10):
            checkpoints.save(step, state, {"step": step})
            checkpoints.wait()
            kept[step] = sorted(listed_steps(path))
    assert kept[4] == [1, 2, 3, 4]  # before there are so many steps, the first
    assert kept[6] == [2, 4, 5, 6] and kept[8] == [4, 6, 7, 8]
    for last, steps in kept.items():  # whichever of the three last steps was refused first, also if `last` is harmed
        assert steps[0] <= max(1, last - 1 - 3) and steps[0] >= last - 2 * 3 - 1


def test_the_manifest_holds_a_hash_of_every_file(copied):
    path = copied[0]
    expected = hash_files(path / "2")
    assert json.loads((path / "manifests" / "2.json").read_text()) == expected
    assert len(expected) == sum(file.is_file() for file in (path / "2").rglob("*")) > 3


def test_a_layer_can_be_read_without_the_others(tmp_path):
    declared = small(mesh__data=1, mesh__fsdp=4, mesh__tensor=2)  # without copies, which Orbax would save in parts
    params = abstract_state(declared, sharding.make_mesh(declared)).params
    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    params = jax.jit(lambda: init_state(declared).params, out_shardings=where)()
    checkpoints = Checkpoints(tmp_path, Checkpoint(), pytest.fail)
    checkpoints.save(2, {"params": params}, {"step": 2})
    checkpoints.close()
    saved = open_latest(tmp_path, lambda facts: None, pytest.fail)
    assert saved.facts == {"step": 2} and saved.step == 2
    found = saved.read("layers/mlp/gate_DF", (1,))
    np.testing.assert_array_equal(found, np.asarray(params["layers"]["mlp"]["gate_DF"])[1])
    np.testing.assert_array_equal(saved.read("embedding_VD"), np.asarray(params["embedding_VD"]))
    assert saved._opened["layers/mlp/gate_DF"].chunk_layout.read_chunk.shape == (1, 8, 32)
    shutil.rmtree(tmp_path / "2")
    for name in ("layers/mlp/gate_DF", "final_norm_D"):
        with pytest.raises(Interrupted, match="checkpoint 2 went away or was changed while it was read"):
            saved.read(name, (0,))


def test_a_checkpoint_without_a_manifest_is_put_aside_whole_and_not_deleted(copied):
    forget(copied[0] / "2")
    before = hash_files(copied[0] / "2")
    opened(copied[0])[0].close()
    (aside,) = (copied[0] / "harmed").iterdir()
    assert hash_files(aside) == before


def test_a_run_that_saved_once_does_not_begin_again_where_its_checkpoints_are_gone(saved, tmp_path):
    (tmp_path / "last_save.json").write_bytes((saved[0].parent / "last_save.json").read_bytes())
    with pytest.raises(ExperimentError, match=r"its checkpoints are gone; restore one, begin from scratch with --from"):
        opened(tmp_path / "checkpoints")


def test_a_record_of_an_earlier_version_says_that_checkpoints_are_gone(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"sessions": [{"saves": {"longest_seconds": 1.5}}]}))
    with pytest.raises(ExperimentError, match="its checkpoints are gone"):
        opened(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["a b", "x%20y", "a#b?c", "w*é"])
def test_checkpoints_are_read_from_any_path(saved, tmp_path, name):
    shutil.copytree(saved[0], tmp_path / name / "checkpoints")
    found = open_latest(tmp_path / name / "checkpoints", lambda facts: None, pytest.fail)
    assert found is not None
    assert found.read("final_norm_D").shape == (32,)


def test_a_checkpoint_that_the_reader_cannot_open_is_not_committed(copied, monkeypatch):
    def fail(path, step):
        raise ValueError("cannot be read")

    monkeypatch.setattr(manager, "check_readable", fail)
    checkpoints, _ = opened(copied[0])
    state, _ = restored(checkpoints)
    checkpoints.save(3, state, {"step": 3})
    with pytest.raises(SaveFailed, match="cannot be read"):
        checkpoints.wait()
    assert latest_step(copied[0]) == 2
    checkpoints.close()


def test_digits_of_other_scripts_are_no_step(copied):
    (copied[0] / "٤٢").mkdir()
    assert listed_steps(copied[0]) == [1, 2]
