"""From a data set to padded batches: video-centric, seeded, and without state.

Each batch holds a few videos and several queries of each, so that a video is encoded once for all
of its queries, as SnAG trains. Every random choice is drawn from a generator seeded by
(seed, epoch) or (seed, epoch, first query): training can stop after any step and resume exactly,
and a crop is the same however many processes share a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.moments import TimeGrid


@dataclass(frozen=True)
class GroundingBatch:
    """Padded videos and the queries about them. `B` videos, `Q` queries of all of them together.

    Attributes:
        video: (B, T, C) clip features.
        video_mask: (B, T) True on real clips.
        text: (Q, K, C) word features.
        text_mask: (Q, K) True on real words.
        query_video: (Q,) row of `video` that each query is about.
        moments: (Q, M, 2) start and end in grid-index units of the (possibly cropped) video.
        moment_mask: (Q, M) True on real moments.
        video_ids, query_ids: names, for messages and predictions.
        grids, durations: of each video, to go back to seconds; a crop moves its grid's offset.
        sentence: (Q, C) one vector per query in the space of the clips; None where the data set has
            none.
    """

    video: Tensor
    video_mask: Tensor
    text: Tensor
    text_mask: Tensor
    query_video: Tensor
    moments: Tensor
    moment_mask: Tensor
    video_ids: tuple[str, ...]
    query_ids: tuple[str, ...]
    grids: tuple[TimeGrid, ...]
    durations: tuple[float, ...]
    sentence: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "GroundingBatch":
        """The batch on a device; features (not times) in `dtype` where one is given."""
        return replace(
            self,
            video=self.video.to(device, dtype),
            text=self.text.to(device, dtype),
            sentence=None if self.sentence is None else self.sentence.to(device, dtype),
            video_mask=self.video_mask.to(device),
            text_mask=self.text_mask.to(device),
            query_video=self.query_video.to(device),
            moments=self.moments.to(device),
            moment_mask=self.moment_mask.to(device),
        )


@dataclass(frozen=True, slots=True)
class Crop:
    """Random temporal cropping in training (SnAG's released recipe).

    Attributes:
        max_clips: longer videos are cut to a window of this many clips.
        ratio: shorter ones to a random share of their length within this range; None keeps them.
        min_coverage: share of every moment that must stay inside the window.
    """

    max_clips: int
    ratio: tuple[float, float] | None = (0.9, 1.0)
    min_coverage: float = 0.5

    def __post_init__(self) -> None:
        if self.max_clips < 1:
            raise ConfigurationError(f"Crop.max_clips must be positive, found {self.max_clips}")
        if self.ratio is not None and not 0 < self.ratio[0] <= self.ratio[1] <= 1:
            raise ConfigurationError(f"Crop.ratio must satisfy 0 < low <= high <= 1: {self.ratio}")
        if not 0 <= self.min_coverage < 1:
            raise ConfigurationError(
                f"Crop.min_coverage must be at least 0 and below 1, found {self.min_coverage}"
            )

    def window(
        self, num_clips: int, moments: Sequence[np.ndarray], rng: np.random.Generator
    ) -> tuple[int, int]:
        """First clip and length of a random window that keeps every moment of every query.

        Args:
            num_clips: length of the video.
            moments: one (M, 2) array of grid indices per query.

        A window that covers all queries may not exist in a long video; then one is drawn that
        covers the first query, or else one of its moments, and the caller drops what falls outside.
        """
        if num_clips > self.max_clips:
            length = self.max_clips
        elif self.ratio is None:
            return 0, num_clips
        else:
            low, high = (max(1, int(np.ceil(share * num_clips))) for share in self.ratio)
            length = int(rng.integers(low, high + 1))
        starts = np.arange(num_clips - length + 1)
        covered = [self.covers(starts, length, m) for m in moments]  # (starts, M) each
        everything = np.concatenate(covered, axis=1).all(1)
        for allowed in (everything, covered[0].all(1), covered[0].any(1)):
            if allowed.any():
                return int(rng.choice(starts[allowed])), length
        # A moment longer than the window: as much of it as fits.
        centre = moments[0][0].mean() - (length - 1) / 2
        return int(np.clip(round(centre), 0, num_clips - length)), length

    def covers(self, starts: np.ndarray, length: int, moments: np.ndarray) -> np.ndarray:
        """(..., M) whether windows keep more than `min_coverage` of each (M, 2) moment."""
        first = np.asarray(starts)[..., None] - 0.5  # a clip reaches half a step to both sides
        last = first + length
        kept = np.minimum(moments[:, 1], last) - np.maximum(moments[:, 0], first)
        return kept.clip(min=0) > self.min_coverage * (moments[:, 1] - moments[:, 0]).clip(min=1e-5)


@dataclass(frozen=True, slots=True)
class Sample:
    """One video and the positions (in `dataset.queries`) of the queries asked of it together."""

    video_id: str
    queries: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """What one training step sees; the features themselves are read by `BatchPlan.load`."""

    epoch: int
    number: int
    samples: tuple[Sample, ...]

    def share(self, rank: int, world: int) -> "BatchSpec":
        """The samples of one of `world` processes; every process gets at least one.

        Raises:
            ConfigurationError: there are fewer videos in the batch than processes.
        """
        if len(self.samples) < world:
            raise ConfigurationError(
                f"a batch of {len(self.samples)} videos cannot be shared by {world} processes"
            )
        return replace(self, samples=self.samples[rank::world])


@dataclass(frozen=True)
class BatchPlan:
    """The order of training: which videos and queries make up each step of each epoch.

    Attributes:
        dataset: where videos and queries come from.
        videos_per_batch: videos of one step.
        queries_per_video: the most queries asked of one video in one step; a video with more of
            them occurs several times in an epoch.
        seed: of the order and of the crops.
        crop: random cropping, or None.
        drop_last: leave an incomplete last batch out.
        similar_lengths: put videos of about the same length (within a factor of two, but for what
            is left of each such class) into one batch, so that short ones are not padded to long
            ones. Which ones, and the order of the batches, stay random.
    """

    dataset: GroundingDataset
    videos_per_batch: int = 4
    queries_per_video: int = 4
    seed: int = 0
    crop: Crop | None = None
    drop_last: bool = False
    similar_lengths: bool = False

    def __post_init__(self) -> None:
        if self.videos_per_batch < 1 or self.queries_per_video < 1:
            raise ConfigurationError("a batch needs at least one video and one query per video")
        if len(self.dataset) == 0:
            raise DataError(f"{self.dataset.name} has no queries to train on")

    def epoch(self, epoch: int) -> list[BatchSpec]:
        """The steps of one epoch, in order."""
        rng = np.random.default_rng([self.seed, epoch])
        samples = []
        for video_id in self.dataset.videos:
            positions = rng.permutation(self.dataset.positions_of(video_id))
            for group in self._groups(video_id, positions):
                samples.extend(_samples(video_id, group, self.queries_per_video))
        size = self.videos_per_batch
        order = rng.permutation(len(samples))
        if self.drop_last and len(order) > size:
            order = order[: len(order) // size * size]
        if self.similar_lengths:
            octaves = np.array([self._octave(sample.video_id) for sample in samples])
            order = order[np.argsort(octaves[order], kind="stable")]
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if self.similar_lengths:
            batches = [batches[number] for number in rng.permutation(len(batches))]
        return [
            BatchSpec(epoch, number, tuple(samples[i] for i in batch))
            for number, batch in enumerate(batches)
        ]

    def _octave(self, video_id: str) -> int:
        """Videos of the same octave differ in length, as cropped, by less than a factor of two."""
        video = self.dataset.videos[video_id]
        clips = video.duration / video.grid.step
        return math.floor(
            math.log2(clips if self.crop is None else min(clips, self.crop.max_clips))
        )

    def _groups(self, video_id: str, positions: np.ndarray) -> list[np.ndarray]:
        """Queries that may be asked together: of a video longer than a crop, those of one stretch.

        Groups are formed greedily by the start of the first moment. Queries drawn from all over an
        hour would find no window that holds them, and most would be dropped.
        """
        if self.crop is None or len(positions) == 0:
            return [positions]
        video = self.dataset.videos[video_id]
        if video.duration <= self.crop.max_clips * video.grid.step:
            return [positions]
        moments = [self.dataset.queries[i].moments for i in positions]
        starts = np.array([m[:, 0].min() for m in moments])
        ends = np.array([m[:, 1].max() for m in moments])
        reach = (self.crop.max_clips - 1) * video.grid.step
        waiting = np.argsort(starts, kind="stable").tolist()
        groups = []
        while waiting:
            first = waiting[0]  # alone, where its moment is longer than the window
            near = [i for i in waiting if i == first or ends[i] <= starts[first] + reach]
            group = set(near[: self.queries_per_video])
            groups.append(positions[sorted(group)])
            waiting = [i for i in waiting if i not in group]
        return groups

    def load(self, spec: BatchSpec) -> GroundingBatch:
        """Read the features of one step, crop and pad them."""
        items = [self._sample(sample, spec.epoch) for sample in spec.samples]
        return _collate(self.dataset, items)

    def _sample(self, sample: Sample, epoch: int) -> "_Item":
        item = _read(self.dataset, sample)
        if self.crop is None:
            return item
        # Each query is asked once an epoch; a trailing 0 would repeat the epoch's own stream.
        rng = np.random.default_rng([self.seed, epoch, 1 + sample.queries[0]])
        start, length = self.crop.window(len(item.video), item.moments, rng)
        keep = [self.crop.covers(start, length, m).any() for m in item.moments]
        if not any(keep):  # a moment longer than the window
            keep = [True] + [False] * (len(keep) - 1)
        low, high = -0.5, length - 0.5
        return replace(
            item,
            video=item.video[start : start + length],
            grid=replace(item.grid, offset=item.grid.offset + start * item.grid.step),
            queries=tuple(q for q, k in zip(item.queries, keep, strict=True) if k),
            moments=tuple(
                self._clip(m - start, low, high)
                for m, k in zip(item.moments, keep, strict=True)
                if k
            ),
        )

    def _clip(self, moments: np.ndarray, low: float, high: float) -> np.ndarray:
        """Moments cut to the window; those hardly inside it are dropped."""
        clipped = moments.clip(low, high)
        lengths = (moments[:, 1] - moments[:, 0]).clip(min=1e-5)
        kept = (clipped[:, 1] - clipped[:, 0]) > self.crop.min_coverage * lengths
        return clipped[kept] if kept.any() else clipped[[np.argmax(np.ptp(clipped, axis=1))]]


def evaluation_batches(
    dataset: GroundingDataset, videos_per_batch: int = 8, queries_per_batch: int = 64
) -> Iterator[GroundingBatch]:
    """Every query once, videos in order of length so that little padding is needed.

    A batch holds at most `videos_per_batch` videos and `queries_per_batch` queries; a video with
    more of them occurs in several batches.
    """
    if videos_per_batch < 1 or queries_per_batch < 1:
        raise ConfigurationError("a batch needs at least one video and one query")
    if len(dataset) == 0:
        raise DataError(f"{dataset.name} has no queries to evaluate")
    ids = [video_id for video_id in dataset.videos if dataset.positions_of(video_id)]
    ids.sort(key=lambda video_id: dataset.videos[video_id].duration)
    batch: list[Sample] = []
    for sample in (s for v in ids for s in _samples(v, dataset.positions_of(v), queries_per_batch)):
        queries = sum(len(other.queries) for other in batch) + len(sample.queries)
        if len(batch) == videos_per_batch or queries > queries_per_batch:
            yield _collate(dataset, [_read(dataset, other) for other in batch])
            batch = []
        batch.append(sample)
    yield _collate(dataset, [_read(dataset, sample) for sample in batch])


def _samples(video_id: str, positions: Sequence[int], most: int) -> Iterator[Sample]:
    """The queries about a video, at most `most` in a sample."""
    for start in range(0, len(positions), most):
        yield Sample(video_id, tuple(int(i) for i in positions[start : start + most]))


@dataclass(frozen=True)
class _Item:
    """One sample in memory: clip features and, per query, its moments in grid indices."""

    video_id: str
    video: np.ndarray
    grid: TimeGrid
    queries: tuple[int, ...]
    moments: tuple[np.ndarray, ...]


def _read(dataset: GroundingDataset, sample: Sample) -> _Item:
    grid = dataset.videos[sample.video_id].grid
    return _Item(
        video_id=sample.video_id,
        video=dataset.clips(sample.video_id),
        grid=grid,
        queries=sample.queries,
        moments=tuple(grid.to_index(dataset.queries[i].moments) for i in sample.queries),
    )


def _collate(dataset: GroundingDataset, items: Sequence[_Item]) -> GroundingBatch:
    queries = [dataset.queries[i] for item in items for i in item.queries]
    video, video_mask = pad([item.video for item in items])
    text, text_mask = pad([dataset.text_features[query.id] for query in queries])
    moments, moment_mask = pad([m for item in items for m in item.moments])
    counts = torch.tensor([len(item.queries) for item in items])
    sentences = dataset.sentence_features
    sentence = None
    if sentences is not None:
        vectors = np.concatenate([sentences[query.id] for query in queries])
        sentence = torch.from_numpy(vectors.astype(np.float32))
    return GroundingBatch(
        video=video,
        video_mask=video_mask,
        text=text,
        text_mask=text_mask,
        query_video=torch.repeat_interleave(torch.arange(len(items)), counts),
        moments=moments,
        moment_mask=moment_mask,
        video_ids=tuple(item.video_id for item in items),
        query_ids=tuple(query.id for query in queries),
        grids=tuple(item.grid for item in items),
        durations=tuple(dataset.videos[item.video_id].duration for item in items),
        sentence=sentence,
    )


def pad(sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Stack (T_n, C) sequences to (N, T, C) float32, zero-padded, with the (N, T) mask."""
    longest = max(len(sequence) for sequence in sequences)
    width = sequences[0].shape[1]
    padded = torch.zeros(len(sequences), longest, width)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.from_numpy(np.asarray(sequence, dtype=np.float32))
        mask[row, : len(sequence)] = True
    return padded, mask
