"""The mixture as a user meets it: declared, refused, planned, trained in stages, resumed, shown, accounted for."""

import dataclasses
import errno
import json
import re
import subprocess
import sys

import pytest

from euroflax import report, tables, verbs
from euroflax.data import arrays, packings
from euroflax.data.prepare import prepare
from euroflax.experiment import ExperimentError, Interrupted, Mixture, Stage, load, override, validate
from euroflax.folders import Folders
from euroflax.generation import Sampling
from euroflax.huggingface.card import model_card
from euroflax.languages import EU24
from euroflax.run import main
from euroflax.training.record import read_manifest, read_samples
from euroflax.training.stop import Stop
from tests.conftest import ROOT, TINY, run, small, user_environment, write_experiment
from tests.training.test_loop import StopAfter, deterministic

STAGES = (
    Stage(from_tokens=1000, sequence_length=96, batch_tokens=4 * 96),
    Stage(from_tokens=2000, mixture=Mixture(languages="uniform"), sequence_length=32, batch_tokens=16 * 32),
)


def staged(**changes):
    weights = {"sample-el": 0.5, "sample-en": 0.3, "sample-mt": 0.2}
    return small(
        **{
            "data__mixture": Mixture(weights=weights),
            "stages": STAGES,
            "training__tokens": 3500,
            "mesh__data": 4,
            "mesh__tensor": 2,
        }
        | changes
    )


# What a mixture may not be.


@pytest.mark.parametrize(
    ("mixture", "fault"),
    [
        ({"languages": {"el": 0.5, "en": 0.5}}, "data.mixture.languages has no share for mt; give each a share"),
        (
            {"languages": {"el": 0.5, "en": 0.3, "mt": 0.2, "ga": 0.1}},
            "languages[ga]=0.1 has no source in that language",
        ),
        ({"languages": {"ell": 0.5, "en": 0.3, "mt": 0.1, "el": 0.1}}, "names one language 2 times (ell, el)"),
        (
            {"languages": {"el": 0.5, "en": 0.3, "mlt": 0.3}},
            "languages sum to 1.1, not 1; divide each by 1.1: rescaled",
        ),
        (
            {"languages": {"el": 0.5, "en": 0.3, "mt": 0.2, "mts": 0.1}},
            "languages[mts] is not a known language; the near",
        ),
        ({"languages": {"el": 0.5, "en": 0.5, "mt": 0.0}}, "data.mixture.languages[mt]=0.0 is not positive"),
        ({"sources": {"sample-el": 0.5}}, "data.mixture.sources has no share for sample-en, sample-mt"),
        (
            {"sources": {"sample-el": 0.5, "sample-en": 1.0, "sample-mt": 1.0}},
            "data.mixture.sources in el sum to 0.5, not 1; divide each by 0.5: rescaled they are {sample-el: 1}",
        ),
        (
            {"languages": "temperature"},
            "data.mixture.alpha=None is not an exponent for temperature, 0 to 10; use for example 0.3",
        ),
        ({"languages": "temperature", "alpha": 500.0}, "data.mixture.alpha=500.0 is not an exponent for temperature"),
        ({"alpha": 0.5}, "data.mixture.alpha=0.5 is used by temperature alone; leave it out"),
        ({"languages": "unimax"}, "data.mixture.max_epochs=None leaves unimax without a cap; use for example 4"),
        ({"max_epochs": 0.0}, "data.mixture.max_epochs=0.0 is not a positive number"),
        (
            {"language_floor": 0.4},
            "data.mixture.language_floor=0.4 times 3 languages is not within 0 and 1; use 0.333333",
        ),
        (
            {"weights": {"sample-el": 0.5, "sample-en": 0.3, "sample-mt": 0.2}, "languages": "uniform"},
            "data.mixture.languages=uniform has no meaning beside data.mixture.weights",
        ),
        (
            {"weights": {"sample-el": 0.5, "sample-en": 0.3005, "sample-mt": 0.2}},
            "data.mixture.weights sum to 1.0005, not 1; divide each by 1.0005: rescaled they are "
            "{sample-el: 0.499750125, sample-en: 0.300349825, sample-mt: 0.19990005}",
        ),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused_in_a_stage_as_at_the_beginning(mixture, fault):
    declared = small()
    made = Mixture(**mixture)
    data = dataclasses.replace(declared.data, mixture=made)
    assert any(fault in found for found in validate(dataclasses.replace(declared, data=data)))
    later = dataclasses.replace(declared, stages=(Stage(from_tokens=512, mixture=made),))
    assert any(fault.replace("data.mixture", "stages[0].mixture") in found for found in validate(later))


@pytest.mark.parametrize("slack", [0.0, 9e-7, -9e-7])
def test_weights_may_miss_one_by_a_millionth(slack):
    assert not validate(small(data__mixture__weights={"sample-el": 0.5, "sample-en": 0.3, "sample-mt": 0.2 + slack}))


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        ([Stage(from_tokens=0, batch_tokens=64)], "stages[0].from_tokens=0 is not after the beginning of the run at 0"),
        ([Stage(from_tokens=9999, batch_tokens=64)], "is not before the end of the run, training.tokens=3072"),
        (
            [Stage(from_tokens=900, batch_tokens=64), Stage(from_tokens=800, batch_tokens=128)],
            "stages[1].from_tokens=800 is not after stages[0], which begins at 900 tokens; stages begin one after the",
        ),
        ([Stage(from_tokens=900)], "stages[0] changes nothing; give it a mixture, a sequence_length or batch_tokens"),
        (
            [Stage(from_tokens=900, sequence_length=60)],
            "training.batch_tokens=512 is not a multiple of stages[0].sequence",
        ),
        (
            [Stage(from_tokens=900, batch_tokens=100)],
            "stages[0].batch_tokens=100 is not a multiple of data.sequence_leng",
        ),
        (
            [Stage(from_tokens=900, batch_tokens=1024), Stage(from_tokens=930, batch_tokens=512)],
            "stages[0] has no row of 64 tokens: stages begin at whole rows; begin the one after it later",
        ),
        ([Stage(from_tokens=3070, batch_tokens=64)], "stages[0] has no row of 64 tokens"),
        ([Stage(from_tokens=900, sequence_length=1)], "stages[0].sequence_length=1 is less than 2"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(stages, fault):
    assert any(fault in found for found in validate(small(stages=tuple(stages))))


def test_a_batch_of_a_stage_that_does_not_divide_over_the_mesh_is_refused():
    declared = small(mesh__data=8, stages=(Stage(from_tokens=900, batch_tokens=4 * 64),))
    (fault,) = validate(declared)
    assert fault.startswith("stages[0].batch_tokens=256 is 4 rows and does not divide over") and fault.endswith(
        "use 512, or 4 devices"
    )


def test_a_stage_survives_json_and_the_command_line(tmp_path):
    declared = staged()
    path = write_experiment(tmp_path / "x.py", declared)
    assert dataclasses.replace(load(path), name=declared.name) == declared
    assert load(path, {"data.mixture.languages": "uniform", "data.mixture.weights": "{}"}).data.mixture == Mixture(
        languages="uniform"
    )
    shares = load(path, {"data.mixture.weights": "{}", "data.mixture.languages": '{"el": 0.5, "en": 0.3, "mt": 0.2}'})
    assert shares.data.mixture.languages == {"el": 0.5, "en": 0.3, "mt": 0.2}


def test_a_cap_that_is_broken_is_refused_by_check_plan_and_train_alike(folders):
    declared = small(training__tokens=40_000, data__mixture__weights={}, data__mixture__max_epochs=2)
    prepare(declared, folders)
    for verb in (verbs.check, verbs.plan, verbs.train):
        with pytest.raises(
            ExperimentError, match=r"max_epochs=2: source sample-el would be read [\d.]+ times; .* fits"
        ):
            verb(declared, folders)
    assert not (folders.run_dir(declared.name) / "experiment.json").exists()


def test_a_cap_counts_the_epochs_of_all_stages(folders):
    mixture = Mixture(max_epochs=2.5)
    stages = (Stage(from_tokens=10_000, mixture=dataclasses.replace(mixture, languages="uniform")),)
    fits = small(training__tokens=12_000, data__mixture=mixture, stages=stages)
    verbs.plan(fits, folders)
    prepare(fits, folders)
    verbs.plan(fits, folders)
    with pytest.raises(ExperimentError, match=r"^stages\[0\].mixture.max_epochs=2.5: source sample-\w\w would be read"):
        verbs.plan(dataclasses.replace(fits, training=dataclasses.replace(fits.training, tokens=17_000)), folders)
    verbs.plan(small(training__tokens=10_000, data__mixture=mixture), folders)
    verbs.plan(small(training__tokens=7_000, data__mixture=stages[0].mixture), folders)


# What is shown of it.


def test_plan_and_check_show_natural_frequency_shares_and_epochs_in_one_table(folders, tmp_path):
    declared = staged(data__mixture=Mixture(languages="natural"))
    path = write_experiment(tmp_path / "x.py", declared)
    common = ("--cache-dir", folders.cache_dir, "--runs-dir", tmp_path / "runs")
    unprepared = run(path, "check", "--cache-dir", tmp_path / "none", "--runs-dir", tmp_path / "runs")
    assert unprepared.returncode == 0 and "unknown" in unprepared.stdout, unprepared.stderr
    assert run(path, "prepare", *common).returncode == 0
    for verb in ("plan", "check"):
        done = run(path, verb, *common)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.search(r"mixture, shares of bytes\s*\n source +language +size +bytes +natural +share 0", done.stdout)
        assert re.search(r"sample-mt +mt +measured +[\d,]+ +[\d.]+% +[\d.]+% +[\d.]+% +33.33% ", done.stdout), (
            done.stdout
        )
        assert re.search(r" 1 +1,024 +16 +96 +4 *\n", done.stdout)
    planned = json.loads(run(path, "plan", "--json", *common).stdout)
    checked = json.loads(run(path, "check", "--json", *common).stdout)
    assert planned["stages"] == checked["stages"] and len(planned["stages"]) == 3
    sizes = [row["bytes"] for row in planned["stages"][0]["sources"]]
    assert [row["natural"] for row in planned["stages"][0]["sources"]] == pytest.approx([s / sum(sizes) for s in sizes])
    assert sum(entry["rows"] for entry in planned["ledger"]) == load(path).total_rows
    assert planned["tokens"] == load(path).total_tokens


@pytest.fixture(scope="module")
def trained_in_stages(cache, tmp_path_factory):
    root = tmp_path_factory.mktemp("staged")
    folders = Folders(cache_dir=cache, runs_dir=root / "runs", data_root=root)
    declared = staged(data__packing="best-fit")
    verbs.train(declared, folders)
    return declared, folders


def test_the_context_of_a_model_is_its_longest_row(trained_in_stages):
    declared, folders = trained_in_stages
    exported = verbs.export(declared, folders)
    assert json.loads((exported / "config.json").read_text())["max_position_embeddings"] == 96
    assert json.loads((exported / "tokenizer_config.json").read_text())["model_max_length"] == 96
    manifest = read_manifest(folders.run_dir(declared.name))
    manifest["withdrawn"] = [{"position": 9, "listed": {"sample-mt": 3, "sample-el": 0}, "fingerprint": ""}]
    card = model_card(declared, manifest, [], {"step": 3, "position": 20, "ledger": manifest["ledger"]})
    assert "on 1,408 tokens" in card and "3 steps, the last of 384 tokens" in card and "context of 96 tokens" in card
    assert "Left out, being withdrawn: the documents of 3 listed ids of sample-mt from row 9 on." in card
    (written,) = verbs.generate(declared, folders, ["a b " * 38], Sampling(max_new_tokens=2))
    assert 64 < written.prompt_tokens < 94 and len(written.tokens) == 2


def test_the_report_shows_the_shares_asked_of_all_stages_until_now_beside_the_ledger(trained_in_stages):
    declared, folders = trained_in_stages
    manifest = read_manifest(folders.run_dir(declared.name))
    mixture = report._mixture(declared, manifest)
    first, last = (stretch["shares"] for stretch in manifest["mixture"]["resolved"][:: len(declared.spans) - 1])
    for row in mixture:
        one, other = sorted((first[row["source"]["name"]], last[row["source"]["name"]]))
        assert one == other or one < row["asked"] < other
        assert row["asked"] == pytest.approx(row["read"], abs=0.1)
    assert sum(row["asked"] for row in mixture) == pytest.approx(1)
    assert sum(row["tokens"] for row in mixture) == sum(e["tokens"] for e in manifest["ledger"]["entries"])
    (provider,) = report._by(manifest, "provider")
    assert provider["name"] == "Euroflax" and provider["tokens"] == sum(row["tokens"] for row in mixture)
    early = manifest | {"ledger": manifest["ledger"] | {"position": 3}}
    assert {row["source"]["name"]: row["asked"] for row in report._mixture(declared, early)} == pytest.approx(first)
    page = report.write(folders.run_dir(declared.name)).read_text()
    assert "as asked, over the stages until now," in page and "Read by language and provider" in page


def test_show_prints_a_row_and_the_ledger(trained_in_stages, capsys):
    declared, folders = trained_in_stages
    path = write_experiment(folders.data_root / f"{declared.name}.py", declared)
    common = ["--cache-dir", str(folders.cache_dir), "--runs-dir", str(folders.runs_dir), "--devices", "cpu:8"]
    placed = verbs.show(declared, folders, 17)
    assert main([str(path), "show", "--row", "17", *common]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        f"row 17: source {placed.source.name} ({placed.source.language}), stage 1, epoch {placed.epoch}, "
    )
    for document, text in zip(placed.documents, placed.texts, strict=True):
        assert f"document {document['id']}, tokens " in shown and text in shown
    assert main([str(path), "show", "--row", "17", "--json", *common]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == placed.tokens.tolist() and found["segments"][0]["document"] == placed.documents[0]
    assert main([str(path), "show", "--ledger", "--json", *common]) == 0
    ledger = json.loads(capsys.readouterr().out)
    manifest = read_manifest(folders.run_dir(declared.name))
    assert {"position": ledger["position"], "entries": ledger["entries"]} == manifest["ledger"]
    assert ledger["position"] == declared.total_rows == sum(entry["rows"] for entry in ledger["entries"])
    assert main([str(path), "show", "--ledger", "--position", "9", *common]) == 0
    shown = capsys.readouterr().out
    assert "read in the first 9 of" in shown and "by language" in shown and "by provider" in shown
    for arguments, fault in (
        (["show"], "show needs one of --row I and --ledger"),
        (["show", "--row", "1", "--ledger"], "show needs one of --row I and --ledger"),
        (["show", "--row", "99999"], f"row=99999 is not in the run; use 0 to {declared.total_rows - 1}"),
        (["show", "--ledger", "--position", "-1"], f"position=-1 is not in the run; use 0 to {declared.total_rows}"),
        (["bench", "--rows", "0"], "--rows 0 is no number of rows; use 1 or more"),
        (["show", "--row", "1", "--position", "1"], "--position goes with --ledger"),
        (["plan", "--row", "1"], "--row is not for plan; it goes with show"),
    ):
        assert main([str(path), *arguments, *common]) == 2
        assert capsys.readouterr().err == f"error: {fault}\n"


def test_bench_measures_both_packings_beside_grain(folders, capsys):
    capped = Mixture(max_epochs=1)  # met by the first stage, and not by all tokens of the run
    stages = (Stage(from_tokens=2048, mixture=Mixture()),)
    declared = small(data__sequence_length=128, data__mixture=capped, stages=stages, training__tokens=20_000)
    path = write_experiment(folders.data_root / "x.py", declared)
    common = ["--cache-dir", str(folders.cache_dir), "--runs-dir", str(folders.runs_dir), "--devices", "cpu:8"]
    assert main([str(path), "bench", "--rows", "160", "--json", *common]) == 0
    found = json.loads(capsys.readouterr().out)
    loaders = {(line["loader"], line["packing"]): line for line in found["loaders"]}
    assert len(loaders) == 6 and found["sources"] == 3 and found["sequence_length"] == 128
    for packing in ("concat", "best-fit"):
        ours, grains = loaders["euroflax", packing], loaders["grain IterDataset.mix", packing]
        assert ours["tokens_per_second"] > 0 and ours["times_slower"] == 1 and ours["rows"] == grains["rows"] == 160
        assert grains["times_slower"] == pytest.approx(ours["tokens_per_second"] / grains["tokens_per_second"])


# What a run does with it.


@pytest.mark.parametrize("stops", [(1, 4), (3,)], ids=["within stages", "at the end of one"])
def test_a_run_of_stages_that_is_stopped_in_each_of_them_ends_bitwise_the_same(folders, tmp_path, stops):
    declared = staged(evaluation__every_steps=100, checkpoint__every_steps=100, data__packing="best-fit")
    whole = verbs.train(declared, folders)
    lines = [line for line in whole.metrics if "loss" in line]
    assert [line["tokens"] for line in lines] == [512, 1024, 1408, 1792, 2080, 2592, 3104, 3520]
    assert lines[-1]["sequences"] == declared.total_rows and [x["step"] for x in lines] == list(range(1, 9))
    apart = dataclasses.replace(folders, runs_dir=tmp_path / "apart")
    for step in stops:
        stop = Stop()
        with pytest.raises(Interrupted):
            verbs.train(declared, apart, StopAfter(stop, step=step), stop)
        read = read_manifest(apart.run_dir(declared.name))["ledger"]["position"]
        assert read == lines[step + 1]["sequences"]  # a wish is heard a step later, and a step is read one later
    resumed = verbs.train(declared, apart)
    assert deterministic(resumed.metrics) == deterministic(whole.metrics)
    manifests = [read_manifest(f.run_dir(declared.name)) for f in (folders, apart)]
    assert manifests[0]["ledger"] == manifests[1]["ledger"] and len(manifests[1]["sessions"]) == len(stops) + 1


@pytest.mark.slow
def test_the_learning_rate_counts_tokens_over_all_stages(folders):
    declared = staged(training__schedule__warmup_tokens=3000, training__schedule__decay_tokens=0)
    lines = [line for line in verbs.train(declared, folders).metrics if "loss" in line]
    peak = declared.training.schedule.peak_learning_rate
    for line in lines:
        assert line["learning_rate"] == pytest.approx(peak * min(1, line["tokens"] / 3000), rel=1e-6)


def test_documents_that_are_withdrawn_during_a_run_are_left_out_from_its_position_on(folders):
    (folders.data_root / "mt.ids").write_text("")
    sources = tuple(
        dataclasses.replace(source, block_list="mt.ids") if source.language == "mt" else source
        for source in small().data.sources
    )
    declared = staged(data__sources=sources)
    stop = Stop()
    with pytest.raises(Interrupted):
        verbs.train(declared, folders, StopAfter(stop, step=3), stop)
    position = read_manifest(folders.run_dir(declared.name))["ledger"]["position"]
    before = [verbs.show(declared, folders, index) for index in range(position)]
    withdrawn = sorted({d["id"] for row in before if row.source.language == "mt" for d in row.documents})[:2]
    (folders.data_root / "mt.ids").write_text("\n".join([*withdrawn, "nobody's"]) + "\n")
    display = StopAfter()
    done = verbs.train(declared, folders, display)
    assert "withdrawn   source sample-mt: 3 ids listed, 1 of them unknown (nobody's)" in display.notes
    manifest = read_manifest(done.path)
    assert [(w["position"], w["listed"]) for w in manifest["withdrawn"]] == [
        (0, {"sample-mt": 0}),
        (position, {"sample-mt": 3}),
    ]
    (folders.data_root / "mt.ids").write_text("something else\n")
    prepare(declared, folders)  # another list is for the next start; what the run did stays on record
    rows = [verbs.show(declared, folders, index) for index in range(declared.total_rows)]
    assert [row.tokens.tolist() for row in rows[:position]] == [row.tokens.tolist() for row in before]
    later = [d["id"] for row in rows[position:] if row.source.language == "mt" for d in row.documents]
    assert later and not set(later) & set(withdrawn)
    entry = next(entry for entry in manifest["ledger"]["entries"] if entry["source"] == "sample-mt")
    counted = [row for row in rows if row.source.language == "mt"]
    assert entry["tokens"] == sum((row.segment_ids > 0).sum() for row in counted) and entry["rows"] == len(counted)
    assert verbs.evaluate(declared, folders)["step"] == 8


def test_a_list_for_text_that_is_evaluated_on_is_refused():
    sources = tuple(dataclasses.replace(s, block_list="ids") for s in small().evaluation.sources)
    fault = next(f for f in validate(small(evaluation__sources=sources)) if "block_list" in f)
    assert fault.startswith("evaluation.sources[0].block_list=ids is for text that is trained on; take the documents")


def test_plan_says_what_is_wrong_with_data_and_takes_declared_sizes_only_where_there_is_none(folders):
    sources = tuple(dataclasses.replace(source, block_list="gone") for source in small().data.sources)
    prepare(small(), folders)
    with pytest.raises(ExperimentError, match="block_list=gone cannot be read"):
        verbs.plan(small(data__sources=sources), folders)
    missing = tuple(dataclasses.replace(s, path="gone.jsonl", expected_tokens=6400) for s in small().data.sources)
    made = verbs.plan(small(data__sources=missing, data__mixture=Mixture()), folders)
    assert {entry["size"] for entry in made.ledger} == {"declared"} and made.ledger[0]["documents"] is None
    assert [row["epochs"] for row in made.stages[0]["sources"]] == pytest.approx([0.16] * 3)


def test_a_list_may_begin_with_a_byte_order_mark(folders):
    (folders.data_root / "ids").write_bytes("\ufeffmarket\r\nfire \n\n".encode())
    sources = tuple(dataclasses.replace(source, block_list="ids") for source in small().data.sources)
    prepared = prepare(small(data__sources=sources), folders)
    assert prepared.withdrawn["sample-el"] == ("fire", "market") and prepared.unknown_ids["sample-el"] == []
    assert tables.about_rows(small(data__sources=sources), prepared)[0].startswith("rows        ")
    rows = int(tables.about_rows(small(data__sources=sources), prepared)[0].split()[1])
    assert rows < int(tables.about_rows(small(), prepare(small(), folders))[0].split()[1])


def test_a_list_that_cannot_be_read_or_takes_all_is_refused(folders):
    sources = tuple(dataclasses.replace(source, block_list="ids") for source in small().data.sources)
    declared = small(data__sources=sources)
    for verb in (verbs.check, verbs.train):
        with pytest.raises(
            ExperimentError, match=r"source sample-el: block_list=ids cannot be read at .*/ids \(No such"
        ):
            verb(declared, folders)
    prepared = prepare(small(), folders)
    _, store = prepared.train[0]
    (folders.data_root / "ids").write_text("".join(d["id"] + "\n" for d in store.documents(list(range(10)))))
    with pytest.raises(ExperimentError, match="source sample-el: all its documents are withdrawn; take the source out"):
        verbs.train(declared, folders)


@pytest.mark.slow
def test_a_held_out_document_that_is_withdrawn_is_not_evaluated_on(folders):
    sources = tuple(dataclasses.replace(s, holdout_fraction=0.4, block_list="ids") for s in small().data.sources)
    declared = small(data__sources=sources)
    declared = dataclasses.replace(declared, evaluation=dataclasses.replace(declared.evaluation, sources=()))
    (folders.data_root / "ids").write_text("")
    before = prepare(declared, folders)
    held_out = before.evaluation[0][1].documents([0])[0]["id"]
    (folders.data_root / "ids").write_text(f"{held_out}\nother\n")
    after = prepare(declared, folders)
    assert after.left_out["sample-el"] == {0} and after.unknown_ids["sample-el"] == ["other"]
    from euroflax.evaluation import _documents

    sampled = override(declared, {"evaluation.sample_tokens": 4})
    done = verbs.train(sampled, folders)
    assert held_out not in (done.path / "samples.json").read_text()
    assert held_out not in [d["document"] for d in read_samples(done.path)["samples"]]
    assert 0 in _documents(declared, before, *before.evaluation[0])
    assert 0 not in _documents(declared, after, *after.evaluation[0])


@pytest.mark.slow
def test_a_list_that_changes_under_unimax_leaves_the_rows_before_it_as_they_were(folders):
    (folders.data_root / "ids").write_text("")
    sources = tuple(
        dataclasses.replace(source, block_list="ids") if source.language == "el" else source
        for source in small().data.sources
    )
    mixture = Mixture(languages="unimax", max_epochs=0.8)
    declared = small(training__tokens=4096, data__sources=sources, data__mixture=mixture, checkpoint__every_steps=100)
    stop = Stop()
    with pytest.raises(Interrupted):
        verbs.train(declared, folders, StopAfter(stop, step=2), stop)
    (folders.data_root / "ids").write_text("market\n")
    fits = small(
        training__tokens=4096,
        data__sources=sources,
        data__mixture=dataclasses.replace(mixture, max_epochs=3),
    )
    with pytest.raises(ExperimentError, match=r"the mixture of stage 0 has other weights"):
        verbs.train(fits, folders)  # another cap changes what unimax has drawn
    with pytest.raises(ExperimentError, match=r"max_epochs=0.8 cannot be met: it leaves \d+ rows"):
        verbs.train(declared, folders)  # what was left of the window counts as read
    roomy = small(
        training__tokens=148 * 64,
        data__sources=sources,
        data__mixture=dataclasses.replace(mixture, max_epochs=2),
        checkpoint__every_steps=100,
    )
    spacious = dataclasses.replace(folders, runs_dir=folders.runs_dir / "roomy")
    (folders.data_root / "ids").write_text("")
    stop = Stop()
    with pytest.raises(Interrupted):
        verbs.train(roomy, spacious, StopAfter(stop, step=2), stop)
    before = read_manifest(spacious.run_dir(roomy.name))["mixture"]["resolved"]
    (folders.data_root / "ids").write_text("market\n")
    done = verbs.train(roomy, spacious)
    after = read_manifest(done.path)["mixture"]["resolved"]
    assert len(after) == 2 and after[0]["weights"] == before[0]["weights"] != after[1]["weights"]
    assert done.metrics[-1]["step"] == 19
    shorter = small(training__tokens=4096, data__sources=sources, data__mixture=Mixture(max_epochs=0.8))
    apart = dataclasses.replace(folders, runs_dir=folders.runs_dir / "natural")
    (folders.data_root / "ids").write_text("")
    stop = Stop()
    with pytest.raises(Interrupted):
        verbs.train(shorter, apart, StopAfter(stop, step=2), stop)
    (folders.data_root / "ids").write_text("market\n")
    with pytest.raises(ExperimentError, match=r"max_epochs=0\.8: source sample-el would be read"):
        verbs.train(shorter, apart)
    raised = dataclasses.replace(shorter.data, mixture=Mixture(max_epochs=2.0))
    assert verbs.train(dataclasses.replace(shorter, data=raised), apart).metrics[-1]["step"] == 8


def test_more_tokens_that_would_change_the_past_of_the_mixture_are_refused(folders):
    mixture = Mixture(languages="unimax", max_epochs=0.8)
    declared = small(training__tokens=4000, data__mixture=mixture)
    verbs.train(declared, folders)
    with pytest.raises(ExperimentError, match=r"the mixture of stage 0 has other weights than the run began with"):
        verbs.train(small(training__tokens=4600, data__mixture=mixture), folders)


# What may befall its files.


@pytest.mark.parametrize("when", [1, 3, 8, 11])
def test_a_disk_that_fills_during_preparation_leaves_nothing_half_and_asks_to_run_again(
    tmp_path, monkeypatch, capsys, when
):
    path = write_experiment(tmp_path / "x.py", small())
    common = [str(path), "prepare", "--cache-dir", str(tmp_path / "cache"), "--runs-dir", str(tmp_path / "runs")]
    common += ["--devices", "cpu:8"]
    written = []
    write = arrays.ArrayWriter._write

    def full(self, count):
        written.append(count)
        if len(written) >= 6 * when:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(arrays.ArrayWriter, "_write", full)
        assert main(common) == 75
    assert "No space left on device; make room and run the same command again" in capsys.readouterr().err
    cache = tmp_path / "cache"
    assert not list(cache.rglob("*.partial"))
    for manifest in cache.glob("*/*/manifest.json"):
        json.loads(manifest.read_text())
    assert main(common) == 0
    assert (
        len(list(cache.glob("stores/*/manifest.json"))) == 6 and len(list(cache.glob("packings/*/manifest.json"))) == 3
    )


def test_a_packing_is_made_once_for_all_runs_that_need_it(folders, monkeypatch):
    declared = small(data__sequence_length=48, training__batch_tokens=8 * 48)
    prepare(declared, folders)
    monkeypatch.setattr(packings, "make_packing", None)
    prepare(dataclasses.replace(declared, name="another"), folders)
    with pytest.raises(TypeError):
        prepare(small(data__sequence_length=40, training__batch_tokens=8 * 40), folders)


def test_the_default_experiment_says_where_its_rows_are_padded(cache, tmp_path):
    done = run(TINY, "prepare", "--cache-dir", cache, "--runs-dir", tmp_path)
    assert re.search(r"rows        \d+ of 128 tokens \(concat\), [\d.]+% padding", done.stdout), done.stderr


OPEN = """
import pathlib, resource, sys
from euroflax.data.loader import Rows
from euroflax.data.prepare import prepare
from euroflax.experiment import load
from euroflax.folders import Folders
from euroflax.generation import Sampling
from euroflax.huggingface.card import model_card
from euroflax.languages import EU24

if __name__ == "__main__":
    declared = load(sys.argv[1])
    prepared = prepare(declared, Folders(cache_dir=pathlib.Path(sys.argv[2]), runs_dir=pathlib.Path(sys.argv[2])))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = Rows(declared, prepared).row(3_000_000_000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(row.source.name, row.epoch, len(row.texts), (after - before) // 1024)
"""


def test_318_sources_open_at_row_three_thousand_million_in_little_memory(cache, tmp_path):
    originals = small(languages=EU24).data.sources
    sources = tuple(dataclasses.replace(originals[i % 24], name=f"part-{i}") for i in range(318))
    weights = {source.name: 4e-6 if i < 300 else (1 - 300 * 4e-6) / 18 for i, source in enumerate(sources)}
    declared = small(
        data__sources=sources,
        data__mixture=Mixture(weights=weights, unit="tokens"),
        training__tokens=3_500_000_000 * 64,
    )
    path = write_experiment(tmp_path / "x.py", declared)
    (tmp_path / "open.py").write_text(OPEN)
    command = [sys.executable, tmp_path / "open.py", path, cache]
    environment = user_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    source, epoch, texts, megabytes = done.stdout.split()
    assert source.startswith("part-") and int(epoch) > 10**6 and int(texts) > 0 and int(megabytes) < 200
