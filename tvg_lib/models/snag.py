"""SnAG: scalable and accurate video grounding (Mu, Mo and Li, CVPR 2024).

The base of MSCL and the yardstick of HieraMamba. Its equations are restated in the MSCL paper
(Nguyen et al., AAAI 2025), whose numbers are used here.

    symbol        here                          equation
    v_t           video (B, T, C)
    Z^0           after `embedding`             1
    Z^l           Pyramid.levels[l - 1]         2-4, `TransformerBlock`
    alpha, beta   LayerScale                    2, 3, 7
    E             EncodedText.features
    X^l           PointPredictions.fused        5-7, `LateFusion`
    p, (d^s,d^e)  logits (sigmoid), offsets     8, 9

The released code differs from the printed equations in two ways, both followed here: the first
block of the pyramid keeps the full length (so level l halves it l times, counting from 0), and the
fusion scales and shifts the video features by what cross-attention finds in the words, where
equation 6 as printed weighs video features (`tvg_lib.nn.printed_fusion` has its readings).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.nn.attention import TransformerBlock
from tvg_lib.nn.fusion import LateFusion
from tvg_lib.nn.pyramid import ClassificationHead, Pyramid, RegressionHead
from tvg_lib.nn.sequence import MaskedConv1d, SinusoidalPositions, pad_time, zero_invalid
from tvg_lib.nn.text import TextProjection, TextTransformer


class ClipEmbedding(nn.Module):
    """Projection, convolutions with norm and ReLU, positions: clip features to Z^0 (equation 1).

    Args:
        stride: how many input clips make one step of level 0 (a power of two). Each of the first
            log2(stride) convolutions halves the length and sees five steps instead of three.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        max_length: int,
        convolutions: int = 2,
        stride: int = 1,
        positions: bool = True,
        stretch_over_padding: bool = False,
    ) -> None:
        super().__init__()
        halvings = max(stride.bit_length() - 1, 0)
        if stride != 1 << halvings or halvings > convolutions:
            raise ValueError(
                f"the input stride is a power of two, at most 2**{convolutions}; found {stride}"
            )
        self.stride = stride
        self.projection = nn.Linear(in_channels, channels)
        nn.init.zeros_(self.projection.bias)
        self.convolutions = nn.ModuleList(
            MaskedConv1d(channels, channels, 5, stride=2)
            if number < halvings
            else MaskedConv1d(channels, channels, 3)
            for number in range(convolutions)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(convolutions))
        self.positions = (
            SinusoidalPositions(channels, max_length, stretch_over_padding) if positions else None
        )

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Args: x (B, T, C_in), mask (B, T). Returns (B, T/stride, C) and its mask."""
        x = self.projection(zero_invalid(x, mask))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x, mask = convolution(x, mask)
            x = F.relu(norm(x))
        if self.positions is not None:
            x = self.positions(x, mask)
        return x, mask


class VideoTransformer(nn.Module):
    """Local-attention transformer that halves the sequence from level to level (equations 1-4)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        heads: int = 4,
        levels: int = 8,
        stem: int = 0,
        window: int = 19,
        max_length: int = 2304,
        convolutions: int = 2,
        stride: int = 1,
        positions: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        stretch_over_padding: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = ClipEmbedding(
            in_channels,
            channels,
            max_length,
            convolutions,
            stride,
            positions,
            stretch_over_padding,
        )
        strides = [1] * stem + [1] + [2] * (levels - 1)
        self.stem_layers = stem
        self.multiple = stride * 2 ** (levels - 1)
        if stretch_over_padding and window:
            # The released code pads until its blocks of attention fit every level.
            self.multiple *= window // 2 * 2
        self.blocks = nn.ModuleList(
            TransformerBlock(
                channels,
                heads,
                stride=block_stride,
                window=window,
                attention_dropout=attention_dropout,
                dropout=dropout,
                drop_path=drop_path,
            )
            for block_stride in strides
        )

    def forward(self, x: Tensor, mask: Tensor) -> Pyramid:
        """Args: x (B, T, C_in), mask (B, T); any T, padded here to a multiple of every stride."""
        x, mask = pad_time(x, mask, self.multiple)
        x, mask = self.embedding(x, mask)
        base = x
        levels, masks = [], []
        for number, block in enumerate(self.blocks):
            x, mask = block(x, mask)
            if number >= self.stem_layers:
                levels.append(x)
                masks.append(mask)
        return Pyramid(tuple(levels), tuple(masks), self.embedding.stride, base=base)


@dataclass(frozen=True)
class SnagConfig:
    """Architecture of a SnAG. The defaults are the released TACoS configuration.

    Attributes:
        video_dim, text_dim: width of clip and word features.
        channels, heads, levels, stem, window: of the video pyramid; `window` 0 is full attention.
        max_clips: longest training video in steps of level 0 (positions stretch beyond it).
        input_stride: clips per step of level 0.
        positions: whether the video gets position codes.
        text_encoder: "transformer" learns context, "projection" trusts the features'.
        text_channels, text_heads, text_layers, max_words, text_positions, background_token: of it.
        text_channels None keeps the width of the features ("projection" only).
        fusion_layers, fusion_heads, modulation: of late fusion.
        head_layers: convolutions before each output.
        prior: start probability of positives, None for even odds.
        attention_dropout, dropout, drop_path: on attention, projections and residual branches of
            the video encoder; the text encoder and the fusion have their own in the released files,
            always equal to these.
        stretch_over_padding: see `SinusoidalPositions`.
    """

    video_dim: int
    text_dim: int
    channels: int = 256
    heads: int = 4
    levels: int = 8
    stem: int = 0
    window: int = 19
    max_clips: int = 2304
    embedding_convolutions: int = 2
    input_stride: int = 1
    positions: bool = True
    text_encoder: Literal["transformer", "projection"] = "transformer"
    text_channels: int | None = 128
    text_heads: int = 4
    text_layers: int = 5
    max_words: int = 48
    text_positions: bool = True
    background_token: bool = True
    fusion_layers: int = 2
    fusion_heads: int = 4
    modulation: Literal["affine", "adaln"] = "affine"
    head_layers: int = 2
    prior: float | None = None
    attention_dropout: float = 0.0
    dropout: float = 0.1
    drop_path: float = 0.1
    stretch_over_padding: bool = False


def text_encoder(config: SnagConfig) -> TextTransformer | TextProjection:
    """The text encoder that a configuration describes."""
    if config.text_encoder == "projection":
        return TextProjection(
            config.text_dim,
            config.text_channels,
            heads=config.text_heads,
            max_length=config.max_words,
            positions=config.text_positions,
            background_token=config.background_token,
            stretch_over_padding=config.stretch_over_padding,
        )
    return TextTransformer(
        config.text_dim,
        config.text_channels or config.text_dim,
        heads=config.text_heads,
        layers=config.text_layers,
        max_length=config.max_words,
        positions=config.text_positions,
        background_token=config.background_token,
        attention_dropout=config.attention_dropout,
        dropout=config.dropout,
        drop_path=config.drop_path,
        stretch_over_padding=config.stretch_over_padding,
    )


class SnAG(PointGrounder):
    """The whole model of a `SnagConfig`."""

    def __init__(self, config: SnagConfig) -> None:
        words = text_encoder(config)
        super().__init__(
            video_encoder=self._make_video_encoder(config),
            text_encoder=words,
            fusion=LateFusion(
                config.channels,
                words.channels,
                layers=config.fusion_layers,
                heads=config.fusion_heads,
                modulation=config.modulation,
                attention_dropout=config.attention_dropout,
                dropout=config.dropout,
                drop_path=config.drop_path,
            ),
            classification=ClassificationHead(config.channels, config.head_layers, config.prior),
            regression=RegressionHead(config.channels, config.levels, config.head_layers),
        )
        self.config = config

    @staticmethod
    def _make_video_encoder(config: SnagConfig) -> nn.Module:
        """From (B, T, C) and mask (B, T) to a `Pyramid`; a subclass may have another."""
        return VideoTransformer(
            config.video_dim,
            config.channels,
            heads=config.heads,
            levels=config.levels,
            stem=config.stem,
            window=config.window,
            max_length=config.max_clips,
            convolutions=config.embedding_convolutions,
            stride=config.input_stride,
            positions=config.positions,
            attention_dropout=config.attention_dropout,
            dropout=config.dropout,
            drop_path=config.drop_path,
            stretch_over_padding=config.stretch_over_padding,
        )


# The released configurations, by their data set and features.
TACOS = SnagConfig(video_dim=4096, text_dim=300)
EGO4D_SLOWFAST = SnagConfig(
    video_dim=2304, text_dim=768, channels=512, text_layers=1, max_words=24, modulation="adaln"
)
EGO4D_EGOVLP = SnagConfig(
    video_dim=256,
    text_dim=768,
    channels=384,
    text_encoder="projection",
    text_channels=768,
    max_words=24,
    text_positions=False,
    modulation="adaln",
)
MAD = SnagConfig(
    video_dim=512,
    text_dim=512,
    channels=512,
    levels=9,
    window=17,
    max_clips=4096,
    input_stride=2,
    positions=False,
    text_encoder="projection",
    text_channels=512,
    max_words=75,
    text_positions=False,
    modulation="adaln",
)
CHARADES_C3D = SnagConfig(
    video_dim=4096, text_dim=300, levels=6, stem=1, window=5, max_clips=256, max_words=16
)
CHARADES_I3D = replace(CHARADES_C3D, video_dim=2048)
ACTIVITYNET = SnagConfig(
    video_dim=500,
    text_dim=300,
    channels=128,
    levels=7,
    window=5,
    max_clips=256,
    modulation="adaln",
)
