"""Points of the pyramid, the moments each may answer for, and the targets they learn.

A point of level l stands at clip i * 2^l and regresses distances in units of 2^l clips. Its
regression range says which moments it may answer for, by the larger of its two distances, in clips:

    level 0   [0, 4)      level 1   [2, 8)      level 2   [4, 16)   ...   last level   [.., open)

(regression range 4, sigma 0.5: each level starts at half of where the one below ends.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PointGrid:
    """Rules by which levels share out moments (SnAG's released defaults).

    Attributes:
        regression_range: upper end of level 0's range, in clips.
        sigma: where a level's range begins, as a share of the end of the one below; 1 for ranges
            that touch without overlapping.
        center_radius: a point is positive only within this many strides of the moment's centre.
    """

    regression_range: float = 4.0
    sigma: float = 0.5
    center_radius: float = 1.5

    def ranges(self, levels: int, max_length: float = float("inf")) -> list[tuple[float, float]]:
        """(low, high) of every level in clips; the last is open up to `max_length` at least."""
        low, high = 0.0, self.regression_range
        result = [(low, high)]
        for _ in range(1, levels):
            low, high = self.sigma * high, 2 * high
            result.append((low, high))
        if levels > 1:
            result[-1] = (low, max(high, max_length + 1))
        return result

    def points(
        self,
        lengths: Sequence[int],
        max_length: float = float("inf"),
        device: torch.device | None = None,
    ) -> Tensor:
        """All points of a pyramid whose levels have `lengths` steps.

        Returns:
            (P, 4): position in clips, low and high end of the regression range, stride.
        """
        rows = []
        for level, ((low, high), length) in enumerate(
            zip(self.ranges(len(lengths), max_length), lengths, strict=True)
        ):
            position = torch.arange(length, dtype=torch.float32, device=device) * 2**level
            constants = position.new_tensor([low, high, 2**level]).expand(length, 3)
            rows.append(torch.cat([position[:, None], constants], dim=1))
        return torch.cat(rows)

    def near_center(self, points: Tensor, moments: Tensor) -> Tensor:
        """Which points lie inside a moment and near its centre: centre sampling.

        Args:
            points: (P, 4) as from `points`.
            moments: (Q, M, 2) in clips.

        Returns:
            (Q, M, P) boolean.
        """
        position, radius = points[:, 0], self.center_radius * points[:, 3]
        start, end = moments[..., 0, None], moments[..., 1, None]  # (Q, M, 1)
        center = (start + end) / 2
        low = torch.maximum(center - radius, start)
        high = torch.minimum(center + radius, end)
        return (position > low) & (position < high)

    def in_range(self, points: Tensor, moments: Tensor) -> Tensor:
        """Which points may answer for which moments by their regression range; (Q, M, P)."""
        distances = _distances(points, moments).amax(-1)
        return (distances >= points[:, 1]) & (distances < points[:, 2])

    def targets(
        self, points: Tensor, moments: Tensor, moment_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What every point should say.

        Args:
            points: (P, 4).
            moments: (Q, M, 2) in clips.
            moment_mask: (Q, M) True on real moments; None where all are.

        Returns:
            labels: (Q, P) boolean, near the centre and in the range of some moment.
            offsets: (Q, P, 2) distances to start and end of that moment in strides; of the
                shortest where there are several, as in ActionFormer. Meaningful at positives only.
        """
        positive = self.near_center(points, moments) & self.in_range(points, moments)
        if moment_mask is not None:
            positive &= moment_mask[..., None]
        length = (moments[..., 1] - moments[..., 0])[..., None]  # (Q, M, 1)
        chosen = length.masked_fill(~positive, float("inf")).argmin(dim=1)  # (Q, P)
        offsets = _distances(points, moments) / points[:, 3, None]  # (Q, M, P, 2)
        index = chosen[:, None, :, None].expand(-1, 1, -1, 2)
        return positive.any(dim=1), offsets.gather(1, index).squeeze(1)


def _distances(points: Tensor, moments: Tensor) -> Tensor:
    """Signed distances (Q, M, P, 2) from each point to the start and to the end, in clips."""
    position = points[:, 0]
    return torch.stack([position - moments[..., 0, None], moments[..., 1, None] - position], dim=-1)
