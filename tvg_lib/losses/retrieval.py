"""Losses of partially relevant video retrieval, as MamFusion's released code has them.

    triplet          a query's own video scores `margin` above another one, and the reverse; on the
                     cosines of both scales
    contrast (NCE)   the own video among all videos of the batch, and the reverse; at both scales
    query-diverse    queries about one video keep apart
    fused contrast   the own video among the candidates of re-ranking, by the second score: for
                     fusion over time, which the released code does not have

Sources: MS-SL (Dong et al. 2022) for the first two, GMMFormer (Wang et al. 2024) for the third.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.distributed import reduce_sum
from tvg_lib.models.mamfusion import RetrievalOutput


class HasEpoch(Protocol):
    """A batch that knows the epoch (from 0) it belongs to."""

    epoch: int


def own_video(query_video: Tensor, videos: int) -> Tensor:
    """(Q, B) True where a query is about a video."""
    return query_video[:, None] == torch.arange(videos, device=query_video.device)


def random_negative(scores: Tensor, allowed: Tensor, pool: int | None) -> Tensor:
    """One negative score per row.

    Args:
        scores: (N, M).
        allowed: (N, M) what may be drawn.
        pool: draw among so many of the highest allowed; None draws among all.

    Returns:
        (N,) the score drawn; -inf where a row allows none.
    """
    lowest = scores.masked_fill(~allowed, -torch.inf)
    order = lowest.argsort(dim=1, descending=True)
    size = allowed.sum(1)
    if pool is not None:
        size = size.clamp(max=pool)
    pick = (torch.rand(len(scores), device=scores.device) * size).long()
    return lowest.gather(1, order.gather(1, pick[:, None])).squeeze(1)


def triplet_terms(
    scores: Tensor, query_video: Tensor, margin: float, pool: int | None
) -> tuple[Tensor, Tensor]:
    """Triplet losses of every query and of every video with queries.

    Args:
        scores: (Q, B).
        query_video: (Q,).
        margin: by how much the right pair should win.
        pool: hard negatives of a query come from so many best videos, that of a video is the best
            query of another one; None draws both among all.

    Returns:
        (Q,) and (B,); a video without queries, or without a negative, counts 0.
    """
    own = own_video(query_video, scores.shape[1])
    right = scores.gather(1, query_video[:, None]).squeeze(1)
    to_videos = (margin + random_negative(scores, ~own, pool) - right).clamp(min=0)
    # The mean over a video's queries is the positive, as released.
    mean = (scores * own).sum(0) / own.sum(0).clamp(min=1)
    hardest = None if pool is None else 1
    to_queries = (margin + random_negative(scores.T, ~own.T, hardest) - mean).clamp(min=0)
    return to_videos, to_queries.masked_fill(~own.any(0), 0.0)


def contrast_terms(logits: Tensor, query_video: Tensor) -> tuple[Tensor, Tensor]:
    """NCE of every query among the videos, and of every video (all of its queries) among queries.

    Args:
        logits: (Q, B).
        query_video: (Q,).

    Returns:
        (Q,) and (B,); a video without queries counts 0.
    """
    own = own_video(query_video, logits.shape[1])
    to_videos = F.cross_entropy(logits, query_video, reduction="none")
    # A finite fill, so that a video without queries has finite gradients.
    positives = logits.masked_fill(~own, -1e9).logsumexp(0)
    to_queries = logits.logsumexp(0) - positives
    return to_videos, to_queries.masked_fill(~own.any(0), 0.0)


def query_diverse_terms(
    queries: Tensor, query_video: Tensor, margin: float, alpha: float
) -> Tensor:
    """(Q,) log(1 + sum of exp(alpha (cosine + margin)) over the other queries of the same video).

    Args:
        queries: (Q, D).
        query_video: (Q,).
    """
    unit = F.normalize(queries, dim=-1)
    same = query_video[:, None] == query_video
    same = same & ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    exponents = (alpha * (unit @ unit.T + margin)).masked_fill(~same, -1e9)
    return F.softplus(exponents.logsumexp(1))


class RetrievalObjective(nn.Module):
    """The sum of all terms, each as a mean over queries or videos.

    Defaults are the released TVR settings. In several processes negatives come from the videos of
    the own process; the terms add up to the mean over the joint batch.

    Args:
        margin: of the triplets.
        hard_from: epoch (from 0) from which negatives are hard.
        hard_pool: best videos that a hard negative is drawn from.
        clip_contrast, frame_contrast, diverse, fused: weights of the terms; the triplets have 1.
        diverse_margin, diverse_alpha: of the query-diverse term.
        temperature: None contrasts products of vectors that are not scaled to length 1, as
            released; a number contrasts cosines, divided by it. Vectors of a given space are short,
            so that their products say nothing to a softmax.
        fused_temperature: of the fused contrast.
    """

    def __init__(
        self,
        margin: float = 0.2,
        hard_from: int = 20,
        hard_pool: int = 20,
        clip_contrast: float = 0.027,
        frame_contrast: float = 0.045,
        diverse: float = 0.015,
        fused: float = 0.5,
        diverse_margin: float = 0.2,
        diverse_alpha: float = 32.0,
        temperature: float | None = None,
        fused_temperature: float = 0.05,
    ) -> None:
        super().__init__()
        self.margin, self.hard_from, self.hard_pool = margin, hard_from, hard_pool
        self.clip_contrast, self.frame_contrast = clip_contrast, frame_contrast
        self.diverse, self.fused = diverse, fused
        self.diverse_margin, self.diverse_alpha = diverse_margin, diverse_alpha
        self.temperature, self.fused_temperature = temperature, fused_temperature

    def forward(self, output: RetrievalOutput, batch: HasEpoch) -> dict[str, Tensor]:
        """Terms by name, weighted, and "total"."""
        query_video = output.query_video
        queries, videos = output.clip_scores.shape
        asked = own_video(query_video, videos).any(0).sum()
        counts = reduce_sum(torch.stack([query_video.new_tensor(queries), asked]))
        pool = self.hard_pool if batch.epoch >= self.hard_from else None

        def mean(terms: tuple[Tensor, Tensor]) -> Tensor:
            return terms[0].sum() / counts[0] + terms[1].sum() / counts[1]

        def contrast(products: Tensor, cosines: Tensor) -> Tensor:
            logits = products if self.temperature is None else cosines / self.temperature
            return mean(contrast_terms(logits, query_video))

        clip, frame = output.clip_scores, output.frame_scores
        diverse = query_diverse_terms(
            output.queries, query_video, self.diverse_margin, self.diverse_alpha
        )
        terms = {
            "clip_triplet": mean(triplet_terms(clip, query_video, self.margin, pool)),
            "frame_triplet": mean(triplet_terms(frame, query_video, self.margin, pool)),
            "clip_contrast": self.clip_contrast * contrast(output.clip_products, clip),
            "frame_contrast": self.frame_contrast * contrast(output.frame_products, frame),
            "diverse": self.diverse * diverse.sum() / counts[0],
        }
        if output.fused_scores is not None:
            logits = (output.fused_scores / self.fused_temperature).masked_fill(
                ~output.candidate_mask, -1e9
            )
            right = torch.zeros_like(query_video)
            fused = F.cross_entropy(logits, right, reduction="sum")
            terms["fused_contrast"] = self.fused * fused / counts[0]
        terms["total"] = torch.stack(list(terms.values())).sum()
        return terms
