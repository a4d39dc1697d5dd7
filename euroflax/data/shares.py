"""Shares of sources out of what a mixture declares and how much there is of each source."""

import dataclasses
import math

from euroflax.data.packing import Packing
from euroflax.data.schedule import apportion
from euroflax.experiment import ExperimentError, Mixture, Source, Span
from euroflax.languages import fold

DENOMINATOR = 10**9
_BYTES_PER_TOKEN = 4.0
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Size:
    """One pass over a source."""

    bytes: float
    tokens: float
    rows: float
    measured: bool
    """Whether a store tells; otherwise the source declares it."""

    @classmethod
    def of(cls, packing: Packing) -> "Size":
        """The size of a packed store."""
        return cls(packing.num_bytes, packing.num_tokens, packing.num_rows, measured=True)


def declared_size(source: Source, sequence_length: int) -> Size | None:
    """The size that a source declares, four bytes to a token where it declares one of the two; None for neither."""
    if source.expected_bytes is None and source.expected_tokens is None:
        return None
    tokens = source.expected_tokens or (source.expected_bytes or 0) / _BYTES_PER_TOKEN
    size = source.expected_bytes or tokens * _BYTES_PER_TOKEN
    return Size(size, tokens, max(tokens / sequence_length, 1), measured=False)


def mixture_path(span: Span) -> str:
    """The field of a stage's mixture, for an error message."""
    return f"stages[{span.number - 1}].mixture" if span.number else "data.mixture"


def row_weights(
    span: Span, sources: tuple[Source, ...], sizes: list[Size], rows: int, read: list[float]
) -> tuple[int, ...]:
    """How many rows of each source in `DENOMINATOR` rows.

    Args:
        span: the stage, whose mixture it is.
        sources: the sources.
        sizes: one pass over each.
        rows: rows that are drawn by these weights.
        read: epochs of each source before them.

    Raises:
        ExperimentError: the cap on epochs cannot be met, or a share is too small to be kept.
    """
    shares = declared_shares(span, sources, sizes, rows, read)
    amounts = [_amount(size, span.mixture) for size in sizes]
    wanted = [share * size.rows / amount for share, size, amount in zip(shares, sizes, amounts, strict=True)]
    total = math.fsum(wanted)
    for source, value in zip(sources, wanted, strict=True):
        if value / total * DENOMINATOR < 1 - _ROUNDING:
            raise ExperimentError(
                f"{mixture_path(span)}: source {source.name} has a share of {value / total:.3g} of the rows, less than "
                f"one in {DENOMINATOR}; give it more, join it with another source, or take it out"
            )
    weights = apportion(wanted, DENOMINATOR)
    _check_epochs(span, sources, [weight * rows / DENOMINATOR for weight in weights], sizes, read)
    return tuple(weights)


def _check_epochs(
    span: Span, sources: tuple[Source, ...], rows: list[float], sizes: list[Size], read: list[float]
) -> None:
    cap = span.mixture.max_epochs
    if cap is None:
        return
    faults = []
    for source, count, size, before in zip(sources, rows, sizes, read, strict=True):
        if count > (cap - before) * size.rows + 1:
            fits = max(0.0, (cap - before) * size.rows)
            faults.append(
                f"{mixture_path(span)}.max_epochs={cap:g}: source {source.name} would be read "
                f"{before + count / size.rows:.4g} times; {fits / count:.3g} of its share fits, or max_epochs="
                f"{math.ceil(100 * (before + count / size.rows)) / 100:g}, or fewer training.tokens"
            )
    if faults:
        raise ExperimentError(*faults)


def _amount(size: Size, mixture: Mixture) -> float:
    return size.bytes if mixture.unit == "bytes" else size.tokens


def declared_shares(
    span: Span, sources: tuple[Source, ...], sizes: list[Size], rows: int, read: list[float]
) -> list[float]:
    """The share of each source in bytes or tokens, as the mixture of a stage has it; arguments as `row_weights`."""
    mixture = span.mixture
    if mixture.weights:
        return [mixture.weights[source.name] for source in sources]
    amounts = [_amount(size, mixture) for size in sizes]
    codes = [fold(source.language) or source.language for source in sources]
    within = _within(mixture, sources, codes, amounts)
    by_language = {
        code: sum(a for a, c in zip(amounts, codes, strict=True) if c == code) for code in sorted(set(codes))
    }
    if isinstance(mixture.languages, dict):
        shares = {fold(code) or code: share for code, share in mixture.languages.items()}
    elif mixture.languages == "unimax":
        shares = _floored(_unimax(span, codes, within, sizes, rows, read), mixture.language_floor)
    else:
        shares = _floored(_powers(by_language, mixture.languages, mixture.alpha), mixture.language_floor)
    return [shares[code] * part for code, part in zip(codes, within, strict=True)]


def _powers(sizes: dict[str, float], strategy: str, alpha: float | None) -> dict[str, float]:
    exponent = {"natural": 1.0, "uniform": 0.0, "temperature": alpha or 0.0}[strategy]
    values = {name: size**exponent for name, size in sizes.items()}
    total = math.fsum(values.values())
    return {name: value / total for name, value in values.items()}


def _within(mixture: Mixture, sources: tuple[Source, ...], codes: list[str], amounts: list[float]) -> list[float]:
    """The share of each source within its language."""
    if isinstance(mixture.sources, dict):
        return [mixture.sources[source.name] for source in sources]
    found: dict[str, float] = {}
    for code in set(codes):
        mine = {s.name: a for s, a, c in zip(sources, amounts, codes, strict=True) if c == code}
        found |= _powers(mine, mixture.sources, mixture.alpha)
    return [found[source.name] for source in sources]


def _floored(shares: dict[str, float], floor: float) -> dict[str, float]:
    """Shares of at least `floor`, the others less in proportion."""
    low: set[str] = set()
    while True:
        rest = math.fsum(share for name, share in shares.items() if name not in low)
        scale = (1 - floor * len(low)) / rest if rest else 0.0
        more = {name for name, share in shares.items() if name not in low and share * scale < floor}
        if not more:
            return {name: floor if name in low else share * scale for name, share in shares.items()}
        low |= more


def _unimax(
    span: Span, codes: list[str], within: list[float], sizes: list[Size], rows: int, read: list[float]
) -> dict[str, float]:
    """Equal amounts of each language, but of none more than the cap on epochs leaves.

    Chung et al., "UniMax: Fairer and more effective language sampling for large-scale multilingual pretraining", 2023.
    """
    cap, budget = span.mixture.max_epochs or 0.0, float(rows)
    cost = dict.fromkeys(sorted(set(codes)), 0.0)
    amounts = [_amount(size, span.mixture) for size in sizes]
    for code, part, size, amount in zip(codes, within, sizes, amounts, strict=True):
        cost[code] += part * size.rows / amount

    def under(cap: float) -> dict[str, float]:
        """The most of each language."""
        left = dict.fromkeys(cost, math.inf)
        for code, part, amount, before in zip(codes, within, amounts, read, strict=True):
            left[code] = min(left[code], max(0.0, cap - before) * amount / part)
        return left

    left = under(cap)
    fits = int(math.fsum(left[code] * cost[code] for code in left))
    if fits < rows:
        needed = cap
        while math.fsum(most * cost[code] for code, most in under(needed).items()) < budget:
            needed *= 1.01
        raise ExperimentError(
            f"{mixture_path(span)}.max_epochs={cap:g} cannot be met: it leaves {fits} rows of {span.sequence_length} "
            f"tokens and the stage reads {rows}; use max_epochs={math.ceil(needed * 10) / 10:g} or more, or "
            f"{rows - fits} rows ({(rows - fits) * span.sequence_length} tokens) less"
        )
    taken: dict[str, float] = {}
    for code in sorted(left, key=lambda code: left[code]):
        rest = math.fsum(cost[other] for other in left if other not in taken)
        taken[code] = min(left[code], budget / rest)
        budget -= taken[code] * cost[code]
    total = math.fsum(taken.values())
    return {code: amount / total for code, amount in taken.items()}
