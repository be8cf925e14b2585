"""The same videos and queries seen by two encoders at once."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.data.features import FeatureStore
from tvg_lib.errors import DataError


class StackedFeatures:
    """Two feature stores side by side, each sequence scaled to rows of length 1 first."""

    def __init__(self, first: FeatureStore, second: FeatureStore) -> None:
        self._stores = (first, second)

    @property
    def dim(self) -> int:
        """Width of both together."""
        return sum(store.dim for store in self._stores)

    def __getitem__(self, key: str) -> np.ndarray:
        """(T, C) float32.

        Raises:
            DataError: the two have different lengths.
        """
        first, second = (store[key] for store in self._stores)
        if len(first) != len(second):
            raise DataError(f"{key!r}: {len(first)} rows of one encoder, {len(second)} of another")
        return np.concatenate([_unit(first), _unit(second)], axis=1)

    def __contains__(self, key: object) -> bool:
        return all(key in store for store in self._stores)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._stores[0] if key in self._stores[1])

    def __len__(self) -> int:
        return sum(1 for _ in self)


def paired(first: GroundingDataset, second: GroundingDataset, name: str) -> GroundingDataset:
    """`first` with the clip and sentence features of `second` beside its own.

    What reads all channels sees both encoders; `A2FAConfig.guide_channels` takes the features from
    the first and the mask from the second. Word features are those of `first`.

    Raises:
        DataError: the data sets differ in videos or queries, or have no sentence vectors.
    """
    if set(first.videos) != set(second.videos) or [q.id for q in first.queries] != [
        q.id for q in second.queries
    ]:
        raise DataError(f"{first.name} and {second.name} hold different videos or queries")
    if first.sentence_features is None or second.sentence_features is None:
        raise DataError(f"{first.name} and {second.name}: both need sentence vectors")
    return replace(
        first,
        name=name,
        video_features=StackedFeatures(first.video_features, second.video_features),
        sentence_features=StackedFeatures(first.sentence_features, second.sentence_features),
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(lengths, 1e-8)).astype(np.float32)
