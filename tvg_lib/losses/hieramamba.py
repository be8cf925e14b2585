"""What HieraMamba is trained on: detection, and two contrastive losses summed over the levels.

    L = L_cls + rho L_reg + w_ACC L_ACC + w_SPC L_SPC

All four are divided by the same running number of positive points, as in the released code, so
what a weight means changes with it: the released 10 and 1 (TACoS, norm 100) start as 0.1 and 0.01.

Facts of the released code that a reader of the paper would not expect, all options here: its
projectors are never trained (the optimiser is made before they are); the segments' prototypes are
means of the few points that are positive for detection, not of all that lie in the moment; and both
MAD configurations switch the contrast off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.losses.contrastive import ContrastiveProjector, anchor_contrast, segment_contrast
from tvg_lib.losses.detection import DetectionObjective
from tvg_lib.models.hieramamba import AnchorPyramid
from tvg_lib.nn.points import PointGrid
from tvg_lib.nn.pyramid import PointPredictions


@dataclass(frozen=True)
class AnchorContrast:
    """ACC: an anchor resembles the tokens it summarises, not far anchors of its video.

    Attributes:
        weight: w_ACC.
        across_videos: anchors of the batch's other videos are admissible as negatives, too.
        Others as in `anchor_contrast`.
    """

    weight: float = 10.0
    negative_ratio: float | None = 4.0
    gap_ratio: float = 0.3
    temperature: float = 0.07
    hard_negatives: bool = False
    across_videos: bool = False


@dataclass(frozen=True)
class SegmentContrast:
    """SPC: points of the moment resemble their mean, points outside do not.

    Attributes:
        weight: w_SPC.
        negative_ratio, temperature, hard_negatives: as in `segment_contrast`.
        across_videos: points of the batch's other videos are admissible as negatives, too.
        whole_moment: the points of the moment are all that lie in it; else, as released, those near
            its centre.
        every_level: take them from every level; else, as released, only from those whose points
            are positive for detection, about two levels per moment.
    """

    weight: float = 1.0
    negative_ratio: float | None = 1.0
    temperature: float = 0.07
    hard_negatives: bool = False
    across_videos: bool = False
    whole_moment: bool = False
    every_level: bool = False


class HieraMambaObjective(nn.Module):
    """Detection plus ACC plus SPC.

    Args:
        channels: width of the model.
        detection: classification and regression; its running norm divides all terms.
        anchor, segment: the contrastive losses; None switches one off.
        projector_channels: width of the spaces of the contrast.
        trained_projectors: whether the projectors learn; False leaves them as random projections,
            as released.
    """

    def __init__(
        self,
        channels: int,
        detection: DetectionObjective | None = None,
        anchor: AnchorContrast | None = None,
        segment: SegmentContrast | None = None,
        projector_channels: int = 256,
        trained_projectors: bool = True,
    ) -> None:
        super().__init__()
        self.detection = detection or DetectionObjective()
        self.anchor, self.segment = anchor, segment
        self.anchor_projector = self.segment_projector = None
        if anchor is not None:
            self.anchor_projector = ContrastiveProjector(channels, None, projector_channels)
            self.anchor_projector.requires_grad_(trained_projectors)
        if segment is not None:
            self.segment_projector = ContrastiveProjector(channels, None, projector_channels)
            self.segment_projector.requires_grad_(trained_projectors)

    @property
    def grid(self) -> PointGrid:
        """Which points are positive."""
        return self.detection.grid

    def forward(self, output: PointPredictions, batch: GroundingBatch) -> dict[str, Tensor]:
        """The terms "classification", "regression", "anchor", "segment" and "total".

        The contrastive terms are unweighted and already divided by the norm.

        Raises:
            ValueError: ACC is asked of a model without anchors.
        """
        norm = self.detection.norm.value.clone()  # of the batches before this one
        terms = self.detection(output, batch)
        if self.anchor is not None:
            terms["anchor"] = self._anchor_loss(output, batch) / norm
            terms["total"] = terms["total"] + self.anchor.weight * terms["anchor"]
        if self.segment is not None:
            terms["segment"] = self._segment_loss(output, batch) / norm
            terms["total"] = terms["total"] + self.segment.weight * terms["segment"]
        return terms

    def _anchor_loss(self, output: PointPredictions, batch: GroundingBatch) -> Tensor:
        pyramid, settings = output.pyramid, self.anchor
        if not isinstance(pyramid, AnchorPyramid):
            raise ValueError("anchor contrast needs a model whose pyramid has anchors")
        other_videos = None
        if settings.across_videos:
            video = _video_of_rows(output, batch)
            other_videos = video[:, None] != video
        levels = zip(
            pyramid.levels, pyramid.masks, pyramid.anchors, pyramid.anchor_masks, strict=True
        )
        loss = sum(
            anchor_contrast(
                self.anchor_projector(tokens),
                mask,
                self.anchor_projector(anchors),
                anchor_mask,
                settings.gap_ratio,
                settings.negative_ratio,
                settings.temperature,
                hard_negatives=settings.hard_negatives,
                other_videos=other_videos,
            )
            for tokens, mask, anchors, anchor_mask in levels
        )
        # Other terms are sums over queries; this one is a mean over videos. As released, it counts
        # once per query of an average video, and once where each query has its own encoding.
        return loss * (len(output.logits) / len(pyramid.levels[0]))

    def _segment_loss(self, output: PointPredictions, batch: GroundingBatch) -> Tensor:
        settings, pyramid = self.segment, output.pyramid
        points = self.grid.points(output.lengths, device=output.logits.device)
        moments = batch.moments / pyramid.clips_per_step
        real = batch.moment_mask[..., None]
        place = points[:, 0]
        inside = (place >= moments[..., 0, None]) & (place <= moments[..., 1, None]) & real
        positive = (
            inside if settings.whole_moment else self.grid.near_center(points, moments) & real
        )
        if not settings.every_level:
            positive = positive & self.grid.in_range(points, moments)
        positive = positive.any(1) & output.mask
        negative = output.mask & ~positive & ~inside.any(1)
        if settings.across_videos:
            other_video = _video_of_rows(output, batch) != batch.query_video[:, None]  # (Q, rows)
        levels = zip(
            pyramid.levels,
            pyramid.masks,
            output.per_level(positive),
            output.per_level(negative),
            strict=True,
        )
        loss = 0.0
        for tokens, mask, chosen, others in levels:
            projected = self.segment_projector(tokens)  # once per video
            elsewhere = elsewhere_negative = None
            if settings.across_videos:
                elsewhere = projected.flatten(0, 1)
                elsewhere_negative = (other_video[..., None] & mask).flatten(1)
            loss = loss + segment_contrast(
                projected[output.pyramid_row],
                chosen,
                others,
                settings.negative_ratio,
                settings.temperature,
                settings.hard_negatives,
                elsewhere,
                elsewhere_negative,
            )
        return loss


def _video_of_rows(output: PointPredictions, batch: GroundingBatch) -> Tensor:
    """(rows,) index of the video that each row of the pyramid encodes.

    With late fusion rows are videos; with early fusion a video has one row for each query.
    """
    video = torch.arange(len(output.pyramid.levels[0]), device=batch.query_video.device)
    return video.scatter(0, output.pyramid_row, batch.query_video)
