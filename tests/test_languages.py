from euroflax import languages


def test_there_are_24_official_languages():
    assert len(languages.EU24) == 24
    assert languages.EU24[:3] == ("bg", "cs", "da")


def test_aliases_and_three_letter_codes_fold():
    assert [languages.fold(code) for code in ("ekk", "est", "lvs", "als", "mt")] == ["et", "et", "lv", "sq", "mt"]
    assert languages.fold("xx") is None


def test_no_spelling_belongs_to_two_languages():
    rows = languages.LANGUAGES.values()
    spellings = [s for row in rows for s in {row.code, row.iso639_3, *row.aliases}]
    assert len(spellings) == len(set(spellings))


def test_an_unknown_code_names_its_neighbours():
    assert "mt" in languages.neighbours("maltes")
    assert "et" in languages.neighbours("estonia")
