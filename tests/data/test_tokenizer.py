import dataclasses
import json

import pytest
import tokenizers

from euroflax.data import documents, tokenizer
from euroflax.data.files import find_files
from euroflax.experiment import ExperimentError
from tests.conftest import ROOT, small


def files(declared):
    return {source.name: find_files(source, ROOT) for source in declared.data.sources}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    declared = small()
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    path.write_text(tokenizer.train(declared, files(declared), lambda size: None))
    return tokenizer.read(path)


def test_it_has_the_asked_size_and_takes_any_text_and_back(trained):
    assert trained.vocab_size == 512
    for text in ("Ħelu 2026!\n\tgħ", "αβγ 你好 🙂", " leading", "a  b   c\r\n"):
        (ids,) = trained.encode([text])
        assert trained.inner.decode(ids) == text


def test_markers_inside_a_text_are_ordinary_text(trained):
    (ids,) = trained.encode(["a<|end_of_text|>b<|begin_of_text|>"])
    assert not {trained.bos, trained.eos, trained.pad} & set(ids)


def test_training_twice_gives_the_same_bytes():
    declared = small()
    assert tokenizer.train(declared, files(declared), lambda s: None) == tokenizer.train(
        declared, files(declared), lambda s: None
    )


def test_the_sample_has_as_many_bytes_of_each_language():
    declared = small(data__tokenizer__sample_bytes=3000)
    text = "".join(tokenizer.balanced_sample(declared, files(declared)))
    greek = sum(len(letter.encode()) for letter in text if "Ͱ" <= letter <= "Ͽ" or "ἀ" <= letter <= "῿")
    assert 2990 <= len(text.encode()) <= 3000
    assert greek > 750


def test_held_out_documents_do_not_train_the_tokenizer():
    declared = small(languages=("en",))
    half = dataclasses.replace(declared.data.sources[0], holdout_fraction=0.5)
    declared = dataclasses.replace(declared, data=dataclasses.replace(declared.data, sources=(half,)))
    seen = list(tokenizer.balanced_sample(declared, files(declared)))
    records = [json.loads(line) for line in files(declared)["sample-en"][0].read_text().splitlines()]
    held = [r["text"] for r in records if documents.is_held_out(documents.Document(r["id"], r["text"]), 0.5)]
    assert 0 < len(held) < 10 and len(seen) == 10 - len(held)
    assert not set(held) & set(seen)


def test_a_vocabulary_that_the_data_cannot_fill_says_what_it_can():
    declared = small(model__vocab_size=60_000)
    with pytest.raises(ExperimentError, match=r"model\.vocab_size=60000 is more than the \d+ tokens"):
        tokenizer.train(declared, files(declared), lambda size: None)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("{}", "is no tokenizer.json")])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ExperimentError, match=message):
        tokenizer.read(path)


def test_long_texts_are_encoded_in_pieces_with_the_same_tokens(trained, monkeypatch):
    text = "One two, three. Four five six!\n\n" * 40
    (whole,) = trained.encode([text])
    monkeypatch.setattr(tokenizer, "_PIECE", 64)
    pieces = tokenizer.split(text, 64)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 64 < len(text)
    assert trained.encode(["a", text, "b"]) == [trained.encode(["a"])[0], whole, trained.encode(["b"])[0]]


def test_a_text_without_a_space_is_split_too():
    assert tokenizer.split("a" * 10, 4) == ["aaaa", "aaaa", "aa"]


@pytest.mark.parametrize("text", ["a" * 4_000_000, " " * 1_000_000, "ab" * 500_000])
def test_a_vocabulary_is_made_of_long_runs_in_bounded_time(tmp_path, text):
    runs = list(tokenizer._without_long_runs(text))
    assert "".join(runs) == text and max(map(len, runs)) == 1024


def test_lost_bytes_are_those_of_characters_that_do_not_come_back(trained):
    lower = tokenizers.Tokenizer.from_str(trained.inner.to_str())
    lower.normalizer = tokenizers.normalizers.Lowercase()
    losing = dataclasses.replace(trained, inner=lower)
    text = "Ωμέγα Και A"
    (ids,) = losing.encode([text])
    assert losing.lost_bytes(text, ids) == len("ΩΚA".encode())
    assert trained.lost_bytes(text, trained.encode([text])[0]) == 0
