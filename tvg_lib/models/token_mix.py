"""A second, augmented view of each video: Tube TokenMix on clip features.

Source: Xing et al., "SVFormer: Semi-supervised Video Transformer for Action Recognition" (CVPR
2023), which MSCL's Table 4 compares itself with.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.nn.pyramid import PointPredictions, Pyramid


def tube_token_mix(video: Tensor, mask: Tensor, groups: int = 16, beta: float = 10.0) -> Tensor:
    """Each video mixed with another of the batch by one mask that is constant in time.

    Tube TokenMix takes the same patches of every frame from the other video: its masks are tubes
    through time. Clip features have no patches, so the tokens are equal groups of channels. The
    share taken is drawn from Beta(beta, beta) for the whole batch, as there; but as a video keeps
    its moments here, it always keeps the larger part of its tokens.

    Args:
        video: (B, T, C); mask (B, T). Where the other video has ended, a video is left as it is.
        groups: tokens of a clip; C is split as evenly as it goes.
        beta: of the distribution; large values mix halves.

    Returns:
        (B, T, C)
    """
    batch, _, width = video.shape
    share = torch.distributions.Beta(beta, beta).sample()
    taken = int(torch.minimum(share, 1 - share) * groups)
    token = torch.arange(width, device=video.device) * groups // width
    foreign = torch.randperm(groups, device=video.device)[token] < taken  # (C,)
    shift = int(torch.randint(1, batch, ())) if batch > 1 else 0
    other = torch.arange(batch, device=video.device).roll(shift)
    there = mask[other] & mask
    return torch.where(foreign & there[..., None], video[other], video)


@dataclass(frozen=True)
class TwoViewPredictions(PointPredictions):
    """Predictions with the pyramid of an augmented view of the same videos."""

    view: Pyramid


class TokenMixGrounder(PointGrounder):
    """A point grounder that encodes a mixed view of its videos, too, while it trains.

    Args:
        model: whose parts it takes over.
        groups, beta: of `tube_token_mix`.
    """

    def __init__(self, model: PointGrounder, groups: int = 16, beta: float = 10.0) -> None:
        super().__init__(
            model.video_encoder,
            model.text_encoder,
            model.fusion,
            model.classification,
            model.regression,
        )
        self.groups, self.beta = groups, beta

    def forward(self, batch: GroundingBatch) -> PointPredictions:
        """Predictions; in training with the second view."""
        output = super().forward(batch)
        if not self.training:
            return output
        mixed = tube_token_mix(batch.video, batch.video_mask, self.groups, self.beta)
        parts: dict[str, Any] = {f.name: getattr(output, f.name) for f in fields(output)}
        return TwoViewPredictions(**parts, view=self.encode_video(mixed, batch.video_mask))
