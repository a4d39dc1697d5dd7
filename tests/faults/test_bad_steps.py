"""What the guard refuses in a run: a NaN, a document that is noise, and a device that spoils the parameters."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from euroflax import verbs
from euroflax.checkpoint import latest_step
from euroflax.console import SilentDisplay
from euroflax.data.loader import Rows
from euroflax.data.prepare import prepare
from euroflax.experiment import Guard, Mixture, RunFailed
from euroflax.training import loop
from euroflax.training.record import read_manifest
from tests.conftest import small

pytestmark = pytest.mark.faults

SMALL = {
    "training__tokens": 48 * 512,
    "checkpoint__every_steps": 8,
    "evaluation__every_steps": 100,
    "training__schedule__peak_learning_rate": 1e-2,
}


class Notes(SilentDisplay):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def refused(run):
    return [line for line in run.metrics if "skipped" in line]


def test_a_nan_is_refused_counted_shown_and_logged_with_its_rows(folders, fault, monkeypatch):
    fault.expected("a NaN in a batch", "the step is not applied, said with its rows, and the run goes on")
    genuine = loop.batches

    def batches(*given):
        for step, batch in enumerate(genuine(*given), 1):
            yield batch | {"loss_weights_BL": batch["loss_weights_BL"] * np.float32("nan" if step == 20 else 1)}

    monkeypatch.setattr(loop, "batches", batches)
    display = Notes()
    run = verbs.train(small(**SMALL), folders, display)
    (line,) = refused(run)
    assert (line["step"], line["rows"], line["loss"]) == (20, [152, 159], None)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.params))
    (said,) = [note for note in display.notes if "is not applied" in note]
    fault.happened(said)


def noise(size):
    letters = random.Random(0)
    return "".join(chr(letters.randrange(0x4E00, 0x9FFF)) for _ in range(size))


def test_a_document_of_noise_is_refused_and_its_row_names_it(folders, tmp_path, fault):
    fault.expected("a document of noise among good ones", "its step is not applied, and show --row names the document")
    text = "All human beings are born free and equal in dignity and rights. " * 4
    documents = [{"id": f"good-{i}", "text": f"{i}. {text}"} for i in range(900)]
    documents[150] = {"id": "noise", "text": noise(100)}
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    declared, held = late(small(**SMALL, training__guard=Guard(window_steps=12)), folders)
    display = Notes()
    run = verbs.train(declared, folders, display)
    steps = refused(run)
    assert steps and all("far above those before it" in line["skipped"] for line in steps)
    assert all(set(range(line["rows"][0], line["rows"][1] + 1)) & set(held) for line in steps)
    first, last = steps[0]["rows"]
    shown = [verbs.show(declared, folders, row).documents for row in range(first, last + 1)]
    assert "noise" in {document["id"] for found in shown for document in found}
    said = next(note for note in display.notes if "is not applied" in note)
    fault.happened(f"{said}; show names the document")


def late(declared, folders):
    """The run with a seed by which noise comes only once the guard knows the run, and the rows that hold it."""
    source = dataclasses.replace(declared.data.sources[0], name="mine", language="en", path="text.jsonl")
    declared = dataclasses.replace(
        declared, data=dataclasses.replace(declared.data, sources=(source,), mixture=Mixture())
    )
    prepared = prepare(declared, folders)
    for seed in range(50):
        declared = dataclasses.replace(declared, training=dataclasses.replace(declared.training, seed=seed))
        rows = Rows(declared, prepared)
        held = [i for i in range(declared.total_rows) if "noise" in {d["id"] for d in rows.row(i).documents}]
        if held and min(held) > 160:
            return declared, held
    raise AssertionError("no seed puts the noise late")


@pytest.fixture
def spoilt(monkeypatch):
    """A device that spoils the parameters once, at the thirtieth step that it takes."""
    genuine, calls = loop.compile_step, []

    def compile_step(*given):
        step = genuine(*given)

        def spoil(state, batch):
            calls.append(None)
            if len(calls) == 30:
                state = state.replace(params=jax.tree.map(lambda leaf: leaf * 8, state.params))
            return step(state, batch)

        return spoil

    monkeypatch.setattr(loop, "compile_step", compile_step)
    return calls


GUARD = Guard(window_steps=8, max_skipped=2)


def test_a_spike_ends_the_run_and_keeps_the_last_good_checkpoint(folders, fault, spoilt):
    fault.expected("a spike: the parameters are spoilt at step 30", "exit 1, the last good checkpoint kept, rows named")
    declared = small(**SMALL, training__guard=GUARD)
    with pytest.raises(
        RunFailed, match=r"look at rows 232 to 239, 240 to 247, 248 to 255: .*; checkpoint 24 is kept"
    ) as failed:
        verbs.train(declared, folders)
    assert latest_step(folders.run_dir(declared.name) / "checkpoints") == 24
    fault.happened(f"exit 1: {failed.value}")


def test_a_spike_with_a_return_goes_back_and_on_without_the_rows(folders, fault, spoilt):
    fault.expected("a spike, with max_returns=1", "back to the checkpoint before it, and on without its rows")
    declared = small(**SMALL, training__guard=dataclasses.replace(GUARD, max_returns=1))
    display = Notes()
    run = verbs.train(declared, folders, display)
    (said,) = [note for note in display.notes if "goes back to step 24 and on without rows 232 to 255" in note]
    assert read_manifest(run.path)["skipped_ranges"] == [[232, 256]]
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    assert len(losses) == 48 - 3 and max(losses[24:]) < max(losses[:24]) and not refused(run)
    fault.happened(said)
