"""Classification and regression losses over the points of a pyramid."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.distributed import reduce_sum
from tvg_lib.nn.points import PointGrid
from tvg_lib.nn.pyramid import PointPredictions


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float | None = None,
    gamma: float = 2.0,
) -> Tensor:
    """Sigmoid focal loss of every element (Lin et al. 2017), in float32.

    Args:
        logits: any shape.
        targets: same shape, in [0, 1]; may be smoothed. p_t is the probability given to the soft
            target, and an element counts as positive for `alpha` from 0.5 on.
        alpha: weight of positives, 1 - alpha of negatives; None weighs all by 1.
        gamma: exponent of the modulating factor (1 - p_t).
    """
    logits, targets = logits.float(), targets.float()
    probability = logits.sigmoid()
    p_t = probability * targets + (1 - probability) * (1 - targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = loss * (1 - p_t) ** gamma
    if alpha is not None:
        loss = loss * torch.where(targets >= 0.5, alpha, 1 - alpha)
    return loss


def iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - IoU of two intervals round a common point (the released code's "iou"), in float32.

    Args:
        predicted, target: (N, 2) distances to start and end, >= 0.

    Returns:
        (N,)
    """
    predicted, target = predicted.float(), target.float()
    overlap = torch.minimum(predicted, target).sum(-1)
    union = predicted.sum(-1) + target.sum(-1) - overlap
    return 1 - overlap / union.clamp(min=1e-8)


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Distance-IoU loss (Zheng et al. 2020): adds the squared distance of centres over the hull.

    Args and result as in `iou_loss`.
    """
    hull = torch.maximum(predicted.float(), target.float()).sum(-1)
    shift = (predicted[..., 1] - predicted[..., 0] - target[..., 1] + target[..., 0]).float() / 2
    return iou_loss(predicted, target) + (shift / hull.clamp(min=1e-8)) ** 2


class RunningNorm(nn.Module):
    """An exponential moving average of the number of positives, by which losses are divided.

    Args:
        start: value before the first batch.
        momentum: share of the old value that stays.
    """

    def __init__(self, start: float = 100.0, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.tensor(float(start)))

    @torch.no_grad()
    def update(self, count: Tensor) -> None:
        """Take the count of a batch in, at least 1."""
        fresh = count.to(self.value).clamp(min=1)
        self.value.mul_(self.momentum).add_((1 - self.momentum) * fresh)


class DetectionObjective(nn.Module):
    """Focal classification plus IoU regression, as SnAG and HieraMamba train (MSCL, equation 13).

    Args:
        grid: which points are positive.
        label_smoothing: targets are 1 - s/2 and s/2; 0.2 is hidden in SnAG's released code.
        alpha, gamma: of the focal loss.
        regression: `diou_loss` (TACoS, MAD) or `iou_loss` (Ego4D).
        regression_weight: rho_reg.
        norm_start, norm_momentum: of the running number of positives.
    """

    def __init__(
        self,
        grid: PointGrid | None = None,
        label_smoothing: float = 0.2,
        alpha: float = 0.5,
        gamma: float = 2.0,
        regression: Callable[[Tensor, Tensor], Tensor] = diou_loss,
        regression_weight: float = 1.0,
        norm_start: float = 100.0,
        norm_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.grid = grid or PointGrid()
        self.label_smoothing = label_smoothing
        self.alpha, self.gamma = alpha, gamma
        self.regression = regression
        self.regression_weight = regression_weight
        self.norm = RunningNorm(norm_start, norm_momentum)

    def forward(self, output: PointPredictions, batch: GroundingBatch) -> dict[str, Tensor]:
        """The terms "classification" and "regression", and their weighted sum "total".

        Both are sums over points divided by the running norm of the batches *before* this one.
        """
        points = self.grid.points(output.lengths, device=output.logits.device)
        moments = batch.moments / output.pyramid.clips_per_step
        labels, offsets = self.grid.targets(points, moments, batch.moment_mask)
        positive = labels & output.mask
        smooth = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        focal = focal_loss(output.logits, smooth, self.alpha, self.gamma)
        norm = self.norm.value.clone()
        classification = focal.masked_fill(~output.mask, 0.0).sum() / norm
        regression = self.regression(output.offsets[positive], offsets[positive]).sum() / norm
        if self.training:
            self.norm.update(reduce_sum(positive.sum()))
        return {
            "total": classification + self.regression_weight * regression,
            "classification": classification,
            "regression": regression,
        }
