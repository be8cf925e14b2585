"""The feature pyramid as one flat sequence, and the heads that read it.

    level 0   o o o o o o o o            one point per clip
    level 1   o   o   o   o              one per two clips
    level 2   o       o                  one per four clips
    flat      o o o o o o o o | o o o o | o o       `|`: an invalid separator

Fusion and heads use three-step convolutions that read zeros at invalid positions. With one
separator between levels, a single pass over the flat sequence gives exactly what one pass per level
would.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.nn.sequence import MaskedConv1d


@dataclass(frozen=True)
class Pyramid:
    """Levels of a video encoder, finest first.

    Attributes:
        levels: (B, T_l, D) each.
        masks: (B, T_l) each.
        clips_per_step: clips of the video's grid per step of level 0 (the encoder's input stride).
        base: (B, T_0, D) what enters the first block, Z^0 in MSCL; None if an encoder keeps none.
    """

    levels: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    clips_per_step: int = 1
    base: Tensor | None = field(default=None, kw_only=True)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps T_l of every level, padding included."""
        return tuple(level.shape[1] for level in self.levels)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """One sequence of all levels with separators.

        Returns:
            x (B, P + L - 1, D), mask (B, P + L - 1), and level (P + L - 1,) with the level of each
            position, -1 at separators. P = sum of T_l.
        """
        x, mask, level = [], [], []
        for number, (features, valid) in enumerate(zip(self.levels, self.masks, strict=True)):
            gap = 1 if number + 1 < len(self.levels) else 0
            x.append(F.pad(features, (0, 0, 0, gap)))
            mask.append(F.pad(valid, (0, gap)))
            level += [number] * features.shape[1] + [-1] * gap
        return torch.cat(x, 1), torch.cat(mask, 1), torch.tensor(level, device=x[0].device)

    def select(self, rows: Tensor) -> "Pyramid":
        """The pyramids of some videos; `rows` as in tensor indexing."""
        return replace(
            self,
            levels=tuple(x[rows] for x in self.levels),
            masks=tuple(m[rows] for m in self.masks),
            base=None if self.base is None else self.base[rows],
        )


@dataclass(frozen=True)
class PointPredictions:
    """What the heads say of every point of the pyramid, levels one after the other.

    Attributes:
        logits: (Q, P) log-odds that the point is near the centre of the moment.
        offsets: (Q, P, 2) distances to start and end, in units of the point's stride, >= 0.
        mask: (Q, P) True on points over real clips.
        pyramid: the features of the videos before (late) fusion, for losses that read them.
        pyramid_row: (Q,) row of `pyramid` that each query was asked of: its video, or with early
            fusion its own.
        fused: (Q, P, D) features after fusion with the query.
        text, text_mask: (Q, K, D_text) encoded words.
    """

    logits: Tensor
    offsets: Tensor
    mask: Tensor
    pyramid: Pyramid
    pyramid_row: Tensor
    fused: Tensor
    text: Tensor
    text_mask: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Points per level, summing to P."""
        return self.pyramid.lengths

    def per_level(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut a (Q, P, ...) tensor into its levels."""
        return x.split(self.lengths, dim=1)


class ConvolutionalHead(nn.Module):
    """Convolutions with norm and ReLU, and an output convolution, shared by all levels."""

    def __init__(self, channels: int, out_channels: int, layers: int = 2) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            MaskedConv1d(channels, channels, 3) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))
        self.output = MaskedConv1d(channels, out_channels, 3, bias=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x (Q, P, D), mask (Q, P). Returns (Q, P, out_channels)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x, mask)[0]), inplace=True)
        return self.output(x, mask)[0]


class ClassificationHead(ConvolutionalHead):
    """Logit of every point.

    Args:
        prior: probability given to positives at the start; None starts at even odds.
    """

    def __init__(self, channels: int, layers: int = 2, prior: float | None = None) -> None:
        super().__init__(channels, 1, layers)
        if prior is not None:
            nn.init.constant_(self.output.bias, torch.logit(torch.tensor(prior)).item())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x (Q, P, D), mask (Q, P). Returns (Q, P)."""
        return super().forward(x, mask).squeeze(-1)


class RegressionHead(ConvolutionalHead):
    """Non-negative distances to start and end, with one learnt scale per level."""

    def __init__(self, channels: int, levels: int, layers: int = 2) -> None:
        super().__init__(channels, 2, layers)
        self.scales = nn.Parameter(torch.ones(levels))

    def forward(self, x: Tensor, mask: Tensor, level: Tensor) -> Tensor:
        """Args: x (Q, P, D), mask (Q, P), level (P,) of each point. Returns (Q, P, 2)."""
        return F.relu(super().forward(x, mask) * self.scales[level][:, None])
