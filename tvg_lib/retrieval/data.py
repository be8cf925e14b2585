"""A grounding data set as retrieval sees it: segments and frames of videos, words of queries.

MS-SL's two views of a video, which GMMFormer and MamFusion keep:

    segments   a fixed number of stretches of equal length, each the mean of its clips
    frames     the clips themselves, averaged down only where a video has more than a model's limit

All vectors are scaled to length 1. Moments are not looked at: in this task training knows only
which video belongs to a query.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tvg_lib.data.batching import BatchSpec, Sample, pad
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.errors import ConfigurationError, DataError

_EPSILON = 1e-5  # added to lengths that are divided by, as in the released code


def unit_rows(x: np.ndarray) -> np.ndarray:
    """(..., C) vectors scaled to length 1; zeros stay zero."""
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + _EPSILON)


def averaged(clips: np.ndarray, count: int, drop_last: bool = False) -> np.ndarray:
    """`count` means of consecutive stretches of (T, C) clips; short videos repeat clips.

    Args:
        clips: (T, C).
        count: rows of the result.
        drop_last: leave the last clip out of the last stretch, as the released code does (its
            bounds stop at T - 1).
    """
    steps = len(clips)
    bounds = np.round(np.arange(count + 1) / count * steps).astype(int)
    starts = np.minimum(bounds[:-1], steps - 1)
    sizes = np.diff(np.minimum(bounds, steps - 1)) if drop_last else bounds[1:] - starts
    totals = np.cumsum(np.vstack([np.zeros_like(clips[:1]), clips]), axis=0, dtype=np.float64)
    sizes = np.maximum(sizes, 1)
    means = (totals[starts + sizes] - totals[starts]) / sizes[:, None]
    return means.astype(np.float32)


@dataclass(frozen=True)
class RetrievalView:
    """How videos and queries are cut for a model.

    Attributes:
        segments: of every video.
        max_frames: longer videos are averaged down to so many frames.
        max_words: of a query that are read; the rest is cut off.
        drop_last: see `averaged`.
    """

    segments: int = 32
    max_frames: int = 512
    max_words: int = 30
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name in ("segments", "max_frames", "max_words"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"RetrievalView.{name} must be at least 1")

    def video(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, C) clips to (L, C) segments and (T', C) frames, all of length 1."""
        frames = clips
        if len(clips) > self.max_frames:
            frames = averaged(clips, self.max_frames, self.drop_last)
        return unit_rows(averaged(clips, self.segments, self.drop_last)), unit_rows(frames)

    def videos(self, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """(T_n, C) clips of B videos to what `MamFusion.encode_video` reads.

        Returns:
            segments (B, L, C), padded frames (B, T, C) and their mask (B, T).
        """
        cut = [self.video(sequence) for sequence in clips]
        frames, mask = pad([frames for _, frames in cut])
        return torch.from_numpy(np.stack([segments for segments, _ in cut])), frames, mask

    def words(self, words: np.ndarray) -> np.ndarray:
        """(K, C) word features, cut and scaled to length 1."""
        return unit_rows(words[: self.max_words])


@dataclass(frozen=True)
class VideoBatch:
    """Padded videos, ready for `MamFusion.encode_video`.

    Attributes:
        segments: (B, L, C).
        frames, frame_mask: (B, T, C), (B, T).
        video_ids: B names.
    """

    segments: Tensor
    frames: Tensor
    frame_mask: Tensor
    video_ids: tuple[str, ...]


@dataclass(frozen=True)
class QueryBatch:
    """Padded queries, ready for `MamFusion.encode_text`.

    Attributes:
        text, text_mask: (Q, K, C), (Q, K) words.
        sentence: (Q, D) sentence vectors; the mean of the words where the data set has none.
        query_ids: Q names.
    """

    text: Tensor
    text_mask: Tensor
    sentence: Tensor
    query_ids: tuple[str, ...]


@dataclass(frozen=True)
class RetrievalBatch:
    """What one training step sees: different videos and some queries of each.

    Attributes:
        segments, frames, frame_mask, video_ids: as in `VideoBatch`.
        text, text_mask, sentence, query_ids: as in `QueryBatch`.
        query_video: (Q,) row of the video that each query is about.
        epoch: from 0; losses turn to hard negatives at some epoch.
    """

    segments: Tensor
    frames: Tensor
    frame_mask: Tensor
    text: Tensor
    text_mask: Tensor
    sentence: Tensor
    query_video: Tensor
    video_ids: tuple[str, ...]
    query_ids: tuple[str, ...]
    epoch: int = 0

    def to(self, device: torch.device | str) -> "RetrievalBatch":
        """The batch on a device."""
        tensors = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def load_videos(
    dataset: GroundingDataset, view: RetrievalView, video_ids: Sequence[str]
) -> VideoBatch:
    """Read, cut and pad some videos."""
    cut = view.videos([dataset.clips(video_id) for video_id in video_ids])
    return VideoBatch(*cut, tuple(video_ids))


def load_queries(
    dataset: GroundingDataset, view: RetrievalView, positions: Sequence[int]
) -> QueryBatch:
    """Read, cut and pad some queries, given by their positions in `dataset.queries`."""
    ids = tuple(dataset.queries[i].id for i in positions)
    words = [dataset.text_features[query_id] for query_id in ids]
    if dataset.sentence_features is None:
        sentences = [features.mean(0) for features in words]
    else:
        sentences = [dataset.sentence_features[query_id][0] for query_id in ids]
    text, mask = pad([view.words(features) for features in words])
    return QueryBatch(text, mask, torch.from_numpy(np.stack(sentences).astype(np.float32)), ids)


def video_batches(
    dataset: GroundingDataset, view: RetrievalView, size: int = 64
) -> Iterator[VideoBatch]:
    """Every video once, in the order of the data set."""
    ids = list(dataset.videos)
    for start in range(0, len(ids), size):
        yield load_videos(dataset, view, ids[start : start + size])


def query_batches(
    dataset: GroundingDataset, view: RetrievalView, size: int = 256
) -> Iterator[QueryBatch]:
    """Every query once, in the order of the data set."""
    for start in range(0, len(dataset), size):
        yield load_queries(dataset, view, range(start, min(start + size, len(dataset))))


@dataclass(frozen=True)
class RetrievalPlan:
    """The order of training: every video with queries once an epoch, with some of its queries.

    A video occurs at most once in a batch, so every other video of the batch is a true negative.

    Attributes:
        dataset: where videos and queries come from.
        view: how they are cut.
        videos_per_batch: of one step.
        queries_per_video: drawn anew each epoch where a video has more; None takes all, as the
            released code does.
        seed: of the order and of the draws.
    """

    dataset: GroundingDataset
    view: RetrievalView = field(default_factory=RetrievalView)
    videos_per_batch: int = 64
    queries_per_video: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.videos_per_batch < 2:
            raise ConfigurationError("a batch needs at least two videos: one is no contrast")
        if self.queries_per_video is not None and self.queries_per_video < 1:
            raise ConfigurationError("a video needs at least one query in a batch")
        if len(self._asked) < 2:
            raise DataError(f"{self.dataset.name} has fewer than two videos with queries")

    @property
    def _asked(self) -> list[str]:
        return [v for v in self.dataset.videos if self.dataset.positions_of(v)]

    def epoch(self, epoch: int) -> list[BatchSpec]:
        """The steps of one epoch, in order; a single video left over joins the last step."""
        rng = np.random.default_rng([self.seed, epoch])
        samples = []
        for video_id in self._asked:
            drawn = rng.permutation(self.dataset.positions_of(video_id))
            samples.append(Sample(video_id, tuple(map(int, drawn[: self.queries_per_video]))))
        order = rng.permutation(len(samples))
        size = self.videos_per_batch
        starts = list(range(0, len(order), size))
        if len(starts) > 1 and len(order) - starts[-1] < 2:
            starts.pop()
        ends = [*starts[1:], len(order)]
        return [
            BatchSpec(epoch, number, tuple(samples[i] for i in order[start:end]))
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]

    def load(self, spec: BatchSpec) -> RetrievalBatch:
        """Read the features of one step."""
        videos = load_videos(self.dataset, self.view, [s.video_id for s in spec.samples])
        positions = [i for sample in spec.samples for i in sample.queries]
        queries = load_queries(self.dataset, self.view, positions)
        counts = torch.tensor([len(sample.queries) for sample in spec.samples])
        rows = torch.repeat_interleave(torch.arange(len(spec.samples)), counts)
        return RetrievalBatch(**vars(videos), **vars(queries), query_video=rows, epoch=spec.epoch)
