"""The training of a tokenizer in a process of its own. The tokens of stores are held in test_prepare."""

import json
import multiprocessing
import os
import random
import signal

import pytest

from euroflax.data import tokenizer
from euroflax.data.tokenize import train_apart
from euroflax.experiment import ExperimentError, Interrupted, RunFailed
from tests.conftest import small
from tests.data.test_tokenizer import files


def test_it_is_what_training_here_gives():
    declared = small(data__tokenizer__sample_bytes=20_000)
    told, here = [], []
    text = tokenizer.train(declared, files(declared), here.append)
    assert train_apart(declared, files(declared), told.append) == text
    assert sum(told) == sum(here) > 1000 and told[-1] == here[-1] == 0


def test_a_fault_of_the_sample_is_said_here():
    declared = small(model__vocab_size=60_000)
    with pytest.raises(ExperimentError, match=r"model\.vocab_size=60000 is more than the \d+ tokens"):
        train_apart(declared, files(declared), lambda size: None)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A sample that is read in a second, and whose merges take many."""
    path, letters = tmp_path_factory.mktemp("endless") / "a.jsonl", random.Random(0)
    text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz  ", k=4_000_000))
    lines = [json.dumps({"id": str(i), "text": text[i : i + 1000]}) + "\n" for i in range(0, len(text), 1000)]
    path.write_text("".join(lines))
    declared = small(model__vocab_size=400_000, data__tokenizer__sample_bytes=8_000_000)
    return declared, {source.name: [path] for source in declared.data.sources}


def test_a_wish_to_stop_while_merges_are_counted_ends_it(endless):
    told = []

    def advance(size):
        told.append(size)
        if told[-3:] == [0, 0, 0]:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        train_apart(*endless, advance)
    assert not multiprocessing.active_children()


def test_the_death_of_the_process_is_said(endless):
    def advance(size):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(RunFailed, match=r"data\.tokenizer: a worker process died, as in a script .* want of memory"):
        train_apart(*endless, advance)
