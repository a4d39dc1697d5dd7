import types

import numpy as np
import pytest

from euroflax.data.mixture import Resolved, apportion, resolve, schedule
from tests.conftest import small


@pytest.mark.parametrize("weights", [(1,), (2, 1, 1), (50, 7, 4, 3, 3, 1), tuple(range(1, 40)), (997, 1, 1, 1)])
def test_at_every_place_each_source_is_within_one_of_its_share(weights):
    order, total = schedule(weights), sum(weights)
    places = np.arange(1, total + 1)
    for source, weight in enumerate(weights):
        drawn = np.cumsum(order == source)
        assert drawn[-1] == weight
        assert np.max(np.abs(drawn * total - places * weight)) < total


def test_place_and_drawn_agree_with_counting():
    resolved = Resolved(("a", "b", "c"), (5, 3, 2), (7, 7, 7))
    counts = [0, 0, 0]
    for index in range(57):
        source, before = resolved.place(index)
        assert before == counts[source]
        assert resolved.drawn(index) == counts
        counts[source] += 1


def test_apportionment_sums_and_gives_each_source_a_row():
    assert apportion([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    counts = apportion([1 - 1e-9, 1e-9], 65536)
    assert counts == [65535, 1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        shares = rng.dirichlet(np.ones(30) * 0.1) + 1e-6
        counts = apportion(list(shares), 65536)
        assert sum(counts) == 65536 and min(counts) >= 1


def test_shares_of_bytes_become_row_weights_by_the_bytes_in_a_row():
    declared = small(languages=("en", "mt"))
    stores = [types.SimpleNamespace(num_tokens=6401, num_bytes=b, num_documents=1) for b in (40_000, 20_000)]
    prepared = types.SimpleNamespace(train=tuple(zip(declared.data.sources, stores, strict=True)))
    resolved = resolve(declared, prepared)
    assert resolved.rows_per_epoch == (100, 100)
    # Half of the bytes each: rows of the second source hold half as much text, so it gets twice the rows.
    assert resolved.weights[1] / resolved.weights[0] == pytest.approx(2, rel=1e-4)
    tokens = resolve(small(languages=("en", "mt"), data__mixture__unit="tokens"), prepared)
    assert tokens.weights == (1, 1)
    natural = resolve(small(languages=("en", "mt"), data__mixture__weights={}), prepared)
    assert natural.weights == (1, 1)
