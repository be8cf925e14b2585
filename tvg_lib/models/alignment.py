"""What lies between features and detectors: aligners, which mix the query into the frames.

Every aligner takes the same `AlignmentInput` and returns the same `Alignment`, so that any of them
can stand before any detector (`tvg_lib.models.aligned_grounder`). Here are those that A2FA is
compared with; A2FA itself is in `tvg_lib.models.a2fa`. They are honest implementations of an idea,
at the size of our data, not reproductions of the models that made the idea known:

    SimilarityAlignment       none: the frames as they are, with their similarity to the query
    CrossAttentionAlignment   frames attend to the words (as in UniVTG and Moment-DETR's successors)
    QueryDependentAlignment   the same with dummy words that absorb what does not match, and a
                              token that reads the whole video and gates its channels (the ideas of
                              CG-DETR and QD-DETR)
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.errors import DataError
from tvg_lib.nn.attention import MultiHeadAttention, TransformerBlock
from tvg_lib.nn.feed_forward import FeedForward
from tvg_lib.nn.sequence import SinusoidalPositions, zero_invalid


@dataclass(frozen=True)
class AlignmentInput:
    """One row per query: its video, its words, and its sentence in the space of the frames.

    Attributes:
        video: (Q, T, C) frame features V.
        mask: (Q, T) True on real frames, which come first.
        sentence: (Q, C) query feature q.
        text: (Q, K, W) word features.
        text_mask: (Q, K).
    """

    video: Tensor
    mask: Tensor
    sentence: Tensor
    text: Tensor
    text_mask: Tensor

    @classmethod
    def of(cls, batch: GroundingBatch) -> "AlignmentInput":
        """The rows of a batch, queries of one video sharing its features.

        Raises:
            DataError: the data set has no sentence vectors in the space of the clips.
        """
        if batch.sentence is None:
            raise DataError(
                f"videos {', '.join(batch.video_ids[:3])}: these data have no sentence vectors in "
                "the space of the clips; alignment by similarity needs them"
            )
        return cls(
            batch.video[batch.query_video],
            batch.video_mask[batch.query_video],
            batch.sentence,
            batch.text,
            batch.text_mask,
        )


@dataclass(frozen=True)
class Alignment:
    """What an aligner hands to a detector.

    Attributes:
        features: (Q, T, D) aligned frame features V^a, zero at invalid frames.
        mask: (Q, T).
        relevance: (Q, T) logit of "this frame belongs to the query", before any hard mask; it ranks
            the frames (highlights) and is evidence for detectors that read it.
    """

    features: Tensor
    mask: Tensor
    relevance: Tensor


class Aligner(Protocol):
    """An `nn.Module` that aligns; `channels` is the width D of what it returns."""

    channels: int

    def __call__(self, inputs: AlignmentInput) -> Alignment: ...


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the last axis, 0 where one side is 0."""
    return (F.normalize(a, dim=-1, eps=1e-8) * F.normalize(b, dim=-1, eps=1e-8)).sum(-1)


def standardised(scores: Tensor, mask: Tensor) -> Tensor:
    """(Q, T) scores with mean 0 and variance 1 over the valid frames of each row."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    centred = (scores - (scores * mask).sum(1, keepdim=True) / count) * mask
    variance = (centred**2).sum(1, keepdim=True) / count
    return centred / (variance + 1e-6).sqrt()


def smoothed(x: Tensor, mask: Tensor, width: int) -> Tensor:
    """(Q, T, C): mean over the valid ones of `width` neighbouring frames (an odd number)."""
    if width == 1:
        return x
    window = torch.ones(1, 1, width, dtype=x.dtype, device=x.device)
    rows = zero_invalid(x, mask).transpose(1, 2)
    total = F.conv1d(rows.flatten(0, 1)[:, None], window, padding=width // 2)
    count = F.conv1d(mask[:, None].to(x.dtype), window, padding=width // 2).clamp(min=1)
    mean = total.view_as(rows) / count
    return zero_invalid(mean.transpose(1, 2), mask)


class Calibration(nn.Module):
    """A score of frames to a logit: standardised over the video, then scaled and shifted.

    A query's best frame then stands out whatever its absolute similarity. Scale and shift are
    learnt; they start so that a frame of usual similarity is below one half.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.shift = nn.Parameter(torch.tensor(-0.5))

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Args: scores and mask (Q, T). Returns logits (Q, T), zero at invalid frames."""
        return (standardised(scores, mask) * self.scale + self.shift) * mask


class SimilarityAlignment(nn.Module):
    """No alignment: frame features as they are; relevance is the cosine with the sentence.

    Args:
        channels: C of the features.
        smoothing: frames averaged, an odd number.
    """

    def __init__(self, channels: int, smoothing: int = 1) -> None:
        super().__init__()
        self.channels, self.smoothing = channels, smoothing
        self.calibration = Calibration()

    def forward(self, inputs: AlignmentInput) -> Alignment:
        video = smoothed(inputs.video, inputs.mask, self.smoothing)
        scores = cosine(inputs.sentence[:, None], video)
        relevance = self.calibration(scores, inputs.mask)
        return Alignment(zero_invalid(video, inputs.mask), inputs.mask, relevance)


class _Projected(nn.Module):
    """Both modalities brought to one width, with positions on the frames."""

    def __init__(self, in_channels: int, text_channels: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.video = nn.Sequential(
            nn.LayerNorm(in_channels), nn.Dropout(dropout), nn.Linear(in_channels, channels)
        )
        self.text = nn.Sequential(
            nn.LayerNorm(text_channels), nn.Dropout(dropout), nn.Linear(text_channels, channels)
        )
        self.positions = SinusoidalPositions(channels, max_length=256)

    def forward(self, inputs: AlignmentInput) -> tuple[Tensor, Tensor]:
        """(Q, T, D) frames and (Q, K, D) words."""
        return self.positions(self.video(inputs.video), inputs.mask), self.text(inputs.text)


class CrossAttentionAlignment(nn.Module):
    """Frames attend to the words, then to one another.

    Args:
        in_channels, text_channels: of clip and word features.
        channels, heads, layers: of the encoder; `layers` of cross- and as many of self-attention.
        dropout: of projections and residual branches.
    """

    def __init__(
        self,
        in_channels: int,
        text_channels: int,
        channels: int = 128,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.project = _Projected(in_channels, text_channels, channels, dropout)
        self.cross = nn.ModuleList(
            _CrossBlock(channels, heads, dropout=dropout) for _ in range(layers)
        )
        self.self_attention = nn.ModuleList(
            TransformerBlock(channels, heads, convolutional=False, dropout=dropout)
            for _ in range(layers)
        )
        self.score = nn.Linear(channels, 1)
        self.calibration = Calibration()

    def forward(self, inputs: AlignmentInput) -> Alignment:
        frames, words = self.project(inputs)
        return self._aligned(self._mixed(frames, words, inputs.text_mask, inputs.mask), inputs)

    def _mixed(self, frames: Tensor, words: Tensor, text_mask: Tensor, mask: Tensor) -> Tensor:
        """(Q, T, D) frames that have read (Q, K, D) words, then one another."""
        for block in self.cross:
            frames = block(frames, words, text_mask)
        for block in self.self_attention:
            frames, _ = block(frames, mask)
        return frames

    def _aligned(self, frames: Tensor, inputs: AlignmentInput) -> Alignment:
        """Relevance: what was learnt, on top of the similarity that is given."""
        given = self.calibration(cosine(inputs.sentence[:, None], inputs.video), inputs.mask)
        learnt = self.score(frames).squeeze(-1) * inputs.mask
        return Alignment(zero_invalid(frames, inputs.mask), inputs.mask, given + learnt)


class QueryDependentAlignment(CrossAttentionAlignment):
    """Cross-attention where a frame may turn away from the query, and sees the whole video.

    Dummy words stand beside the real ones and absorb the attention of frames that match nothing;
    a learnt token reads all mixed frames of the video and gates the channels of each.

    Args: as of `CrossAttentionAlignment`, and
        dummies: number of dummy words.
    """

    def __init__(
        self,
        in_channels: int,
        text_channels: int,
        channels: int = 128,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        dummies: int = 4,
    ) -> None:
        super().__init__(in_channels, text_channels, channels, heads, layers, dropout)
        self.dummies = nn.Parameter(torch.randn(dummies, channels) * 0.02)
        self.reader = MultiHeadAttention(channels, heads)
        self.token = nn.Parameter(torch.randn(channels) * 0.02)

    def forward(self, inputs: AlignmentInput) -> Alignment:
        frames, words = self.project(inputs)
        queries, count = len(words), len(self.dummies)
        words = torch.cat([words, self.dummies.expand(queries, -1, -1)], dim=1)
        text_mask = F.pad(inputs.text_mask, (0, count), value=True)
        frames = zero_invalid(self._mixed(frames, words, text_mask, inputs.mask), inputs.mask)
        token = self.token.expand(queries, 1, -1)
        token = self.reader(token, frames, frames, inputs.mask)  # (Q, 1, D)
        return self._aligned(frames * (1 + torch.tanh(token)), inputs)


class _CrossBlock(nn.Module):
    """Pre-norm cross-attention and feed-forward on residual branches."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = MultiHeadAttention(channels, heads, dropout=dropout)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, expansion=2, dropout=dropout)

    def forward(self, frames: Tensor, words: Tensor, text_mask: Tensor) -> Tensor:
        """Args: frames (Q, T, D), words (Q, K, D), text_mask (Q, K). Returns (Q, T, D)."""
        frames = frames + self.attention(self.norm(frames), words, words, text_mask)
        return frames + self.feed_forward(self.feed_forward_norm(frames))
