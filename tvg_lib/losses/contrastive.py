"""HieraMamba's two contrastive losses (An and Grauman, CVPR 2026), as its released code has them.

ACC, anchor-conditioned contrast: an anchor resembles the tokens it summarises, not far anchors.
SPC, segment-pooled contrast: points of the moment resemble their mean, points outside do not.

For unit vectors and temperature tau, with S+ and S- the sums of exp(similarity / tau) over the
positives and the negatives, both are -log(S+ / (S+ + S-)). Each function here takes one level of
the pyramid; levels are summed by the objective.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastiveProjector(nn.Module):
    """Linear, layer norm, GELU, linear, and scaling to unit length: the space of the contrast."""

    def __init__(self, channels: int, hidden: int | None = None, out_channels: int = 256) -> None:
        super().__init__()
        hidden = hidden or channels
        self.hidden = nn.Linear(channels, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., C). Returns (..., out_channels) of length 1, in float32."""
        return F.normalize(self.output(F.gelu(self.norm(self.hidden(x)))).float(), dim=-1)


def anchor_contrast(
    tokens: Tensor,
    token_mask: Tensor,
    anchors: Tensor,
    anchor_mask: Tensor,
    gap_ratio: float = 0.2,
    negative_ratio: float | None = None,
    temperature: float = 0.07,
    stride: int = 2,
    hard_negatives: bool = False,
    other_videos: Tensor | None = None,
) -> Tensor:
    """ACC of one level.

    Args:
        tokens: (B, T, D) unit vectors; anchor n summarises tokens n * stride to
            n * stride + stride - 1.
        token_mask: (B, T).
        anchors: (B, N, D) unit vectors, N = ceil(T / stride); anchor_mask (B, N).
        gap_ratio: negatives are anchors of the same video more than max(1, gap_ratio * N) away,
            rounded down. As released, N counts padding: a video's gap depends on the longest of
            its batch.
        negative_ratio: negatives per positive token; None takes every admissible one.
        temperature: tau.
        stride: tokens per anchor.
        hard_negatives: take the admissible anchors most similar instead of random ones.
        other_videos: (B, B) boolean: the anchors of which rows are admissible for which, too. Rows
            are not videos where early fusion encodes a video once for each of its queries.

    Returns:
        The mean over valid anchors; one without negatives counts as 0.
    """
    batch, count, width = anchors.shape
    missing = count * stride - tokens.shape[1]
    own = F.pad(tokens, (0, 0, 0, missing)).view(batch, count, stride, width)
    own = torch.einsum("bnd,bnsd->bns", anchors, own)
    positive = F.pad(token_mask, (0, missing)).view(batch, count, stride)
    place = torch.arange(count, device=anchors.device)
    far = (place[:, None] - place).abs() > max(1, int(gap_ratio * count))
    if other_videos is not None:
        own_row = torch.eye(batch, dtype=torch.bool, device=anchors.device)[:, None, :, None]
        others = torch.einsum("bnd,cmd->bncm", anchors, anchors).flatten(2)  # (B, N, B * N)
        negative = (own_row & far[:, None]) | other_videos[:, None, :, None]
        negative = negative.flatten(2) & anchor_mask.flatten()
    else:
        others = anchors @ anchors.transpose(1, 2)
        negative = (far & anchor_mask[:, None]).expand(batch, count, count)
    if negative_ratio is not None:
        wanted = (negative_ratio * positive.sum(2, keepdim=True)).ceil().clamp(min=1)
        score = others.detach() if hard_negatives else None
        negative = _subset(negative, wanted, ceil(max(1, negative_ratio * stride)), score)
    loss = _log_ratio(own / temperature, positive, others / temperature, negative)
    return loss.masked_fill(~anchor_mask, 0.0).sum() / anchor_mask.sum().clamp(min=1)


def segment_contrast(
    features: Tensor,
    positive: Tensor,
    negative: Tensor,
    negative_ratio: float | None = None,
    temperature: float = 0.07,
    hard_negatives: bool = False,
    elsewhere: Tensor | None = None,
    elsewhere_negative: Tensor | None = None,
) -> Tensor:
    """SPC of one level.

    Args:
        features: (Q, P, D) unit vectors of the points of each query's video.
        positive: (Q, P) points of the moment: the centre-sampled ones in the released code.
        negative: (Q, P) valid points outside the whole annotated moment.
        negative_ratio: negatives per positive, rounded down; None takes every one.
        temperature: tau.
        hard_negatives: take the admissible points most similar instead of random ones.
        elsewhere: (M, D) unit vectors of points of other videos, admissible as negatives of the
            queries that `elsewhere_negative` (Q, M) says.

    Returns:
        The mean over the queries that have both kinds; 0 where none has.
    """
    mean = (features * positive[..., None]).sum(1) / positive.sum(1, keepdim=True).clamp(min=1)
    prototype = F.normalize(mean, dim=-1)
    similarity = others = torch.einsum("qd,qpd->qp", prototype, features)
    if elsewhere is not None:
        others = torch.cat([similarity, prototype @ elsewhere.T], dim=1)
        negative = torch.cat([negative, elsewhere_negative], dim=1)
    if negative_ratio is not None:
        wanted = (negative_ratio * positive.sum(1, keepdim=True)).floor()
        score = others.detach() if hard_negatives else None
        negative = _subset(negative, wanted, int(wanted.max()), score)
    loss = _log_ratio(similarity / temperature, positive, others / temperature, negative)
    both = positive.any(1) & negative.any(1)
    return loss.masked_fill(~both, 0.0).sum() / both.sum().clamp(min=1)


def random_subset(candidates: Tensor, count: int | Tensor) -> Tensor:
    """A random choice of up to `count` of the True entries of the last axis.

    Args:
        candidates: (..., N) boolean.
        count: how many to keep of each row; a tensor broadcasts against (..., 1).

    Returns:
        (..., N) boolean.
    """
    return _subset(candidates, count, int(torch.as_tensor(count).max()))


def _subset(
    candidates: Tensor, count: int | Tensor, most: int, score: Tensor | None = None
) -> Tensor:
    """Up to `count`, at most `most`, of the True entries: of highest score, or at random."""
    if score is None:
        score = torch.rand(candidates.shape, device=candidates.device)
    best = score.masked_fill(~candidates, -torch.inf).topk(min(most, candidates.shape[-1]), dim=-1)
    rank = torch.arange(best.indices.shape[-1], device=candidates.device)
    kept = (rank < count) & (best.values > -torch.inf)
    return torch.zeros_like(candidates).scatter(-1, best.indices, kept)


def _log_ratio(
    positive: Tensor, positive_mask: Tensor, negative: Tensor, negative_mask: Tensor
) -> Tensor:
    """-log(S+ / (S+ + S-)) over the last axis, from logits; 0 where a row has no negative."""
    # The fill is finite so that rows without entries give finite gradients.
    log_positive = positive.masked_fill(~positive_mask, -1e9).logsumexp(-1)
    log_negative = negative.masked_fill(~negative_mask, -1e9).logsumexp(-1)
    return F.softplus(log_negative - log_positive)
