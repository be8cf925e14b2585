"""Video retrieval: ranks with ties, R@K and SumR, bad input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvg_lib.errors import DataError
from tvg_lib.metrics import ranks_from_lists, ranks_from_scores, retrieval, retrieval_report


def test_by_hand():
    scores = np.array(
        [
            [0.9, 0.1, 0.5],  # right: 0, rank 1
            [0.9, 0.1, 0.5],  # right: 1, rank 3
            [0.7, 0.7, 0.2],  # right: 0, tied: rank 2
            [0.3, 0.3, 0.3],  # right: 2, all tied: last
        ]
    )
    ranks = ranks_from_scores(scores, [0, 1, 0, 2])
    np.testing.assert_array_equal(ranks, [1, 3, 2, 3])
    report = retrieval_report(ranks, ks=(1, 2))
    assert report.brief() == {"R@1": 25.0, "R@2": 50.0, "SumR": 75.0}
    np.testing.assert_array_equal(report.contributions["SumR"], [200, 0, 100, 0])
    np.testing.assert_array_equal(report.ranks, ranks)


def test_default_ranks_are_those_of_the_papers():
    report = retrieval_report([1, 4, 7, 50, 200])
    expected = {"R@1": 20.0, "R@5": 40.0, "R@10": 60.0, "R@100": 80.0, "SumR": 200.0}
    assert report.brief() == expected


def test_lists():
    ranks = ranks_from_lists([["a", "b"], ["b", "a"], ["b"]], ["a", "a", "a"])
    np.testing.assert_array_equal(ranks, [1, 2, math.inf])
    assert retrieval_report(ranks).values["R@100"] == pytest.approx(200 / 3)


cases = st.integers(1, 6).flatmap(
    lambda V: st.lists(
        st.tuples(st.lists(st.integers(0, 4), min_size=V, max_size=V), st.integers(0, V - 1)),
        min_size=1,
        max_size=6,
    )
)


@settings(max_examples=60, deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_properties(rows, rng):
    scores, targets = np.array([r[0] for r in rows], dtype=float), np.array([r[1] for r in rows])
    Q, V = scores.shape
    ranks = ranks_from_scores(scores, targets)
    # Any order of the list that breaks ties against the right video gives the same rank.
    lists = [
        sorted(range(V), key=lambda v, q=q: (-scores[q, v], v == targets[q])) for q in range(Q)
    ]
    np.testing.assert_array_equal(ranks, ranks_from_lists(lists, targets.tolist()))
    # Reordering videos, and growing functions of the score, change nothing.
    order = rng.sample(range(V), V)
    inverse = np.argsort(order)
    np.testing.assert_array_equal(ranks_from_scores(scores[:, order], inverse[targets]), ranks)
    np.testing.assert_array_equal(ranks_from_scores(np.exp(scores), targets), ranks)
    report = retrieval_report(ranks)
    by_k = [report.values[f"R@{k}"] for k in (1, 5, 10, 100)]
    assert by_k == sorted(by_k)
    assert by_k[-1] == 100  # no more than 6 videos
    assert report.values["SumR"] == pytest.approx(sum(by_k))


def test_perfect_scores_give_100():
    report = retrieval_report(ranks_from_scores(np.eye(30), np.arange(30)))
    assert report.brief() == {"R@1": 100, "R@5": 100, "R@10": 100, "R@100": 100, "SumR": 400}


def test_blocks_of_queries_join(monkeypatch):
    rng = np.random.default_rng(0)
    scores, targets = rng.random((37, 11)), rng.integers(11, size=37)
    whole = ranks_from_scores(scores, targets)
    monkeypatch.setattr(retrieval, "_BLOCK_ENTRIES", 50)
    np.testing.assert_array_equal(ranks_from_scores(scores, targets), whole)
    scores[30, 2] = np.nan
    with pytest.raises(DataError, match="query 30"):
        ranks_from_scores(scores, targets)


def test_minus_infinity_rules_a_video_out():
    assert ranks_from_scores([[-np.inf, 0.0]], [1])[0] == 1


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        ([1.0, 2.0], [0], r"expected scores \(queries, videos\), found shape \(2,\)"),
        (np.zeros((0, 3)), [], "found shape"),
        ([[1.0, 2.0]], [0, 1], r"expected one video index per query, \(1,\)"),
        ([[1.0, 2.0]], [0.0], "of float64"),
        ([[1.0, 2.0]], [2], r"query 0: expected a video index in \[0, 2\), found 2"),
        ([[1.0, 2.0]], [-1], "found -1"),
        ([[1.0, 2.0], [1.0, np.nan]], [0, 0], "query 1: a score is NaN"),
        ([[1.0, np.inf]], [0], r"query 0: a score is NaN or \+inf"),
    ],
)
def test_bad_scores(scores, targets, message):
    with pytest.raises(DataError, match=message):
        ranks_from_scores(scores, targets)


def test_other_bad_input():
    with pytest.raises(DataError, match="one ranked list per query"):
        ranks_from_lists([["a"]], ["a", "b"])
    with pytest.raises(DataError, match="query 0: expected each video once"):
        ranks_from_lists([["a", "a"]], ["a"])
    for ranks in ([], [0], [math.nan], [[1]]):
        with pytest.raises(DataError, match="at least 1"):
            retrieval_report(ranks)
    with pytest.raises(DataError, match="ks must be"):
        retrieval_report([1], ks=())
    with pytest.raises(DataError, match="2 distinct query ids"):
        retrieval_report([1, 2], query_ids=["a", "a"])
