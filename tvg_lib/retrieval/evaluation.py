"""Encode a library, score every query against every video, re-rank, report."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.errors import DataError
from tvg_lib.metrics import RetrievalReport, ranks_from_scores, retrieval_report
from tvg_lib.metrics.retrieval import moment_ratio_report
from tvg_lib.models.mamfusion import EncodedQueries, EncodedVideos, MamFusion
from tvg_lib.retrieval.data import RetrievalView, query_batches, video_batches

_PAIRS = 2048  # of query and video, fused at a time
_QUERIES = 256  # scored at a time


@torch.inference_mode()
def encode_library(
    model: MamFusion, dataset: GroundingDataset, view: RetrievalView, batch_size: int = 64
) -> EncodedVideos:
    """All videos, in the order of the data set, on the device of the model."""
    device = next(model.parameters()).device
    return EncodedVideos.joined(
        [
            model.encode_video(*(x.to(device) for x in (b.segments, b.frames, b.frame_mask)))
            for b in video_batches(dataset, view, batch_size)
        ]
    )


@torch.inference_mode()
def encode_queries(
    model: MamFusion, dataset: GroundingDataset, view: RetrievalView, batch_size: int = 256
) -> list[EncodedQueries]:
    """All queries, in the order of the data set, in batches (of different numbers of words)."""
    device = next(model.parameters()).device
    return [
        model.encode_text(*(x.to(device) for x in (b.text, b.text_mask, b.sentence)))
        for b in query_batches(dataset, view, batch_size)
    ]


@torch.inference_mode()
def score_matrix(
    model: MamFusion,
    dataset: GroundingDataset,
    view: RetrievalView,
    rerank: int = 0,
) -> np.ndarray:
    """(Q, V) score of every video for every query, in the orders of the data set.

    Args:
        model: in evaluation mode.
        dataset, view: what is asked.
        rerank: how many of each query's best videos get the second score too; they stay ahead of
            the others. 0 keeps the first score.
    """
    library = encode_library(model, dataset, view)
    rows = []
    for queries in encode_queries(model, dataset, view, _QUERIES):
        scores = model.scores(queries, library)
        if rerank and model.config.reranks:
            scores = rerank_best(model, queries, library, scores, rerank)
        rows.append(scores.cpu())
    return torch.cat(rows).numpy()


def rerank_best(
    model: MamFusion,
    queries: EncodedQueries,
    library: EncodedVideos,
    scores: Tensor,
    count: int,
) -> Tensor:
    """Re-rank each query's `count` best videos by both scores together.

    Args:
        scores: (Q, V) the first score.

    Returns:
        (Q, V) where the candidates have new scores, shifted to stay ahead of all others.
    """
    best = scores.topk(min(count, scores.shape[1]), dim=1)
    rows = torch.arange(len(scores), device=scores.device)
    rows = rows.repeat_interleave(best.indices.shape[1])
    columns = best.indices.flatten()
    fused = torch.cat(
        [
            model.fused_scores(queries, library, rows[at : at + _PAIRS], columns[at : at + _PAIRS])
            for at in range(0, len(rows), _PAIRS)
        ]
    ).view_as(best.values)
    return scores.scatter(1, best.indices, model.reranked(best.values, fused))


def moment_ratios(dataset: GroundingDataset) -> np.ndarray:
    """(Q,) share of its video that a query's moments cover together, in (0, 1].

    Raises:
        DataError: a query has no moment.
    """
    ratios = []
    for query in dataset.queries:
        if len(query.moments) == 0:
            raise DataError(f"{dataset.name}: query {query.id!r} has no moment")
        covered, reached = 0.0, 0.0
        for start, end in query.moments[np.argsort(query.moments[:, 0])]:
            covered += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        ratios.append(min(1.0, covered / dataset.videos[query.video_id].duration))
    return np.array(ratios)


def targets(dataset: GroundingDataset) -> np.ndarray:
    """(Q,) position of the right video of each query among the data set's videos."""
    position = {video_id: i for i, video_id in enumerate(dataset.videos)}
    return np.array([position[query.video_id] for query in dataset.queries])


def report_of_scores(
    scores: np.ndarray, dataset: GroundingDataset, ks: Sequence[int] = (1, 5, 10, 100)
) -> RetrievalReport:
    """R@K and SumR of a (Q, V) score matrix, SumR by moment-to-video ratio where there are moments.

    Intervals draw recordings whole.
    """
    ids = [query.id for query in dataset.queries]
    ranks = ranks_from_scores(scores, targets(dataset))
    report = retrieval_report(ranks, ks=ks, query_ids=ids)
    if all(len(query.moments) for query in dataset.queries):
        by_ratio = moment_ratio_report(report, moment_ratios(dataset))
        report = replace(
            report,
            values=report.values | by_ratio.values,
            contributions=report.contributions | by_ratio.contributions,
        )
    return replace(report, groups=tuple(dataset.recording_of(query) for query in dataset.queries))
