"""Percentile bootstrap over queries: how far a mean would move with another draw of queries.

Every metric of this package is a mean of one number per query, so one routine serves them all. A
query that does not count for a metric (for example one without a short moment, for the short-moment
mAP) carries NaN there; a resample then averages over those of its queries that do count.

Queries about one recording are not independent. Given the recording of each query as its group,
whole groups are drawn, which makes the intervals as wide as they should be.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 13.3 (percentile
interval) and 16.4 (paired data are resampled as pairs); Davison and Hinkley, Bootstrap Methods and
their Application (1997), section 3.8 (groups are resampled whole).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike

from tvg_lib.errors import DataError

# Resample counts held in memory at a time (8 bytes each).
_BLOCK_ENTRIES = 4_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries with its bootstrap interval.

    Attributes:
        value: the mean over the queries that count; NaN when none does.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of queries that count.
    """

    value: float
    low: float
    high: float
    n: int

    def __repr__(self) -> str:
        if not isfinite(self.value):
            return f"undefined (n={self.n})"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n={self.n})"


def bootstrap(
    per_query: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of one number per query, with its percentile bootstrap interval.

    Args:
        per_query: (Q,) one number per query, NaN where the query does not count.
        groups: (Q,) what each query belongs to; None takes every query for itself.
        resamples: how many times as many groups as there are are drawn, with replacement.
        seed: seed of the draws; the same seed and number of groups give the same draws.
        confidence: probability mass of the interval, in (0, 1).

    Raises:
        DataError: no query, not one-dimensional, infinite numbers, or bad settings.
    """
    estimates = bootstrap_many(
        {"per_query": per_query},
        groups=groups,
        resamples=resamples,
        seed=seed,
        confidence=confidence,
    )
    return estimates["per_query"]


def bootstrap_many(
    per_query: Mapping[str, ArrayLike],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """`bootstrap` for several metrics of the same queries, all on the same resamples.

    Args:
        per_query: name -> (Q,) one number per query, NaN where the query does not count.
        groups: (Q,) what each query belongs to.

    Raises:
        DataError: as `bootstrap`; also when the arrays differ in length.
    """
    if resamples < 1:
        raise DataError(f"resamples must be at least 1, found {resamples}")
    if seed < 0:
        raise DataError(f"seed must not be negative, found {seed}")
    if not 0 < confidence < 1:
        raise DataError(f"confidence must lie between 0 and 1, found {confidence}")
    columns = {name: _checked(values, name) for name, values in per_query.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"every metric needs one number per query, found lengths {lengths}")
    if not columns:
        return {}

    X = np.stack(list(columns.values()), axis=1)  # (Q, M)
    counted = np.isfinite(X)
    group = _group_numbers(groups, len(X))
    means = _resampled_means(np.where(counted, X, 0.0), counted, group, resamples, seed)
    tail = (1 - confidence) / 2
    estimates = {}
    for m, name in enumerate(columns):
        n = int(counted[:, m].sum())
        # A resample may hold no query that counts; it then says nothing about this metric.
        usable = means[np.isfinite(means[:, m]), m]
        if n == 0 or len(usable) == 0:
            estimates[name] = Estimate(float("nan"), float("nan"), float("nan"), n)
            continue
        low, high = np.quantile(usable, [tail, 1 - tail])
        estimates[name] = Estimate(float(X[counted[:, m], m].mean()), float(low), float(high), n)
    return estimates


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Estimate:
    """Mean difference `first - second` of two systems on the same queries.

    Queries are resampled as pairs, so what makes a query hard for both systems cancels: the
    interval is narrower than two separate intervals suggest. An interval without 0 means that the
    sign of the difference is stable over queries.

    Args:
        first: (Q,) one number per query, NaN where the query does not count.
        second: (Q,) the other system's, in the same order of queries.
        groups: (Q,) what each query belongs to.

    Raises:
        DataError: as `bootstrap`; also when the two differ in length or in which queries count.
    """
    a, b = _checked(first, "first"), _checked(second, "second")
    if a.shape != b.shape:
        raise DataError(f"paired systems need the same queries, found {len(a)} and {len(b)}")
    if (np.isnan(a) != np.isnan(b)).any():
        index = int(np.flatnonzero(np.isnan(a) != np.isnan(b))[0])
        raise DataError(f"query {index} counts for one of the two paired systems only")
    return bootstrap(a - b, groups=groups, resamples=resamples, seed=seed, confidence=confidence)


def _checked(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise DataError(f"{name}: expected one number per query (Q,), found shape {array.shape}")
    if np.isinf(array).any():
        raise DataError(f"{name}: query {int(np.flatnonzero(np.isinf(array))[0])} is infinite")
    return array


def _group_numbers(groups: Sequence[Hashable] | None, Q: int) -> np.ndarray:
    """(Q,) the number of each query's group, in order of first appearance."""
    if groups is None:
        return np.arange(Q)
    if len(groups) != Q:
        raise DataError(f"every query needs a group, found {len(groups)} for {Q} queries")
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.array([number[group] for group in groups])


def _resampled_means(
    X: np.ndarray, counted: np.ndarray, group: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """(Q, M) numbers, which of them count and the group of each query -> (resamples, M) means.

    NaN where no query of a resample counts.
    """
    G = int(group.max()) + 1
    sums, sizes = np.zeros((G, X.shape[1])), np.zeros((G, X.shape[1]))
    np.add.at(sums, group, X)
    np.add.at(sizes, group, counted)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ENTRIES // G)
    means = []
    for start in range(0, resamples, block):
        B = min(block, resamples - start)
        # How often each group was drawn is all a mean needs: two matrix products serve M metrics.
        drawn = rng.integers(G, size=(B, G)) + G * np.arange(B)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=B * G).reshape(B, G).astype(np.float64)
        totals, numbers = weights @ sums, weights @ sizes
        means.append(
            np.divide(totals, numbers, out=np.full_like(totals, np.nan), where=numbers > 0)
        )
    return np.concatenate(means)
