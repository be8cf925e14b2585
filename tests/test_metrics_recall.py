"""Recall@K at IoU: hand-computed cases, a slow reference, properties, bad input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvg_lib.errors import DataError
from tvg_lib.metrics import recall_at_k


def test_by_hand():
    predictions = [
        # IoU with [0, 10]: 0.4 (score 0.9), 1.0 (score 0.5): found at once, better at rank 2.
        np.array([[0, 10, 0.5], [0, 4, 0.9]]),
        # IoU with [10, 20]: 0, then 0.5: only the second counts, and the threshold is inclusive.
        np.array([[30, 40, 2.0], [10, 15, 1.0], [10, 20, -1.0]]),
        np.zeros((0, 3)),
    ]
    truth = [[[0, 10]], [[10, 20]], [[0, 1]]]
    report = recall_at_k(predictions, truth, ks=(1, 2, 5), thresholds=(0.3, 0.5))
    np.testing.assert_array_equal(report.hits[:, :, 0], [[1, 1, 1], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(report.hits[:, :, 1], [[0, 1, 1], [0, 1, 1], [0, 0, 0]])
    third = 100 / 3
    np.testing.assert_allclose(report.recall, [[third, 0], [2 * third] * 2, [2 * third] * 2])
    assert report.brief() == {
        "R1@0.3": 33.33,
        "R1@0.5": 0.0,
        "R2@0.3": 66.67,
        "R2@0.5": 66.67,
        "R5@0.3": 66.67,
        "R5@0.5": 66.67,
        "mIoU": 13.33,
    }
    np.testing.assert_array_equal(report.contributions["R1@0.3"], [100, 0, 0])


def test_ranked_windows_keep_their_order_and_equal_scores_too():
    truth = [[[0, 10]]]
    assert recall_at_k([[[20, 30], [0, 10]]], truth, ks=(1,)).values["R1@0.5"] == 0
    assert recall_at_k([[[20, 30, 1], [0, 10, 1]]], truth, ks=(1,)).values["R1@0.5"] == 0
    assert recall_at_k([[[20, 30, 1], [0, 10, 2]]], truth, ks=(1,)).values["R1@0.5"] == 100


def test_any_of_several_moments_is_a_hit():
    truth = [[[0, 10], [50, 60]], [[0, 10], [50, 60]]]
    report = recall_at_k([[[50, 60]], [[20, 30]]], truth, ks=(1,), thresholds=(0.7,))
    np.testing.assert_array_equal(report.hits.ravel(), [True, False])


def test_one_moment_may_be_a_pair():
    assert recall_at_k([[[0, 10]]], [[0, 10]]).values["R1@0.7"] == 100


times = st.floats(0, 100).map(lambda x: round(x, 1))
window = st.tuples(times, times).map(sorted)
scored = st.tuples(window, st.floats(-1, 1)).map(lambda x: [*x[0], x[1]])
queries = st.lists(
    st.tuples(st.lists(scored, max_size=7), st.lists(window, min_size=1, max_size=3)),
    min_size=1,
    max_size=5,
)
KS, THRESHOLDS = (1, 3, 5), (0.1, 0.3, 0.5, 0.7)


def report_of(cases):
    return recall_at_k([c[0] for c in cases], [c[1] for c in cases], ks=KS, thresholds=THRESHOLDS)


@settings(max_examples=60, deadline=None)
@given(queries)
def test_matches_slow_reference(cases):
    report = report_of(cases)
    for q, (predictions, moments) in enumerate(cases):
        ranked = sorted(predictions, key=lambda w: -w[2])
        for i, k in enumerate(KS):
            best = 0.0
            for s, e, _ in ranked[:k]:
                for a, b in moments:
                    overlap = max(0.0, min(e, b) - max(s, a))
                    union = (e - s) + (b - a) - overlap
                    best = max(best, overlap / union if union > 0 else 0.0)
            assert report.best_iou[q, i] == pytest.approx(best)
            assert report.hits[q, i].tolist() == [best >= t for t in THRESHOLDS]


@settings(max_examples=40, deadline=None)
@given(queries, st.randoms(use_true_random=False))
def test_properties(cases, rng):
    report = report_of(cases)
    # Recall rises with K and falls with the threshold.
    assert (np.diff(report.recall, axis=0) >= 0).all()
    assert (np.diff(report.recall, axis=1) <= 0).all()
    # The order of the queries does not matter.
    order = rng.sample(range(len(cases)), len(cases))
    shuffled = report_of([cases[i] for i in order])
    np.testing.assert_array_equal(shuffled.hits, report.hits[order])
    np.testing.assert_allclose(shuffled.recall, report.recall)
    # A common shift of all times does not matter (by a power of two: no rounding at 0.1 s).
    shifted = report_of(
        [
            ([[s + 64, e + 64, c] for s, e, c in p], [[s + 64, e + 64] for s, e in g])
            for p, g in cases
        ]
    )
    np.testing.assert_allclose(shifted.best_iou, report.best_iou, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(window.filter(lambda w: w[1] > w[0]), min_size=1, max_size=3), min_size=1))
def test_perfect_predictions_give_100(truth):
    report = recall_at_k(truth, truth, ks=(1, 5), thresholds=(0.5, 1.0))
    assert set(report.values.values()) == {100.0}


def test_real_annotations(tvg_data):
    lines = (tvg_data / "annotations" / "charades_sta_test.txt").read_text().splitlines()
    truth = [[float(x) for x in line.split("##")[0].split()[1:]] for line in lines]
    truth = [[min(pair), max(pair)] for pair in truth]
    report = recall_at_k([[pair] for pair in truth], truth)
    assert len(report.query_ids) == len(lines) > 3000
    assert report.brief()["R1@0.7"] == 100
    # A window over everything finds the moments that fill at least that share of it.
    whole = recall_at_k([[[0.0, 30.0]]] * len(truth), truth, ks=(1,), thresholds=(0.5,))
    inside = np.array([max(0.0, min(e, 30.0) - s) / max(e, 30.0) >= 0.5 for s, e in truth])
    assert whole.values["R1@0.5"] == pytest.approx(100 * inside.mean(), abs=0.1)


BAD = {
    "numbers of queries": (([[[0, 1]]], []), {}, "found 1 for 0 queries"),
    "no query": (([], []), {}, "at least one query"),
    "no truth": (([[[0, 1]]], [np.zeros((0, 2))]), {}, "query 0: .*at least one moment"),
    "shape": (([[0, 1, 2, 3]], [[[0, 1]]]), {}, r"query 0: expected shape \(N, 2\), found \(4,\)"),
    "NaN": (([[[0, math.nan, 1]]], [[[0, 1]]]), {}, "query 0: expected finite"),
    "infinite score": (([[[0, 1, math.inf]]], [[[0, 1]]]), {}, "expected finite"),
    "reversed": (([[[5, 1]]], [[[0, 1]]]), {}, r"ends before it starts: \[5.0, 1.0\]"),
    "reversed truth": (([[[0, 1]]], [[[5, 1]]]), {}, "ground truth of query 0: .*ends before"),
    "k": (([[[0, 1]]], [[[0, 1]]]), {"ks": (0, 1)}, "ks must be distinct positive"),
    "k twice": (([[[0, 1]]], [[[0, 1]]]), {"ks": (1, 1)}, "ks must be distinct positive"),
    "threshold": (([[[0, 1]]], [[[0, 1]]]), {"thresholds": (50,)}, r"must lie in \(0, 1\]"),
    "ids": (([[[0, 1]]] * 2, [[[0, 1]]] * 2), {"query_ids": "aa"}, "2 distinct query ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, options, message = BAD[name]
    with pytest.raises(DataError, match=message):
        recall_at_k(*arguments, **options)


def test_messages_use_the_names_of_queries():
    with pytest.raises(DataError, match="prediction of query 'b'"):
        recall_at_k([[[0, 1]], [[2, 1]]], [[[0, 1]]] * 2, query_ids=["a", "b"])
