"""Text-to-video retrieval: R@K and SumR, the metrics of partially relevant video retrieval.

    rank(q) = 1 + number of other videos that score at least as high as the right one
    R@K     = percentage of queries with rank(q) <= K
    SumR    = R@1 + R@5 + R@10 + R@100        (MS-SL, GMMFormer, MamFusion)

Ties count against the system: a constant score ranks the right video last, not first.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tvg_lib.errors import DataError
from tvg_lib.metrics.report import MetricReport, percent

# Score entries compared at a time.
_BLOCK_ENTRIES = 16_000_000


@dataclass(frozen=True, eq=False, repr=False)
class RetrievalReport(MetricReport):
    """R@K, named `R@1` and so on, and `SumR`, their sum.

    Attributes:
        ranks: (Q,) rank of the right video, from 1; infinite when a ranked list lacks it.
    """

    ranks: np.ndarray


def ranks_from_scores(scores: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """Rank of the right video of each query; ties count against it.

    Args:
        scores: (Q, V) score of every video for every query, higher is better. -inf is allowed (a
            video ruled out); NaN and +inf are not.
        targets: (Q,) index of the right video, in [0, V).

    Returns:
        (Q,) ranks from 1, as floats.

    Raises:
        DataError: wrong shapes, NaN or +inf, or an index outside the videos.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or scores.size == 0:
        raise DataError(f"expected scores (queries, videos), found shape {scores.shape}")
    Q, V = scores.shape
    if targets.shape != (Q,) or targets.dtype.kind not in "iu":
        raise DataError(
            f"expected one video index per query, ({Q},) integers, found shape {targets.shape} "
            f"of {targets.dtype}"
        )
    if targets.min() < 0 or targets.max() >= V:
        query = int(np.flatnonzero((targets < 0) | (targets >= V))[0])
        raise DataError(
            f"query {query}: expected a video index in [0, {V}), found {targets[query]}"
        )
    ranks = np.empty(Q)
    block = max(1, _BLOCK_ENTRIES // V)
    for start in range(0, Q, block):
        part = scores[start : start + block]
        bad = ~(part < np.inf).all(axis=1)
        if bad.any():
            raise DataError(f"query {start + int(np.flatnonzero(bad)[0])}: a score is NaN or +inf")
        right = np.take_along_axis(part, targets[start : start + block, None], axis=1)
        ranks[start : start + block] = (part >= right).sum(axis=1)  # counts the video itself: + 1
    return ranks


def ranks_from_lists(
    ranked: Sequence[Sequence[Hashable]], targets: Sequence[Hashable]
) -> np.ndarray:
    """Rank of the right video in each query's list of video ids, best first.

    Returns:
        (Q,) ranks from 1, as floats; infinite where a (shortened) list does not hold the video.

    Raises:
        DataError: different numbers of queries, none, or a video named twice in a list.
    """
    if len(ranked) != len(targets) or len(targets) == 0:
        raise DataError(
            f"expected one ranked list per query, found {len(ranked)} lists, {len(targets)} queries"
        )
    ranks = np.full(len(targets), np.inf)
    for q, (videos, target) in enumerate(zip(ranked, targets, strict=True)):
        position = {video: i for i, video in enumerate(videos)}
        if len(position) != len(videos):
            raise DataError(
                f"query {q}: expected each video once in its ranked list, found {len(videos)} "
                f"entries of {len(position)} videos"
            )
        if target in position:
            ranks[q] = 1 + position[target]
    return ranks


def retrieval_report(
    ranks: ArrayLike,
    *,
    ks: Sequence[int] = (1, 5, 10, 100),
    query_ids: Sequence[Hashable] | None = None,
) -> RetrievalReport:
    """R@K and SumR of the given ranks.

    Args:
        ranks: (Q,) rank of the right video from 1, as `ranks_from_scores` or `ranks_from_lists`
            give it; infinity is a miss at every K.
        ks: the ranks K; SumR is the sum over them.
        query_ids: names of the queries for pairing; their indices when left out.

    Raises:
        DataError: no query, a rank below 1 or NaN, or senseless ks or ids.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or len(ranks) == 0 or not (ranks >= 1).all():
        raise DataError(f"expected ranks (Q,) of at least 1, found {ranks!r}")
    ks = tuple(ks)
    if not ks or any(k < 1 for k in ks) or len(set(ks)) != len(ks):
        raise DataError(f"ks must be distinct positive integers, found {ks}")
    ids = tuple(range(len(ranks))) if query_ids is None else tuple(query_ids)
    if len(ids) != len(ranks) or len(set(ids)) != len(ids):
        raise DataError(f"expected {len(ranks)} distinct query ids, found {len(ids)}")
    contributions = {f"R@{k}": percent(ranks <= k) for k in ks}
    contributions["SumR"] = np.sum(list(contributions.values()), axis=0)
    values = {name: float(c.mean()) for name, c in contributions.items()}
    return RetrievalReport(ids, values, contributions, ranks)
