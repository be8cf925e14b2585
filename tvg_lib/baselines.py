"""What a model must beat: a rule without training, and a guess that sees neither video nor words.

`ZeroShotWindow` draws a window round the clips most like the query. It needs features of clips and
sentences in one space, and has two numbers, chosen on one split and used on another.

`MomentPrior` answers every query with the same windows, those that hit most training moments. What
it reaches is due to where annotators place moments, not to understanding.

Both give a ranked list, so every metric can be computed for them as for a model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tvg_lib.data.dataset import GroundingDataset, Query, Video
from tvg_lib.decoding import Prediction
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.moments import interval_iou

SMOOTHINGS = (1, 3, 5, 7, 9, 11, 15)
FRACTIONS = (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8)


def similarity(dataset: GroundingDataset, query: Query) -> np.ndarray:
    """(T,) cosine of the query's sentence vector with every clip of its video.

    Raises:
        DataError: the data set has no sentence vectors.
    """
    if dataset.sentence_features is None:
        raise DataError(
            f"{dataset.name} has no sentence vectors in the space of its clips; "
            "a zero-shot rule has nothing to compare"
        )
    clips = dataset.video_features[query.video_id]
    sentence = dataset.sentence_features[query.id][0]
    lengths = np.linalg.norm(clips, axis=1) * np.linalg.norm(sentence)
    return clips @ sentence / lengths.clip(min=1e-8)


def smooth(curve: np.ndarray, width: int) -> np.ndarray:
    """(T,) mean over `width` neighbouring values (an odd number); fewer at the two ends."""
    window = np.ones(width)
    half = width // 2
    count = np.convolve(np.ones(len(curve)), window)[half : half + len(curve)]
    return np.convolve(curve, window)[half : half + len(curve)] / count


def grow(curves: np.ndarray, peaks: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """First and last clip (both N) of the stretch round a peak where a curve stays high.

    Args:
        curves: (N, T).
        peaks: (N,) a clip of each curve.
        fraction: of the way from the curve's minimum to the peak.
    """
    index = np.arange(curves.shape[1])
    low = curves.min(1)
    height = curves[np.arange(len(curves)), peaks]
    below = curves < (low + fraction * (height - low))[:, None]
    first = np.where(below & (index < peaks[:, None]), index, -1).max(1) + 1
    last = np.where(below & (index > peaks[:, None]), index, len(index)).min(1) - 1
    return first, last


def _seconds(video: Video, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the clips first..last, both included, inside the video."""
    start, end = video.grid.span_to_seconds(first, last + (not video.grid.end_inclusive))
    return np.maximum(start, 0), np.minimum(end, video.duration)


@dataclass(frozen=True)
class ClipScores:
    """Scores of clips in (0, 1] by their similarity to the sentence, relative to the best clip.

    `exp((s - max s) / temperature)` of the smoothed cosine s: what `tvg_lib.decoding.ground` takes
    as external scores.

    Attributes:
        smoothing: clips, an odd number.
        temperature: the difference in cosine that costs a factor e. 0.1 was the best of 0.05, 0.1,
            0.2 and 0.4 on the held-out videos of QVH-captions' val, by mAP; all were close.
    """

    smoothing: int = 5
    temperature: float = 0.1

    def of(self, dataset: GroundingDataset) -> dict[str, np.ndarray]:
        """(T,) scores by query id."""
        scores = {}
        for query in dataset.queries:
            curve = smooth(similarity(dataset, query), self.smoothing)
            scores[query.id] = np.exp((curve - curve.max()) / self.temperature).astype(np.float32)
        return scores


@dataclass(frozen=True)
class ZeroShotWindow:
    """Best window around the most similar clip.

    1. The cosine of the query with every clip, averaged over `smoothing` clips, gives a curve.
    2. The highest peak grows to both sides as long as the curve stays at or above
       `low + fraction * (peak - low)`, where `low` is the curve's minimum.
    3. Further answers come from the next-highest local maxima outside the windows found so far,
       each grown by the same rule from its own height. The height of its peak is a window's score,
       the curve itself the highlight score of the clips.

    Attributes:
        smoothing: clips, an odd number.
        fraction: between 0 (the whole video) and 1 (the peak alone).
        keep: most windows of a query.
    """

    smoothing: int = 5
    fraction: float = 0.5
    keep: int = 10

    def __post_init__(self) -> None:
        if self.smoothing < 1 or self.smoothing % 2 == 0:
            raise ConfigurationError(f"smoothing is an odd number of clips, found {self.smoothing}")
        if not 0 <= self.fraction <= 1:
            raise ConfigurationError(f"fraction lies between 0 and 1, found {self.fraction}")
        if self.keep < 1:
            raise ConfigurationError(f"at least one window must be kept, found keep={self.keep}")

    def windows(self, curve: np.ndarray) -> list[tuple[int, int, float]]:
        """First clip, last clip and score of each window of a smoothed curve (T,), best first."""
        padded = np.concatenate([[-np.inf], curve, [-np.inf]])
        peaks = np.flatnonzero((curve >= padded[:-2]) & (curve >= padded[2:]))
        taken = np.zeros(len(curve), bool)
        found: list[tuple[int, int, float]] = []
        for peak in peaks[np.argsort(-curve[peaks], kind="stable")]:
            if taken[peak]:
                continue
            first, last = (int(end[0]) for end in grow(curve[None], peak[None], self.fraction))
            taken[first : last + 1] = True
            found.append((first, last, float(curve[peak])))
            if len(found) == self.keep:
                break
        return found

    def predict(self, dataset: GroundingDataset) -> list[Prediction]:
        """Ranked moments of every query, in the order of the data set's queries."""
        return [
            self._answer(dataset, query, similarity(dataset, query)) for query in dataset.queries
        ]

    def _answer(self, dataset: GroundingDataset, query: Query, cosines: np.ndarray) -> Prediction:
        curve = smooth(cosines, self.smoothing)
        video = dataset.videos[query.video_id]
        first, last, score = np.array(self.windows(curve)).T
        moments = np.stack([*_seconds(video, first, last), score], axis=1)
        # A clip may begin where an annotation says the video has ended.
        moments = moments[moments[:, 1] > moments[:, 0]]
        return Prediction(
            query.id,
            query.video_id,
            query.text,
            moments,
            curve.astype(np.float32),
            truth=query.moments,
            duration=video.duration,
        )

    def fitted(self, dataset: GroundingDataset) -> "ZeroShotWindow":
        """The rule with the smoothing and fraction that do best on a data set.

        Best is the highest R1@0.5 + R1@0.7 over `SMOOTHINGS` x `FRACTIONS`; of equals the first.
        """
        if not len(dataset):
            raise DataError(f"{dataset.name} has no queries to choose a rule on")
        cosines = [similarity(dataset, query) for query in dataset.queries]
        by_length: dict[int, list[int]] = {}
        for i, curve in enumerate(cosines):
            by_length.setdefault(len(curve), []).append(i)
        quality: dict[ZeroShotWindow, float] = {}
        for width in SMOOTHINGS:
            curves = {
                length: np.stack([smooth(cosines[i], width) for i in members])
                for length, members in by_length.items()
            }
            for fraction in FRACTIONS:
                moments: list[np.ndarray] = [np.empty(0)] * len(dataset)
                for length, members in by_length.items():
                    ends = grow(curves[length], curves[length].argmax(1), fraction)
                    for i, first, last in zip(members, *ends, strict=True):
                        video = dataset.videos[dataset.queries[i].video_id]
                        moments[i] = np.array([_seconds(video, first, last)])
                overlap = [
                    interval_iou(moment, query.moments).max()
                    for moment, query in zip(moments, dataset.queries, strict=True)
                ]
                rule = replace(self, smoothing=width, fraction=fraction)
                quality[rule] = sum(np.mean(np.array(overlap) >= t) for t in (0.5, 0.7))
        return max(quality, key=lambda rule: quality[rule])


@dataclass(frozen=True)
class MomentPrior:
    """The same windows, as shares of the video's length, for every query.

    Candidates are all windows on a raster of `1 / RASTER` of the video. They are chosen greedily on
    training moments: first the one that hits most queries at IoU 0.5, then the one that hits most
    of the queries not hit so far, and so on; of equals, the one with the higher mean IoU. The share
    of queries that a window newly hits is its score.

    Attributes:
        windows: (N, 3) start, end (shares of the duration) and score, best first.
        density: (RASTER,) share of training queries that have a moment over each piece of a video;
            the highlight score of its clips.
    """

    RASTER = 30

    windows: np.ndarray = field(repr=False)
    density: np.ndarray = field(repr=False)

    @classmethod
    def fitted(cls, dataset: GroundingDataset, keep: int = 10) -> "MomentPrior":
        """Choose the windows on a data set's moments.

        Raises:
            DataError: the data set has no queries.
        """
        if not len(dataset):
            raise DataError(f"{dataset.name} has no queries to learn a prior from")
        edges = np.arange(cls.RASTER + 1) / cls.RASTER
        candidates = np.array([(a, b) for a in edges for b in edges if a < b])
        shares = [
            query.moments / dataset.videos[query.video_id].duration for query in dataset.queries
        ]
        overlap = np.stack([interval_iou(candidates, s).max(1) for s in shares], axis=1)  # (N, Q)
        hits, mean = overlap >= 0.5, overlap.mean(1)
        open_queries = np.ones(len(dataset), bool)
        chosen: list[tuple[float, float, float]] = []
        free = np.ones(len(candidates), bool)
        for _ in range(min(keep, len(candidates))):
            gain = (hits & open_queries).mean(1)
            best = max(np.flatnonzero(free), key=lambda i: (gain[i], mean[i]))
            chosen.append((*candidates[best], gain[best]))
            free[best] = False
            open_queries &= ~hits[best]
        pieces = np.stack([edges[:-1], edges[1:]], axis=1)
        density = np.mean([(interval_iou(pieces, s) > 0).any(1) for s in shares], axis=0)
        return cls(np.array(chosen), density)

    def predict(self, dataset: GroundingDataset) -> list[Prediction]:
        """The windows in seconds, for every query; neither features nor words are read."""
        return list(self._answers(dataset, dataset.queries))

    def _answers(self, dataset: GroundingDataset, queries: Sequence[Query]) -> Iterator[Prediction]:
        for query in queries:
            video = dataset.videos[query.video_id]
            scale = np.array([video.duration, video.duration, 1.0])
            clips = max(1, round(video.duration / video.grid.step))
            piece = (np.arange(clips) + 0.5) / clips * self.RASTER
            saliency = self.density[piece.astype(int)].astype(np.float32)
            yield Prediction(
                query.id,
                query.video_id,
                query.text,
                self.windows * scale,
                saliency,
                truth=query.moments,
                duration=video.duration,
            )
