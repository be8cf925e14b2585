"""Losses of set prediction and of boundary regression (`tvg_lib.models.detectors`)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.distributed import reduce_sum
from tvg_lib.losses.cells import relevance_loss
from tvg_lib.losses.detection import iou_loss
from tvg_lib.models.detectors import FrameBoundaries, MomentSet
from tvg_lib.moments import interval_iou


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise IoU minus the share of the hull that neither covers; (..., N, 2), (..., M, 2)."""
    hull = torch.maximum(a[..., :, None, 1], b[..., None, :, 1]) - torch.minimum(
        a[..., :, None, 0], b[..., None, :, 0]
    )
    union = (a[..., 1] - a[..., 0])[..., :, None] + (b[..., 1] - b[..., 0])[..., None, :]
    overlap = torch.minimum(a[..., :, None, 1], b[..., None, :, 1]) - torch.maximum(
        a[..., :, None, 0], b[..., None, :, 0]
    )
    union = union - overlap.clamp(min=0)
    return interval_iou(a, b) - (hull - union) / hull.clamp(min=1e-6)


@dataclass(frozen=True)
class SetLossConfig:
    """How a set of moments is matched and taught.

    Attributes:
        span_weight, iou_weight, score_weight: of the L1 distance of centre and width, the
            generalised IoU and the classification, in the matching and in the loss.
        empty_weight: of slots without a moment in the classification.
        relevance_weight: of the frames' relevance, as in `CellLossConfig`.
    """

    span_weight: float = 10.0
    iou_weight: float = 1.0
    score_weight: float = 4.0
    empty_weight: float = 0.1
    relevance_weight: float = 0.0


class SetObjective(nn.Module):
    """Optimal one-to-one matching of predictions and moments, then their losses (DETR)."""

    def __init__(self, config: SetLossConfig | None = None) -> None:
        super().__init__()
        self.config = config or SetLossConfig()

    def forward(self, output: MomentSet, batch: GroundingBatch) -> dict[str, Tensor]:
        """The terms "spans", "iou", "scores" and "relevance", and their weighted "total"."""
        spans = self._spans(batch.moments, output.lengths)
        rows, slots, truths = self.matching(output, batch, spans)
        found = reduce_sum(torch.tensor(float(len(rows)), device=output.logits.device))
        queries = reduce_sum(torch.tensor(float(len(output.logits)), device=output.logits.device))
        distance = (output.spans.float()[rows, slots] - spans[rows, truths]).abs().sum()
        ours, theirs = output.moments[rows, slots], batch.moments[rows, truths]
        overlap = generalised_iou(ours[:, None], theirs[:, None])[:, 0, 0]
        target = torch.zeros_like(output.logits, dtype=torch.float32)
        target[rows, slots] = 1.0
        weight = torch.where(target > 0, 1.0, self.config.empty_weight)
        scores = F.binary_cross_entropy_with_logits(
            output.logits.float(), target, weight, reduction="sum"
        )
        terms = {
            "spans": distance / found,
            "iou": (1 - overlap).sum() / found,
            "scores": scores / found,
            "relevance": relevance_loss(output.relevance, batch).sum() / queries,
        }
        total = (
            self.config.span_weight * terms["spans"]
            + self.config.iou_weight * terms["iou"]
            + self.config.score_weight * terms["scores"]
            + self.config.relevance_weight * terms["relevance"]
        )
        return {"total": total} | terms

    @torch.no_grad()
    def matching(
        self, output: MomentSet, batch: GroundingBatch, spans: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row, slot and moment of every matched pair, of least cost in each row (Hungarian)."""
        from scipy.optimize import linear_sum_assignment

        distance = (output.spans.float()[:, :, None] - spans[:, None]).abs().sum(-1)  # (Q, N, M)
        cost = (
            self.config.span_weight * distance
            - self.config.iou_weight * generalised_iou(output.moments, batch.moments.float())
            - self.config.score_weight * output.logits.float().sigmoid()[..., None]
        ).cpu()
        pairs = []
        for row, mask in enumerate(batch.moment_mask.cpu()):
            real = mask.nonzero().squeeze(1)
            slots, columns = linear_sum_assignment(cost[row, :, real].numpy())
            pairs += [(row, int(s), int(real[c])) for s, c in zip(slots, columns, strict=True)]
        found = torch.tensor(pairs, device=output.logits.device)
        return found[:, 0], found[:, 1], found[:, 2]

    @staticmethod
    def _spans(moments: Tensor, lengths: Tensor) -> Tensor:
        """(Q, M, 2) centre and width as shares of the video."""
        ends = (moments.float() + 0.5) / lengths[:, None, None]
        return torch.stack([ends.mean(-1), ends[..., 1] - ends[..., 0]], dim=-1)


@dataclass(frozen=True)
class BoundaryLossConfig:
    """How the moments of frames are taught.

    Attributes:
        regression_weight: of smooth L1 (in tenths of the frames) and IoU loss together.
        relevance_weight: of the frames' relevance, as in `CellLossConfig`.
    """

    regression_weight: float = 1.0
    relevance_weight: float = 0.0


class BoundaryObjective(nn.Module):
    """Every frame inside a moment is positive and learns its distances; UniVTG's recipe."""

    def __init__(self, config: BoundaryLossConfig | None = None) -> None:
        super().__init__()
        self.config = config or BoundaryLossConfig()

    def forward(self, output: FrameBoundaries, batch: GroundingBatch) -> dict[str, Tensor]:
        """The terms "frames", "regression" and "relevance", and their weighted "total"."""
        index = torch.arange(output.mask.shape[1], device=output.mask.device)
        start, end = batch.moments.float().unbind(-1)  # (Q, M)
        before = index[:, None] - start[:, None]  # (Q, T, M)
        after = end[:, None] - index[:, None]
        member = (before >= 0) & (after >= 0) & batch.moment_mask[:, None]
        positive = member.any(-1) & output.mask
        # The shortest of the moments a frame lies in.
        shortest = (before + after).masked_fill(~member, torch.inf).argmin(-1, keepdim=True)
        target = torch.cat([before.gather(2, shortest), after.gather(2, shortest)], dim=-1)
        queries = reduce_sum(torch.tensor(float(len(output.mask)), device=index.device))
        count = reduce_sum(positive.sum().float()).clamp(min=1)
        frames = F.binary_cross_entropy_with_logits(
            output.logits.float(), positive.float(), reduction="none"
        )
        frames = (frames * output.mask).sum(1) / output.mask.sum(1)
        ours, theirs = output.offsets.float()[positive], target[positive]
        regression = F.smooth_l1_loss(ours / 10, theirs / 10, reduction="sum")
        regression = regression + iou_loss(ours, theirs).sum()
        terms = {
            "frames": frames.sum() / queries,
            "regression": regression / count,
            "relevance": relevance_loss(output.relevance, batch).sum() / queries,
        }
        total = (
            terms["frames"]
            + self.config.regression_weight * terms["regression"]
            + self.config.relevance_weight * terms["relevance"]
        )
        return {"total": total} | terms
