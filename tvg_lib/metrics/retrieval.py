"""Text-to-video retrieval: R@K and SumR, the metrics of partially relevant video retrieval.

    rank(q) = 1 + number of other videos that score at least as high as the right one
    R@K     = percentage of queries with rank(q) <= K
    SumR    = R@1 + R@5 + R@10 + R@100        (MS-SL, GMMFormer, MamFusion)

Ties count against the system: a constant score ranks the right video last, not first.

    M/V     = moment-to-video ratio: the share of the video that a query is about; MS-SL reports
              SumR for (0, 0.2], (0.2, 0.4] and (0.4, 1]
    corpus R<K>@<t> = percentage of queries of whose first K answers (video, moment) one is right:
              the right video, and a moment with at least this IoU (corpus moment retrieval)
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from tvg_lib.errors import DataError
from tvg_lib.metrics.report import MetricReport, percent
from tvg_lib.moments import interval_iou

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


def moment_ratio_report(
    report: RetrievalReport, ratios: ArrayLike, edges: Sequence[float] = (0.0, 0.2, 0.4, 1.0)
) -> MetricReport:
    """SumR by moment-to-video ratio, one metric for each interval (low, high].

    Args:
        report: of all queries.
        ratios: (Q,) moment-to-video ratio of each query, in (0, 1].
        edges: ends of the intervals, ascending.

    Returns:
        Metrics such as `SumR, M/V (0, 0.2]`; a query outside an interval does not count there.

    Raises:
        DataError: a ratio per query is missing or lies outside the edges.
    """
    ratios = np.asarray(ratios, dtype=np.float64)
    if ratios.shape != (len(report.query_ids),):
        raise DataError(
            f"expected one ratio per query, ({len(report.query_ids)},), found {ratios.shape}"
        )
    if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
        raise DataError(f"edges must ascend, found {tuple(edges)}")
    outside = ~((ratios > edges[0]) & (ratios <= edges[-1]))
    if outside.any():
        query = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"query {report.query_ids[query]!r}: expected a moment-to-video ratio in "
            f"({edges[0]:g}, {edges[-1]:g}], found {ratios[query]}"
        )
    contributions = {
        f"SumR, M/V ({low:g}, {high:g}]": np.where(
            (ratios > low) & (ratios <= high), report.contributions["SumR"], np.nan
        )
        for low, high in pairwise(edges)
    }
    values = {
        name: float(np.nanmean(c)) if np.isfinite(c).any() else float("nan")
        for name, c in contributions.items()
    }
    return MetricReport(report.query_ids, values, contributions, groups=report.groups)


@dataclass(frozen=True, slots=True)
class CorpusAnswer:
    """One answer of a corpus moment retrieval: a video, and seconds in it."""

    video_id: str
    start: float
    end: float


def corpus_moment_report(
    ranked: Sequence[Sequence[CorpusAnswer]],
    targets: Sequence[str],
    moments: Sequence[np.ndarray],
    *,
    ks: Sequence[int] = (1, 10, 100),
    thresholds: Sequence[float] = (0.5, 0.7),
    query_ids: Sequence[Hashable] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> MetricReport:
    """Corpus moment retrieval: video and moment both right (XML, Lei et al. 2020, "VCMR").

    Args:
        ranked: answers to each query, best first.
        targets: the right video of each query.
        moments: (M, 2) its true moments in seconds; any of them will do.
        ks, thresholds: ranks and IoU that are reported, as `corpus R1@0.5`.
        query_ids: names of the queries for pairing; their indices when left out.
        groups: what each query belongs to, for intervals.

    Raises:
        DataError: different numbers of queries, none, a query without a moment, or senseless ks.
    """
    Q = len(ranked)
    if not Q or len(targets) != Q or len(moments) != Q:
        raise DataError(
            f"expected one list, target and set of moments per query, found {Q}, {len(targets)} "
            f"and {len(moments)}"
        )
    if not ks or any(k < 1 for k in ks):
        raise DataError(f"ks must be positive integers, found {tuple(ks)}")
    first = {threshold: np.full(Q, np.inf) for threshold in thresholds}  # rank of the first hit
    for q, (answers, target, truth) in enumerate(zip(ranked, targets, moments, strict=True)):
        if len(truth) == 0:
            raise DataError(f"query {q} has no moment to find")
        right = [rank for rank, a in enumerate(answers[: max(ks)]) if a.video_id == target]
        if not right:
            continue
        spans = np.array([[answers[rank].start, answers[rank].end] for rank in right])
        overlap = interval_iou(spans, np.asarray(truth, dtype=np.float64)).max(1)
        for threshold, ranks in first.items():
            hits = np.flatnonzero(overlap >= threshold)
            if len(hits):
                ranks[q] = right[hits[0]] + 1
    contributions = {
        f"corpus R{k}@{threshold:g}": percent(ranks <= k)
        for k in ks
        for threshold, ranks in first.items()
    }
    values = {name: float(c.mean()) for name, c in contributions.items()}
    ids = tuple(range(Q)) if query_ids is None else tuple(query_ids)
    return MetricReport(
        ids, values, contributions, groups=None if groups is None else tuple(groups)
    )
