"""A2FA: anchor-aware feature alignment (Tan et al., CVPR 2025, section 3.2, equations 1 to 12).

    symbol         here                            equation
    V, q           AlignmentInput.video, sentence
    V^e            query_embedded                  1
    A              anchor_frames                   2
    b^L, b^R       transition_points               3, 4
    [b^L, b^R]     coarse_intervals                5
    m              inside (True where m = 0)       6
    A^g, g         A2FA.aggregate                  7, 8
    r, V^r         A2FA.reweight                   9, 10
    alpha          A2FA.matching                   11
    V^a            A2FA.forward                    12

No code of the authors is public. What the paper leaves open is an argument of `A2FA`, with the
printed form kept beside our default (notebook 42 compares them, as a whole and some by themselves):

- features are scaled to length 1 first (`unit_length`); equation 1 mixes q and v_i, whose lengths
  would count;
- the matrices start at the identity plus a learnt difference, so that matching starts as the
  similarity it is given (`start="similarity"`), or at Xavier's random ones, as printed;
- equation 11 has no bias and no scale, and sigmoid(x) of a cosine is about 1/2 whatever the frame;
  `calibrated` standardises it over the video, with two learnt numbers.

`AnchorInterval` is equation 5 alone: a grounder without training.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.data.batching import evaluation_batches
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.decoding import Prediction, to_predictions
from tvg_lib.errors import ConfigurationError
from tvg_lib.models.alignment import (
    Alignment,
    AlignmentInput,
    Calibration,
    cosine,
    smoothed,
)
from tvg_lib.nn.sequence import zero_invalid


def query_embedded(video: Tensor, sentence: Tensor) -> Tensor:
    """V^e (Q, T, C), equation 1: frames mixed with the query by their similarity to it.

    Args:
        video: (Q, T, C).
        sentence: (Q, C).
    """
    share = cosine(sentence[:, None], video)[..., None]
    return share * sentence[:, None] + (1 - share) * video


def anchor_frames(embedded: Tensor, sentence: Tensor, mask: Tensor) -> Tensor:
    """A (Q,), equation 2: the valid frame most similar to the query; of equals the first.

    Args:
        embedded: (Q, T, C) V^e.
        sentence: (Q, C).
        mask: (Q, T).
    """
    scores = cosine(sentence[:, None], embedded).masked_fill(~mask, -torch.inf)
    return scores.argmax(1)


def transition_points(embedded: Tensor, anchor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """b^L and b^R (Q,), equations 3 and 4, for all rows at once by cumulative sums.

    The score of a split at b differs from that of no split by sums of cosines over 1..b, so two
    cumulative sums give the scores of all b. Frames are counted from 0 here. Of equal splits the
    first one is taken.

    Args:
        embedded: (Q, T, C) V^e.
        anchor: (Q,).
        mask: (Q, T); valid frames come first.
    """
    return _transitions(F.normalize(embedded, dim=-1, eps=1e-8), anchor, mask)


def _transitions(unit: Tensor, anchor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`transition_points` of V^e whose frames already have length 1."""
    rows = torch.arange(len(unit), device=unit.device)
    last = mask.sum(1) - 1
    ends = torch.stack([torch.zeros_like(anchor), anchor, last], dim=1)  # (Q, 3) frames 1, A, N
    prototypes = unit[rows[:, None], ends]  # (Q, 3, C)
    to_first, to_anchor, to_last = (unit @ prototypes.transpose(1, 2)).unbind(-1)  # (Q, T)
    index = torch.arange(unit.shape[1], device=unit.device)
    # Sums up to and including b. What does not depend on b is left out: it moves no maximum.
    left = (to_first - to_anchor).cumsum(1)  # equation 3
    right = (to_anchor - to_last).cumsum(1)  # equation 4
    left = left.masked_fill(index > anchor[:, None], -torch.inf)
    right = right.masked_fill((index < anchor[:, None]) | (index > last[:, None]), -torch.inf)
    return left.argmax(1), right.argmax(1)


def coarse_intervals(video: Tensor, sentence: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and last frame [b^L, b^R] (Q, 2), equation 5, and the anchors (Q,).

    Args:
        video: (Q, T, C).
        sentence: (Q, C).
        mask: (Q, T).
    """
    embedded = query_embedded(video, sentence)
    anchor = anchor_frames(embedded, sentence, mask)
    left, right = transition_points(embedded, anchor, mask)
    return torch.stack([left, right], dim=1), anchor


def inside(interval: Tensor, steps: int) -> Tensor:
    """(Q, T) True where the mask m of equation 6 is 0; False where it is minus infinity.

    Args:
        interval: (Q, 2) first and last frame.
        steps: T.
    """
    index = torch.arange(steps, device=interval.device)
    return (index >= interval[:, :1]) & (index <= interval[:, 1:])


@dataclass(frozen=True)
class A2FAConfig:
    """How A2FA reads what the paper leaves open; see the module's docstring.

    Attributes:
        channels: width C of frames and sentences.
        guide_channels: the last so many of the `channels` come from a second encoder, which makes
            the mask (Table 4); 0 makes the mask from the features themselves.
        masked: whether the mask of equation 6 is used at all.
        reweighted: whether frames are re-weighted (equations 7 to 10; Table 6).
        start: "similarity" or "xavier".
        pace: of the learnt differences at the start "similarity"; see `NearIdentity`.
        sharpness: factor on the cosines of equation 7 at the start "similarity".
        calibrated: standardise equation 11 over the video and learn its scale and shift.
        unit_length: scale frames and sentences to length 1 first; off as printed.
        smoothing: frames averaged before everything else, an odd number; 1 as printed.
    """

    channels: int
    guide_channels: int = 0
    masked: bool = True
    reweighted: bool = True
    start: Literal["similarity", "xavier"] = "similarity"
    pace: float = 0.03
    sharpness: float = 10.0
    calibrated: bool = True
    unit_length: bool = True
    smoothing: int = 1

    def __post_init__(self) -> None:
        if self.smoothing < 1 or self.smoothing % 2 == 0:
            raise ConfigurationError(f"A2FAConfig.smoothing is odd, found {self.smoothing}")
        if not 0 <= self.guide_channels < self.channels:
            raise ConfigurationError(
                f"A2FAConfig.guide_channels lies in 0..{self.channels - 1}, found "
                f"{self.guide_channels}"
            )


class NearIdentity(nn.Linear):
    """x + pace W x without bias, W zero at first: a matrix that starts at the identity.

    Weight decay then draws it back to the identity, not to zero. A step of Adam moves every entry
    by about the learning rate, and hundreds of entries add up in a product: `pace` below 1 keeps
    the similarity that was given from being gone after some dozen steps.
    """

    def __init__(self, channels: int, pace: float) -> None:
        super().__init__(channels, channels, bias=False)
        nn.init.zeros_(self.weight)
        self.pace = pace

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pace * super().forward(x)

    def transposed(self, x: Tensor) -> Tensor:
        """The transposed matrix applied to x (Q, C)."""
        return x + self.pace * (x @ self.weight)


class Matrix(nn.Linear):
    """A matrix without bias from Xavier's initialisation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, bias=False)
        nn.init.xavier_uniform_(self.weight)

    def transposed(self, x: Tensor) -> Tensor:
        """The transposed matrix applied to x (Q, C)."""
        return x @ self.weight


class A2FA(nn.Module):
    """Anchor-aware alignment of frames to a query; an `Aligner`.

    Every matrix that equations 7 to 11 apply to all frames meets one vector of the query there, so
    it is moved to that side: (W v) . u = v . (W^T u), and a mean of V v_i is V of their mean. The
    same numbers, one product a query where the printed order has one a frame.
    """

    def __init__(self, config: A2FAConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels - config.guide_channels
        names = ["match_frame", "match_query"]  # W_1^a, W_2^a
        if config.reweighted:
            # Q^g, K^g, V^g, W_1^r, W_2^r
            names += ["query", "key", "value", "compare_frame", "compare_aggregate"]
        self.matrices = nn.ModuleDict({name: self._matrix() for name in names})
        if config.reweighted:
            similar = config.start == "similarity"
            self.scale = nn.Parameter(torch.tensor(1.0))  # w
            self.shift = nn.Parameter(torch.tensor(1.0 if similar else 0.0))  # beta
        self.calibration = Calibration() if config.calibrated else None

    def _matrix(self) -> nn.Module:
        if self.config.start == "similarity":
            return NearIdentity(self.channels, self.config.pace)
        return Matrix(self.channels)

    def _products(self, frames: Tensor, matrix: str, vector: Tensor) -> Tensor:
        """(Q, T) products of the vector (Q, C) with the frames (Q, T, C) under a matrix."""
        return (frames @ self.matrices[matrix].transposed(vector)[..., None]).squeeze(-1)

    def aggregate(self, video: Tensor, sentence: Tensor, kept: Tensor) -> Tensor:
        """g (Q, C), equations 7 and 8: the frames' mean, weighted by how they match the query.

        Args:
            video: (Q, T, C).
            sentence: (Q, C).
            kept: (Q, T) frames that the mask m leaves.
        """
        scores = self._products(video, "key", self.matrices["query"](sentence))
        if self.config.start == "similarity":
            scores = scores * self.config.sharpness
        weights = scores.masked_fill(~kept, -torch.inf).softmax(1)  # A^g
        return self.matrices["value"]((weights[:, None] @ video).squeeze(1))

    def reweight(self, video: Tensor, aggregate: Tensor) -> Tensor:
        """r (Q, T), equation 9: how like the aggregate a frame is, between -1 and 1."""
        other = self.matrices["compare_aggregate"](aggregate)
        return torch.tanh(self.scale * self._products(video, "compare_frame", other) + self.shift)

    def matching(self, reweighted: Tensor, sentence: Tensor, mask: Tensor) -> Tensor:
        """The argument of the sigmoid in equation 11 without the mask, (Q, T)."""
        logits = self._products(reweighted, "match_frame", self.matrices["match_query"](sentence))
        return logits * mask if self.calibration is None else self.calibration(logits, mask)

    def forward(self, inputs: AlignmentInput) -> Alignment:
        """Equations 1 to 12."""
        mask = inputs.mask
        video, guide = self._parts(inputs.video)
        sentence, guide_sentence = self._parts(inputs.sentence)
        video = smoothed(video, mask, self.config.smoothing)
        kept = mask
        if self.config.masked:
            guide = smoothed(guide, mask, self.config.smoothing)
            interval, _ = coarse_intervals(guide, guide_sentence, mask)
            kept = inside(interval, mask.shape[1])
        reweighted = video
        if self.config.reweighted:
            r = self.reweight(video, self.aggregate(video, sentence, kept))
            reweighted = r[..., None] * video  # equation 10
        relevance = self.matching(reweighted, sentence, mask)
        alpha = torch.where(kept, relevance.sigmoid(), 0.0)[..., None]  # equation 11
        aligned = alpha * sentence[:, None] + (1 - alpha) * reweighted  # equation 12
        return Alignment(zero_invalid(aligned, mask), mask, relevance)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and those that make the mask: the same, or another encoder's."""
        parts = [x[..., : self.channels]]
        if self.config.guide_channels:
            parts.append(x[..., self.channels :])
        if self.config.unit_length:
            parts = [F.normalize(part, dim=-1) for part in parts]
        return parts[0], parts[-1]


@dataclass(frozen=True)
class AnchorInterval:
    """Equation 5 as a grounder without training, usable wherever sentence and clips share a space.

    The interval round the anchor frame is the first answer. Further ones come from the next best
    frames outside the intervals found so far. An answer's score is the similarity of its anchor;
    the clips' similarities are the highlight scores.

    Attributes:
        smoothing: clips averaged first, an odd number.
        keep: most intervals of a query.
    """

    smoothing: int = 1
    keep: int = 10

    def predict(self, dataset: GroundingDataset) -> list[Prediction]:
        """Ranked intervals of every query, in the order of the data set's queries."""
        found: dict[str, Prediction] = {}
        for batch in evaluation_batches(dataset, 64, 128):
            inputs = AlignmentInput.of(batch)
            intervals, scores, similarity = self.intervals(inputs)
            spans = intervals + intervals.new_tensor([-0.5, 0.5])
            answers = to_predictions(spans, scores, batch, dataset, saliency=similarity)
            found |= {answer.query_id: answer for answer in answers}
        return [found[query.id] for query in dataset.queries]

    def intervals(self, inputs: AlignmentInput) -> tuple[Tensor, Tensor, Tensor]:
        """First and last frames (Q, K, 2), scores (Q, K), -inf where none is left, and the
        similarity (Q, T) of all frames with the sentence.
        """
        video = smoothed(F.normalize(inputs.video, dim=-1), inputs.mask, self.smoothing)
        sentence = F.normalize(inputs.sentence, dim=-1)
        unit = F.normalize(query_embedded(video, sentence), dim=-1, eps=1e-8)  # V^e, scaled
        similarity = cosine(sentence[:, None], unit)
        left = inputs.mask.clone()
        intervals, scores = [], []
        for _ in range(self.keep):
            # Equation 2 over the frames that are left; the score is -inf where none is.
            score, anchor = similarity.masked_fill(~left, -torch.inf).max(1)
            interval = torch.stack(_transitions(unit, anchor, inputs.mask), dim=1)
            scores.append(score)
            intervals.append(interval.to(similarity.dtype))
            left = left & ~inside(interval, left.shape[1])
        return torch.stack(intervals, 1), torch.stack(scores, 1), similarity
