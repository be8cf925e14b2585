"""What an encoder of pictures is, and a pair of encoders that share a space.

The sentence half is `tvg_lib.encoders.sentence.SentenceEncoder`. Three pairs are at hand:

    tvg_lib.encoders.tiny.TinyDualEncoder   ShapeStories' own
    tvg_lib.encoders.clip.CLIP              real footage, through transformers
    EncoderPair(None, MiniLM())             features that something else has encoded
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import nn

from tvg_lib.encoders.sentence import SentenceEncoder

Resize = Literal["fit", "crop", "stretch"]


@runtime_checkable
class VideoEncoder(Protocol):
    """Windows of frames to vectors, and which windows it wants to see.

    `resize` says what becomes of a picture of another shape than `size`: "fit" keeps all of it and
    adds black bars, "crop" cuts the middle out, "stretch" distorts it.
    """

    @property
    def name(self) -> str:
        """Names the weights: the same name means the same vectors."""
        ...

    @property
    def dim(self) -> int:
        """Width D of every vector."""
        ...

    @property
    def frames(self) -> int:
        """Frames F of a window, each in the middle of its F-th part."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height H and width W of a frame, in pixels."""
        ...

    @property
    def window(self) -> float:
        """Length of a window in seconds."""
        ...

    @property
    def stride(self) -> float:
        """Seconds between the starts of neighbouring windows."""
        ...

    @property
    def resize(self) -> Resize: ...

    def encode(self, windows: np.ndarray) -> np.ndarray:
        """(N, D) float32 unit vectors of windows (N, F, H, W, 3) uint8, red first."""
        ...


class DualEncoder(Protocol):
    """Two encoders that belong together; `video` is None where clips come encoded."""

    @property
    def video(self) -> VideoEncoder | None: ...

    @property
    def text(self) -> SentenceEncoder: ...


@dataclass(frozen=True)
class EncoderPair:
    """A `DualEncoder` of any two halves.

    Attributes:
        video: None where clips come encoded by something else.
        text: for zero-shot rules its sentence vectors lie in the space of the clips.
    """

    video: VideoEncoder | None
    text: SentenceEncoder


def weights_name(prefix: str, module: nn.Module, *more: object) -> str:
    """A name that changes with any weight, so that cached features are never another encoder's."""
    digest = hashlib.sha256(repr(more).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return f"{prefix}-{digest.hexdigest()[:16]}"
