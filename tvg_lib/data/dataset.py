"""The one in-memory form of every data set: videos, queries, moments in seconds, time grids."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from math import isfinite

import numpy as np

from tvg_lib.data.features import FeatureStore
from tvg_lib.errors import DataError
from tvg_lib.moments import TimeGrid


@dataclass(frozen=True, slots=True)
class Video:
    """A video of a data set.

    Attributes:
        id: unique in its data set.
        duration: seconds.
        grid: where its features lie in time.
        recording: what the video was cut from, where several are cut from one; None stands for a
            recording of its own. Such videos are neither split from each other nor independent.
    """

    id: str
    duration: float
    grid: TimeGrid
    recording: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (isfinite(self.duration) and self.duration > 0):
            raise DataError(
                f"video {self.id!r}: a duration is a positive number of seconds, found "
                f"{self.duration!r}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Saliency:
    """Highlight annotation of a query (QVHighlights): scores of chosen clips by several annotators.

    Attributes:
        clips: (K,) clip indices.
        scores: (K, A) one integer score (0..4) per clip and annotator.
    """

    clips: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        if self.clips.ndim != 1 or self.scores.ndim != 2 or len(self.clips) != len(self.scores):
            raise DataError(
                "saliency has (K,) clips and (K, A) scores, found shapes "
                f"{self.clips.shape} and {self.scores.shape}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A sentence about a video and the moments it describes.

    Attributes:
        id: unique in its data set.
        video_id: the video it is asked of.
        text: the sentence.
        moments: (M, 2) start and end in seconds, M >= 1 where annotations are given.
        saliency: highlight scores, where the data set has them.
    """

    id: str
    video_id: str
    text: str
    moments: np.ndarray
    saliency: Saliency | None = None

    def __post_init__(self) -> None:
        if self.moments.ndim != 2 or self.moments.shape[1] != 2:
            raise DataError(
                f"query {self.id!r}: moments are a (M, 2) array of start and end, found shape "
                f"{self.moments.shape}"
            )


@dataclass(frozen=True, eq=False)
class GroundingDataset:
    """Videos, queries about them, and lazily read features of both.

    Attributes:
        name: for records and messages, e.g. "qvh-captions/val".
        videos: by id.
        queries: in a fixed order.
        video_features: (T, C) clip features by video id, read when asked for.
        text_features: (K, C) word features by query id.
        sentence_features: (1, C) one vector by query id, in the space of the clip features; None
            where the encoder has no such space.
    """

    name: str
    videos: Mapping[str, Video]
    queries: tuple[Query, ...]
    video_features: FeatureStore
    text_features: FeatureStore
    sentence_features: FeatureStore | None = None
    _by_video: dict[str, list[int]] = field(init=False, repr=False, compare=False)
    _by_id: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_video: dict[str, list[int]] = {}
        by_id: dict[str, int] = {}
        for position, query in enumerate(self.queries):
            if query.id in by_id:
                raise DataError(f"{self.name}: query id {query.id!r} occurs twice")
            by_id[query.id] = position
            if query.video_id not in self.videos:
                raise DataError(
                    f"{self.name}: query {query.id!r} asks about video {query.video_id!r}, "
                    f"which is not among the {len(self.videos)} videos"
                )
            by_video.setdefault(query.video_id, []).append(position)
        object.__setattr__(self, "_by_video", by_video)
        object.__setattr__(self, "_by_id", by_id)
        self._check_moments()

    def _check_moments(self) -> None:
        """Moments lie in their videos: the readers clip and count, nothing else may slip in."""
        misnamed = next((key for key, video in self.videos.items() if video.id != key), None)
        if misnamed is not None:
            raise DataError(
                f"{self.name}: the video under {misnamed!r} is called {self.videos[misnamed].id!r}"
            )
        if not self.queries:
            return
        owners: np.ndarray = np.repeat(
            np.arange(len(self.queries)), [len(q.moments) for q in self.queries]
        )
        start, end = np.concatenate([query.moments for query in self.queries]).T
        durations = np.array([self.videos[query.video_id].duration for query in self.queries])
        slack = 1e-3  # seconds: rounding of published times and durations
        inside = (start >= -slack) & (start <= end) & (end <= durations[owners] + slack)
        if not inside.all():  # NaN is not inside either
            bad = int(np.argmin(inside))
            query = self.queries[owners[bad]]
            raise DataError(
                f"{self.name}: query {query.id!r} has the moment [{start[bad]}, {end[bad]}], which "
                f"does not lie in its video {query.video_id!r} of {durations[owners[bad]]} s"
            )

    def __len__(self) -> int:
        return len(self.queries)

    def query(self, query_id: str) -> Query:
        """The query of an id.

        Raises:
            DataError: there is none.
        """
        if query_id not in self._by_id:
            raise DataError(f"{self.name} has no query {query_id!r}")
        return self.queries[self._by_id[query_id]]

    def positions_of(self, video_id: str) -> tuple[int, ...]:
        """Where in `queries` the queries about one video are."""
        return tuple(self._by_video.get(video_id, ()))

    def queries_of(self, video_id: str) -> list[Query]:
        """The queries about one video, in order."""
        return [self.queries[i] for i in self.positions_of(video_id)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything a model can see: annotations and all features."""
        digest = hashlib.sha256()
        for video in self.videos.values():
            digest.update(repr(video).encode())
            digest.update(np.ascontiguousarray(self.video_features[video.id]).tobytes())
        for query in self.queries:
            digest.update(repr((query.id, query.video_id, query.text)).encode())
            digest.update(np.ascontiguousarray(query.moments, dtype=np.float64).tobytes())
            digest.update(np.ascontiguousarray(self.text_features[query.id]).tobytes())
            if self.sentence_features is not None:
                digest.update(np.ascontiguousarray(self.sentence_features[query.id]).tobytes())
            if query.saliency is not None:
                digest.update(np.ascontiguousarray(query.saliency.clips).tobytes())
                digest.update(np.ascontiguousarray(query.saliency.scores).tobytes())
        return digest.hexdigest()

    def subset(self, video_ids: Iterable[str], name: str) -> "GroundingDataset":
        """The same data restricted to some videos."""
        keep = set(video_ids)
        unknown = keep - set(self.videos)
        if unknown:
            raise DataError(f"{self.name} has no video {sorted(unknown)[0]!r}")
        return replace(
            self,
            name=name,
            videos={key: video for key, video in self.videos.items() if key in keep},
            queries=tuple(query for query in self.queries if query.video_id in keep),
        )

    def split(self, fraction: float, seed: int) -> tuple["GroundingDataset", "GroundingDataset"]:
        """Hold about `fraction` of the videos out; no recording is on both sides.

        Returns:
            (kept, held out)

        Raises:
            DataError: the fraction is not between 0 and 1, or one side would have no video.
        """
        if not 0 < fraction < 1:
            raise DataError(f"the held-out fraction lies between 0 and 1, found {fraction}")
        recordings = self._shuffled_recordings(seed)
        count = max(1, round(fraction * len(self.videos)))
        held: list[str] = []
        for videos in recordings:
            if len(held) >= count:
                break
            held += videos
        if len(held) == len(self.videos):
            raise DataError(
                f"{self.name}: holding {fraction} of {len(self.videos)} videos out "
                f"({len(recordings)} recordings) leaves none to train on"
            )
        return self._without(held, "")

    def folds(self, count: int, seed: int) -> list[tuple["GroundingDataset", "GroundingDataset"]]:
        """For cross-validation: every video is held out once, with all of its recording.

        Returns:
            (kept, held out) of each fold; the folds are about equally large.

        Raises:
            DataError: fewer than two folds, or more than there are recordings.
        """
        recordings = self._shuffled_recordings(seed)
        if not 2 <= count <= len(recordings):
            raise DataError(
                f"{self.name} has {len(recordings)} recordings: expected 2 to as many folds, found "
                f"{count}"
            )
        held: list[list[str]] = [[] for _ in range(count)]
        for videos in recordings:
            min(held, key=len).extend(videos)
        return [self._without(part, str(number)) for number, part in enumerate(held)]

    def _shuffled_recordings(self, seed: int) -> list[list[str]]:
        """The ids of the videos of each recording, the recordings in a random order."""
        recordings: dict[str, list[str]] = {}
        for video in sorted(self.videos.values(), key=lambda video: video.id):
            recordings.setdefault(video.recording or video.id, []).append(video.id)
        order = np.random.default_rng(seed).permutation(sorted(recordings))
        return [recordings[name] for name in order]

    def _without(
        self, held: Sequence[str], suffix: str
    ) -> tuple["GroundingDataset", "GroundingDataset"]:
        """(kept, held out), with names that end in the suffix."""
        return (
            self.subset(self.videos.keys() - held, f"{self.name}-train{suffix}"),
            self.subset(held, f"{self.name}-held{suffix}"),
        )

    def recording_of(self, query: Query) -> str:
        """The recording that a query is about."""
        return self.videos[query.video_id].recording or query.video_id

    def clips(self, video_id: str) -> np.ndarray:
        """(T, C) clip features of a video, checked against its grid and duration.

        Raises:
            GridMismatchError: they do not fit; names both numbers.
            DataError: there is no such video, or its features are missing or broken.
        """
        if video_id not in self.videos:
            raise DataError(f"{self.name} has no video {video_id!r}")
        video = self.videos[video_id]
        features = self.video_features[video_id]
        video.grid.check(len(features), video.duration, f"{self.name}: video {video_id!r}")
        return features

    def check(self) -> None:
        """Read every feature once, one at a time, and check it.

        Raises:
            GridMismatchError: a video's features do not fit its duration.
            DataError: features are missing, empty, of mixed width, or not finite.
        """
        for video_id in self.videos:
            self._check_width(self.clips(video_id), self.video_features, video_id)
        for store in (self.text_features, self.sentence_features):
            if store is not None:
                for query in self.queries:
                    self._check_width(store[query.id], store, query.id)

    def _check_width(self, features: np.ndarray, store: FeatureStore, key: str) -> None:
        if features.ndim != 2 or features.shape[1] != store.dim or not np.isfinite(features).all():
            raise DataError(
                f"{self.name}: the features of {key!r} are not finite (T, {store.dim}): found "
                f"shape {features.shape}"
            )

    def __repr__(self) -> str:
        hours = sum(video.duration for video in self.videos.values()) / 3600
        return (
            f"GroundingDataset({self.name}: {len(self.videos)} videos, {hours:.1f} h, "
            f"{len(self.queries)} queries)"
        )

    def _repr_html_(self) -> str:
        counts = {
            "videos": len(self.videos),
            "hours": f"{sum(video.duration for video in self.videos.values()) / 3600:.1f}",
            "queries": len(self.queries),
            "moments": sum(len(query.moments) for query in self.queries),
            "with saliency": sum(query.saliency is not None for query in self.queries),
            "grids": len({video.grid for video in self.videos.values()}),
        }
        head = "".join(f"<th>{name}</th>" for name in counts)
        row = "".join(f"<td>{value}</td>" for value in counts.values())
        return f"<b>{escape(self.name)}</b><table><tr>{head}</tr><tr>{row}</tr></table>"
