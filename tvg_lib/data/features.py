"""Feature stores: (T, C) float32 sequences by id, read when asked for."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class FeatureStore(Protocol):
    """A read-only mapping from ids to feature sequences."""

    @property
    def dim(self) -> int:
        """Width C of every sequence."""
        ...

    def __getitem__(self, key: str) -> np.ndarray:
        """(T, C) float32, T >= 1, finite; a `DataError` names the id and the file otherwise."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...
