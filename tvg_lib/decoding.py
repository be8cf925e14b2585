"""From points to moments: thresholds, (soft) non-maximum suppression, voting, and back to seconds.

Only the first K picks are ever needed, so suppression runs K vectorised rounds over all queries at
once; no compiled extension. `tests/test_decoding.py` holds the plain O(n^2) loop it must equal.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tvg_lib import inline
from tvg_lib.data.batching import GroundingBatch, evaluation_batches
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.moments import Moment, interval_iou
from tvg_lib.nn.points import PointGrid
from tvg_lib.nn.pyramid import PointPredictions

SHOWN = 5  # answers that a prediction draws


@dataclass(frozen=True)
class Prediction:
    """Ranked answers to one query.

    Attributes:
        query_id, video_id, text: what was asked of what.
        moments: (N, 3) start and end in seconds and score, best first.
        saliency: (T,) score of every clip, for highlight detection; None where not predicted.
        truth: (M, 2) the true moments in seconds, and
        duration: the video's, in seconds: for drawing only, None where not known.
    """

    query_id: str
    video_id: str
    text: str
    moments: np.ndarray
    saliency: np.ndarray | None = None
    truth: np.ndarray | None = None
    duration: float | None = None

    def __len__(self) -> int:
        return len(self.moments)

    def __iter__(self) -> Iterator[Moment]:
        return (Moment(*map(float, row)) for row in self.moments)

    @property
    def best(self) -> Moment:
        """The first-ranked moment."""
        return Moment(*map(float, self.moments[0]))

    def __repr__(self) -> str:
        best = f", best {self.best!r}" if len(self) else ""
        return f"Prediction({self.text!r}: {len(self)} moments{best})"

    def _repr_html_(self) -> str:
        truth = np.zeros((0, 2)) if self.truth is None else self.truth
        latest = np.concatenate([truth[:, 1], self.moments[:, 1], [0.0]]).max()
        duration = float(latest) if self.duration is None else self.duration
        rows = []
        if len(truth):
            note = ", ".join(inline.span(start, end, duration) for start, end in truth[:2])
            note += " …" if len(truth) > 2 else ""
            rows.append(inline.Row("truth", truth.tolist(), inline.TRUTH, note))
        for rank, (start, end, score) in enumerate(self.moments[:SHOWN].tolist(), start=1):
            note = f"{inline.span(start, end, duration)} · {score:.2f}"
            if len(truth):
                iou = interval_iou(np.array([[start, end]]), truth).max()
                note += f" · IoU {iou:.2f}"
            rows.append(inline.Row(f"{rank}", [(start, end)], inline.ANSWER, note))
        return inline.bars(rows, duration, f"“{self.text}” · {self.video_id}")


@dataclass(frozen=True)
class DecodingConfig:
    """How scored points become a short ranked list (SnAG's released TACoS settings).

    Attributes:
        score_threshold: points must score more than this.
        pre_top_k: how many points enter suppression.
        min_length: shortest moment kept, in steps of level 0.
        suppression: "soft" decays scores by exp(-IoU^2 / sigma), "hard" drops neighbours with at
            least `iou_threshold`, None ranks by score alone.
        sigma, iou_threshold: of the two kinds of suppression.
        min_score: a moment whose score falls below it is dropped.
        keep: moments in the final list.
        voting_threshold: each kept moment becomes the score-weighted mean of all with at least
            this IoU; 0 switches voting off.
    """

    score_threshold: float = 1e-3
    pre_top_k: int = 2000
    min_length: float = 0.1
    suppression: Literal["soft", "hard"] | None = "soft"
    sigma: float = 0.9
    iou_threshold: float = 0.1
    min_score: float = 1e-3
    keep: int = 5
    voting_threshold: float = 0.95


def point_moments(
    output: PointPredictions,
    grid: PointGrid,
    config: DecodingConfig,
    external: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Candidate moments of every query before suppression.

    Args:
        output: of the model.
        grid: where points stand.
        config: thresholds.
        external: (Q, P) factors on the points' scores, as from `spread_over_levels`.

    Returns:
        moments (Q, N, 2) in steps of level 0 and scores (Q, N), best first; rejected candidates
        score -inf.
    """
    points = grid.points(output.lengths, device=output.logits.device)
    scores = output.logits.float().sigmoid()
    if external is not None:
        scores = scores * external
    rejected = ~output.mask | (scores <= config.score_threshold)
    scores = scores.masked_fill(rejected, float("-inf"))
    scores, index = scores.topk(min(config.pre_top_k, scores.shape[1]), dim=1)
    offsets = output.offsets.float().gather(1, index[..., None].expand(-1, -1, 2))
    position, stride = points[index, 0], points[index, 3]
    start = position - offsets[..., 0] * stride
    end = position + offsets[..., 1] * stride
    scores = scores.masked_fill(end - start <= config.min_length, float("-inf"))
    return torch.stack([start, end], dim=-1), scores


def spread_over_levels(
    scores: Sequence[np.ndarray], lengths: Sequence[int], clips_per_step: int = 1
) -> Tensor:
    """Clip scores from elsewhere for every point: each level takes the maximum of its surroundings.

    SnAG's released code multiplies such scores, of a model that compares clip and sentence, into
    the scores of the points; MSCL's account of it does not mention this.

    Args:
        scores: per query, (T,) non-negative.
        lengths: points per level of the pyramid.
        clips_per_step: clips per step of level 0.

    Returns:
        (Q, P)
    """
    level = torch.zeros(len(scores), lengths[0] * clips_per_step)
    for row, clips in enumerate(scores):
        level[row, : len(clips)] = torch.as_tensor(clips)
    level = F.max_pool1d(level[:, None], clips_per_step)
    levels = [level]
    for _ in lengths[1:]:
        levels.append(F.max_pool1d(levels[-1], kernel_size=3, stride=2, padding=1))
    return torch.cat(levels, dim=-1).squeeze(1)


def suppress(
    moments: Tensor,
    scores: Tensor,
    keep: int,
    kind: Literal["soft", "hard"] = "soft",
    sigma: float = 0.9,
    iou_threshold: float = 0.1,
    min_score: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Greedy (soft) non-maximum suppression, `keep` rounds for all queries at once.

    Args:
        moments: (Q, N, 2).
        scores: (Q, N); -inf where there is no candidate.
        kind, sigma, iou_threshold, min_score: as in `DecodingConfig`. The first pick of soft
            suppression is kept whatever its score; hard suppression drops low scores beforehand.

    Returns:
        moments (Q, K, 2) and scores (Q, K), best first; -inf scores where candidates ran out.
        K = min(keep, N).
    """
    scores = scores.clone()
    if kind == "hard":
        scores.masked_fill_(scores <= min_score, float("-inf"))
    picked, picked_scores = [], []
    for _ in range(min(keep, scores.shape[1])):
        best = scores.argmax(dim=1, keepdim=True)  # (Q, 1)
        value = scores.gather(1, best)
        moment = moments.gather(1, best[..., None].expand(-1, -1, 2))  # (Q, 1, 2)
        picked.append(moment)
        picked_scores.append(value)
        overlap = _padded_iou(moment, moments).squeeze(1)  # (Q, N)
        if kind == "soft":
            scores = scores * torch.exp(-(overlap**2) / sigma)
            # "not at least" also catches -inf * 0, where a small sigma makes the decay vanish.
            scores.masked_fill_(~(scores >= min_score), float("-inf"))
        else:
            scores.masked_fill_(overlap >= iou_threshold, float("-inf"))
        scores.scatter_(1, best, float("-inf"))
    if not picked:
        return moments[:, :0], scores[:, :0]
    return torch.cat(picked, dim=1), torch.cat(picked_scores, dim=1)


def vote(picked: Tensor, moments: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Replace each picked moment by the score-weighted mean of all candidates that overlap it.

    Args:
        picked: (Q, K, 2).
        moments, scores: (Q, N, 2) and (Q, N), all candidates; -inf where there is none.
        iou_threshold: candidates with at least this IoU vote.

    Returns:
        (Q, K, 2)
    """
    weight = scores.clamp(min=0)[:, None] * (interval_iou(picked, moments) >= iou_threshold)
    total = weight.sum(-1, keepdim=True)
    return torch.where(total > 0, weight / total.clamp(min=1e-12) @ moments, picked)


def decode(moments: Tensor, scores: Tensor, config: DecodingConfig) -> tuple[Tensor, Tensor]:
    """Suppress and vote: (Q, N, 2), (Q, N) candidates to (Q, K, 2), (Q, K), best first."""
    if config.suppression is None:
        # Stable: which of equal scores comes first is the model's affair, as with suppression.
        values, order = scores.sort(dim=1, descending=True, stable=True)
        values, order = values[:, : config.keep], order[:, : config.keep]
        return moments.gather(1, order[..., None].expand(-1, -1, 2)), values
    picked, picked_scores = suppress(
        moments,
        scores,
        config.keep,
        config.suppression,
        config.sigma,
        config.iou_threshold,
        config.min_score,
    )
    if config.voting_threshold > 0:
        picked = vote(picked, moments, scores, config.voting_threshold)
    return picked, picked_scores


def to_predictions(
    moments: Tensor,
    scores: Tensor,
    batch: GroundingBatch,
    dataset: GroundingDataset,
    saliency: Tensor | None = None,
) -> list[Prediction]:
    """Ranked moments (Q, K, 2) in clips to predictions in seconds, cut to the video.

    `saliency` (Q, T) scores clips, where a model does.
    """
    moments, scores = moments.cpu().double(), scores.cpu().double()  # some devices lack float64
    predictions = []
    for row, query_id in enumerate(batch.query_ids):
        video = int(batch.query_video[row])
        real = torch.isfinite(scores[row])
        seconds = batch.grids[video].to_seconds(moments[row, real])
        seconds = seconds.clamp(0, batch.durations[video])
        ranked = torch.cat([seconds, scores[row, real, None]], dim=1)
        query = dataset.query(query_id)
        clips = None
        if saliency is not None:
            clips = saliency[row, batch.video_mask[video]].float().cpu().numpy()
        predictions.append(
            Prediction(
                query_id,
                query.video_id,
                query.text,
                ranked.numpy(),
                clips,
                truth=query.moments,
                duration=batch.durations[video],
            )
        )
    return predictions


@torch.inference_mode()
def ground(
    model: PointGrounder,
    dataset: GroundingDataset,
    config: DecodingConfig | None = None,
    grid: PointGrid | None = None,
    videos_per_batch: int = 8,
    queries_per_batch: int = 64,
    external: Mapping[str, np.ndarray] | None = None,
) -> list[Prediction]:
    """Ask every query of a data set of its video; predictions in the order of `dataset.queries`.

    Args:
        model: left in the mode (training or not) it came in.
        dataset, config, grid: what is asked, and how points become moments.
        videos_per_batch, queries_per_batch: bounds on memory, which grows with queries times clips.
        external: by query id, (T,) scores of the clips of its video in [0, 1] that are multiplied
            into the scores of the points; see `spread_over_levels`.
    """
    config, grid = config or DecodingConfig(), grid or PointGrid()
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    predictions = {}
    try:
        for batch in evaluation_batches(dataset, videos_per_batch, queries_per_batch):
            batch = batch.to(device)
            output = model(batch)
            factors = None
            if external is not None:
                factors = spread_over_levels(
                    [external[query_id] for query_id in batch.query_ids],
                    output.lengths,
                    output.pyramid.clips_per_step,
                ).to(device)
            moments, scores = decode(*point_moments(output, grid, config, factors), config)
            moments = moments * output.pyramid.clips_per_step
            for prediction in to_predictions(moments, scores, batch, dataset):
                predictions[prediction.query_id] = prediction
    finally:
        model.train(training)
    return [predictions[query.id] for query in dataset.queries]


def _padded_iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise IoU with 1e-6 added to every length, as the published suppression computes it."""
    overlap = torch.minimum(a[..., :, None, 1], b[..., None, :, 1]) - torch.maximum(
        a[..., :, None, 0], b[..., None, :, 0]
    )
    overlap = overlap.clamp(min=0)
    lengths = (a[..., 1] - a[..., 0] + 1e-6)[..., :, None] + (b[..., 1] - b[..., 0] + 1e-6)[
        ..., None, :
    ]
    return overlap / (lengths - overlap)
