import json
import pathlib
import string
import unicodedata

import pytest

from euroflax.languages import EU24

SAMPLE = pathlib.Path(__file__).parent.parent / "euroflax" / "sample"
TRAINED = ["market", "train", "school", "river", "court", "hospital", "parliament", "harvest", "library", "fire"]
HELD_OUT = ["ferry", "theatre"]

LATIN = set(string.ascii_lowercase)
# Letters beyond a to z that a language writes; the ones before the bar must occur in twelve paragraphs of it.
LETTERS = {
    "cs": "áéíýčěřšžůú|óďťň",
    "da": "æøå|é",
    "de": "äöüß|",
    "en": "|",
    "es": "áéíóñ|úü",
    "et": "äõöü|šž",
    "fi": "äö|å",
    "fr": "éèàê|âçëîïôùûüœæ",
    "ga": "áéíóú|",
    "hr": "čćšž|đ",
    "hu": "áéíóöőúü|ű",
    "it": "èà|ùòéì",
    "lt": "ąčęėįšųūž|",
    "lv": "āēģīķļņšūž|č",
    "mt": "ċġħż|àèìòù",
    "nl": "|éëïèöü",
    "pl": "ąćęłńóśźż|",
    "pt": "áâãçéêíóõ|àôúü",
    "ro": "ăâîșț|",
    "sk": "áäčéíľňôšťúýž|óďĺŕ",
    "sl": "čšž|",
    "sv": "åäö|é",
}
GREEK = set("αβγδεζηθικλμνξοπρστυφχψωςάέήίόύώϊϋΐΰ")
BULGARIAN = set("абвгдежзийклмнопрстуфхцчшщъьюяѝ")
# Short words that mark a language off from its neighbours.
WORDS = {
    "bg": "и на в се да който са по",
    "cs": "se je na že když jsou který nebo už",
    "da": "og er det af ikke når på deres",
    "de": "und der die das ist nicht wenn auf",
    "el": "και το της να είναι για στο",
    "en": "the and is of to when they",
    "es": "el la los y en una cuando se del",
    "et": "ja on ei kui ning selle see kes",
    "fi": "ja on ei kun se että ovat jotka",
    "fr": "le les et des est une dans quand",
    "ga": "an na agus ar is tá go ag ina",
    "hr": "je se u na su kada koji kad i",
    "hu": "a az és nem hogy egy is",
    "it": "il la e di che è un gli della",
    "lt": "ir yra kad iš bet kai su į",
    "lv": "un ir no kad ar uz bet par",
    "mt": "u li ta' fil- huma meta minn ma",
    "nl": "de het en een van niet is ze",
    "pl": "i w na się nie jest do że",
    "pt": "o a os e de que não uma do",
    "ro": "și de la nu este un care în",
    "sk": "sa je na že keď sú ktorý alebo už",
    "sl": "je in se na ki so da v",
    "sv": "och är det av inte när på att",
}


def read(code, ending=""):
    lines = (SAMPLE / f"{code}{ending}.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["id"]: record["text"] for record in map(json.loads, lines)}


def whole(code):
    return read(code) | read(code, ".heldout")


def test_every_official_language_is_there_and_no_other():
    names = {path.name.split(".")[0] for path in SAMPLE.glob("*.jsonl")}
    assert names == set(EU24)


@pytest.mark.parametrize("code", EU24)
def test_paragraphs_are_parallel_and_two_are_held_out(code):
    assert list(read(code)) == TRAINED
    assert list(read(code, ".heldout")) == HELD_OUT


@pytest.mark.parametrize("code", EU24)
def test_paragraphs_are_normalised_and_have_40_to_60_words(code):
    for name, text in whole(code).items():
        assert unicodedata.is_normalized("NFC", text), name
        assert 40 <= len(text.split()) <= 60, (name, len(text.split()))
        assert text == text.strip() and "  " not in text and text[-1] in ".!?", name


@pytest.mark.parametrize("code", EU24)
def test_letters_are_those_of_the_language(code):
    used = {letter for text in whole(code).values() for letter in text.lower() if letter.isalpha()}
    if code == "el":
        assert used <= GREEK and len(used) > 28
    elif code == "bg":
        assert used <= BULGARIAN and len(used) > 26
    else:
        must, may = LETTERS[code].split("|")
        assert used <= LATIN | set(must) | set(may), used - LATIN - set(must) - set(may)
        assert set(must) <= used, set(must) - used


@pytest.mark.parametrize("code", EU24)
def test_common_words_identify_the_language(code):
    text = [word.strip('.,;:"„“”»«!?') for word in " ".join(whole(code).values()).lower().split()]

    def score(words):
        return sum(word in text for word in words.split()) / len(words.split())

    assert max(WORDS, key=lambda other: score(WORDS[other])) == code


def test_no_two_languages_have_a_paragraph_in_common():
    texts = [text for code in EU24 for text in whole(code).values()]
    assert len(texts) == len(set(texts)) == 24 * 12
