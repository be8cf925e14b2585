"""MamFusion: partially relevant video retrieval with Mamba and fusion over time (ICME 2025).

    words ────query encoder──▶ words' ──attention pooling──▶ query vector q
    segments ──clip branch───▶ c_1 .. c_L                    clip score   max_l cos(c_l, q)
    frames ───frame branch───▶ frames' ─attention pooling──▶ v    frame score  cos(v, q)

    score = 0.7 clip score + 0.3 frame score       a matrix product over a prebuilt index
    re-ranking of the best candidates: fusion over time of words' and c_1 .. c_L, scored alike

Sources: abstract of arXiv 2506.03473 and its released code @ efa33f9; the paper's own equations are
not public. A branch is, twice: a Gaussian-mixture block (mean of four post-norm attentions, three
of them with scores damped by a Gaussian of the distance; GMMFormer, Wang et al. 2024) and a
residual Mamba, x + LayerNorm(Mamba(x)).

**Fusion.** The abstract promises "Temporal T-to-V Fusion and Temporal V-to-T Fusion to explicitly
model temporal relationships between text queries and video moments". The released code attends over
the *batch*: pooled video vectors to pooled query vectors and back; the result reaches one small
loss term and never inference. Here fusion runs over *time*, within a pair of query and video, in
training and at inference: in T-to-V the query's words attend to the video's segments, in V-to-T the
segments attend to the words. As in the released code, what is attended to multiplies its target;
here on a residual branch, so that nothing is lost where attention finds nothing.
`fusion_over="batch"` is the released variant.

**Given space.** The papers' text and video features do not share a space. Where sentence and clips
do (QVH-captions, CLIP), `given_space` keeps the given similarity and learns a correction of it:
every output is the given vector plus a linear map, zero at first, of what the branch computed and
of the given vector; a fused output is the first one plus such a map of what fusion computed. An
untrained model is then the rule without training: the maximum over (averaged) segments, mixed with
the mean of the frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.nn.attention import MultiHeadAttention
from tvg_lib.nn.sequence import LayerScale, zero_invalid
from tvg_lib.ssm import Mamba

Branches = Literal["none", "clip", "frame", "both"]
Fusion = Literal["none", "text-to-video", "video-to-text", "both"]


class RetrievalInputs(Protocol):
    """What a model reads of a batch (`tvg_lib.retrieval.data.RetrievalBatch`)."""

    segments: Tensor
    frames: Tensor
    frame_mask: Tensor
    text: Tensor
    text_mask: Tensor
    sentence: Tensor
    query_video: Tensor


@dataclass(frozen=True)
class MamFusionConfig:
    """Architecture of a MamFusion and of its ablations.

    Attributes:
        video_dim, text_dim: width of clip and word features.
        channels, heads: of every encoder.
        max_words, max_frames: positions that are learnt; longer inputs are refused.
        widths: of the Gaussians of a block, beside one attention without; empty for plain attention
            only.
        blocks: Gaussian-mixture blocks (each with its residual Mamba) of a branch.
        windows: lengths of the stretches of neighbouring segments that a query is compared with, as
            MS-SL does with every length; (1,) compares single segments. Those that are longer than
            the video are passed over.
        mamba: branches that have residual Mamba modules ("multi-Mamba").
        bidirectional: a second Mamba reads each sequence backwards; the two are added.
        d_state, d_conv, expand: of Mamba.
        fusion: directions of fusion; the first of "A-to-B" attends to the second.
        fusion_over: "time" re-ranks, "batch" is the released variant (training only).
        clip_weight, frame_weight: of the two scores.
        fused_weight: share of the fused score in that of a re-ranked candidate.
        candidates: negatives per query that the fused score is trained on: the best by the first
            score, as in re-ranking.
        dropout, input_dropout: of the encoders, and of their inputs and positions.
        given_space: see the module.
        smoothing: with `given_space`, neighbouring segments averaged in the given clip vectors (an
            odd number).
        correction: scale of all corrections. A step of Adam moves every weight alike, so this, not
            the learning rate, says how far a step may leave the given space.
        initial_std: of all linear maps at first.
        masks_as_published: give Mamba no mask, and take the length of the Gaussians' axis over the
            padding. Results then depend on padding; only of use for matching released results.
    """

    video_dim: int
    text_dim: int
    channels: int = 384
    heads: int = 8
    max_words: int = 30
    max_frames: int = 512
    widths: tuple[float, ...] = (0.5, 1.0, 5.0)
    blocks: int = 2
    windows: tuple[int, ...] = (1,)
    mamba: Branches = "both"
    bidirectional: bool = False
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    fusion: Fusion = "both"
    fusion_over: Literal["time", "batch"] = "time"
    clip_weight: float = 0.7
    frame_weight: float = 0.3
    fused_weight: float = 0.5
    candidates: int = 8
    dropout: float = 0.2
    input_dropout: float = 0.2
    given_space: bool = False
    smoothing: int = 1
    correction: float = 0.05
    initial_std: float = 0.02
    masks_as_published: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("mamba", ("none", "clip", "frame", "both")),
            ("fusion", ("none", "text-to-video", "video-to-text", "both")),
            ("fusion_over", ("time", "batch")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"MamFusionConfig.{name}: expected one of {choices}, "
                    f"found {getattr(self, name)!r}"
                )
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "windows", tuple(self.windows))
        if not self.windows or min(self.windows) < 1:
            raise ConfigurationError(
                f"MamFusionConfig.windows: expected positive lengths, found {self.windows}"
            )
        if self.reranks and self.windows != (1,):
            raise ConfigurationError(
                f"MamFusionConfig.windows: fusion over time reads single segments, found "
                f"{self.windows}"
            )
        if self.smoothing < 1 or self.smoothing % 2 == 0:
            raise ConfigurationError(
                f"MamFusionConfig.smoothing: expected an odd number, found {self.smoothing}"
            )
        if not 0 <= self.fused_weight <= 1:
            raise ConfigurationError(
                f"MamFusionConfig.fused_weight: expected 0 to 1, found {self.fused_weight}"
            )

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions of fusion that exist."""
        every = ("text-to-video", "video-to-text")
        return every if self.fusion == "both" else tuple(d for d in every if d == self.fusion)

    @property
    def reranks(self) -> bool:
        """Whether the model has a second score for candidates."""
        return self.fusion != "none" and self.fusion_over == "time"


def gaussian_damping(lengths: Tensor, steps: int, width: float) -> Tensor:
    """Factors on attention scores that fall with distance, GMMFormer's Gaussian window.

    With T the length of a sequence, step i looks from i / T at steps j, which stand at j / (T - 1):
    exp(-(j / (T - 1) - i / T)^2 / (2 (width / 9)^2)), scaled so that each row's largest is 1.

    Args:
        lengths: (B,) valid steps of each sequence.
        steps: T of the padded batch.
        width: of the Gaussian; 0.5, 1 and 5 in the released code.

    Returns:
        (B, steps, steps), 0 for steps beyond the length.
    """
    place = torch.arange(steps, device=lengths.device, dtype=torch.float32)
    length = lengths[:, None, None].float()
    distance = place / (length - 1).clamp(min=1) - place[:, None] / length
    exponent = -(distance**2) / (2 * (max(width, 0.01) / 9) ** 2)
    exponent = exponent.masked_fill(place >= length, -torch.inf)
    return (exponent - exponent.amax(-1, keepdim=True)).exp()


class PostNormAttention(nn.Module):
    """BERT's attention layer: self-attention, projection, residual, layer norm.

    Args:
        width: of the Gaussian that damps the scores; None for none.
    """

    def __init__(
        self, channels: int, heads: int, width: float | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ConfigurationError(f"{channels} channels cannot be shared by {heads} heads")
        self.heads, self.width, self.dropout = heads, width, dropout
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """Args: x (B, T, C); mask (B, T); lengths (B,) for the Gaussian. Returns (B, T, C)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.width is not None:
            scores = scores * gaussian_damping(lengths, x.shape[1], self.width)[:, None]
        # A finite fill: a row without any valid step gets uniform weights, not NaN.
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        attended = self.output((weights @ v).transpose(1, 2).flatten(2))
        return self.norm(x + F.dropout(attended, self.dropout, self.training))


class GaussianMixture(nn.Module):
    """The mean of several attentions of one input: one plain, one for each Gaussian width."""

    def __init__(
        self, channels: int, heads: int, widths: tuple[float, ...], dropout: float
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            PostNormAttention(channels, heads, width, dropout) for width in (None, *widths)
        )

    def forward(self, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """Args: x (B, T, C), mask (B, T), lengths (B,). Returns (B, T, C)."""
        total = sum(attention(x, mask, lengths) for attention in self.attentions)
        return total / len(self.attentions)


class ResidualMamba(nn.Module):
    """x + LayerNorm(Mamba(x)); with a second Mamba, the sum of both directions is normed."""

    def __init__(
        self,
        channels: int,
        d_state: int,
        d_conv: int,
        expand: float,
        bidirectional: bool,
        masked: bool,
    ) -> None:
        super().__init__()
        self.forwards = Mamba(channels, d_state, d_conv, expand)
        self.backwards = Mamba(channels, d_state, d_conv, expand) if bidirectional else None
        self.norm = nn.LayerNorm(channels)
        self.masked = masked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x (B, T, C), mask (B, T). Returns (B, T, C)."""
        seen = mask if self.masked else None
        mixed = self.forwards(x, seen)
        if self.backwards is not None:
            reverse = None if seen is None else seen.flip(1)
            mixed = mixed + self.backwards(x.flip(1), reverse).flip(1)
        return x + self.norm(mixed)


class InputProjection(nn.Module):
    """Layer norm, dropout, linear, ReLU, then learnt positions with a norm and dropout."""

    def __init__(
        self, in_channels: int, channels: int, max_length: int, dropout: float, what: str
    ) -> None:
        super().__init__()
        self.what = what
        self.input_norm = nn.LayerNorm(in_channels)
        self.projection = nn.Linear(in_channels, channels)
        self.positions = nn.Embedding(max_length, channels)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C_in) to (B, T, C).

        Raises:
            DataError: the input is longer than the positions that are learnt.
        """
        steps, longest = x.shape[1], self.positions.num_embeddings
        if steps > longest:
            raise DataError(f"at most {longest} {self.what} expected, found {steps}")
        x = F.relu(self.projection(self.dropout(self.input_norm(x))))
        return self.dropout(self.norm(x + self.positions.weight[:steps]))


class Branch(nn.Module):
    """Clip or frame branch: input projection, then blocks of Gaussian mixture and Mamba."""

    def __init__(
        self, config: MamFusionConfig, max_length: int, with_mamba: bool, what: str
    ) -> None:
        super().__init__()
        self.input = InputProjection(
            config.video_dim, config.channels, max_length, config.input_dropout, what
        )
        self.blocks = nn.ModuleList(
            GaussianMixture(config.channels, config.heads, config.widths, config.dropout)
            for _ in range(config.blocks)
        )
        self.mambas = nn.ModuleList(
            ResidualMamba(
                config.channels,
                config.d_state,
                config.d_conv,
                config.expand,
                config.bidirectional,
                masked=not config.masks_as_published,
            )
            for _ in range(config.blocks if with_mamba else 0)
        )
        self.masks_as_published = config.masks_as_published

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x (B, T, C_in), mask (B, T). Returns (B, T, C)."""
        lengths = mask.sum(1).clamp(min=1)
        if self.masks_as_published:
            lengths = torch.full_like(lengths, mask.shape[1])
        x = self.input(x)
        for number, block in enumerate(self.blocks):
            x = block(x, mask, lengths)
            if self.mambas:
                x = self.mambas[number](x, mask)
        return x


class AttentionPooling(nn.Linear):
    """Weighted mean over the valid steps; the weights are a softmax of a learnt projection."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x (B, T, C), mask (B, T). Returns (B, C)."""
        scores = super().forward(x).squeeze(-1)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(1)
        return (weights[..., None] * x).sum(1)


class Interaction(nn.Module):
    """x + scale * (x ⊙ Attention(x to y)): one direction of fusion.

    Args:
        residual: False multiplies without the residual branch, as the released code does.
    """

    def __init__(self, channels: int, heads: int, dropout: float, residual: bool) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(channels, heads, attention_dropout=dropout)
        self.scale = LayerScale(channels, init=0.5) if residual else None

    def forward(self, x: Tensor, y: Tensor, y_mask: Tensor) -> Tensor:
        """Args: x (P, T, C), y (P, K, C), y_mask (P, K). Returns (P, T, C)."""
        product = x * self.attention(x, y, y, y_mask)
        return product if self.scale is None else x + self.scale(product)


class FusionOverTime(nn.Module):
    """Words and segments of pairs look at one another: T-to-V and V-to-T.

    Both directions read what the encoders gave, not one another's result, so that either can be
    left out.
    """

    def __init__(self, config: MamFusionConfig) -> None:
        super().__init__()
        self.directions = nn.ModuleDict(
            {
                name: Interaction(config.channels, config.heads, config.dropout, residual=True)
                for name in config.directions
            }
        )

    def forward(self, words: Tensor, word_mask: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Words (P, K, C) with mask and segments (P, L, C) of P pairs; returns both, fused."""
        every = torch.ones(segments.shape[:2], dtype=torch.bool, device=segments.device)
        fused_words, fused_segments = words, segments
        if "text-to-video" in self.directions:
            fused_words = self.directions["text-to-video"](words, segments, every)
        if "video-to-text" in self.directions:
            fused_segments = self.directions["video-to-text"](segments, words, word_mask)
        return fused_words, fused_segments


class FusionOverBatch(nn.Module):
    """The released variant: pooled vectors attend over the batch, in training only.

    Video vectors attend to all query vectors of the batch and are multiplied by the result, then
    query vectors attend to these. The released code repeats the video vectors four times first,
    which changes nothing: a softmax over equal copies gives the same mean.
    """

    def __init__(self, config: MamFusionConfig) -> None:
        super().__init__()
        width = config.video_dim if config.given_space else config.channels
        self.directions = nn.ModuleDict(
            {
                name: Interaction(width, config.heads, 0.0, residual=False)
                for name in config.directions
            }
        )

    def forward(self, queries: Tensor, videos: Tensor) -> Tensor:
        """Queries (Q, C) and videos (B, C); returns the queries, fused (Q, C)."""
        queries, videos = queries[None], videos[None]
        if "video-to-text" in self.directions:
            mask = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
            videos = self.directions["video-to-text"](videos, queries, mask)
        if "text-to-video" in self.directions:
            mask = torch.ones(videos.shape[:2], dtype=torch.bool, device=queries.device)
            queries = self.directions["text-to-video"](queries, videos, mask)
        return queries[0]


@dataclass(frozen=True)
class EncodedQueries:
    """Encoded queries.

    Attributes:
        words: (Q, K, C) after the query encoder, and mask (Q, K).
        vector: (Q, D) what videos are compared with; not of length 1.
    """

    words: Tensor
    mask: Tensor
    vector: Tensor


@dataclass(frozen=True)
class EncodedVideos:
    """Encoded videos: what an index holds.

    Attributes:
        hidden: (B, L, C) segments after the clip branch, for fusion.
        segments: (B, L, D) what queries are compared with; not of length 1. With several `windows`
            there are more than L of them.
        vector: (B, D) the frame branch's one vector of each video.
    """

    hidden: Tensor
    segments: Tensor
    vector: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The videos of several parts, one part after the other."""
        return cls(
            hidden=torch.cat([part.hidden for part in parts]),
            segments=torch.cat([part.segments for part in parts]),
            vector=torch.cat([part.vector for part in parts]),
        )


@dataclass(frozen=True)
class RetrievalOutput:
    """Scores of every query of a batch for every video of it.

    Attributes:
        clip_scores, frame_scores: (Q, B) cosines, the first the maximum over segments.
        clip_products, frame_products: the same of vectors that are not scaled to length 1.
        queries: (Q, D) query vectors for the query-diverse loss; fused over the batch in the
            released variant.
        query_video: (Q,) the right video of each query.
        candidates: (Q, N) videos that the second score was computed for, the right one first; None
            in models without fusion over time.
        candidate_mask: (Q, N) False where a batch has too few videos.
        fused_scores: (Q, N) the second score.
    """

    clip_scores: Tensor
    frame_scores: Tensor
    clip_products: Tensor
    frame_products: Tensor
    queries: Tensor
    query_video: Tensor
    candidates: Tensor | None = None
    candidate_mask: Tensor | None = None
    fused_scores: Tensor | None = None


class MamFusion(nn.Module):
    """The whole model of a `MamFusionConfig`.

    Its parts and what it computes are those of the module's drawing. `forward` is for training; an
    index is built with `encode_video` and asked with `encode_text`, `scores` and `fused_scores`.
    """

    def __init__(self, config: MamFusionConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.query_input = InputProjection(
            config.text_dim, channels, config.max_words, config.input_dropout, "words"
        )
        self.query_encoder = PostNormAttention(channels, config.heads, None, config.dropout)
        self.query_pooling = AttentionPooling(channels)
        self.clip_branch = Branch(
            config, config.max_frames, config.mamba in ("clip", "both"), "segments"
        )
        self.frame_branch = Branch(
            config, config.max_frames, config.mamba in ("frame", "both"), "frames"
        )
        self.frame_pooling = AttentionPooling(channels)
        self.fusion = None
        if config.fusion != "none":
            kind = FusionOverTime if config.fusion_over == "time" else FusionOverBatch
            self.fusion = kind(config)
        self._initialise()
        self.corrections = nn.ModuleDict()
        if config.given_space:
            parts = ["query", "clip", "frame"]
            if config.reranks:
                parts += ["fused_query", "fused_clip"]
            for part in parts:
                self.corrections[part] = nn.Linear(channels + config.video_dim, config.video_dim)
                nn.init.zeros_(self.corrections[part].weight)
                nn.init.zeros_(self.corrections[part].bias)

    def _initialise(self) -> None:
        # The released code draws Mamba's linear maps anew, too, and sets the biases of its step
        # sizes to 0, so that it forgets within a step or two. Here Mamba keeps its own start, and
        # so does fusion.
        owners = (m for m in self.modules() if isinstance(m, Mamba | Interaction))
        spared = {id(part) for owner in owners for part in owner.modules()}
        for module in self.modules():
            if id(module) in spared or not isinstance(module, nn.Linear | nn.Embedding):
                continue
            nn.init.normal_(module.weight, std=self.config.initial_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _placed(self, part: str, base: Tensor | None, hidden: Tensor) -> Tensor:
        """What a branch computed, or its base with a correction by both in a given space."""
        if base is None:
            return hidden
        # The base has length 1 or so, what comes out of a layer norm sqrt(C).
        both = torch.cat([hidden, base * base.shape[-1] ** 0.5], dim=-1)
        return base + self.config.correction * self.corrections[part](both)

    def encode_text(self, text: Tensor, mask: Tensor, sentence: Tensor | None) -> EncodedQueries:
        """Args: text (Q, K, C), mask (Q, K), sentence (Q, D), read with `given_space` only.

        Raises:
            DataError: the model works in a given space and there are no sentence vectors.
        """
        if self.config.given_space and sentence is None:
            raise DataError("a model of a given space needs the sentence vectors of its queries")
        every = mask.sum(1)
        words = self.query_encoder(self.query_input(zero_invalid(text, mask)), mask, every)
        given = F.normalize(sentence, dim=-1) if self.config.given_space else None
        pooled = self.query_pooling(words, mask)
        return EncodedQueries(words, mask, self._placed("query", given, pooled))

    def encode_video(self, segments: Tensor, frames: Tensor, frame_mask: Tensor) -> EncodedVideos:
        """Args: segments (B, L, C), all valid; frames (B, T, C), frame_mask (B, T)."""
        every = torch.ones(segments.shape[:2], dtype=torch.bool, device=segments.device)
        frames = zero_invalid(frames, frame_mask)
        hidden = self.clip_branch(segments, every)
        pooled = self.frame_pooling(self.frame_branch(frames, frame_mask), frame_mask)
        given = mean = None
        if self.config.given_space:
            given = F.normalize(neighbour_mean(segments, self.config.smoothing), dim=-1)
            units = F.normalize(frames, dim=-1).sum(1) / frame_mask.sum(1, keepdim=True)
            mean = F.normalize(units, dim=-1)
        segments = self._placed("clip", given, hidden)
        lengths = [width for width in self.config.windows if width <= segments.shape[1]]
        stretches = [windowed_mean(segments, width) for width in lengths]
        vector = self._placed("frame", mean, pooled)
        return EncodedVideos(hidden, torch.cat(stretches, dim=1), vector)

    def combined(self, clip_scores: Tensor, frame_scores: Tensor) -> Tensor:
        """The first score, from its two parts."""
        return self.config.clip_weight * clip_scores + self.config.frame_weight * frame_scores

    def score_parts(self, queries: EncodedQueries, videos: EncodedVideos) -> tuple[Tensor, Tensor]:
        """(Q, B) clip scores and (Q, B) frame scores."""
        q = F.normalize(queries.vector, dim=-1)
        frame = q @ F.normalize(videos.vector, dim=-1).T
        return best_segment(q, F.normalize(videos.segments, dim=-1)), frame

    def scores(self, queries: EncodedQueries, videos: EncodedVideos) -> Tensor:
        """(Q, B) first score of every query for every video: matrix products only."""
        return self.combined(*self.score_parts(queries, videos))

    def fused_curves(self, queries: EncodedQueries, videos: EncodedVideos) -> Tensor:
        """(P, L) cosine of each fused segment with the fused query, pair by pair.

        Args:
            queries, videos: P of each.

        Raises:
            ConfigurationError: the model has no fusion over time.
        """
        if not self.config.reranks:
            raise ConfigurationError("this MamFusion has no fusion over time: nothing re-ranks")
        words, segments = self.fusion(queries.words, queries.mask, videos.hidden)
        pooled = self.query_pooling(words, queries.mask)
        given = self.config.given_space
        q = self._placed("fused_query", queries.vector if given else None, pooled)
        clips = self._placed("fused_clip", videos.segments if given else None, segments)
        return (F.normalize(clips, dim=-1) @ F.normalize(q, dim=-1)[..., None]).squeeze(-1)

    def fused_scores(
        self, queries: EncodedQueries, videos: EncodedVideos, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """(P,) second score of pairs of a query and a video.

        Args:
            rows, columns: (P,) query and video of each pair.
        """
        asked = EncodedQueries(queries.words[rows], queries.mask[rows], queries.vector[rows])
        chosen = EncodedVideos(
            videos.hidden[columns], videos.segments[columns], videos.vector[columns]
        )
        frame = F.cosine_similarity(asked.vector, chosen.vector, dim=-1)
        return self.combined(self.fused_curves(asked, chosen).amax(-1), frame)

    def reranked(self, first: Tensor, fused: Tensor) -> Tensor:
        """Scores of candidates from both their scores, shifted to stay ahead of all other videos.

        Args:
            first: (..., N) the best first scores of a library.
            fused: (..., N) second scores of the same videos.
        """
        both = (1 - self.config.fused_weight) * first + self.config.fused_weight * fused
        lift = first.amin(-1, keepdim=True) - both.amin(-1, keepdim=True)
        return both + lift.clamp(min=0)

    def forward(self, batch: RetrievalInputs) -> RetrievalOutput:
        """All scores of a batch; the second score for the right video and the hardest others."""
        queries = self.encode_text(batch.text, batch.text_mask, batch.sentence)
        videos = self.encode_video(batch.segments, batch.frames, batch.frame_mask)
        clip_scores, frame_scores = self.score_parts(queries, videos)
        output = RetrievalOutput(
            clip_scores=clip_scores,
            frame_scores=frame_scores,
            clip_products=best_segment(queries.vector, videos.segments),
            frame_products=queries.vector @ videos.vector.T,
            queries=queries.vector,
            query_video=batch.query_video,
        )
        if isinstance(self.fusion, FusionOverBatch):
            return replace(output, queries=self.fusion(queries.vector, videos.vector))
        if not self.config.reranks:
            return output
        first = self.combined(output.clip_scores, output.frame_scores).detach()
        others = first.scatter(1, batch.query_video[:, None], -torch.inf)
        hardest = others.topk(min(self.config.candidates, first.shape[1]), dim=1)
        candidates = torch.cat([batch.query_video[:, None], hardest.indices], dim=1)
        rows = torch.arange(len(first), device=first.device)
        rows = rows.repeat_interleave(candidates.shape[1])
        fused = self.fused_scores(queries, videos, rows, candidates.flatten())
        right = torch.ones_like(batch.query_video, dtype=torch.bool)[:, None]
        return replace(
            output,
            candidates=candidates,
            candidate_mask=torch.cat([right, hardest.values.isfinite()], dim=1),
            fused_scores=fused.view(candidates.shape),
        )


def best_segment(queries: Tensor, segments: Tensor) -> Tensor:
    """(Q, B) largest product of each query (Q, D) with a segment of each video (B, L, D)."""
    return (queries @ segments.flatten(0, 1).T).unflatten(1, segments.shape[:2]).amax(-1)


def windowed_mean(x: Tensor, width: int) -> Tensor:
    """(B, L - width + 1, C) means over every stretch of `width` steps of (B, L, C)."""
    return x if width == 1 else F.avg_pool1d(x.transpose(1, 2), width, stride=1).transpose(1, 2)


def neighbour_mean(x: Tensor, width: int) -> Tensor:
    """(B, L, C) mean over `width` neighbours (an odd number); fewer at the two ends."""
    return F.avg_pool1d(
        x.transpose(1, 2), width, stride=1, padding=width // 2, count_include_pad=False
    ).transpose(1, 2)


def gmmformer_like(config: MamFusionConfig) -> MamFusionConfig:
    """GMMFormer in the same frame: neither Mamba nor fusion."""
    return replace(config, mamba="none", fusion="none")


def ms_sl_like(config: MamFusionConfig) -> MamFusionConfig:
    """MS-SL in the same frame: one plain attention layer a branch, stretches of many lengths.

    Unlike MS-SL, lengths are powers of two instead of all, and the frame branch is pooled alike for
    every query instead of by the best stretch.
    """
    return replace(
        gmmformer_like(config), widths=(), blocks=1, windows=(1, 2, 4, 8, 16, 32), smoothing=1
    )


# The released architectures, with fusion as the paper describes it. The released model itself is
# `replace(TVR, fusion_over="batch", masks_as_published=True)`. Widths of the inputs are those of
# MS-SL's features. How each is trained: `tvg_lib.retrieval.recipes`.
TVR = MamFusionConfig(video_dim=3072, text_dim=768, max_frames=512, dropout=0.45)
ACTIVITYNET = MamFusionConfig(video_dim=1024, text_dim=1024, max_frames=256, dropout=0.18)
CHARADES = MamFusionConfig(
    video_dim=1024, text_dim=1024, max_frames=1024, heads=4, dropout=0.3, input_dropout=0.15
)
