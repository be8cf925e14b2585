"""The frame that SnAG, MSCL and HieraMamba share: encode, fuse late, predict at every point.

    clip features ──video encoder──▶ pyramid ─┐
                                              ├─ late fusion ─ heads ─▶ logit and offsets per point
    word features ──text encoder───▶ words ───┘

A video is encoded once, however many queries are asked of it. A model that fuses early, too
(HieraMamba), does in `encode_video` what needs no query and the rest in `predict`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.nn.fusion import LateFusion
from tvg_lib.nn.pyramid import ClassificationHead, PointPredictions, Pyramid, RegressionHead

POINTS = 4096  # that are predicted at a time on a CPU


@dataclass(frozen=True)
class EncodedText:
    """Encoded words.

    Attributes:
        features: (Q, K, D_text).
        mask: (Q, K).
    """

    features: Tensor
    mask: Tensor


class PointGrounder(nn.Module):
    """Single-stage grounding over the points of a feature pyramid.

    A question takes 3.4 million operations per point at width 256 (`benchmarks/published.py` counts
    them; 4.5 by definition of the layers), 15 * 10^9 over the 4,590 points of 2,304 clips. They lie
    in the feed-forward networks of the fusion and the convolutions of the heads, behind the first
    product of video and words, so hardly any can be done before the question is known.

    Args:
        video_encoder: (B, T, C) and mask (B, T) to a `Pyramid`.
        text_encoder: (Q, K, C) and mask (Q, K) to the same, encoded.
        fusion: late cross-attention.
        classification, regression: the heads.
    """

    def __init__(
        self,
        video_encoder: nn.Module,
        text_encoder: nn.Module,
        fusion: LateFusion,
        classification: ClassificationHead,
        regression: RegressionHead,
    ) -> None:
        super().__init__()
        self.video_encoder = video_encoder
        self.text_encoder = text_encoder
        self.fusion = fusion
        self.classification = classification
        self.regression = regression

    def encode_video(self, video: Tensor, mask: Tensor) -> Pyramid:
        """Args: video (B, T, C), mask (B, T)."""
        return self.video_encoder(video, mask)

    def encode_text(self, text: Tensor, mask: Tensor) -> EncodedText:
        """Args: text (Q, K, C), mask (Q, K)."""
        return EncodedText(*self.text_encoder(text, mask))

    def predict(self, pyramid: Pyramid, text: EncodedText, query_video: Tensor) -> PointPredictions:
        """Ask encoded queries of encoded videos; `query_video` (Q,) is the video of each query."""
        x, mask, level = pyramid.flat()
        parts = [
            self._answers(x, mask, level, EncodedText(*words), rows)
            for *words, rows in _small_parts(x, text.features, text.mask, query_video)
        ]
        logits, offsets, valid, fused = map(torch.cat, zip(*parts, strict=True))
        return PointPredictions(
            logits=logits,
            offsets=offsets,
            mask=valid,
            pyramid=pyramid,
            pyramid_row=query_video,
            fused=fused,
            text=text.features,
            text_mask=text.mask,
        )

    def _answers(
        self, x: Tensor, mask: Tensor, level: Tensor, text: EncodedText, query_video: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, offsets, mask and fused features of every point, for some of the queries."""
        fused, mask = self.fusion(x, mask, text.features, text.mask, query_video)
        logits = self.classification(fused, mask)
        offsets = self.regression(fused, mask, level)
        points = level >= 0  # everything but the separators
        return logits[:, points], offsets[:, points], mask[:, points], fused[:, points]

    def forward(self, batch: GroundingBatch) -> PointPredictions:
        """Encode the videos and queries of a batch and predict."""
        videos = self.encode_video(batch.video, batch.video_mask)
        text = self.encode_text(batch.text, batch.text_mask)
        return self.predict(videos, text, batch.query_video)


def _small_parts(
    x: Tensor, features: Tensor, mask: Tensor, query_video: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Words, their mask and video of the queries: few at a time on a CPU, all at once elsewhere.

    What a few thousand points need fits in the cache, from which a CPU reads several times as fast
    as from memory; and memory for an answer need not grow with the number of queries. Words that
    are padding in a whole part are left out.
    """
    on_cpu = x.device.type == "cpu"
    size = max(1, POINTS // x.shape[1]) if on_cpu else max(1, len(query_video))
    for part in zip(*(v.split(size) for v in (features, mask, query_video)), strict=True):
        if on_cpu:
            present = part[1].any(0).nonzero()
            words = int(present[-1]) + 1 if len(present) else 1
            part = part[0][:, :words], part[1][:, :words], part[2]
        yield part
