import numpy as np
import pytest

from euroflax.data.schedule import Schedule, apportion
from euroflax.data.shares import DENOMINATOR

# The weights of a real list of 156 parts: most of them are tiny.
DATAMIX_156 = """
0.324000 0.004000 0.000611 0.000370 0.000491 0.000436 0.000284 0.000317 0.000015 0.000420 0.000770 0.106376
0.000347 0.000370 0.000484 0.000362 0.000371 0.000358 0.000280 0.000332 0.000596 0.003607 0.000391 0.000592
0.000422 0.000467 0.000460 0.000315 0.000308 0.000290 0.000528 0.000337 0.000340 0.000414 0.000415 0.000341
0.000331 0.000639 0.000237 0.000047 0.000098 0.000125 0.000115 0.000408 0.000169 0.001681 0.000041 0.000234
0.014184 0.000030 0.000196 0.001754 0.000024 0.000163 0.000487 0.000025 0.001021 0.000087 0.000088 0.000056
0.000027 0.000010 0.000490 0.000004 0.000130 0.000753 0.001284 0.000444 0.000184 0.000062 0.002847 0.000192
0.000327 0.000245 0.000478 0.002058 0.001462 0.001925 0.001725 0.002164 0.001519 0.005300 0.001441 0.003138
0.001176 0.001770 0.006995 0.001208 0.001232 0.001626 0.002395 0.001116 0.005054 0.011542 0.001497 0.002026
0.001402 0.001491 0.002971 0.000997 0.001370 0.003259 0.005665 0.002441 0.001637 0.001486 0.010192 0.001667
0.002057 0.002763 0.002234 0.002000 0.002000 0.054000 0.131440 0.054000 0.000994 0.001309 0.001173 0.001471
0.002133 0.000980 0.000800 0.000846 0.000838 0.001106 0.007849 0.001377 0.001018 0.000953 0.001014 0.001113
0.001010 0.001400 0.001134 0.001879 0.003604 0.001204 0.003437 0.006930 0.001399 0.001033 0.004756 0.001629
0.000759 0.002020 0.000678 0.000932 0.002216 0.003852 0.001660 0.001519 0.009200 0.025300 0.001500 0.072000
"""


def assert_within_one(weights, places, start=0):
    """At every place from `start` on, each source has been drawn within one of its exact share, by place and drawn."""
    schedule = Schedule(tuple(weights))
    total, counts = sum(weights), schedule.drawn(start).astype(object)
    order = np.empty(places, np.int64)
    for i in range(places):
        order[i], before = schedule.place(start + i)
        assert before == counts[order[i]]
        counts[order[i]] += 1
    assert schedule.drawn(start + places).tolist() == counts.tolist()
    ends = np.arange(start + 1, start + places + 1)
    first = schedule.drawn(start)
    for source, weight in enumerate(weights):
        drawn = first[source] + np.cumsum(order == source)
        assert np.abs(drawn * total - ends * weight).max() < total, source


def test_every_k_up_to_a_million_on_the_list_of_156_parts():
    weights = [float(text) for text in DATAMIX_156.split()]
    assert len(weights) == 156 and sum(weights) == pytest.approx(1, abs=1e-9)
    counts = apportion(weights, DENOMINATOR)
    assert counts == [round(weight * DENOMINATOR) for weight in weights]  # six decimals are kept exactly
    assert_within_one(counts, 1_000_000)


def test_every_k_up_to_a_million_on_weights_out_of_byte_counts():
    sizes = np.random.default_rng(0).lognormal(20, 2, 100).astype(int)
    counts = apportion((np.maximum(sizes, sizes.sum() // 10**6) / sizes.sum()).tolist(), DENOMINATOR)
    assert np.gcd.reduce(counts) == 1 and DENOMINATOR % 10**6 == 0 and 1000 * min(counts) < max(counts)
    assert_within_one(counts, 1_000_000)


@pytest.mark.parametrize(
    "weights",
    [(1,), (2, 1, 1), (50, 7, 4, 3, 3, 1), tuple(range(1, 40)), (997, 1, 1, 1), (1,) * 300, (3,) * 150 + (5,) * 150],
)
@pytest.mark.parametrize("start", [0, 4000, 123_456_789_012 // 100])
def test_weights_of_all_kinds_are_kept_also_far_into_the_run(weights, start):
    assert_within_one(weights, 10_000, start)


def test_random_weights_are_kept_across_cuts():
    rng = np.random.default_rng(1)
    for _ in range(20):
        size = int(rng.integers(2, 200))
        shares = rng.dirichlet(np.full(size, rng.choice([0.05, 0.3, 1.0]))) + 1e-4
        schedule = Schedule(tuple(apportion(shares.tolist(), DENOMINATOR)))
        cut = int(rng.integers(1, 10_000)) * schedule._blocks.block_length
        assert_within_one(apportion(shares.tolist(), DENOMINATOR), 4000, cut - 2000)


def test_place_three_thousand_million_is_found_without_the_ones_before_it():
    weights = apportion([4e-6] * 300 + np.random.default_rng(0).dirichlet(np.ones(18)).tolist(), DENOMINATOR)
    schedule = Schedule(tuple(weights))
    source, before = schedule.place(3_000_000_000)
    assert abs(before - 3_000_000_000 * weights[source] / DENOMINATOR) < 1
    assert schedule.drawn(3_000_000_001)[source] == before + 1
    assert schedule._blocks._block.cache_info().misses == 1


def test_what_was_drawn_can_be_forgotten():
    schedule = Schedule((5, 3))
    found = [schedule.place(index) for index in range(20)]
    schedule.forget()
    assert schedule._blocks._block.cache_info().currsize == 0
    assert [schedule.place(index) for index in range(20)] == found


RARE = {
    "one": [1.0, *[0.3] * 300, 3.2e-7],
    "least": [1.0, 1e-9],
    "several": [1.0, *[0.01] * 150, *[2e-7] * 10, 1e-9, 3e-9],
    "of two kinds": [1.0, 1e-7, 1e-9, 1e-9],
}


@pytest.mark.parametrize("kind", RARE)
def test_shares_down_to_one_in_a_thousand_million_are_kept_at_any_place(kind):
    weights = apportion(RARE[kind], DENOMINATOR)
    schedule = Schedule(tuple(weights))
    exact = np.array(weights) / DENOMINATOR
    is_rare = exact * 2**21 < 1
    within = 1 + exact / 2 / np.where(is_rare, exact[is_rare].sum(), exact[~is_rare].sum())
    rng = np.random.default_rng(0)
    for position in (*rng.integers(0, 2**32, 6).tolist(), 10**6, 2**32 - 1):
        counts = schedule.drawn(position)
        assert counts.sum() == position and (np.abs(counts - exact * position) < within).all()
        source, before = schedule.place(position)
        assert before == counts[source]
        after = counts + np.eye(len(weights), dtype=np.int64)[source]
        np.testing.assert_array_equal(schedule.drawn(position + 1), after)


def test_one_rare_source_comes_in_the_middle_of_its_windows():
    schedule = Schedule((10**9 - 100, 100))
    places = [j * 10**7 + 5 * 10**6 for j in range(3)]
    assert [schedule.place(place) for place in places] == [(1, 0), (1, 1), (1, 2)]
    assert [schedule.place(place + 1)[0] for place in places] == [0, 0, 0]


def test_apportionment_sums_and_gives_each_source_a_row():
    assert apportion([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert apportion([1 - 1e-9, 1e-9], 65536) == [65535, 1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        shares = rng.dirichlet(np.ones(30) * 0.1) + 1e-6
        counts = apportion(list(shares), 65536)
        assert sum(counts) == 65536 and min(counts) >= 1
