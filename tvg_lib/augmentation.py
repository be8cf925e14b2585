"""More to train on, without more annotation. For training splits only.

QVH-captions has 1,550 annotated queries to train on, a fifth of what QVHighlights' own training
split has. Two ways to more of them, both counted in the records:

- *paraphrases*: the published rewordings of each query, with its moments;
- *caption queries*: a clip's own caption asked as a question, whose moment is the stretch round the
  clip where captions stay similar. No human marked these moments; they teach a model to match words
  and clips, not where people see a moment end.

ShapeStories has films of three lengths. A model that is tied to no length can learn words on short
films, where a step is cheap, and distances on longer ones: `joined`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tvg_lib.baselines import grow, smooth
from tvg_lib.data.dataset import GroundingDataset, Query
from tvg_lib.data.features import FeatureStore
from tvg_lib.data.qvh_captions import text_stores
from tvg_lib.encoders.sentence import MiniLM, SentenceEncoder
from tvg_lib.errors import DataError


def with_paraphrases(
    dataset: GroundingDataset,
    wordings: Mapping[str, Sequence[str]],
    encoder: SentenceEncoder | None = None,
) -> GroundingDataset:
    """Every query asked again in other words, with the same moments.

    Args:
        dataset: of QVH-captions.
        wordings: by query id, as from `qvh_captions.paraphrases`.
        encoder: all-MiniLM-L6-v2 by default; embeddings are cached.

    Returns:
        The data set with additional queries `<id>.1`, `<id>.2`, ...
    """
    others = [
        replace(query, id=f"{query.id}.{number}", text=text)
        for query in dataset.queries
        for number, text in enumerate(wordings.get(query.id, ()), start=1)
    ]
    return _with_queries(dataset, others, encoder, "paraphrased")


def with_caption_queries(
    dataset: GroundingDataset,
    captions: Mapping[str, Sequence[str]],
    per_video: int,
    seed: int = 0,
    fraction: float = 0.8,
    smoothing: int = 5,
    encoder: SentenceEncoder | None = None,
) -> GroundingDataset:
    """Some captions of every video asked as queries about it.

    The moment of a caption is grown round its clip as `ZeroShotWindow` grows a window round a peak,
    on the smoothed similarity of all captions of the video with this one.

    Args:
        dataset: of QVH-captions: its clip features are embeddings of captions.
        captions: by video id, as from `qvh_captions.captions`.
        per_video: how many, drawn without replacement.
        seed: of the choice.
        fraction, smoothing: of `grow` and `smooth`.
        encoder: all-MiniLM-L6-v2 by default; embeddings are cached.

    Returns:
        The data set with additional queries `<video id>#<clip>`.

    Raises:
        DataError: a video has no captions.
    """
    rng = np.random.default_rng(seed)
    others = []
    for video in dataset.videos.values():
        texts = captions.get(video.id, ())
        if not texts:
            raise DataError(f"{dataset.name}: no captions of video {video.id!r}")
        clips = dataset.clips(video.id)
        for clip in rng.choice(len(texts), min(per_video, len(texts)), replace=False):
            curve = smooth(clips @ clips[clip], smoothing)
            first, last = (int(end[0]) for end in grow(curve[None], clip[None], fraction))
            start, end = video.grid.span_to_seconds(first, last)
            end = min(end, video.duration)
            if end > start:
                moment = np.array([[start, end]])
                others.append(Query(f"{video.id}#{clip}", video.id, texts[clip], moment))
    return _with_queries(dataset, others, encoder, f"captioned{per_video}")


def joined(first: GroundingDataset, second: GroundingDataset) -> GroundingDataset:
    """The videos and queries of two data sets as one, those of `first` first.

    Raises:
        DataError: an id occurs in both, their features differ in width, or only one of them has
            sentence vectors.
    """
    twice = first.videos.keys() & second.videos.keys()
    if twice:
        raise DataError(f"{first.name} and {second.name} both hold a video {min(twice)!r}")
    sentences = [s for s in (first.sentence_features, second.sentence_features) if s is not None]
    if len(sentences) == 1:
        raise DataError(f"{first.name} and {second.name}: only one of them has sentence vectors")
    return GroundingDataset(
        name=f"{first.name}+{second.name}",
        videos={**first.videos, **second.videos},
        queries=(*first.queries, *second.queries),
        video_features=JoinedFeatures(first.video_features, second.video_features),
        text_features=JoinedFeatures(first.text_features, second.text_features),
        sentence_features=JoinedFeatures(*sentences) if sentences else None,
    )


def _with_queries(
    dataset: GroundingDataset,
    others: Sequence[Query],
    encoder: SentenceEncoder | None,
    suffix: str,
) -> GroundingDataset:
    """`dataset` with more queries, whose words are embedded and cached."""
    name = f"{dataset.name}-{suffix}"
    words, whole = text_stores(others, encoder or MiniLM(), name)
    sentences = dataset.sentence_features
    return replace(
        dataset,
        name=name,
        queries=(*dataset.queries, *others),
        text_features=JoinedFeatures(dataset.text_features, words),
        sentence_features=None if sentences is None else JoinedFeatures(sentences, whole),
    )


class JoinedFeatures:
    """Two feature stores with different ids seen as one."""

    def __init__(self, first: FeatureStore, second: FeatureStore) -> None:
        if first.dim != second.dim:
            raise DataError(f"stores of width {first.dim} and {second.dim} cannot be joined")
        self._first, self._second = first, second

    @property
    def dim(self) -> int:
        """Width C of every sequence."""
        return self._first.dim

    def __getitem__(self, key: str) -> np.ndarray:
        """(T, C) float32."""
        return (self._first if key in self._first else self._second)[key]

    def __contains__(self, key: object) -> bool:
        return key in self._first or key in self._second

    def __iter__(self) -> Iterator[str]:
        yield from self._first
        yield from self._second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)
