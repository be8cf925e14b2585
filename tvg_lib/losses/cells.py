"""Targets and losses on maps of moments (F2SGD and 2D-TAN's enumeration).

The printed loss (A2FA + F2SGD, equation 14) is the squared error to a map that is 1 at the cell of
the true moment and 0 elsewhere: one cell in thousands pulls up, all others down. What else is here
can be changed one thing at a time: a sigmoid before the error, the weight of the ones, targets that
fade with IoU, and a softmax over the whole map, which asks for the right order and nothing else.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.distributed import reduce_sum
from tvg_lib.models.f2sgd import CellScores
from tvg_lib.moments import interval_iou


def moment_cells(moments: Tensor, lengths: Tensor) -> Tensor:
    """First and last frame (Q, M, 2) of moments: the frames whose middle lies in them.

    Args:
        moments: (Q, M, 2) in grid-index units, where frame i has its middle at i.
        lengths: (Q,) frames of each video.

    A moment without a frame's middle gets the frame under its own middle.
    """
    first, last = moments[..., 0].ceil(), moments[..., 1].floor()
    middle = (moments.mean(-1) + 0.5).floor()
    empty = last < first
    first, last = torch.where(empty, middle, first), torch.where(empty, middle, last)
    most = (lengths - 1)[:, None].to(first)
    first = torch.minimum(first.clamp(min=0), most)
    last = torch.minimum(last.clamp(min=0), most)
    return torch.stack([first, torch.maximum(first, last)], dim=-1).long()


def corner_targets(output: CellScores, cells: Tensor, moment_mask: Tensor) -> Tensor:
    """G of equation 14, (Q, T, W): 1 at the cell of every moment, 0 elsewhere.

    Args:
        output: whose map is taught; a moment longer than its band has no cell.
        cells: (Q, M, 2) first and last frames.
        moment_mask: (Q, M).
    """
    columns = output.logits.shape[-1]
    row, column = cells.unbind(-1)
    if output.banded:
        column = column - row
    there = moment_mask & (column < columns)
    target = torch.zeros_like(output.logits, dtype=torch.float32).flatten(1)
    index = (row * columns + column).masked_fill(~there, 0)
    target.scatter_reduce_(1, index, there.float(), reduce="amax")
    return target.view(output.logits.shape)


def overlap_targets(output: CellScores, moments: Tensor, moment_mask: Tensor) -> Tensor:
    """(Q, T, W) largest IoU of every cell's moment with a true one.

    Args:
        output: whose map is taught.
        moments: (Q, M, 2) in grid-index units.
        moment_mask: (Q, M).
    """
    steps, columns = output.logits.shape[1:]
    device = output.logits.device
    first = torch.arange(steps, device=device)[:, None].expand(steps, columns)
    last = torch.arange(columns, device=device).expand(steps, columns)
    if output.banded:
        last = first + last
    spans = torch.stack([first - 0.5, last + 0.5], dim=-1).view(1, -1, 2).to(moments)
    overlap = interval_iou(spans, moments)  # (Q, T W, M)
    overlap = overlap.masked_fill(~moment_mask[:, None], 0.0).amax(-1)
    return overlap.view(-1, steps, columns).float() * output.mask


@dataclass(frozen=True)
class CellLossConfig:
    """Which loss a map is trained with.

    Attributes:
        kind: "squared" is equation 14; "cross-entropy" compares a softmax over all moments of a
            map with the targets, scaled to sum 1; "binary" is the binary cross-entropy of every
            cell (2D-TAN).
        end: what "squared" takes for P: the scores ("linear"), as equation 13 ends with the MLP, or
            their "sigmoid".
        whole_map: "squared" over all cells of the map, those below the diagonal included (as
            printed), or over moments only. A banded map has no cells below the diagonal.
        positive_weight: of cells in proportion to their target, in "squared" and "binary".
        targets: "corner", equation 14's ones; "overlap", the IoU with the truth, rescaled so that
            `low` becomes 0.
        low: see `targets`.
        power: of the rescaled overlap; larger ones approach the corner.
        relevance_weight: of a binary cross-entropy of the frames' relevance (inside a moment or
            not); 0 as printed.
    """

    kind: Literal["squared", "cross-entropy", "binary"] = "cross-entropy"
    end: Literal["linear", "sigmoid"] = "linear"
    whole_map: bool = False
    positive_weight: float = 1.0
    targets: Literal["corner", "overlap"] = "overlap"
    low: float = 0.5
    power: float = 2.0
    relevance_weight: float = 0.0


PRINTED = CellLossConfig(kind="squared", whole_map=True, targets="corner")
"""Equation 14 as it stands in the paper."""


class CellObjective(nn.Module):
    """Loss of a map of moments, and of the relevance of frames."""

    def __init__(self, config: CellLossConfig | None = None) -> None:
        super().__init__()
        self.config = config or CellLossConfig()

    def forward(self, output: CellScores, batch: GroundingBatch) -> dict[str, Tensor]:
        """The terms "cells" and "relevance", means over queries, and their weighted "total"."""
        queries = reduce_sum(torch.tensor(float(len(output.logits)), device=output.logits.device))
        cells = self._cells(output, batch).sum() / queries
        relevance = relevance_loss(output.relevance, batch).sum() / queries
        return {
            "total": cells + self.config.relevance_weight * relevance,
            "cells": cells,
            "relevance": relevance,
        }

    def targets(self, output: CellScores, batch: GroundingBatch) -> Tensor:
        """(Q, T, W) in [0, 1]; the true cell is always 1."""
        lengths = batch.video_mask.sum(1)[batch.query_video]
        corners = corner_targets(output, moment_cells(batch.moments, lengths), batch.moment_mask)
        if self.config.targets == "corner":
            return corners
        overlap = overlap_targets(output, batch.moments, batch.moment_mask)
        overlap = ((overlap - self.config.low) / (1 - self.config.low)).clamp(0, 1)
        return torch.maximum(overlap**self.config.power, corners)

    def _cells(self, output: CellScores, batch: GroundingBatch) -> Tensor:
        """(Q,) loss of each map."""
        target, logits = self.targets(output, batch), output.logits.float()
        if self.config.kind == "cross-entropy":
            scores = logits.masked_fill(~output.mask, -torch.inf).flatten(1).log_softmax(1)
            scores = scores.masked_fill(~output.mask.flatten(1), 0.0)
            shares = target.flatten(1)
            # A moment longer than the band has no cell: nothing is asked of that map then.
            shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-6)
            return -(shares * scores).sum(1)
        weight = 1 + (self.config.positive_weight - 1) * target
        if self.config.kind == "squared":
            P = logits.sigmoid() if self.config.end == "sigmoid" else logits
            error = weight * (P - target) ** 2
            counted = output.mask
            if self.config.whole_map and not output.banded:
                counted = counted | counted.transpose(1, 2)
            return (error * counted).flatten(1).sum(1)
        error = weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (error * output.mask).flatten(1).sum(1) / output.mask.flatten(1).sum(1)


def relevance_loss(relevance: Tensor, batch: GroundingBatch) -> Tensor:
    """(Q,) mean binary cross-entropy of frames: is their middle inside a true moment?

    Args:
        relevance: (Q, T) logits.
        batch: whose moments are the truth.
    """
    index = torch.arange(relevance.shape[1], device=relevance.device)
    start, end = batch.moments[..., :1], batch.moments[..., 1:]  # (Q, M, 1)
    member = (index >= start) & (index <= end) & batch.moment_mask[..., None]
    target = member.any(1).float()
    mask = batch.video_mask[batch.query_video]
    error = F.binary_cross_entropy_with_logits(relevance.float(), target, reduction="none")
    return (error * mask).sum(1) / mask.sum(1)
