import pytest

from euroflax.data.fertility import tokenizer_figures
from euroflax.data.prepare import prepare
from tests.conftest import ROOT, small

SAMPLE = ROOT / "euroflax" / "sample"


def test_figures_are_those_of_a_plain_count(folders):
    import json

    declared = small()
    prepared = prepare(declared, folders)
    found = tokenizer_figures(declared, prepared)
    assert set(found) == {"el", "en", "mt"}

    def texts(name):
        return [json.loads(line)["text"] for line in (SAMPLE / name).read_text().splitlines()]

    def count(lines):
        return sum(len(ids) for ids in prepared.tokenizer.encode(lines))

    held_out = texts("el.heldout.jsonl")
    tokens = count(held_out)
    assert found["el"]["characters_per_token"] == pytest.approx(sum(map(len, held_out)) / tokens)
    assert found["el"]["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in held_out) / tokens)
    assert found["el"]["tokens_per_word"] == pytest.approx(tokens / sum(len(text.split()) for text in held_out))
    assert found["el"]["tokens_vs_english"] == pytest.approx(count(texts("el.jsonl")) / count(texts("en.jsonl")))


def test_a_language_without_parallel_text_is_not_measured_there(folders):
    import dataclasses

    declared = small()
    sources = tuple(
        dataclasses.replace(source, language="uk") if source.language == "mt" else source
        for source in declared.data.sources + declared.evaluation.sources
    )
    declared = dataclasses.replace(
        declared,
        data=dataclasses.replace(declared.data, sources=sources[:3]),
        evaluation=dataclasses.replace(declared.evaluation, sources=sources[3:]),
    )
    found = tokenizer_figures(declared, prepare(declared, folders))
    assert found["uk"]["tokens_vs_english"] is None and found["uk"]["characters_per_token"] > 1
