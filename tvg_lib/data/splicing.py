"""Long films out of short videos: QVH-long, and the same for any data set on one grid."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from tvg_lib.data.dataset import GroundingDataset, Query, Video
from tvg_lib.data.features import FeatureStore
from tvg_lib.errors import DataError


@dataclass(frozen=True, slots=True)
class Part:
    """A video inside a film: its first clip there and the number of clips it fills."""

    video_id: str
    first_clip: int
    num_clips: int


class SplicedFeatures:
    """Films made of videos end to end; a film's features are joined only when they are read."""

    def __init__(self, source: FeatureStore, films: Mapping[str, tuple[Part, ...]]) -> None:
        self._source = source
        self.films = films

    @property
    def dim(self) -> int:
        """Width C of every sequence."""
        return self._source.dim

    def __getitem__(self, key: str) -> np.ndarray:
        """(T, C) float32: the parts in order, each held at its last clip for its full length."""
        if key not in self.films:
            raise DataError(f"no film {key!r} among {len(self.films)}")
        parts = self.films[key]
        end = parts[-1].first_clip + parts[-1].num_clips
        film = np.empty((end, self.dim), np.float32)
        for part in parts:
            clips = self._source[part.video_id]
            film[part.first_clip : part.first_clip + len(clips)] = clips
            film[part.first_clip + len(clips) : part.first_clip + part.num_clips] = clips[-1]
        return film

    def __contains__(self, key: object) -> bool:
        return key in self.films

    def __iter__(self) -> Iterator[str]:
        return iter(self.films)

    def __len__(self) -> int:
        return len(self.films)


def spliced(dataset: GroundingDataset, videos_per_film: int, seed: int) -> GroundingDataset:
    """Long films out of short videos: the videos, shuffled, `videos_per_film` of them end to end.

    Every query is asked over the whole film, with its moments (and highlight clips) moved to where
    its video stands. 24 videos of 150 s make one hour (1,800 clips), 72 make three (5,400 clips).
    Every video is used once; the last film holds what remains and may be shorter. Where a video has
    fewer clips than its duration asks for, its last clip is repeated, so that no moment reaches
    into its neighbour.

    Videos cut from the same recording can meet in one film, and a film can hold a second answer
    that no annotator marked: figures on films are lower bounds, as on every spliced benchmark.

    Args:
        dataset: its videos share one grid without overlap or offset.
        videos_per_film: k.
        seed: of the shuffle; the same seed gives the same films.

    Raises:
        DataError: `videos_per_film` is not positive, or the grids differ.
    """
    if videos_per_film < 1:
        raise DataError(f"a film needs at least one video, found {videos_per_film}")
    grids = {video.grid for video in dataset.videos.values()}
    if len(grids) != 1:
        raise DataError(f"{dataset.name}: videos on {len(grids)} different grids make no film")
    (grid,) = grids
    if grid.offset != 0 or grid.clip_size != grid.stride:
        raise DataError(f"{dataset.name}: films need clips that touch and start at 0, found {grid}")
    ids = sorted(dataset.videos)
    order = [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))]
    films: dict[str, tuple[Part, ...]] = {}
    videos: dict[str, Video] = {}
    home: dict[str, tuple[str, int]] = {}
    for start in range(0, len(order), videos_per_film):
        name = f"film-{start // videos_per_film:04d}"
        parts, first = [], 0
        for video_id in order[start : start + videos_per_film]:
            asked = ceil(dataset.videos[video_id].duration / grid.step)
            clips = max(len(dataset.video_features[video_id]), asked)
            parts.append(Part(video_id, first, clips))
            home[video_id] = (name, first)
            first += clips
        films[name] = tuple(parts)
        videos[name] = Video(name, first * grid.step, grid)

    def moved(query: Query) -> Query:
        name, first = home[query.video_id]
        saliency = query.saliency
        if saliency is not None:
            saliency = replace(saliency, clips=saliency.clips + first)
        moments = query.moments + first * grid.step
        return replace(query, video_id=name, moments=moments, saliency=saliency)

    return replace(
        dataset,
        name=f"{dataset.name}-long{videos_per_film}-seed{seed}",
        videos=videos,
        queries=tuple(moved(query) for query in dataset.queries),
        video_features=SplicedFeatures(dataset.video_features, films),
    )
