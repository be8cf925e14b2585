"""HieraMamba: hierarchical anchor-Mamba pooling (An and Grauman, CVPR 2026, arXiv 2510.23043).

SnAG with another video encoder. Each block of the pyramid puts an anchor in front of every two
tokens, lets a bidirectional state-space layer and local attention work on the mixed sequence, and
parts the two again: moments are predicted on the tokens, the anchors are the tokens of the next
level.

    level 0   [a t t a t t a t t a t t]  ── tokens ─▶ 8 points
               │     │     │     │
    level 1   [a  t  t     a  t  t ]     ── tokens ─▶ 4 points          ...

    symbol        here                           what it is
    Z^0           AnchorPyramid.base             clips after embedding and stem
    block l       VideoMamba.blocks[l]           `AnchorMambaPooling`: Z^l to T^l and A^l
    T^l           AnchorPyramid.levels[l]        on which moments are predicted
    A^l           AnchorPyramid.anchors[l]       Z^(l+1) = A^l
    L_ACC, L_SPC  tvg_lib.losses.contrastive     summed over levels by `HieraMambaObjective`

The letters are ours: of the paper's text only the abstract is at hand. Details come from the
released code (jbistanbul/hieramamba @ 03a8a95), which settles what a paper leaves open. Different
here, and by default: masks are right for every row of a batch (the released code sums them over the
batch), and padding is never heard (there it enters the backward scan and the last anchor);
`leak_padding` reproduces the latter.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tvg_lib.models.anchor_mamba import AnchorMambaPooling, Merge
from tvg_lib.models.point_grounder import EncodedText
from tvg_lib.models.snag import ClipEmbedding, SnAG, SnagConfig
from tvg_lib.nn.anchor_pooling import Pooling
from tvg_lib.nn.attention import TransformerBlock
from tvg_lib.nn.pyramid import PointPredictions, Pyramid
from tvg_lib.nn.sequence import pad_time, zero_invalid


@dataclass(frozen=True)
class AnchorPyramid(Pyramid):
    """A pyramid with the anchors of every level.

    Attributes:
        anchors: (B, N_l, D) each, N_l = ceil(T_l / 2): anchor n of level l summarises its tokens
            2n and 2n + 1. Those of the last level feed no other.
        anchor_masks: (B, N_l) each.
    """

    anchors: tuple[Tensor, ...] = ()
    anchor_masks: tuple[Tensor, ...] = ()

    def select(self, rows: Tensor) -> "AnchorPyramid":
        """The pyramids of some videos; `rows` as in tensor indexing."""
        return replace(
            super().select(rows),
            anchors=tuple(x[rows] for x in self.anchors),
            anchor_masks=tuple(m[rows] for m in self.anchor_masks),
        )


class VideoMamba(nn.Module):
    """Clip embedding and a stack of `AnchorMambaPooling` blocks, each at half the length.

    Args:
        config: of the whole model; only what concerns the video is read.
        in_channels: C_in of the clips; with early fusion they come projected.
    """

    def __init__(self, config: "HieraMambaConfig", in_channels: int) -> None:
        super().__init__()
        self.embedding = ClipEmbedding(
            in_channels,
            config.channels,
            config.max_clips,
            config.embedding_convolutions,
            config.input_stride,
            config.positions,
            config.stretch_over_padding,
        )
        self.stem = nn.ModuleList(
            TransformerBlock(
                config.channels,
                config.heads,
                window=config.stem_window,
                attention_dropout=config.attention_dropout,
                dropout=config.dropout,
                drop_path=config.drop_path,
            )
            for _ in range(config.stem)
        )
        self.blocks = nn.ModuleList(
            AnchorMambaPooling(
                config.channels,
                pooling=config.pooling,
                anchored=config.anchored,
                bidirectional=config.bidirectional,
                state=config.state,
                expand=config.expand,
                head_channels=config.head_channels,
                taps=config.taps,
                window=config.window_of(level),
                local_heads=config.local_heads,
                merge=config.merge,
                feed_forward=config.feed_forward,
                dropout=config.block_dropout,
                leak_padding=config.leak_padding,
            )
            for level in range(config.levels)
        )
        for layer in self.modules():  # as released; gates start half open
            if isinstance(layer, (nn.Linear, nn.Conv1d)) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor) -> AnchorPyramid:
        """Args: x (B, T, C_in), mask (B, T); any T."""
        x, mask = self.embedding(*pad_time(x, mask, self.embedding.stride))
        for block in self.stem:
            x, mask = block(x, mask)
        x = base = zero_invalid(x, mask)
        levels, masks, anchors, anchor_masks = [], [], [], []
        for block in self.blocks:
            tokens, x, anchor_mask = block(x, mask)
            levels.append(tokens)
            masks.append(mask)
            anchors.append(x)
            anchor_masks.append(anchor_mask)
            mask = anchor_mask
        return AnchorPyramid(
            levels=tuple(levels),
            masks=tuple(masks),
            clips_per_step=self.embedding.stride,
            base=base,
            anchors=tuple(anchors),
            anchor_masks=tuple(anchor_masks),
        )


@dataclass(frozen=True)
class HieraMambaConfig(SnagConfig):
    """Architecture of a HieraMamba: a SnAG with another video encoder.

    The defaults are the released TACoS configuration. Of the inherited fields `heads` is of the
    stem, `window` of the local attention inside the blocks (None leaves the local encoder out).

    Attributes:
        pooling, anchored, bidirectional, state, expand, head_channels, taps, local_heads, merge,
            feed_forward: of the blocks, see `AnchorMambaPooling`.
        windowed_levels: local attention has its window in so many levels and is full above.
        local_levels: the local encoder is left out from this level on; None keeps it everywhere.
        stem_window: of attention in the stem; 0 is full attention.
        block_dropout: dropout and rate of stochastic depth of the blocks' own branches (their local
            attention has none). The released code has no setting for it.
        early_fusion: fuse clips and words in front of the video encoder, too, by the same layers.
            The video is then encoded once per query.
        leak_padding: see `AnchorMambaPooling`.
    """

    window: int | None = 5
    pooling: Pooling = "mean"
    anchored: bool = True
    bidirectional: bool = True
    state: int = 64
    expand: float = 2
    head_channels: int = 64
    taps: int | None = None
    windowed_levels: int = 5
    local_levels: int | None = None
    local_heads: int = 2
    merge: Merge = "gate"
    feed_forward: Literal["linear", "swiglu"] | None = None
    stem_window: int = 0
    block_dropout: float = 0.1
    early_fusion: bool = False
    leak_padding: bool = False

    def window_of(self, level: int) -> int | None:
        """Window of the local attention of a level: 0 is full attention, None no local encoder."""
        if self.window is None or (self.local_levels is not None and level >= self.local_levels):
            return None
        return self.window if level < self.windowed_levels else 0


@dataclass(frozen=True)
class ProjectedClips:
    """What early fusion can know of a video without a query.

    Attributes:
        features: (B, T, D).
        mask: (B, T).
    """

    features: Tensor
    mask: Tensor

    def select(self, rows: Tensor) -> "ProjectedClips":
        """Those of some videos; `rows` as in tensor indexing."""
        return ProjectedClips(self.features[rows], self.mask[rows])


class HieraMamba(SnAG):
    """The whole model of a `HieraMambaConfig`: SnAG with another video encoder.

    With late fusion alone a video is encoded once for all its queries. With early fusion
    `encode_video` only projects the clips and `predict` encodes the video anew for every query:
    time and memory grow with queries times clips.
    """

    def __init__(self, config: HieraMambaConfig) -> None:
        super().__init__(config)
        self.video_projection = None
        if config.early_fusion:
            self.video_projection = nn.Linear(config.video_dim, config.channels)
            nn.init.zeros_(self.video_projection.bias)

    @staticmethod
    def _make_video_encoder(config: "HieraMambaConfig") -> nn.Module:
        return VideoMamba(config, config.channels if config.early_fusion else config.video_dim)

    def encode_video(self, video: Tensor, mask: Tensor) -> AnchorPyramid | ProjectedClips:
        """All that needs no query. Args: video (B, T, C), mask (B, T)."""
        if self.video_projection is None:
            return super().encode_video(video, mask)
        return ProjectedClips(self.video_projection(zero_invalid(video, mask)), mask)

    def predict(
        self, encoded: AnchorPyramid | ProjectedClips, text: EncodedText, query_video: Tensor
    ) -> PointPredictions:
        """Ask encoded queries of encoded videos; `query_video` (Q,) is the video of each query."""
        if self.video_projection is None:
            return super().predict(encoded, text, query_video)
        fused, mask = self.fusion(
            encoded.features, encoded.mask, text.features, text.mask, query_video
        )
        pyramid = self.video_encoder(fused, mask)
        return super().predict(pyramid, text, torch.arange(len(fused), device=fused.device))


# The released configurations, by their data set and features.
TACOS = HieraMambaConfig(video_dim=4096, text_dim=300)
EGO4D = HieraMambaConfig(
    video_dim=256,
    text_dim=768,
    channels=384,
    text_encoder="projection",
    text_channels=768,
    max_words=24,
    text_positions=False,
    modulation="adaln",
    early_fusion=True,
)
MAD = HieraMambaConfig(
    video_dim=512,
    text_dim=512,
    channels=512,
    levels=9,
    max_clips=4096,
    input_stride=2,
    text_encoder="projection",
    text_channels=512,
    max_words=75,
    text_positions=False,
    modulation="adaln",
    early_fusion=True,
)
MAD_V2 = replace(MAD, video_dim=768, text_dim=768, channels=768, text_channels=768, positions=False)
