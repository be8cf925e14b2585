"""Moments, their overlap, and the one place where clip indices and seconds meet.

Seconds live at the two ends of the pipeline (annotations, predictions); the grid index lives in the
middle. Every conversion goes through `TimeGrid`, because silent off-by-one-clip errors are the
commonest fault of grounding code.

    clip index     0        1        2        3          stride between clip starts
    seconds     |--------|                               clip_size covered by clip 0
                     |--------|                          clips may overlap (stride < clip_size)
                          |--------|
"""

from dataclasses import dataclass, replace
from math import ceil, floor, isfinite, isnan
from typing import TypeVar

import numpy as np
import torch

from tvg_lib import inline
from tvg_lib.errors import DataError, GridMismatchError

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True, slots=True)
class Moment:
    """A stretch of a video, in seconds; `score` is set when it is a prediction."""

    start: float
    end: float
    score: float | None = None

    def __post_init__(self) -> None:
        if not (isfinite(self.start) and isfinite(self.end)):
            raise DataError(f"a moment needs finite ends, found [{self.start}, {self.end}]")
        if self.end < self.start:
            raise DataError(f"a moment ends before it starts: [{self.start}, {self.end}]")
        if self.score is not None and isnan(self.score):
            raise DataError(f"the score of a moment may not be NaN: [{self.start}, {self.end}]")

    @property
    def length(self) -> float:
        """Duration in seconds."""
        return self.end - self.start

    @property
    def center(self) -> float:
        """Midpoint in seconds."""
        return (self.start + self.end) / 2

    def iou(self, other: "Moment") -> float:
        """Intersection over union of two moments, in [0, 1]."""
        pair = np.array([[self.start, self.end], [other.start, other.end]])
        return float(interval_iou(pair[:1], pair[1:])[0, 0])

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score={self.score:.3f}"
        return f"Moment({self.start:.2f}-{self.end:.2f} s{score})"

    def _repr_html_(self) -> str:
        score = "" if self.score is None else f" · score {self.score:.3f}"
        note = f"{inline.span(self.start, self.end, self.end)}{score}"
        row = inline.Row("moment", [(self.start, self.end)], inline.ANSWER, note)
        return inline.bars([row], self.end)


def interval_iou(a: Array, b: Array) -> Array:
    """Pairwise intersection over union of intervals.

    Args:
        a: (..., N, 2) starts and ends.
        b: (..., M, 2) starts and ends, same kind of array, leading axes broadcastable.

    Returns:
        (..., N, M) in [0, 1]; two empty intervals overlap by 0.
    """
    xp = torch if isinstance(a, torch.Tensor) else np
    a_start, a_end = a[..., :, None, 0], a[..., :, None, 1]
    b_start, b_end = b[..., None, :, 0], b[..., None, :, 1]
    overlap = xp.minimum(a_end, b_end) - xp.maximum(a_start, b_start)
    overlap = overlap.clip(min=0) if xp is np else overlap.clamp(min=0)
    union = (a_end - a_start) + (b_end - b_start) - overlap
    return xp.where(union > 0, overlap / xp.where(union > 0, union, xp.ones_like(union)), 0.0)


@dataclass(frozen=True, slots=True)
class TimeGrid:
    """How a sequence of clip features lies on the time axis of its video.

    Clip `i` is computed from the frames `[i * stride, i * stride + clip_size)` of a stream of `fps`
    frames per second that begins `offset` seconds into the video. Both may be fractional, so that a
    grid given in seconds is `TimeGrid(clip_size=2, stride=2, fps=1)`.

    Attributes:
        clip_size: frames seen by one clip feature.
        stride: frames between the starts of neighbouring clips.
        fps: frames per second of the stream the features were computed from.
        offset: seconds before the first frame of clip 0.
        end_inclusive: whether the last clip of an index span `(first, last)` belongs to the span.
    """

    clip_size: float
    stride: float
    fps: float
    offset: float = 0.0
    end_inclusive: bool = True

    def __post_init__(self) -> None:
        for name in ("clip_size", "stride", "fps"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise DataError(f"TimeGrid.{name} must be a positive number, found {value!r}")
        if not isfinite(self.offset):
            raise DataError(f"TimeGrid.offset must be finite, found {self.offset!r}")

    @property
    def step(self) -> float:
        """Seconds between the starts of neighbouring clips."""
        return self.stride / self.fps

    @property
    def clip_seconds(self) -> float:
        """Seconds covered by one clip."""
        return self.clip_size / self.fps

    def to_seconds(self, index: Array | float) -> Array | float:
        """Time of a (fractional) index: index `i` stands at the middle of clip `i`."""
        return self.offset + (index * self.stride + 0.5 * self.clip_size) / self.fps

    def to_index(self, seconds: Array | float) -> Array | float:
        """Fractional index of a time; the inverse of `to_seconds`."""
        return ((seconds - self.offset) * self.fps - 0.5 * self.clip_size) / self.stride

    def clip_span(self, index: int) -> tuple[float, float]:
        """Start and end in seconds of the footage that clip `index` was computed from."""
        start = self.offset + index * self.step
        return start, start + self.clip_seconds

    def span_to_seconds(self, first: Array | int, last: Array | int) -> tuple:
        """Seconds of a span of clips, each clip standing for `stride` frames of the video.

        With `end_inclusive` the span holds clips first..last, otherwise first..last-1. Tiles of one
        stride (not of one clip) are used so that neighbouring spans touch without overlapping.
        """
        extra = 1 if self.end_inclusive else 0
        return self.offset + first * self.step, self.offset + (last + extra) * self.step

    def seconds_to_span(self, start: float, end: float, num_clips: int) -> tuple[int, int]:
        """The span of clips that a moment covers: every clip tile it overlaps by half or more.

        At least one clip is returned, the one under the moment's centre. The inverse of
        `span_to_seconds` on spans.

        Raises:
            DataError: if `end < start`, an end is not finite, or there are no clips.
        """
        if not (isfinite(start) and isfinite(end) and start <= end):
            raise DataError(f"a moment has finite ends in order, found [{start}, {end}]")
        if num_clips < 1:
            raise DataError(f"a span needs at least one clip, found num_clips={num_clips}")
        first = ceil((start - self.offset) / self.step - 0.5)
        last = floor((end - self.offset) / self.step + 0.5) - 1
        if last < first:
            first = last = floor(((start + end) / 2 - self.offset) / self.step)
        first = min(max(first, 0), num_clips - 1)
        last = min(max(last, first), num_clips - 1)
        return (first, last) if self.end_inclusive else (first, last + 1)

    def expected_clips(self, duration: float) -> tuple[int, int]:
        """Fewest and most clips that feature extractors produce for `duration` seconds.

        The fewest: only clips that lie wholly inside the video. The most: every clip that starts
        inside it (the tail padded), plus one for the rounding of durations and frame rates.
        """
        seconds = max(duration - self.offset, 0.0)
        frames = seconds * self.fps
        fewest = floor((frames - self.clip_size) / self.stride) + 1
        most = floor(frames / self.stride) + 2
        return max(fewest - 1, 1), max(most, 1)

    def check(self, num_clips: int, duration: float, name: str) -> None:
        """Raise if a sequence of `num_clips` features cannot be a video of `duration` seconds.

        Raises:
            GridMismatchError: names both numbers, the grid and `name`.
            DataError: there are no clips, or the duration is not a positive number.
        """
        if num_clips < 1:
            raise DataError(f"{name}: a video has at least one clip, found {num_clips}")
        if not (isfinite(duration) and duration > 0):
            raise DataError(f"{name}: a duration is a positive number of seconds: {duration}")
        fewest, most = self.expected_clips(duration)
        slack = max(1, round(0.01 * most))  # containers and annotations disagree by up to 1 %
        if not fewest - slack <= num_clips <= most + slack:
            last = self.clip_span(num_clips - 1)[1]
            raise GridMismatchError(
                f"{name}: {num_clips} clips on this grid reach to {last:.2f} s, but the annotation "
                f"says the video lasts {duration:.2f} s ({fewest} to {most} clips expected); check "
                f"{self!r}"
            )

    def downsample(self, factor: int) -> "TimeGrid":
        """The grid that keeps every `factor`-th clip."""
        if factor < 1:
            raise DataError(f"a grid is downsampled by a positive integer, found {factor!r}")
        return replace(self, stride=self.stride * factor)

    def resample(self, num_clips: int, length: int) -> "TimeGrid":
        """The grid on which the footage of `num_clips` clips is divided into `length` equal ones.

        For models that bring every video to a fixed number of clips (SnAG on Charades-STA and
        ActivityNet Captions).
        """
        if num_clips < 1 or length < 1:
            raise DataError(f"{num_clips} clips cannot be resampled to {length}: both are positive")
        size = ((num_clips - 1) * self.stride + self.clip_size) / length
        return replace(self, clip_size=size, stride=size)


# Grids of the papers' features (facts of their configuration files).
TACOS_C3D = TimeGrid(clip_size=16, stride=16, fps=29.4)
EGO4D_30FPS = TimeGrid(clip_size=32, stride=16, fps=30)
MAD_5FPS = TimeGrid(clip_size=1, stride=1, fps=5)
QVHIGHLIGHTS_2S = TimeGrid(clip_size=2, stride=2, fps=1)
