"""The languages that Euroflax knows: one row each, with their codes, script and status in the European Union."""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """One language of the table."""

    code: str
    """The code used throughout Euroflax: ISO 639-1 where there is one, ISO 639-3 otherwise."""
    iso639_3: str
    """The ISO 639-3 code."""
    scripts: tuple[str, ...]
    """ISO 15924 codes of the scripts in which it is written."""
    name: str
    """The English name."""
    eu_official: bool
    """Whether it is an official language of the European Union."""
    aliases: tuple[str, ...] = ()
    """Other codes under which corpora carry it; they fold into `code`."""

    @property
    def is_one(self) -> bool:
        """Whether it is one language: neither parallel text (`mul`) nor code."""
        return self.code not in ("mul", "code")


_TABLE = """
bg bul Cyrl      yes -   Bulgarian
hr hrv Latn      yes -   Croatian
cs ces Latn      yes -   Czech
da dan Latn      yes -   Danish
nl nld Latn      yes -   Dutch
en eng Latn      yes -   English
et est Latn      yes ekk Estonian
fi fin Latn      yes -   Finnish
fr fra Latn      yes -   French
de deu Latn      yes -   German
el ell Grek      yes -   Greek
hu hun Latn      yes -   Hungarian
ga gle Latn      yes -   Irish
it ita Latn      yes -   Italian
lv lav Latn      yes lvs Latvian
lt lit Latn      yes -   Lithuanian
mt mlt Latn      yes -   Maltese
pl pol Latn      yes -   Polish
pt por Latn      yes -   Portuguese
ro ron Latn      yes -   Romanian
sk slk Latn      yes -   Slovak
sl slv Latn      yes -   Slovenian
es spa Latn      yes -   Spanish
sv swe Latn      yes -   Swedish
sq sqi Latn      no  als Albanian
eu eus Latn      no  -   Basque
bs bos Latn      no  -   Bosnian
ca cat Latn      no  -   Catalan
gl glg Latn      no  -   Galician
ka kat Geor      no  -   Georgian
is isl Latn      no  -   Icelandic
mk mkd Cyrl      no  -   Macedonian
nb nob Latn      no  -   Norwegian Bokmål
nn nno Latn      no  -   Norwegian Nynorsk
sr srp Cyrl,Latn no  -   Serbian
tr tur Latn      no  -   Turkish
uk ukr Cyrl      no  -   Ukrainian
ltg ltg Latn     no  -   Latgalian
no nor Latn      no  -   Norwegian, form not known
mul mul Zyyy     no  -   Several languages
code zxx Zyyy    no  -   Programming code
"""


def _parse(line: str) -> Language:
    code, iso, scripts, official, aliases, name = line.split(maxsplit=5)
    return Language(
        code=code,
        iso639_3=iso,
        scripts=tuple(scripts.split(",")),
        name=name,
        eu_official=official == "yes",
        aliases=() if aliases == "-" else tuple(aliases.split(",")),
    )


LANGUAGES = {row.code: row for row in map(_parse, _TABLE.strip().splitlines())}
"""Every language of the table by its code."""

EU24 = tuple(sorted(code for code, row in LANGUAGES.items() if row.eu_official))
"""The codes of the 24 official languages of the European Union, in alphabetical order."""

_FOLD = {spelling: row.code for row in LANGUAGES.values() for spelling in (row.code, row.iso639_3, *row.aliases)}


def fold(code: str) -> str | None:
    """The table's code for `code`, an ISO 639-3 code or an alias; None where the table has no such language."""
    return _FOLD.get(code)


def neighbours(code: str) -> list[str]:
    """Up to three known codes or names that look like `code`, for an error message."""
    names = {row.name.lower(): row.code for row in LANGUAGES.values()}
    close = difflib.get_close_matches(code.lower(), [*_FOLD, *names], n=3, cutoff=0.4)
    return list(dict.fromkeys(names.get(match) or _FOLD[match] for match in close))
