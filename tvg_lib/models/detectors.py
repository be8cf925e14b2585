"""Detectors that F2SGD is compared with (Table 8 and Figure 6 of A2FA + F2SGD).

Each takes an `Alignment` and returns ranked moments, so any of them stands behind any aligner. They
implement an idea at the size of our data and do not reproduce the models that made it known:

    Enumeration          every candidate (start, end) gets a feature, convolutions over the map of
                         candidates score it (2D-TAN, Zhang et al. 2020)
    SetPrediction        a few learnt queries each predict one moment; trained by optimal matching
                         (Moment-DETR, Lei et al. 2021)
    BoundaryRegression   every frame predicts the distances to start and end of its moment
                         (UniVTG, Lin et al. 2023)

Their losses are in `tvg_lib.losses.cells` (Enumeration) and `tvg_lib.losses.detectors`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.models.alignment import Alignment
from tvg_lib.models.f2sgd import CellScores
from tvg_lib.nn.attention import MultiHeadAttention, TransformerBlock
from tvg_lib.nn.feed_forward import FeedForward
from tvg_lib.nn.sequence import MaskedConv1d, SinusoidalPositions, zero_invalid
from tvg_lib.nn.square import SquareConvolution


class Enumeration(nn.Module):
    """Every moment of the video is a candidate with a feature of its own.

    A candidate's feature is the mean of its frames' (by cumulative sums), with the features of its
    two ends and its mean relevance; two convolutions let neighbouring candidates compare.

    It starts, as F2SGD does, from the sum of the frames' logits alone, and learns from the same
    loss, a softmax over the map. 2D-TAN's own, a binary cross-entropy of every cell, asks for
    calibrated scores: nearly all cells are no moment, so all are pushed down, the sum first of all,
    and its ranking is lost long before another one is learnt (notebook 42 has the numbers).

    Args:
        in_channels: D of the aligned frames.
        channels: of the map.
        kernel: of the convolutions, odd.
    """

    def __init__(self, in_channels: int, channels: int = 32, kernel: int = 5) -> None:
        super().__init__()
        self.project = nn.Linear(in_channels, 3 * channels)
        self.relevance = nn.Linear(1, channels)
        self.convolutions = nn.ModuleList(
            SquareConvolution(channels, channels, kernel) for _ in range(2)
        )
        self.score = nn.Linear(channels, 1)
        nn.init.zeros_(self.score.weight)
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, alignment: Alignment) -> CellScores:
        """Scores of all T x T cells."""
        mask, steps = alignment.mask, alignment.mask.shape[1]
        frames = zero_invalid(self.project(alignment.features), mask)
        inner, start, end = frames.chunk(3, dim=-1)  # (Q, T, H) each
        mean = _cell_means(inner) + start[:, :, None] + end[:, None]
        relevance = _cell_means(alignment.relevance[..., None])
        x = F.relu(mean + self.relevance(relevance)).movedim(-1, 1)  # (Q, H, T, T)
        index = torch.arange(steps, device=mask.device)
        cells = mask[:, :, None] & mask[:, None] & (index[:, None] <= index)
        for convolution in self.convolutions:
            x = x + F.relu(convolution(x, cells[:, None]))
        # As in F2SGD, what is learnt is added to the sum of the frames' logits.
        lengths = (index - index[:, None] + 1).clamp(min=1)
        evidence = self.gain * relevance.squeeze(-1) * lengths
        logits = self.score(x.movedim(1, -1)).squeeze(-1) + evidence
        return CellScores(logits, cells, alignment.relevance)


def _cell_means(x: Tensor) -> Tensor:
    """(Q, T, T, C): mean of (Q, T, C) over the frames i to j of every cell with i <= j."""
    steps = x.shape[1]
    sums = F.pad(x, (0, 0, 1, 0)).cumsum(1)
    index = torch.arange(steps, device=x.device)
    length = (index - index[:, None] + 1).clamp(min=1)[..., None]
    return (sums[:, None, 1:] - sums[:, :-1, None]) / length


@dataclass(frozen=True)
class MomentSet:
    """One moment per learnt query.

    Attributes:
        spans: (Q, N, 2) centre and width as shares of the video, in (0, 1).
        logits: (Q, N) of "there is a moment".
        lengths: (Q,) frames of each video.
        relevance: (Q, T) of the alignment.
    """

    spans: Tensor
    logits: Tensor
    lengths: Tensor
    relevance: Tensor

    @property
    def moments(self) -> Tensor:
        """(Q, N, 2) start and end in grid-index units, inside the video."""
        centre, width = self.spans.float().unbind(-1)
        ends = torch.stack([centre - width / 2, centre + width / 2], dim=-1).clamp(0, 1)
        return ends * self.lengths[:, None, None] - 0.5

    def ranked(self, keep: int) -> tuple[Tensor, Tensor]:
        """Moments (Q, K, 2) in grid-index units and scores (Q, K), best first."""
        scores, index = self.logits.float().sigmoid().topk(min(keep, self.logits.shape[1]), dim=1)
        return self.moments.gather(1, index[..., None].expand(-1, -1, 2)), scores


class SetPrediction(nn.Module):
    """A transformer whose learnt queries read the aligned frames and predict a moment each.

    Two things decide whether it learns within some hundred steps. Position codes are as large as
    the features, or a slot can tell what it reads and not where. And slots start apart, with
    centres all over the video and widths of a fifth of it, each learning a difference to its own
    place (the reference points of DETR's successors): from equal starts all slots predict the mean
    moment for a long time.

    Args:
        in_channels: D of the aligned frames.
        channels, heads, layers: of the decoder.
        slots: number N of learnt queries.
        dropout: of residual branches.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 128,
        heads: int = 4,
        layers: int = 2,
        slots: int = 10,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.project = nn.Linear(in_channels, channels)
        self.relevance = nn.Linear(1, channels)
        self.positions = SinusoidalPositions(channels, max_length=256)
        self.encoder = TransformerBlock(channels, heads, convolutional=False, dropout=dropout)
        self.slots = nn.Parameter(torch.randn(slots, channels))
        self.layers = nn.ModuleList(_SlotBlock(channels, heads, dropout) for _ in range(layers))
        self.span = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 2))
        nn.init.zeros_(self.span[2].weight)
        nn.init.zeros_(self.span[2].bias)
        centres = (torch.arange(slots) + 0.5) / slots
        places = torch.stack([centres, torch.full_like(centres, 0.2)], dim=-1)
        self.places = nn.Parameter(places.logit())  # (N, 2), before the sigmoid
        self.score = nn.Linear(channels, 1)

    def forward(self, alignment: Alignment) -> MomentSet:
        """N moments of every query."""
        mask = alignment.mask
        frames = self.project(self.norm(alignment.features))
        frames = frames + self.relevance(alignment.relevance[..., None])
        size = math.sqrt(frames.shape[-1])  # the codes come scaled by its inverse
        frames = self.positions(frames / size, mask) * size
        frames, _ = self.encoder(frames, mask)
        slots = self.slots.expand(len(mask), -1, -1)
        for layer in self.layers:
            slots = layer(slots, frames, mask)
        return MomentSet(
            (self.span(slots) + self.places).sigmoid(),
            self.score(slots).squeeze(-1),
            mask.sum(1),
            alignment.relevance,
        )


class _SlotBlock(nn.Module):
    """Self-attention among slots, cross-attention to frames, feed-forward; pre-norm."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.among = MultiHeadAttention(channels, heads, dropout=dropout)
        self.across = MultiHeadAttention(channels, heads, dropout=dropout)
        self.feed_forward = FeedForward(channels, expansion=2, dropout=dropout)

    def forward(self, slots: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        """Args: slots (Q, N, D), frames (Q, T, D), mask (Q, T). Returns (Q, N, D)."""
        every = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)
        x = self.norms[0](slots)
        slots = slots + self.among(x, x, x, every)
        slots = slots + self.across(self.norms[1](slots), frames, frames, mask)
        return slots + self.feed_forward(self.norms[2](slots))


@dataclass(frozen=True)
class FrameBoundaries:
    """One moment per frame.

    Attributes:
        logits: (Q, T) of "this frame lies in a moment".
        offsets: (Q, T, 2) distances to the moment's start and end in frames, at least 0.
        mask: (Q, T).
        relevance: (Q, T) of the alignment.
    """

    logits: Tensor
    offsets: Tensor
    mask: Tensor
    relevance: Tensor

    @property
    def moments(self) -> Tensor:
        """(Q, T, 2) start and end in grid-index units."""
        index = torch.arange(self.mask.shape[1], device=self.mask.device)
        offsets = self.offsets.float()
        return torch.stack([index - offsets[..., 0], index + offsets[..., 1]], dim=-1)

    def ranked(self, keep: int) -> tuple[Tensor, Tensor]:
        """Moments (Q, K, 2) in grid-index units and scores (Q, K), best first."""
        scores = self.logits.float().sigmoid().masked_fill(~self.mask, -torch.inf)
        scores, index = scores.topk(min(keep, scores.shape[1]), dim=1)
        return self.moments.gather(1, index[..., None].expand(-1, -1, 2)), scores


class BoundaryRegression(nn.Module):
    """Convolutions over time that give every frame a score and two distances.

    Args:
        in_channels: D of the aligned frames.
        channels: of the convolutions.
        layers: of each of the two heads.
    """

    def __init__(self, in_channels: int, channels: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.project = nn.Linear(in_channels + 1, channels)
        self.heads = nn.ModuleList(
            nn.ModuleList(MaskedConv1d(channels, channels, 7, bias=True) for _ in range(layers))
            for _ in range(2)
        )
        self.score = nn.Linear(channels, 1)
        self.distance = nn.Linear(channels, 2)
        nn.init.constant_(self.distance.bias, 3.12)  # five frames to both sides

    def forward(self, alignment: Alignment) -> FrameBoundaries:
        """A moment of every frame."""
        mask = alignment.mask
        x = torch.cat([alignment.features, alignment.relevance[..., None]], dim=-1)
        x = F.relu(self.project(x))
        outputs = []
        for head in self.heads:
            h = x
            for convolution in head:
                h = F.relu(convolution(h, mask)[0])
            outputs.append(h)
        logits = self.score(outputs[0]).squeeze(-1) + alignment.relevance
        offsets = F.softplus(self.distance(outputs[1])) ** 2 / 2  # long distances in reach
        return FrameBoundaries(logits, offsets, mask, alignment.relevance)
