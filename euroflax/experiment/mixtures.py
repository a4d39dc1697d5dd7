"""What can be known to be wrong from the values of a mixture alone."""

import collections
import math
from collections.abc import Iterator, Mapping

from euroflax import languages
from euroflax.experiment.codec import shown
from euroflax.experiment.schema import Experiment, Mixture, Source

_MAX_ALPHA = 10

_SHOWN = 24


def mixtures(experiment: Experiment) -> Iterator[str]:
    """The faults of the mixture that the run begins with, and of those of its stages."""
    later = ((f"stages[{i}].mixture", stage.mixture) for i, stage in enumerate(experiment.stages))
    for path, mixture in (("data.mixture", experiment.data.mixture), *later):
        if mixture is not None:
            yield from _mixture(path, mixture, experiment.data.sources)


def _mixture(path: str, mixture: Mixture, sources: tuple[Source, ...]) -> Iterator[str]:
    names = [source.name for source in sources]
    if mixture.weights:
        for field in ("languages", "sources", "alpha", "language_floor"):
            if getattr(mixture, field) != getattr(Mixture(), field):
                yield (
                    f"{path}.{field}={shown(getattr(mixture, field))} has no meaning beside {path}.weights, "
                    "which fixes all shares; leave one of them out"
                )
        yield from _fixed(f"{path}.weights", mixture.weights, names)
        yield from _sums_to_one(f"{path}.weights", mixture.weights)
    if isinstance(mixture.languages, dict):
        yield from _languages(f"{path}.languages", mixture.languages, sources)
    if isinstance(mixture.sources, dict):
        yield from _fixed(f"{path}.sources", mixture.sources, names)
        for code in sorted({_code(source) for source in sources}):
            mine = [source.name for source in sources if _code(source) == code and source.name in mixture.sources]
            if mine:
                yield from _sums_to_one(f"{path}.sources in {code}", {name: mixture.sources[name] for name in mine})
    yield from _numbers(path, mixture, len({_code(source) for source in sources}))


def _code(source: Source) -> str:
    return languages.fold(source.language) or source.language


def _numbers(path: str, mixture: Mixture, num_languages: int) -> Iterator[str]:
    if "temperature" in (mixture.languages, mixture.sources):
        if mixture.alpha is None or not 0 <= mixture.alpha <= _MAX_ALPHA:
            yield (
                f"{path}.alpha={mixture.alpha} is not an exponent for temperature, 0 to {_MAX_ALPHA}; "
                "use for example 0.3"
            )
    elif mixture.alpha is not None and not mixture.weights:
        yield f"{path}.alpha={mixture.alpha} is used by temperature alone; leave it out"
    if mixture.max_epochs is not None and not 0 < mixture.max_epochs < math.inf:
        yield f"{path}.max_epochs={mixture.max_epochs} is not a positive number; use for example 4"
    if mixture.languages == "unimax" and mixture.max_epochs is None:
        yield f"{path}.max_epochs=None leaves unimax without a cap; use for example 4"
    if mixture.language_floor:
        if isinstance(mixture.languages, dict):
            yield f"{path}.language_floor={mixture.language_floor} has no meaning for fixed shares; leave it out"
        elif not 0 <= mixture.language_floor * num_languages <= 1:
            yield (
                f"{path}.language_floor={mixture.language_floor} times {num_languages} languages is not within "
                f"0 and 1; use {math.floor(1e6 / max(num_languages, 1)) / 1e6:g} or less"
            )


def _fixed(field: str, shares: Mapping[str, float], names: list[str]) -> Iterator[str]:
    for name in shares.keys() - set(names):
        yield f"{field}[{name}]={shares[name]} names no source; name one of data.sources"
    if without := [name for name in names if name not in shares]:
        listed = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        yield f"{field} has no share for {listed}; give each a share, or take the source out"
    yield from _positive(field, shares)


def _positive(field: str, shares: Mapping[str, float]) -> Iterator[str]:
    for name, share in shares.items():
        if not 0 < share < math.inf:
            yield f"{field}[{name}]={share} is not positive; give a share, or take the source out"


def _languages(field: str, shares: Mapping[str, float], sources: tuple[Source, ...]) -> Iterator[str]:
    present = {_code(source) for source in sources}
    folded = {code: languages.fold(code) for code in shares}
    for code, known in folded.items():
        if known is None:
            close = ", ".join(languages.neighbours(code)) or "listed in euroflax/languages.py"
            yield f"{field}[{shown(code)}] is not a known language; the nearest are {close}"
        elif known not in present:
            yield f"{field}[{code}]={shares[code]} has no source in that language; add one, or leave the language out"
    for known, count in collections.Counter(folded.values()).items():
        if known is not None and count > 1:
            twice = ", ".join(code for code in shares if folded[code] == known)
            yield f"{field} names one language {count} times ({twice}); give it one share"
    if without := sorted(present - set(folded.values())):
        yield f"{field} has no share for {', '.join(without)}; give each a share, or take its sources out"
    yield from _positive(field, shares)
    yield from _sums_to_one(field, shares)


def _sums_to_one(field: str, shares: Mapping[str, float]) -> Iterator[str]:
    total = math.fsum(shares.values())
    if not abs(total - 1) <= 1e-6:
        offer = ", ".join(f"{name}: {share / total:.9g}" for name, share in shares.items() if total > 0)
        rescaled = f": rescaled they are {{{offer}}}" if len(shares) <= _SHOWN else ""
        yield f"{field} sum to {total:.9g}, not 1; divide each by {total!r}{rescaled}"
