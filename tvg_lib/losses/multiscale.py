"""MSCL's contrast of moments within and across the levels of a pyramid.

Source: Nguyen et al., "Multi-Scale Contrastive Learning for Video Temporal Grounding" (AAAI 2025),
equations 10 to 13.

    symbol     here
    P(l), N(l) `target_sets`, and the random draw of `MultiScaleContrast.draw`
    Q_j'       the rows of a `Draw`
    z^0_i      anchors from `Pyramid.base`
    z^l_j      `Pyramid.levels[l - 1]`: the paper counts the levels from 1
    L_within   `contrast` of every level with itself, summed over levels
    L_cross    `contrast` of the anchors with every level

Both losses are -log(e^{z_i.z_j} / (e^{z_i.z_j} + sum_n e^{z_i.z_n})), once for every pair of an
anchor i and a positive j. As printed they are sums over all pairs of raw dot products, without a
temperature: a moment with many levels weighs more than detection as a whole, and the loss grows
with the squared length of features that nothing bounds. `AS_PRINTED` does that; the defaults of
`ContrastConfig` are the sane form: unit vectors, a temperature, means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.distributed import reduce_sum
from tvg_lib.errors import ConfigurationError
from tvg_lib.losses.contrastive import random_subset
from tvg_lib.nn.points import PointGrid
from tvg_lib.nn.pyramid import PointPredictions


@dataclass(frozen=True)
class ContrastConfig:
    """How moments are chosen and compared.

    The defaults were chosen by mIoU on held-out videos. Notebook 32 trains the printed form and
    those between it and the defaults, each with its held-out mIoU in its record.

    Attributes:
        similarity: "cosine" of the features, or their "dot" product as printed.
        temperature: divides the similarities; 1 as printed.
        reduction: of the pairs of one query: "mean", or "sum" as printed. Queries are averaged.
        queries: "all" queries of the batch, or "one" of each video, drawn as in equation 10. Where
            videos bring equally many queries, the mean over all is what the draw has as its
            expectation, with less noise.
        anchors: of the cross-scale loss: features of the "embedding" (Z^0, as printed) or of the
            "lowest" level, for encoders that keep no Z^0.
        center_radius: alpha of the centre sampling, in strides of the level.
        inside: targets lie inside the moment, as in the code of ActionFormer and SnAG; the printed
            rule lets high levels take points that no part of a short moment touches.
    """

    similarity: Literal["cosine", "dot"] = "cosine"
    temperature: float = 0.1
    reduction: Literal["mean", "sum"] = "mean"
    queries: Literal["all", "one"] = "all"
    anchors: Literal["embedding", "lowest"] = "embedding"
    center_radius: float = 1.5
    inside: bool = True

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.center_radius <= 0:
            raise ConfigurationError(
                "ContrastConfig.temperature and .center_radius must be positive, found "
                f"{self.temperature} and {self.center_radius}"
            )


AS_PRINTED = ContrastConfig("dot", 1.0, "sum", "one", "embedding", inside=False)


def target_sets(
    lengths: Sequence[int],
    moments: Tensor,
    moment_mask: Tensor,
    valid: Tensor,
    center_radius: float = 1.5,
    inside: bool = True,
) -> tuple[Tensor, Tensor]:
    """Which points are targets of which query, and which may be negatives.

    Targets are centre-sampled *without* the test of the regression range. With it a moment has
    targets on about two neighbouring levels only, and a moment longer than 8 clips has none on
    level 0: the cross-scale loss would have no anchors.

    Args:
        lengths: steps of each level.
        moments: (Q, M, 2) in steps of level 0; moment_mask (Q, M).
        valid: (Q, P) points over real clips, P = sum of `lengths`.
        center_radius, inside: as in `ContrastConfig`.

    Returns:
        targets: (Q, P) within `center_radius` strides of the centre of a moment.
        outside: (Q, P) valid, in no moment of the query and no target.
    """
    grid = PointGrid(center_radius=center_radius)
    points = grid.points(lengths, device=moments.device)
    position, stride = points[:, 0], points[:, 3]
    start, end = moments[..., 0, None], moments[..., 1, None]  # (Q, M, 1)
    if inside:
        near = grid.near_center(points, moments)
    else:
        near = (position - (start + end) / 2).abs() <= center_radius * stride
    within = (position >= start) & (position <= end)
    targets = (near & moment_mask[..., None]).any(1) & valid
    touched = (within & moment_mask[..., None]).any(1)
    return targets, valid & ~touched & ~targets


def one_query_per_video(query_video: Tensor) -> Tensor:
    """(Q,) True at one random query of every video (equation 10)."""
    priority = torch.rand(query_video.shape, device=query_video.device)
    highest = priority.new_zeros(int(query_video.max()) + 1)
    highest = highest.scatter_reduce(0, query_video, priority, "amax")
    return priority == highest[query_video]


def gather_steps(x: Tensor, row: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen steps of each query, packed to the left.

    Args:
        x: (B, T, D); row (Q,) the row of each query; chosen (Q, T).

    Returns:
        features (Q, K, D) with K the largest number chosen (at least 1), their mask (Q, K), and
        their steps (Q, K).
    """
    most = max(1, int(chosen.sum(1).max()))
    step = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return x[row[:, None], step], chosen.gather(1, step), step


def contrast(logits: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of equation 11's or 12's terms of each query, and their number.

    Args:
        logits: (Q, A, S) similarities of anchors and samples.
        positive: (Q, A, S) pairs that are pulled together.
        negative: broadcastable to it: pairs that stand in the denominator.

    Returns:
        sum (Q,) and number (Q,). A pair without negatives is log(1) = 0 and is not counted.
    """
    # The fill is finite so that rows without negatives give finite gradients.
    others = logits.masked_fill(~negative, -1e9).logsumexp(-1, keepdim=True)
    counted = positive & negative.any(-1, keepdim=True)
    terms = F.softplus(others - logits).masked_fill(~counted, 0.0)
    return terms.sum((1, 2)), counted.sum((1, 2))


@dataclass(frozen=True)
class Draw:
    """The queries of one step with their sampled points, level by level.

    Attributes:
        query: (N,) which queries of the batch.
        row: (N,) row of the pyramid of each.
        targets, negatives: (N, T_l) each: P(l), and N(l) with as many members as P(l) where the
            video has them.
    """

    query: Tensor
    row: Tensor
    targets: tuple[Tensor, ...]
    negatives: tuple[Tensor, ...]


@dataclass(frozen=True)
class Pool:
    """What the anchors of one level are compared with.

    Attributes:
        features: (N, S, D), or (S, D) where all queries share it.
        positive, negative: (N, S).
        itself: (N, K, S) True where sample s is the k-th target itself (i = j); None if none is.
    """

    features: Tensor
    positive: Tensor
    negative: Tensor
    itself: Tensor | None = None


def sampled_pools(levels: Sequence[Tensor], draw: Draw, *, anchors_among_them: bool) -> list[Pool]:
    """The drawn targets and negatives of each query, level by level.

    Args:
        levels: (B, T_l, D) each, of the view of the videos that gives the samples.
        draw: which steps.
        anchors_among_them: the anchors are of this view, too: a target is no positive of itself.
    """
    pools = []
    for x, targets, negatives in zip(levels, draw.targets, draw.negatives, strict=True):
        positive, positive_mask, _ = gather_steps(x, draw.row, targets)
        negative, negative_mask, _ = gather_steps(x, draw.row, negatives)
        count, more = positive_mask.shape[1], negative_mask.shape[1]
        itself = None
        if anchors_among_them:
            itself = F.pad(torch.eye(count, dtype=torch.bool, device=x.device), (0, more))
            itself = itself.expand(len(positive), -1, -1)
        pools.append(
            Pool(
                torch.cat([positive, negative], dim=1),
                F.pad(positive_mask, (0, more)),
                F.pad(negative_mask, (count, 0)),
                itself,
            )
        )
    return pools


class MultiScaleContrast(nn.Module):
    """The two losses, on the pyramid of any `PointGrounder`.

    Subclasses take their samples from elsewhere (`pools`).
    """

    def __init__(self, config: ContrastConfig | None = None) -> None:
        super().__init__()
        self.config = config or ContrastConfig()

    def draw(self, output: PointPredictions, batch: GroundingBatch) -> Draw:
        """Queries, targets and as many random negatives (equation 10)."""
        config = self.config
        targets, outside = target_sets(
            output.lengths,
            batch.moments / output.pyramid.clips_per_step,
            batch.moment_mask,
            output.mask,
            config.center_radius,
            config.inside,
        )
        query = torch.arange(len(targets), device=targets.device)
        if config.queries == "one":
            query = query[one_query_per_video(batch.query_video)]
        targets = targets[query].split(output.lengths, dim=1)
        negatives = [
            random_subset(candidates, positive.sum(1, keepdim=True))
            for candidates, positive in zip(
                outside[query].split(output.lengths, dim=1), targets, strict=True
            )
        ]
        return Draw(query, output.pyramid_row[query], targets, tuple(negatives))

    def pools(self, output: PointPredictions, batch: GroundingBatch, draw: Draw) -> list[Pool]:
        """For every level: the targets and the negatives of the same query, of this very pass."""
        return sampled_pools(output.pyramid.levels, draw, anchors_among_them=True)

    def forward(self, output: PointPredictions, batch: GroundingBatch) -> dict[str, Tensor]:
        """The terms "within" and "cross": shares, see `tvg_lib.distributed`."""
        with torch.autocast(output.logits.device.type, enabled=False):
            draw = self.draw(output, batch)
            pools = self.pools(output, batch, draw)
            within, cross = self.within(output, draw, pools), self.cross(output, draw, pools)
        return {"within": within, "cross": cross}

    def within(self, output: PointPredictions, draw: Draw, pools: Sequence[Pool]) -> Tensor:
        """Equation 11: targets of each level with those of the same level."""
        parts = []
        for x, targets, pool in zip(output.pyramid.levels, draw.targets, pools, strict=True):
            anchors, mask, _ = gather_steps(x, draw.row, targets)
            parts.append(self._part(anchors, mask, pool, pool.itself))
        return self.reduce(parts)

    def cross(self, output: PointPredictions, draw: Draw, pools: Sequence[Pool]) -> Tensor:
        """Equation 12: targets of level 0 with those of every level above it."""
        if self.config.anchors == "lowest":
            base, above = output.pyramid.levels[0], pools[1:]
        else:
            base, above = output.pyramid.base, pools
        if base is None:
            raise ConfigurationError(
                "this video encoder keeps no Z^0; take ContrastConfig(anchors='lowest')"
            )
        anchors, mask, _ = gather_steps(base, draw.row, draw.targets[0])
        return self.reduce([self._part(anchors, mask, pool, None) for pool in above])

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """(..., A, D) and (..., S, D) to (..., A, S), in float32 at least."""
        a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
        if self.config.similarity == "cosine":
            a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        return a @ b.transpose(-1, -2) / self.config.temperature

    def _part(
        self, anchors: Tensor, mask: Tensor, pool: Pool, itself: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        positive = mask[..., None] & pool.positive[:, None]
        if itself is not None:
            positive = positive & ~itself
        logits = self.similarity(anchors, pool.features)
        return contrast(logits, positive, pool.negative[:, None])

    def reduce(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Parts (N,) of the levels to the mean over the queries of all processes."""
        total = sum(value for value, _ in parts)
        number = sum(count for _, count in parts)
        if self.config.reduction == "sum":
            return total.sum() / reduce_sum(total.new_tensor(len(total))).clamp(min=1)
        mean = total / number.clamp(min=1)
        return mean.sum() / reduce_sum((number > 0).sum()).clamp(min=1)


class ContrastiveObjective(nn.Module):
    """Detection with contrast beside it (equation 13).

    Args:
        detection: gives "total" and named terms, such as `DetectionObjective`.
        contrast: gives named terms, such as `MultiScaleContrast`.
        weights: rho of each term of `contrast`; a term that is not named has weight 0 and is only
            reported.
    """

    def __init__(
        self, detection: nn.Module, contrast: nn.Module, weights: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.detection, self.contrast = detection, contrast
        self.weights = dict(weights)

    def forward(self, output: PointPredictions, batch: GroundingBatch) -> dict[str, Tensor]:
        """The terms of both, and "total", the detection's plus the weighted contrast."""
        terms = self.detection(output, batch)
        contrast = self.contrast(output, batch)
        if unknown := set(self.weights) - set(contrast):
            raise ConfigurationError(
                f"there is no contrast {sorted(unknown)}; there are {sorted(contrast)}"
            )
        total = terms["total"]
        for name, weight in self.weights.items():
            if weight:
                total = total + weight * contrast[name]
        return terms | contrast | {"total": total}
