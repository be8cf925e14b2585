"""Recall@K at IoU: the metric of TACoS, Ego4D-NLQ, MAD, Charades-STA and ActivityNet Captions.

    R@K, IoU@t = (1/Q) sum_q [ max over the K best predictions p and the moments g of q of
                               IoU(p, g) >= t ]

The threshold is inclusive, as in SnAG's evaluator. Most of these data sets have one moment per
query; with several, reaching any one of them is a hit.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tvg_lib.errors import DataError
from tvg_lib.metrics.report import MetricReport, percent
from tvg_lib.moments import interval_iou


@dataclass(frozen=True, eq=False, repr=False)
class RecallReport(MetricReport):
    """Recall@K at IoU, named `R1@0.5` (K = 1, threshold 0.5) and so on, and `mIoU` of the best one.

    Attributes:
        ks: the K ranks.
        thresholds: the T thresholds on IoU.
        best_iou: (Q, K) best IoU of each query among its k best predictions.
    """

    ks: tuple[int, ...]
    thresholds: tuple[float, ...]
    best_iou: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """(Q, K, T) whether a query is found at rank k and threshold t."""
        return self.best_iou[:, :, None] >= np.array(self.thresholds)

    @property
    def recall(self) -> np.ndarray:
        """(K, T) recall in percent: the mean of `hits`."""
        return percent(self.hits.mean(axis=0))


def recall_at_k(
    predictions: Sequence[ArrayLike],
    ground_truth: Sequence[ArrayLike],
    *,
    ks: Sequence[int] = (1, 5),
    thresholds: Sequence[float] = (0.3, 0.5, 0.7),
    query_ids: Sequence[Hashable] | None = None,
) -> RecallReport:
    """Recall@K at IoU thresholds, with per-query hits.

    Args:
        predictions: one array per query, in seconds: (N, 3) start, end, score in any order (ranked
            here by score, equal scores keep their order), or (N, 2) start, end already ranked.
            N may differ, be less than K, or be 0 (a query without predictions is a miss).
        ground_truth: one (M, 2) array of moments per query, M >= 1, in seconds; (2,) for one.
        ks: ranks K.
        thresholds: thresholds on IoU in (0, 1], inclusive.
        query_ids: names of the queries, for messages and pairing; their indices when left out.

    Raises:
        DataError: different numbers of queries, none, a wrong shape, NaN or infinity, a moment that
            ends before it starts, a query without ground truth, or senseless ks or thresholds.
    """
    ids = _checked_ids(query_ids, len(predictions), len(ground_truth))
    ks, thresholds = tuple(ks), tuple(thresholds)
    if not ks or any(k < 1 for k in ks) or len(set(ks)) != len(ks):
        raise DataError(f"ks must be distinct positive integers, found {ks}")
    if not thresholds or any(not 0 < t <= 1 for t in thresholds):
        raise DataError(f"thresholds on IoU must lie in (0, 1], found {thresholds}")

    ranked = [
        rank_windows(p, f"prediction of query {q!r}")[: max(ks), :2]
        for q, p in zip(ids, predictions, strict=True)
    ]
    moments = [
        check_windows(np.atleast_2d(g), 2, f"ground truth of query {q!r}")
        for q, g in zip(ids, ground_truth, strict=True)
    ]
    for q, g in zip(ids, moments, strict=True):
        if len(g) == 0:
            raise DataError(f"ground truth of query {q!r}: expected at least one moment, found 0")

    P, P_mask = pad_windows(ranked)
    G, G_mask = pad_windows(moments)
    iou = np.where(P_mask[:, :, None] & G_mask[:, None, :], interval_iou(P, G), 0.0)
    # (Q, N): the best IoU so far, going down the ranking.
    so_far = np.maximum.accumulate(iou.max(axis=2), axis=1)
    best = so_far[:, [min(k, so_far.shape[1]) - 1 for k in ks]]

    contributions = {
        f"R{k}@{t:g}": percent(best[:, i] >= t) for i, k in enumerate(ks) for t in thresholds
    }
    top1 = iou[:, 0].max(axis=1)
    contributions["mIoU"] = percent(top1)
    values = {name: float(c.mean()) for name, c in contributions.items()}
    return RecallReport(ids, values, contributions, ks, thresholds, best)


def rank_windows(windows: ArrayLike, where: str) -> np.ndarray:
    """(N, 3) start, end, score sorted by falling score (stable); (N, 2) is returned as it is.

    Raises:
        DataError: as `check_windows`.
    """
    array = np.asarray(windows, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, 2))
    width = 3 if array.ndim == 2 and array.shape[1] == 3 else 2
    array = check_windows(array, width, where)
    return array if width == 2 else array[np.argsort(-array[:, 2], kind="stable")]


def check_windows(windows: ArrayLike, width: int, where: str) -> np.ndarray:
    """(N, width) float array whose first two columns are start <= end, all finite.

    Raises:
        DataError: `where` is not such an array; the message says what was found.
    """
    array = np.asarray(windows, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, width))
    if array.ndim != 2 or array.shape[1] != width:
        raise DataError(f"{where}: expected shape (N, {width}), found {array.shape}")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise DataError(f"{where}: expected finite numbers, found {array[row].tolist()}")
    if (array[:, 1] < array[:, 0]).any():
        row = int(np.flatnonzero(array[:, 1] < array[:, 0])[0])
        raise DataError(f"{where}: a moment ends before it starts: {array[row, :2].tolist()}")
    return array


def pad_windows(windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Q arrays (N_q, C) of one width -> (Q, N, C) filled up with 0, and (Q, N) True where valid.

    N is at least 1, so that a maximum over it exists even if no query has a window.
    """
    lengths = np.array([len(w) for w in windows])
    mask = np.arange(max(1, lengths.max())) < lengths[:, None]
    padded = np.zeros((*mask.shape, windows[0].shape[1]))
    padded[mask] = np.concatenate(windows)
    return padded, mask


def _checked_ids(
    query_ids: Sequence[Hashable] | None, num_predictions: int, num_ground_truth: int
) -> tuple[Hashable, ...]:
    if num_predictions != num_ground_truth:
        raise DataError(
            f"expected one prediction array per query, found {num_predictions} for "
            f"{num_ground_truth} queries"
        )
    if num_ground_truth == 0:
        raise DataError("expected at least one query, found none")
    ids = tuple(range(num_ground_truth)) if query_ids is None else tuple(query_ids)
    if len(ids) != num_ground_truth or len(set(ids)) != len(ids):
        raise DataError(
            f"expected {num_ground_truth} distinct query ids, found {len(ids)} "
            f"({len(set(ids))} distinct)"
        )
    return ids
