"""Text encoders: word features (Q, K, C) to contextual word features with a background token."""

import torch
from torch import Tensor, nn

from tvg_lib.nn.attention import MultiHeadAttention, TransformerBlock
from tvg_lib.nn.sequence import SinusoidalPositions, zero_invalid


class TextTransformer(nn.Module):
    """Projection, positions, a learnt background token and transformer blocks, as in SnAG.

    The background token is always valid, so that a video step that no word describes has something
    to attend to.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        heads: int = 4,
        layers: int = 5,
        max_length: int = 48,
        positions: bool = True,
        background_token: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        stretch_over_padding: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.input = nn.Linear(in_channels, channels)
        nn.init.zeros_(self.input.bias)
        self.positions = (
            SinusoidalPositions(channels, max_length, stretch_over_padding) if positions else None
        )
        self.background = None
        if background_token:
            self.background = nn.Parameter(torch.empty(channels))
            nn.init.trunc_normal_(self.background, std=0.02)
        self.layers = nn.ModuleList(
            TransformerBlock(
                channels,
                heads,
                convolutional=False,
                attention_dropout=attention_dropout,
                dropout=dropout,
                drop_path=drop_path,
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Args: x (Q, K, C_in), mask (Q, K). Returns (Q, K + 1, C) and its mask."""
        x = self.input(zero_invalid(x, mask))
        if self.positions is not None:
            x = self.positions(x, mask)
        if self.background is not None:
            x = torch.cat([self.background.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
            mask = torch.cat([mask.new_ones(len(x), 1), mask], dim=1)
        for layer in self.layers:
            x, _ = layer(x, mask)
        return x, mask


class TextProjection(nn.Module):
    """A linear projection of ready-made contextual features, with an attention-pooled summary.

    For features that a language model has already contextualised (SnAG's choice for BERT, EgoVLP
    and CLIP text). The summary attends from the mean of the words to the mean and the words, and
    stands in front of them as the background token where `background_token` asks for it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int | None = None,
        heads: int = 4,
        max_length: int = 48,
        positions: bool = False,
        background_token: bool = True,
        stretch_over_padding: bool = False,
    ) -> None:
        super().__init__()
        self.input = nn.Identity() if channels is None else nn.Linear(in_channels, channels)
        if channels is not None:
            nn.init.zeros_(self.input.bias)
        self.channels = channels = channels or in_channels
        self.positions = (
            SinusoidalPositions(channels, max_length, stretch_over_padding) if positions else None
        )
        self.pool = MultiHeadAttention(channels, heads) if background_token else None

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Args: x (Q, K, C_in), mask (Q, K). Returns (Q, K', C) and its mask."""
        x = self.input(zero_invalid(x, mask))
        if self.positions is not None:
            x = self.positions(x, mask)
        if self.pool is not None:
            mean = zero_invalid(x, mask).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            with_mean = torch.cat([mean, x], dim=1)
            mask = torch.cat([mask.new_ones(len(x), 1), mask], dim=1)
            summary = self.pool(mean, with_mean, with_mean, mask)
            x = torch.cat([summary, x], dim=1)
        return x, mask
