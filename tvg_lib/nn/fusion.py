"""Late fusion: video features are modulated by what each step finds in the words of the query."""

from typing import Literal

import torch
from torch import Tensor, nn

from tvg_lib.nn.attention import ConvolutionalProjection, MultiHeadAttention
from tvg_lib.nn.feed_forward import FeedForward
from tvg_lib.nn.sequence import LayerScale, repeat_rows


class CrossAttentionBlock(nn.Module):
    """Cross-attention whose output scales and shifts the video features, then a feed-forward.

    Args:
        channels: width of the video features.
        text_channels: width of the words.
        modulation: "affine" scales and shifts the features as they are, "adaln" after a layer norm
            without parameters (SnAG's two released variants).
    """

    def __init__(
        self,
        channels: int,
        text_channels: int,
        heads: int = 4,
        modulation: Literal["affine", "adaln"] = "affine",
        expansion: int = 4,
        attention_dropout: float = 0.0,
        dropout: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.video_norm = nn.LayerNorm(channels)
        self.text_norm = nn.LayerNorm(text_channels)
        self.query = ConvolutionalProjection(channels)
        self.attention = MultiHeadAttention(
            channels,
            heads,
            key_channels=text_channels,
            out_channels=2 * channels,
            attention_dropout=attention_dropout,
            dropout=dropout,
        )
        self.modulation_norm = (
            nn.LayerNorm(channels, elementwise_affine=False)
            if modulation == "adaln"
            else nn.Identity()
        )
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, expansion, dropout)
        self.feed_forward_scale = LayerScale(channels, drop_path)

    def forward(
        self, x: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor, row: Tensor | None = None
    ) -> Tensor:
        """Fuse.

        Args:
            x: (B, P, D) video features; mask (B, P).
            text: (Q, K, C) words; text_mask (Q, K).
            row: (Q,) video of each query; None where B = Q and rows already correspond. What does
                not depend on the query is computed once per video.

        Returns:
            (Q, P, D); of no meaning at invalid steps. Only the convolution reads other steps than
            its own, and it reads zeros there.
        """
        words = self.text_norm(text)
        found = self.attention(self.query(self.video_norm(x), mask), words, words, text_mask, row)
        scale, shift = found.chunk(2, dim=-1)
        x = self.modulation_norm(x)
        if row is not None:
            x = repeat_rows(x, row)
        x = torch.addcmul(shift, x, scale)
        return x + self.feed_forward_scale(self.feed_forward(self.feed_forward_norm(x)))


class LateFusion(nn.Module):
    """A stack of cross-attention blocks and a closing layer norm (SnAG)."""

    def __init__(
        self,
        channels: int,
        text_channels: int,
        layers: int = 2,
        heads: int = 4,
        modulation: Literal["affine", "adaln"] = "affine",
        attention_dropout: float = 0.0,
        dropout: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CrossAttentionBlock(
                channels,
                text_channels,
                heads,
                modulation,
                attention_dropout=attention_dropout,
                dropout=dropout,
                drop_path=drop_path,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, x: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Args as in `CrossAttentionBlock`. Returns (Q, P, D) and the mask (Q, P)."""
        for number, layer in enumerate(self.layers):
            x = layer(x, mask, text, text_mask, row if number == 0 else None)
            mask = repeat_rows(mask, row) if number == 0 else mask
        return self.norm(x), mask
