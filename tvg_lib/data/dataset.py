"""The one in-memory form of every data set: videos, queries, moments in seconds, one grid a video."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tvg_lib.data.features import FeatureStore
from tvg_lib.errors import DataError
from tvg_lib.moments import TimeGrid


@dataclass(frozen=True, slots=True)
class Video:
    """A video of a data set: its length in seconds and the grid its features lie on."""

    id: str
    duration: float
    grid: TimeGrid


@dataclass(frozen=True, slots=True)
class Saliency:
    """Highlight annotation of a query (QVHighlights): scores of chosen clips by several annotators.

    Attributes:
        clips: (K,) clip indices.
        scores: (K, A) one integer score (0..4) per clip and annotator.
    """

    clips: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True)
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
                    f"{self.name}: query {query.id!r} asks about video {query.video_id!r}, which is "
                    f"not among the {len(self.videos)} videos"
                )
            by_video.setdefault(query.video_id, []).append(position)
        object.__setattr__(self, "_by_video", by_video)
        object.__setattr__(self, "_by_id", by_id)

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
        """Hold `fraction` of the videos out, by video, so that no video is on both sides.

        Returns:
            (kept, held out)
        """
        if not 0 < fraction < 1:
            raise DataError(f"the held-out fraction lies between 0 and 1, found {fraction}")
        ids = sorted(self.videos)
        order = np.random.default_rng(seed).permutation(len(ids))
        held = {ids[i] for i in order[: max(1, round(fraction * len(ids)))]}
        return (
            self.subset(set(ids) - held, f"{self.name}-train"),
            self.subset(held, f"{self.name}-held"),
        )

    def check(self) -> None:
        """Read every feature once and check it against its grid; used by the doctor and by tests.

        Raises:
            GridMismatchError: a video's features do not fit its duration.
            DataError: features are missing, empty, of mixed width, or not finite.
        """
        for video in self.videos.values():
            video.grid.check(len(self.video_features[video.id]), video.duration, video.id)
        for query in self.queries:
            self.text_features[query.id]

    def __repr__(self) -> str:
        hours = sum(video.duration for video in self.videos.values()) / 3600
        return (
            f"GroundingDataset({self.name}: {len(self.videos)} videos, {hours:.1f} h, "
            f"{len(self.queries)} queries)"
        )
