"""The order of rows over stages, block lists and epochs, held against a plain account of what was emitted."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest

from euroflax.data import shuffling
from euroflax.data import store as stores
from euroflax.data.ledger import ledger, totals
from euroflax.data.loader import BATCH_KEYS, Rows, batches
from euroflax.data.order import Order
from euroflax.data.prepare import prepare
from euroflax.data.shuffling import shuffled
from euroflax.data.withdrawals import Withdrawal, write_history
from euroflax.experiment import Mixture, Stage
from euroflax.folders import Folders
from tests.conftest import small

STAGES = (
    Stage(from_tokens=1500, sequence_length=96, batch_tokens=4 * 96),
    Stage(from_tokens=5000, mixture=Mixture(languages="uniform")),
    Stage(from_tokens=9000, sequence_length=32, batch_tokens=16 * 32, mixture=Mixture()),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A cache of its own: the stores in it have several windows."""
    root = tmp_path_factory.mktemp("order")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "_WINDOW_TOKENS", (400, 400))
        prepare(declared(), Folders(cache_dir=root, runs_dir=root / "runs"))
    return Folders(cache_dir=root, runs_dir=root / "runs")


def declared(packing="concat", **changes):
    return small(**{"training__tokens": 14_000, "data__packing": packing, "stages": STAGES} | changes)


@pytest.fixture(params=["concat", "best-fit"])
def run(request, folders):
    experiment = declared(request.param)
    prepared = prepare(experiment, folders)
    assert all(store.manifest["windows"] > 3 for _, store in prepared.train)
    return experiment, prepared


def test_stages_begin_at_rows_and_each_has_its_length(run):
    experiment, _ = run
    assert [(s.first_row, s.first_token, s.sequence_length, s.batch_rows) for s in experiment.spans] == [
        (0, 0, 64, 8),
        (24, 1536, 96, 4),
        (61, 5088, 96, 4),
        (102, 9024, 32, 16),
    ]
    assert experiment.total_rows == 102 + 156 and experiment.total_tokens == 9024 + 156 * 32
    assert experiment.tokens_at(25) == 1536 + 96 and experiment.tokens_at(24) == 1536
    rows = Rows(*run)
    for index in (0, 23, 24, 60, 61, 101, 102, experiment.total_rows - 1):
        assert len(rows.row(index).tokens) == experiment.span_at(index).sequence_length


def test_within_an_epoch_nothing_is_read_twice_whatever_changes(run):
    experiment, prepared = run
    rows = Rows(experiment, prepared)
    seen = collections.defaultdict(set)
    stages = collections.defaultdict(set)
    for index in range(experiment.total_rows):
        placed = rows.row(index)
        stages[placed.source.name, placed.epoch].add(placed.stage)
        for document, (first, last, _) in zip(placed.documents, placed.spans, strict=True):
            tokens = {(document["id"], token) for token in range(first, last)}
            assert not tokens & seen[placed.source.name, placed.epoch]
            seen[placed.source.name, placed.epoch] |= tokens
    assert any({0, 1} <= found for found in stages.values())  # an epoch goes on where the row length changes


def test_a_later_epoch_begins_when_all_but_what_was_left_over_has_been_read(run):
    experiment, prepared = run
    order = Rows(experiment, prepared).order
    for number, (source, store) in enumerate(prepared.train):
        read = 0
        for stretch, ends in order.read_until(experiment.total_rows):
            rows = stretch.sources[number]
            read += int((rows.consumed(ends[number]) - rows.consumed(stretch.begins[number]))[:, 2].sum())
            read += stretch.left_over[number]
        last = order.stretches[-1]
        end = last.numbers_at(experiment.total_rows)[number]
        assert read == last.sources[number].consumed(end)[:, 2].sum(), source.name
        assert read > store.num_tokens  # the run is longer than an epoch


def test_only_what_was_left_of_a_window_group_is_passed_over_and_only_if_rows_change(run):
    order = Rows(*run).order
    _, second, third, fourth = order.stretches
    assert third.left_over == (0, 0, 0) and sum(second.left_over) > 0 and sum(fourth.left_over) > 0
    assert third.begins == tuple(second.numbers_at(second.stop_row))
    for stretch in (second, fourth):
        for rows, left in zip(stretch.sources, stretch.left_over, strict=True):
            windows = rows.packing.totals.read(0, len(rows.packing.totals))["tokens"]
            assert left < windows.max() * shuffling._MAX_WINDOWS_IN_GROUP


def test_each_stage_keeps_its_shares_at_every_row(run):
    experiment, prepared = run
    order = Rows(experiment, prepared).order
    for stretch in order.stretches:
        counts = np.zeros(3)
        for index in range(stretch.first_row, stretch.stop_row):
            counts[order.place(index).source] += 1
            exact = (index + 1 - stretch.first_row) * np.array(stretch.weights) / sum(stretch.weights)
            assert np.abs(counts - exact).max() < 1


def test_no_batch_reaches_over_the_end_of_a_stage_and_the_rows_are_the_same(run):
    experiment, prepared = run
    rows = Rows(experiment, prepared)
    found, index = [], 0
    for batch in batches(experiment, rows, 0, range):
        span = experiment.span_at(index)
        assert batch["tokens_BL"].shape == (span.batch_rows, span.sequence_length)
        size = min(span.batch_rows, span.stop_row - index)
        assert not batch["segment_ids_BL"][size:].any() and batch["segment_ids_BL"][:size].any(axis=1).all()
        found += [{key: batch[key][at] for key in BATCH_KEYS} for at in range(size)]
        index += size
    assert index == experiment.total_rows and len(list(batches(experiment, rows, 0, range))) == experiment.total_steps
    fresh = Rows(experiment, prepared)
    for at in np.random.default_rng(0).permutation(index):
        placed = fresh.row(int(at))
        assert np.array_equal(placed.tokens, found[at]["tokens_BL"])
        assert np.array_equal(placed.loss_weights, found[at]["loss_weights_BL"])
    other = dataclasses.replace(
        experiment,
        training=dataclasses.replace(experiment.training, batch_tokens=2 * 64),
        stages=(dataclasses.replace(STAGES[0], batch_tokens=6 * 96), *STAGES[1:]),
    )
    position = 37
    streamed = list(itertools.chain.from_iterable(b["tokens_BL"] for b in batches(other, rows, position, range)))
    used = [row for row in streamed if (row != prepared.tokenizer.pad).any()]
    assert all(np.array_equal(a, b["tokens_BL"]) for a, b in zip(used, found[position:], strict=True))


def brute_force(experiment, rows, indices):
    """What rows hold, counted document by document out of the rows themselves."""
    count = collections.Counter()
    for index in indices:
        placed = rows.row(index)
        assert (placed.segment_ids > 0).sum() == sum(last - first for first, last, _ in placed.spans)
        for document, (first, last, length) in zip(placed.documents, placed.spans, strict=True):
            by = (placed.source.name, document["provider"] or placed.source.provider)
            count[by, "tokens"] += last - first
            count[by, "documents"] += first == 0
            count[by, "bytes"] += document["bytes"] * last // length - document["bytes"] * first // length
        count[placed.source.name, "rows"] += 1
    return count


def as_counts(entries):
    count = collections.Counter()
    for entry in entries:
        for name in ("documents", "bytes", "tokens"):
            count[(entry.source, entry.provider), name] += getattr(entry, name)
        count[entry.source, "rows"] += entry.rows or 0
    return count


@pytest.mark.parametrize("position", [0, 1, 23, 24, 40, 61, 101, 200, 258])
def test_the_ledger_is_what_the_rows_hold(run, position):
    experiment, prepared = run
    rows = Rows(experiment, prepared)
    assert as_counts(ledger(experiment, rows.order, position)) == brute_force(experiment, rows, range(position))


def test_skipped_ranges_are_subtracted(run):
    experiment, prepared = run
    rows = Rows(experiment, prepared)
    kept = [i for i in range(150) if not (10 <= i < 30 or 90 <= i < 110)]
    found = ledger(experiment, rows.order, 150, [(10, 30), (90, 110)])
    assert as_counts(found) == brute_force(experiment, rows, kept)
    found = ledger(experiment, rows.order, 150, [(15, 22), (90, 105), (10, 30), (100, 110)])  # of a second return
    assert as_counts(found) == brute_force(experiment, rows, kept)
    assert sum(totals(found, "language")[code]["tokens"] for code in ("el", "en", "mt")) == sum(e.tokens for e in found)


@pytest.mark.parametrize("long", ["continue", "cut"])
def test_the_ledger_of_other_rows(folders, long):
    experiment = declared("best-fit", data__long_documents=long, stages=())
    rows = Rows(experiment, prepare(experiment, folders))
    for position in (50, experiment.total_rows):
        assert as_counts(ledger(experiment, rows.order, position)) == brute_force(experiment, rows, range(position))


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_the_ledger_knows_the_provider_of_each_document(tmp_path, monkeypatch, packing):
    monkeypatch.setattr(stores, "_WINDOW_TOKENS", (400, 400))
    monkeypatch.setattr("euroflax.data.store._WINDOWS", 10)
    experiment = declared(packing, data__tokenizer__sample_bytes=1000)
    texts = [{"id": f"d{i}", "text": f"document {i} " * (i % 13 + 1), "by": f"p{i % 3}"} for i in range(150)]
    for text in texts[::5]:
        del text["by"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    first, *others = experiment.data.sources
    first = dataclasses.replace(first, path="a.jsonl", provider_field="by", provider="p1")
    data = dataclasses.replace(experiment.data, sources=(first, *others))
    experiment = dataclasses.replace(experiment, data=data)
    prepared = prepare(experiment, Folders(cache_dir=tmp_path / "c", runs_dir=tmp_path, data_root=tmp_path))
    assert prepared.train[0][1].manifest["windows"] > 5
    rows = Rows(experiment, prepared)
    for position in (7, 100, experiment.total_rows):
        entries = ledger(experiment, rows.order, position)
        assert as_counts(entries) == brute_force(experiment, rows, range(position))
    assert {e.provider for e in entries if e.source == first.name} == {"p0", "p1", "p2"}
    assert sum(e.rows is not None for e in entries) == 3
    sums = totals(entries, "provider")
    assert sums["p1"]["tokens"] == sum(e.tokens for e in entries if e.provider == "p1")
    for name in ("documents", "bytes", "tokens"):
        assert sums["Euroflax"][name] == sum(getattr(e, name) for e in entries if e.source != first.name)


def test_epochs_are_the_share_of_a_pass_that_was_read(run):
    experiment, prepared = run
    entries = ledger(experiment, Rows(experiment, prepared).order, experiment.total_rows)
    for entry, (_, store) in zip(entries, prepared.train, strict=True):
        assert entry.epochs == pytest.approx(entry.tokens / store.num_tokens)


def test_withdrawn_documents_are_gone_from_a_position_on_and_no_row_before_it_changes(run, folders, tmp_path):
    experiment, prepared = run
    before = Rows(experiment, prepared)
    gone = {"sample-en": tuple(sorted(d["id"] for d in prepared.train[1][1].documents([0, 3, 5])))}
    experiment = with_lists(experiment, folders, gone)
    own = dataclasses.replace(folders, runs_dir=tmp_path)
    own.run_dir(experiment.name).mkdir()
    write_history(own.run_dir(experiment.name), (Withdrawal(0, {}),))
    prepared = prepare(experiment, own)
    assert prepared.withdrawals(40) == (Withdrawal(0, {}), Withdrawal(40, gone))
    assert prepared.withdrawals() == (Withdrawal(0, {}),) and prepared.withdrawals(0) == (Withdrawal(0, gone),)
    after = Rows(experiment, prepared, prepared.withdrawals(40))
    for index in range(experiment.total_rows):
        row = after.row(index)
        if index < 40:
            assert np.array_equal(row.tokens, before.row(index).tokens)
        elif row.source.name == "sample-en":
            assert not {document["id"] for document in row.documents} & set(gone["sample-en"])
    assert as_counts(ledger(experiment, after.order, 200)) == brute_force(experiment, after, range(200))
    _, second, third, *_ = after.order.stretches
    assert third.first_row == 40 and third.left_over[0] == third.left_over[2] == 0 < third.left_over[1]
    assert third.begins[0] == second.numbers_at(40)[0]


def with_lists(experiment, folders, ids):
    sources = []
    for source in experiment.data.sources:
        if source.name in ids:
            path = folders.cache_dir / f"{source.name}.ids"
            path.write_text("\n".join(ids[source.name]) + "\n\n")
            source = dataclasses.replace(source, block_list=str(path))
        sources.append(source)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sources=tuple(sources)))


def test_a_shuffle_is_a_permutation_that_is_the_same_on_every_machine():
    for size in (1, 2, 3, 64, 1000):
        assert sorted(shuffled(size, 3, "s", 0)) == list(range(size))
    assert shuffled(12, 0, "sample-mt", 0).tolist() == EXPECTED
    assert shuffled(1000, 0, "a").tolist() != shuffled(1000, 0, "b").tolist()
    assert abs(np.corrcoef(np.arange(10**5), shuffled(10**5, 1))[0, 1]) < 0.01


EXPECTED = [4, 9, 5, 7, 6, 3, 1, 10, 11, 8, 2, 0]


def test_an_order_that_is_only_opened_far_on_draws_no_row_before(run, monkeypatch):
    experiment, prepared = run
    order = Order(experiment, prepared, (Withdrawal(0, {}),))
    asked = []
    place = type(order.stretches[0].schedule).place
    monkeypatch.setattr(type(order.stretches[0].schedule), "place", lambda s, i: (asked.append(i), place(s, i))[1])
    order.place(200)
    assert asked == [200 - 102]
    assert order.stretches[-1].schedule._blocks._block.cache_info().misses == 1
    assert all(stretch.schedule._blocks._block.cache_info().currsize == 0 for stretch in order.stretches[:-1])
