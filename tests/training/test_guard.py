"""What the guard refuses, on numbers, in a step and in a run; each fault is planted."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from euroflax import comparison, report, verbs
from euroflax.checkpoint import Checkpoints, listed_steps
from euroflax.data.loader import Rows, empty_batch
from euroflax.experiment import Guard, Interrupted, RunFailed, validate
from euroflax.training import guard as guards
from euroflax.training import loop
from euroflax.training.optimizer import learning_rate
from euroflax.training.record import read_manifest
from euroflax.training.step import init_state, train_step
from euroflax.training.stop import Stop
from tests.conftest import small

GUARD = Guard(deviations=4.0, window_steps=8, max_skipped=2)
NAN, INF = float("nan"), float("inf")


def judged(pairs, guard=GUARD):
    """The reason of each step of given losses and norms, whether there were too many, and the state in the end."""
    state, found = guards.init_guard(guard), []
    for step, (loss, norm) in enumerate(pairs, 1):
        state, reason, too_many = guards.judge(
            guard, state, jnp.int32(step), jnp.uint32(8 * step - 8), jnp.float32(loss), jnp.float32(norm)
        )
        found.append((int(reason), bool(too_many)))
    return found, state


def calm(steps):
    """Losses and norms that waver by a tenth."""
    return [(3.0 + 0.1 * (-1) ** step, 1.0 + 0.1 * (-1) ** step) for step in range(steps)]


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        ((NAN, 1.0), guards.LOSS_NOT_FINITE),
        ((3.0, INF), guards.GRADIENT_NOT_FINITE),
        ((NAN, NAN), guards.LOSS_NOT_FINITE),
        ((3.6, 1.0), guards.LOSS_HIGH),
        ((3.0, 1.6), guards.GRADIENT_HIGH),
        ((2.0, 0.1), guards.FINE),
        ((3.3, 1.2), guards.FINE),
    ],
)
def test_a_planted_step_is_refused_for_its_reason_and_leaves_the_statistics_as_they_were(planted, reason):
    found, state = judged([*calm(10), planted])
    assert [r for r, _ in found] == [0] * 10 + [reason] and not found[-1][1]
    if reason:
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), state.loss_mean, judged(calm(10))[1].loss_mean))
        assert int(state.skipped) == 1 and int(state.applied) == 10 and int(state.last_skips_I[-1]) == 11


def test_mean_and_deviation_are_those_of_the_steps_so_far():
    pairs = calm(7)
    state = judged(pairs)[1]
    losses = np.array([loss for loss, _ in pairs])
    np.testing.assert_allclose([state.loss_mean, state.loss_variance], [losses.mean(), losses.var()], rtol=1e-5)


def test_mean_and_deviation_forget_what_lies_windows_back():
    state = judged([*calm(40), *((loss - 1, norm) for loss, norm in calm(60))])[1]
    np.testing.assert_allclose([state.loss_mean, state.loss_variance], [2.0, 0.01], rtol=0.05)


def test_no_height_is_refused_before_the_window_is_full_or_without_a_bound():
    assert judged([*calm(7), (30.0, 10.0)])[0][-1] == (0, False)
    assert judged([*calm(20), (30.0, 10.0)], dataclasses.replace(GUARD, deviations=None))[0][-1] == (0, False)


def test_more_than_the_bound_in_the_window_are_too_many():
    bad = (NAN, 1.0)
    assert [many for _, many in judged([*calm(8), bad, *calm(3), bad, bad])[0]][-3:] == [False, False, True]
    assert not any(many for _, many in judged([*calm(8), bad, *calm(5), bad, *calm(2), bad])[0])
    assert [many for _, many in judged([(3.0, 1.0), bad, bad, bad], Guard())[0]] == [False, False, False, True]


def batch_of(declared, weight):
    rows, length = declared.batch_rows, declared.data.sequence_length
    batch = {name: jnp.asarray(values) for name, values in empty_batch(rows, length, 0).items()}
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, declared.model.vocab_size)
    ones = jnp.ones((rows, length), jnp.int32)
    weights = jnp.ones((rows, length)).at[0, 0].set(weight)
    return batch | {"tokens_BL": tokens, "targets_BL": tokens, "segment_ids_BL": ones, "loss_weights_BL": weights}


def test_a_refused_step_changes_no_bit_of_parameters_and_optimizer_and_consumes_its_rows():
    declared = small()
    state = init_state(declared)
    step = jax.jit(lambda state, batch: train_step(declared, declared.spans[0], state, batch))
    refused, metrics = step(state, batch_of(declared, NAN))
    assert int(metrics["skipped"]) == guards.LOSS_NOT_FINITE
    same = jax.tree.map(
        lambda a, b: bool(jnp.array_equal(a, b)), (refused.params, refused.optimizer), (state.params, state.optimizer)
    )
    assert jax.tree.all(same) and int(refused.position) == declared.batch_rows and int(refused.step) == 1
    applied, metrics = step(refused, batch_of(declared, 1.0))
    assert int(metrics["skipped"]) == 0 and not jnp.array_equal(
        applied.params["embedding_VD"], state.params["embedding_VD"]
    )


@pytest.mark.parametrize("field", ["window_steps", "max_skipped", "max_returns"])
def test_more_than_the_guard_can_keep_is_refused(field):
    declared = small(**{f"training__guard__{field}": 3_000_000_000})
    assert [fault for fault in validate(declared) if f"training.guard.{field}=3000000000 is more than" in fault]


@pytest.fixture
def planted(monkeypatch):
    """Makes the batches of some steps ones whose loss is not finite."""
    genuine, bad = loop.batches, set()

    def batches(declared, rows, position, mine):
        for number, batch in enumerate(genuine(declared, rows, position, mine), position // declared.batch_rows + 1):
            weights = batch["loss_weights_BL"]
            yield batch | {"loss_weights_BL": weights * np.float32(NAN)} if number in bad else batch

    monkeypatch.setattr(loop, "batches", batches)
    return bad


RETURNS = {"training__guard": Guard(max_skipped=1, max_returns=2), "checkpoint__every_steps": 1}


@pytest.fixture
def harmful(monkeypatch):
    """Rows in whose batches no loss is finite, wherever the batches begin."""
    genuine, bad = Rows.batch, set()

    def batch(self, span, indices, stop=None):
        made = genuine(self, span, indices, stop)
        if bad & {index for index in indices if index < stop}:
            made["loss_weights_BL"] *= np.float32(NAN)
        return made

    monkeypatch.setattr(Rows, "batch", batch)
    return bad


def read_rows(metrics):
    """The rows of each step, by where it ended."""
    return [(line["step"], line["sequences"]) for line in metrics if "loss" in line]


def test_a_run_goes_back_before_a_bad_stretch_and_on_without_its_rows(folders, harmful):
    harmful.update({17, 26})  # steps 3 and 4
    display = Notes()
    run = verbs.train(small(**RETURNS), folders, display)
    assert [n for n in display.notes if "goes back to step 2 and on without rows 16 to 31, return 1 of 2" in n]
    assert read_rows(run.metrics) == [(1, 8), (2, 16), (3, 40), (4, 48)]
    assert not [line for line in run.metrics if "skipped" in line]
    manifest = read_manifest(run.path)
    assert manifest["skipped_ranges"] == [[16, 32]] and manifest["returns"][0]["rows"] == [16, 32]
    assert manifest["returns"][0]["step"] == 2 and manifest["goodput"]["seconds"]["lost"] > 0
    assert sum(entry["rows"] for entry in manifest["ledger"]["entries"] if entry["rows"]) == 32
    again = verbs.train(small(**RETURNS), folders, display)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, run.params, again.params))
    page = report.write(run.path).read_text()
    assert "16 to 31" in page and "went back" in page and "1,024 of them in rows that were passed over" in page
    other = shutil.copytree(run.path, run.path.with_name("other"))
    assert "went back 1 time<" in comparison.write(run.path, [other]).read_text()


def test_the_state_is_gone_from_memory_before_another_one_is_read(folders, harmful, monkeypatch):
    harmful.update({17, 26})
    genuine, alive = Checkpoints.restore, []

    def restore(self, abstract, check):
        shape = abstract.params["embedding_VD"].shape
        alive.append(sum(leaf.shape == shape for leaf in jax.live_arrays()) - before)
        return genuine(self, abstract, check)

    monkeypatch.setattr(Checkpoints, "restore", restore)
    before = sum(leaf.shape == (512, 32) for leaf in jax.live_arrays())
    verbs.train(small(**RETURNS), folders)
    assert alive == [0]


class StopOnce(verbs.SilentDisplay):
    """Stops behind a step, once the run has gone back."""

    def __init__(self, stop, at):
        self.stop, self.at, self.back = stop, at, False

    def note(self, text):
        self.back = self.back or "goes back" in text

    def step(self, metrics, total):
        if self.back and metrics["step"] == self.at:
            self.stop.request("a test")


AHEAD = {
    **RETURNS,
    "checkpoint__every_steps": 4,
    "training__tokens": 12 * 8 * 64,
    "training__schedule__decay_tokens": 5000,
}
"""Steps 7 and 8 are bad: the run goes back to step 4, and rows 48 to 63 lie ahead of it."""


def test_rows_that_lie_ahead_of_the_checkpoint_are_skipped_when_the_run_comes_to_them(folders, harmful):
    harmful.update({50, 60})
    run = verbs.train(small(**AHEAD), folders)
    assert read_rows(run.metrics)[3:] == [(4, 32), (5, 40), (6, 48), (7, 72), (8, 80), (9, 88), (10, 96)]
    manifest = read_manifest(run.path)
    assert manifest["skipped_ranges"] == [[48, 64]]
    assert sum(entry["rows"] for entry in manifest["ledger"]["entries"] if entry["rows"]) == 80
    assert_rates_are_those_of_the_tokens(run.metrics)


LISTED = tuple(
    dataclasses.replace(source, block_list="mt.ids") if source.language == "mt" else source
    for source in small().data.sources
)


def assert_rates_are_those_of_the_tokens(metrics):
    """The devices, which know the ranges from the state, are where the host is."""
    declared = small(**AHEAD)
    for line in metrics:
        if "loss" in line:
            rate = learning_rate(declared.training.schedule, declared.total_tokens, jnp.float32(line["tokens"]))
            assert line["learning_rate"] == pytest.approx(float(rate), rel=1e-6)


@pytest.mark.parametrize(("batch", "steps"), [(8, [(6, 48), (7, 72)]), (24, [(6, 48), (7, 88), (8, 96)])])
def test_a_resume_before_the_rows_that_are_skipped_ends_its_batch_at_them(folders, harmful, batch, steps):
    harmful.update({50, 60})
    stop = Stop()
    with pytest.raises(Interrupted):
        verbs.train(small(**AHEAD), folders, StopOnce(stop, 5), stop)
    run = verbs.train(small(**AHEAD, training__batch_tokens=batch * 64), folders)
    assert read_rows(run.metrics)[5 : 5 + len(steps)] == steps and read_rows(run.metrics)[-1][1] == 96
    assert_rates_are_those_of_the_tokens(run.metrics)
    if batch == 8:
        whole = verbs.train(small(name="whole", **AHEAD), folders)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, whole.params, run.params))


def test_a_run_that_has_gone_back_as_often_as_declared_fails_and_says_so(folders, harmful):
    harmful.update({17, 26, 33, 41})
    declared = small(**RETURNS | {"training__guard": Guard(max_skipped=1, max_returns=1)}, training__tokens=9 * 8 * 64)
    said = r"40 to 47: .*checkpoint 2 is kept; the run has gone back 1 times \(training.guard.max_returns"
    with pytest.raises(RunFailed, match=said):
        verbs.train(declared, folders)
    assert verbs.latest_step(folders.run_dir(declared.name) / "checkpoints") == 2


@pytest.mark.slow
def test_a_checkpoint_from_before_the_first_of_many_scattered_refusals_is_still_there(folders, harmful):
    harmful.update({33, 49, 65})  # steps 5, 7 and 9
    guard = Guard(window_steps=8, max_skipped=2, max_returns=1)
    declared = small(training__guard=guard, checkpoint__every_steps=1, training__tokens=16 * 512)
    display = Notes()
    run = verbs.train(declared, folders, display)
    assert [note for note in display.notes if "goes back to step 2 and on without rows 32 to 71" in note]
    assert read_rows(run.metrics)[-1] == (11, 128) and not [line for line in run.metrics if "skipped" in line]


@pytest.mark.parametrize(("returns", "steps"), [(0, None), (1, 128), (3, 384)])
def test_each_return_may_go_back_a_window_from_the_one_before(folders, monkeypatch, returns, steps):
    given = []

    def opened(*arguments):
        given.append(arguments)
        raise Interrupted("seen")

    monkeypatch.setattr(loop, "Checkpoints", opened)
    with pytest.raises(Interrupted):
        verbs.train(small(training__guard=Guard(max_returns=returns)), folders)
    assert given[0][3] == steps


def test_without_a_checkpoint_before_the_stretch_or_rows_behind_it_there_is_no_return(folders, harmful):
    harmful.update({0, 8})
    with pytest.raises(RunFailed, match="there is no checkpoint yet; none is from before row 0, to go back to"):
        verbs.train(small(name="first", **RETURNS), folders)
    harmful.clear()
    harmful.update({33, 41})
    with pytest.raises(RunFailed, match="the last rows of the run"):
        verbs.train(small(name="last", **RETURNS), folders)


class Notes(verbs.SilentDisplay):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_run_with_a_planted_nan_goes_on_says_so_and_resumes_to_the_same_bits(folders, planted, monkeypatch):
    planted.add(3)
    display = Notes()
    whole = verbs.train(small(name="whole"), folders, display)
    (line,) = [line for line in whole.metrics if "skipped" in line]
    assert line["step"] == 3 and line["skipped"] == "its loss is not finite" and line["rows"] == [16, 23]
    assert line["loss"] is None and any("step 3 is not applied, its loss is not finite" in n for n in display.notes)
    assert any("show --row 16" in note for note in display.notes)
    stop = Stop()

    class StopAtFour(Notes):
        def step(self, metrics, total):
            if metrics["step"] == 4:
                stop.request("a test")

    with pytest.raises(Interrupted):
        verbs.train(small(name="cut"), folders, StopAtFour(), stop)
    cut = verbs.train(small(name="cut"), folders)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), whole.params, cut.params))


def test_too_many_refused_steps_end_the_run_and_keep_the_checkpoint_from_before_them(folders, planted):
    planted.update({4, 5, 6})
    declared = small(training__guard=Guard(max_skipped=2), checkpoint__every_steps=1)
    with pytest.raises(RunFailed, match=r"rows 24 to 31, 32 to 39, 40 to 47: .*checkpoint 3 is kept"):
        verbs.train(declared, folders)
    assert verbs.latest_step(folders.run_dir(declared.name) / "checkpoints") == 3


def test_a_refused_step_stands_in_the_report(folders, planted):
    planted.add(2)
    run = verbs.train(small(), folders)
    page = report.write(run.path).read_text()
    assert "Steps not applied" in page and "8 to 15" in page and "its loss is not finite" in page
    planted.clear()
    page = report.write(verbs.train(small(name="fine"), folders).path).read_text()
    assert "Steps not applied" not in page


def test_a_run_does_not_end_on_a_step_that_is_not_finite(folders, planted):
    planted.add(6)
    with pytest.raises(RunFailed, match=r"the last step of the run is not applied, its loss .*rows 40 to 47: .*check"):
        verbs.train(small(checkpoint__every_steps=4), folders)
    planted.clear()
    assert "skipped" not in verbs.train(small(checkpoint__every_steps=4), folders).metrics[-2]


def test_a_save_that_is_due_behind_a_refused_step_waits_for_one_that_is_applied(folders, planted):
    planted.add(2)
    verbs.train(small(checkpoint__every_steps=2, checkpoint__keep_last=9), folders)
    assert sorted(listed_steps(folders.run_dir("tiny_eu24") / "checkpoints")) == [3, 4, 6]


class StopAt(Notes):
    def __init__(self, stop, at):
        super().__init__()
        self.stop, self.at = stop, at

    def step(self, metrics, total):
        if metrics["step"] == self.at:
            self.stop.request("a test")


def test_a_stop_behind_a_refused_step_waits_for_one_that_is_applied(folders, planted):
    planted.update({3, 4})
    stop = Stop()
    with pytest.raises(Interrupted, match=r"stopped by a test after step 5, which is saved"):
        verbs.train(small(checkpoint__every_steps=2), folders, StopAt(stop, 3), stop)
    assert verbs.latest_step(folders.run_dir("tiny_eu24") / "checkpoints") == 5


@pytest.mark.slow
def test_a_stop_behind_many_refused_steps_saves_nothing_and_says_so(folders, planted):
    planted.update(range(11, 18))
    declared = small(checkpoint__every_steps=2, training__tokens=40 * 512, training__guard=Guard(max_skipped=30))
    stop = Stop()
    with pytest.raises(Interrupted, match=r"which was not applied and is not saved; .*from the last checkpoint"):
        verbs.train(declared, folders, StopAt(stop, 11), stop)
    assert verbs.latest_step(folders.run_dir("tiny_eu24") / "checkpoints") == 10


def test_a_return_that_nothing_was_saved_behind_stands_all_the_same(folders, harmful):
    harmful.update({50, 60})

    class Dies(Notes):
        def note(self, text):
            if "goes back" in text:
                raise MemoryError

    with pytest.raises(MemoryError):
        verbs.train(small(name="cut", **AHEAD), folders, Dies())
    display = Notes()
    run = verbs.train(small(name="cut", **AHEAD), folders, display)
    manifest = read_manifest(run.path)
    assert len(manifest["returns"]) == 1 and manifest["skipped_ranges"] == [[48, 64]]
    assert not any("goes back" in note or "not applied" in note for note in display.notes)
    whole = verbs.train(small(name="whole", **AHEAD), folders)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, whole.params, run.params))


@pytest.mark.slow
def test_a_return_to_before_a_block_list_was_edited_does_not_read_the_withdrawn_documents_again(folders, harmful):
    harmful.update({34, 50})  # steps 5 and 7

    def gone_back(name, display, stop):
        """The list is edited behind step 6; step 7 is one too many, and the run goes back to step 4."""
        declared = small(name=name, **AHEAD, data__sources=LISTED)
        (folders.data_root / "mt.ids").write_text("")
        first = Stop()
        with pytest.raises(Interrupted, match="after step 6, which is saved"):
            verbs.train(declared, folders, StopAt(first, 6), first)
        withdrawn = sorted(read(declared, 0, 32))[:2]
        (folders.data_root / "mt.ids").write_text("\n".join(withdrawn))
        verbs.train(declared, folders, display, stop)
        return declared, withdrawn

    def read(declared, start, end):
        rows = [verbs.show(declared, folders, row) for row in range(start, end)]
        return {document["id"] for row in rows if row.source.language == "mt" for document in row.documents}

    declared, withdrawn = gone_back("whole", Notes(), Stop())
    manifest = read_manifest(folders.run_dir("whole"))
    assert manifest["skipped_ranges"] == [[32, 56]] and [w["position"] for w in manifest["withdrawn"]] == [0, 56]
    later = read(declared, 56, 96)
    assert later and not later & set(withdrawn)
    stop = Stop()
    with pytest.raises(Interrupted):
        gone_back("cut", StopOnce(stop, 6), stop)
    cut = verbs.train(small(name="cut", **AHEAD, data__sources=LISTED), folders)
    whole = verbs.train(declared, folders)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, whole.params, cut.params))
