"""Bootstrap intervals: against theory and a plain loop, coverage, pairing, bad input."""

import math
import re
import sys

import numpy as np
import pytest

from tvg_lib.errors import DataError
from tvg_lib.metrics import (
    Estimate,
    bootstrap,
    bootstrap_many,
    paired_bootstrap,
    recall_at_k,
    retrieval_report,
)


def test_interval_is_that_of_the_normal_law_for_a_mean():
    hits = 100.0 * (np.arange(1600) % 4 == 0)  # 25 % of 1,600
    estimate = bootstrap(hits, resamples=2000, seed=1)
    half = 1.96 * 100 * math.sqrt(0.25 * 0.75 / 1600)
    assert estimate.value == 25
    assert estimate.n == 1600
    assert estimate.low == pytest.approx(25 - half, abs=0.2)
    assert estimate.high == pytest.approx(25 + half, abs=0.2)


def test_matches_a_plain_loop_over_resamples():
    rng = np.random.default_rng(3)
    values = rng.normal(size=200)
    values[:50] = np.nan
    estimate = bootstrap(values, resamples=2000, seed=0, confidence=0.9)
    means = [np.nanmean(rng.choice(values, size=200)) for _ in range(2000)]
    low, high = np.quantile(means, [0.05, 0.95])
    assert estimate.value == pytest.approx(np.nanmean(values))
    assert estimate.n == 150
    assert estimate.low == pytest.approx(low, abs=0.015)
    assert estimate.high == pytest.approx(high, abs=0.015)


def test_groups_are_drawn_whole():
    rng = np.random.default_rng(4)
    groups = rng.integers(30, size=200)
    values = rng.normal(size=200) + 2 * rng.normal(size=30)[groups]
    values[:20] = np.nan
    estimate = bootstrap(values, groups=groups.tolist(), resamples=2000, confidence=0.9)
    members = [values[groups == group] for group in np.unique(groups)]
    means = [
        np.nanmean(np.concatenate([members[i] for i in rng.integers(len(members), size=30)]))
        for _ in range(2000)
    ]
    low, high = np.quantile(means, [0.05, 0.95])
    assert estimate.value == pytest.approx(np.nanmean(values))
    assert estimate.n == 180
    assert estimate.low == pytest.approx(low, abs=0.06)
    assert estimate.high == pytest.approx(high, abs=0.06)


def test_copies_of_a_query_are_no_more_evidence():
    values = np.random.default_rng(5).normal(size=50)
    once = bootstrap(values)
    copied = bootstrap(np.repeat(values, 8), groups=np.repeat(np.arange(50), 8).tolist())
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert bootstrap(np.repeat(values, 8)).high < once.high
    difference = paired_bootstrap(values, -values, groups=list(range(50)))
    assert difference == paired_bootstrap(values, -values)
    with pytest.raises(DataError, match="found 49 for 50 queries"):
        bootstrap(values, groups=list(range(49)))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    estimates = [
        bootstrap(rng.random(100) < 0.4, resamples=200, seed=s, confidence=0.9) for s in range(300)
    ]
    covered = np.mean([e.low <= 0.4 <= e.high for e in estimates])
    assert 0.83 <= covered <= 0.96


def test_seeded_and_shared_by_all_metrics(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.random(50), rng.random(50)
    both = bootstrap_many({"a": a, "b": b, "twice": 2 * a}, seed=5)
    assert bootstrap(a, seed=5) == bootstrap(a, seed=5)
    assert both["a"].low == pytest.approx(bootstrap(a, seed=5).low)
    assert both["b"].high == pytest.approx(bootstrap(b, seed=5).high)
    assert both["a"].low != pytest.approx(bootstrap(a, seed=6).low)
    assert both["twice"].low == pytest.approx(2 * both["a"].low)
    # Memory is bounded by blocks; they do not change the draws.
    monkeypatch.setattr(sys.modules["tvg_lib.metrics.bootstrap"], "_BLOCK_ENTRIES", 170)
    assert bootstrap(a, seed=5).low == pytest.approx(both["a"].low)


def test_constant_and_uncounted():
    assert bootstrap([7.0] * 5) == Estimate(7.0, 7.0, 7.0, 5)
    alone = bootstrap([np.nan] * 20 + [3.0], seed=0)
    assert alone == Estimate(3.0, 3.0, 3.0, 1)
    none = bootstrap([np.nan, np.nan])
    assert none.n == 0
    assert math.isnan(none.value)
    assert repr(none) == "undefined (n=0)"
    assert bootstrap_many({}) == {}


def test_repr():
    assert repr(Estimate(59.234, 56.7, 61.5, 1542)) == "59.23 [56.70, 61.50] (n=1542)"


def test_pairing_removes_what_both_systems_find_hard():
    rng = np.random.default_rng(0)
    hardness = rng.normal(scale=30, size=300)
    better, worse = 52 + hardness + rng.normal(size=300), 50 + hardness + rng.normal(size=300)
    difference = paired_bootstrap(better, worse)
    assert difference.value == pytest.approx((better - worse).mean())
    assert 1.5 < difference.low < difference.value < difference.high < 2.5
    swapped = paired_bootstrap(worse, better)
    assert swapped.high == pytest.approx(-difference.low)
    # Unpaired, the two intervals overlap widely.
    assert bootstrap(worse).high > bootstrap(better).low
    assert paired_bootstrap(better, better) == Estimate(0.0, 0.0, 0.0, 300)


def test_reports_give_estimates_and_paired_differences():
    truth = [[[0.0, 10.0]]] * 40
    first = recall_at_k([[[0, 10]]] * 30 + [[[50, 60]]] * 10, truth, query_ids=range(40))
    second = recall_at_k([[[0, 10]]] * 20 + [[[50, 60]]] * 20, truth, query_ids=range(40))
    estimates = first.estimates(resamples=500, seed=2)
    assert list(estimates) == list(first.values)
    assert estimates["R1@0.5"].value == 75
    assert estimates["R1@0.5"].low < 75 < estimates["R1@0.5"].high
    assert estimates["R1@0.5"].n == 40
    difference = first.minus(second, seed=2)
    assert difference["R1@0.5"].value == 25
    assert difference["R1@0.5"].low > 0
    # Queries are matched by id, not by position.
    backwards = recall_at_k(
        [[[50, 60]]] * 20 + [[[0, 10]]] * 20, truth, query_ids=range(39, -1, -1)
    )
    assert first.minus(backwards, seed=2) == difference
    # Only what both reports have.
    assert list(first.minus(recall_at_k([[[0, 10]]] * 40, truth, ks=(1,)))) == [
        "R1@0.3",
        "R1@0.5",
        "R1@0.7",
        "mIoU",
    ]
    with pytest.raises(DataError, match="same queries, found 40 and 39, of which 1 in one only"):
        first.minus(recall_at_k([[[0, 10]]] * 39, truth[1:], query_ids=range(39)))


def test_sum_of_recalls_has_an_interval():
    estimates = retrieval_report([1, 2, 20, 300] * 50).estimates()
    assert estimates["SumR"].value == 25 + 50 + 50 + 75
    assert estimates["SumR"].low < 200 < estimates["SumR"].high


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "expected one number per query (Q,), found shape (0,)"),
        ([[1.0]], {}, "found shape (1, 1)"),
        ([1.0, math.inf], {}, "query 1 is infinite"),
        ([1.0], {"resamples": 0}, "resamples must be at least 1, found 0"),
        ([1.0], {"seed": -1}, "seed must not be negative, found -1"),
        ([1.0], {"confidence": 95}, "confidence must lie between 0 and 1, found 95"),
    ],
)
def test_bad_input(values, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        bootstrap(values, **options)


def test_bad_pairs():
    with pytest.raises(DataError, match="found 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="query 1 counts for one"):
        paired_bootstrap([1.0, np.nan], [1.0, 2.0])
    with pytest.raises(DataError, match="one number per query, found lengths"):
        bootstrap_many({"a": [1.0], "b": [1.0, 2.0]})
