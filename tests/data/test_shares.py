import pytest

from euroflax.data.shares import DENOMINATOR, Size, declared_shares, declared_size, row_weights
from euroflax.experiment import ExperimentError, Mixture, Source, Span

FIELDS = {"path": "x", "licence": "x", "provider": "x", "origin": "user", "opt_out": "unknown"}
SOURCES = tuple(Source(name=name, language=name[:2], **FIELDS) for name in ("en-1", "en-2", "mt-1", "ga-1"))
# English has 900 bytes in two sources, Maltese 60, Irish 40; a Maltese token is half as many bytes.
SIZES = [
    Size(600, 150, 15, measured=True),
    Size(300, 75, 7.5, measured=True),
    Size(60, 30, 3, measured=True),
    Size(40, 10, 1, measured=True),
]


def span(number=0, **mixture):
    return Span(
        number=number,
        mixture=Mixture(**mixture),
        sequence_length=10,
        batch_rows=1,
        first_row=0,
        stop_row=1000,
        first_token=0,
    )


def shares(rows=100, read=(0.0, 0.0, 0.0, 0.0), **mixture):
    return declared_shares(span(**mixture), SOURCES, SIZES, rows, list(read))


def test_natural_shares_are_in_proportion_to_size():
    assert shares() == pytest.approx([0.6, 0.3, 0.06, 0.04])
    assert shares(unit="tokens") == pytest.approx([150 / 265, 75 / 265, 30 / 265, 10 / 265])


def test_uniform_and_temperature_are_over_languages_and_natural_within():
    assert shares(languages="uniform") == pytest.approx([2 / 9, 1 / 9, 1 / 3, 1 / 3])
    roots = [900**0.5, 60**0.5, 40**0.5]
    english, maltese, irish = (root / sum(roots) for root in roots)
    found = shares(languages="temperature", alpha=0.5)
    assert found == pytest.approx([english * 2 / 3, english / 3, maltese, irish])
    assert shares(languages="uniform", sources="uniform") == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])


def test_fixed_shares_by_language_and_by_source_within_it():
    fixed = shares(
        languages={"eng": 0.5, "mt": 0.3, "gle": 0.2}, sources={"en-1": 0.9, "en-2": 0.1, "mt-1": 1.0, "ga-1": 1.0}
    )
    assert fixed == pytest.approx([0.45, 0.05, 0.3, 0.2])
    weights = {"en-1": 0.1, "en-2": 0.2, "mt-1": 0.3, "ga-1": 0.4}
    assert shares(weights=weights) == [0.1, 0.2, 0.3, 0.4]


def test_a_floor_lifts_small_languages_and_the_others_give_in_proportion():
    assert shares(language_floor=0.05) == pytest.approx(
        [0.6 * 0.95 / 0.96, 0.3 * 0.95 / 0.96, 0.06 * 0.95 / 0.96, 0.05]
    )
    assert shares(language_floor=0.1) == pytest.approx([0.8 * 2 / 3, 0.8 / 3, 0.1, 0.1])
    assert shares(language_floor=1 / 3) == pytest.approx([2 / 9, 1 / 9, 1 / 3, 1 / 3])


def test_unimax_is_uniform_but_for_languages_that_the_cap_holds_back():
    assert shares(rows=3, languages="unimax", max_epochs=4) == pytest.approx([2 / 9, 1 / 9, 1 / 3, 1 / 3])
    # 60 rows: Irish is held at 4 x 40 bytes (4 rows) and Maltese at 4 x 60 (12 rows); English takes the 44 rows left.
    english = 44 / 22.5 * 900
    total = english + 240 + 160
    found = shares(rows=60, languages="unimax", max_epochs=4)
    assert found == pytest.approx([english * 2 / 3 / total, english / 3 / total, 240 / total, 160 / total])
    # A later stage has less left of what was read before.
    read = (0.0, 0.0, 3.0, 0.0)
    later = shares(rows=60, read=read, languages="unimax", max_epochs=4)
    assert later[2] / later[3] == pytest.approx(60 / 160)


def test_a_cap_that_cannot_be_met_says_what_would_fit():
    with pytest.raises(ExperimentError) as caught:
        shares(rows=200, languages="unimax", max_epochs=4)
    (fault,) = caught.value.faults
    assert fault.startswith(
        "data.mixture.max_epochs=4 cannot be met: it leaves 106 rows of 10 tokens and the stage reads"
    )
    assert fault.endswith("use max_epochs=7.6 or more, or 94 rows (940 tokens) less")
    assert sum(shares(rows=200, languages="unimax", max_epochs=7.6)) == pytest.approx(1)


def test_more_epochs_than_the_cap_are_refused_with_what_fits():
    with pytest.raises(ExperimentError) as caught:
        row_weights(span(number=2, languages="uniform", max_epochs=2), SOURCES, SIZES, 100, [0.0] * 4)
    faults = caught.value.faults
    assert len(faults) == 2 and all(fault.startswith("stages[1].mixture.max_epochs=2: source ") for fault in faults)
    # A third of the bytes each: English takes 25/(25+50+25) of the rows, Maltese half of them.
    assert "source mt-1 would be read 16.67 times; 0.12 of its share fits, or max_epochs=16.67" in faults[0]
    assert "source ga-1 would be read 25 times" in faults[1]
    assert row_weights(span(languages="uniform", max_epochs=25), SOURCES, SIZES, 100, [0.0] * 4)


def test_a_cap_holds_for_what_was_read_before_too():
    # A third of the bytes in 100 rows: Maltese 16.67 epochs, Irish 25, English 1.11.
    for cap, read, fits in ((25.0, 0.0, True), (24.0, 0.0, True), (23.5, 0.0, False), (26.0, 3.0, False)):
        asked = (span(languages="uniform", max_epochs=cap), SOURCES, SIZES, 100, [0.0, 0.0, 0.0, read])
        if fits:  # one row of grace, since draws are rounded to rows
            assert row_weights(*asked)
        else:
            with pytest.raises(ExperimentError, match="source ga-1 would be read"):
                row_weights(*asked)


def test_row_weights_undo_what_a_row_holds_of_each_source():
    weights = row_weights(span(languages="uniform"), SOURCES, SIZES, 10, [0.0] * 4)
    assert sum(weights) == DENOMINATOR
    per_row = [size.bytes / size.rows for size in SIZES]
    amounts = [weight * each for weight, each in zip(weights, per_row, strict=True)]
    assert [amount / sum(amounts) for amount in amounts] == pytest.approx([2 / 9, 1 / 9, 1 / 3, 1 / 3], rel=1e-7)


def test_a_share_too_small_to_be_kept_is_refused_and_not_lifted():
    weights = {"en-1": 1 - 2.8e-9, "en-2": 0.8e-9, "mt-1": 1e-9, "ga-1": 1e-9}
    with pytest.raises(
        ExperimentError, match=rf"source en-2 has a share of 8e-10 of the rows, .* one in {DENOMINATOR}"
    ):
        row_weights(span(weights=weights, unit="tokens"), SOURCES, SIZES, 10, [0.0] * 4)


def test_a_declared_size_is_taken_at_four_bytes_a_token():
    source = Source(name="a", language="en", expected_bytes=8000, **FIELDS)
    assert declared_size(source, 100) == Size(8000, 2000, 20, measured=False)
    source = Source(name="a", language="en", expected_bytes=8000, expected_tokens=1000, **FIELDS)
    assert declared_size(source, 100) == Size(8000, 1000, 10, measured=False)
    assert declared_size(Source(name="a", language="en", **FIELDS), 100) is None
