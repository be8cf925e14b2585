"""From a video file to clips on a declared time grid, by timestamps, never by counting frames.

    read_windows   file ─▶ windows (N, F, H, W, 3), streaming
    encode_video   file ─▶ `EncodedVideo`: features (T, D), their grid, the duration
    cached_video   the same, kept on disk by the content of the file and the encoder
    frames_at      the pictures shown at given times

Whatever PyAV can open is read: variable frame rate, rotation metadata, a start time other than
zero, a container that does not know its length, B-frames, non-square pixels, odd sizes, gray, high
bit depths, transparency (over black). What cannot be right is a `DataError` that names the file: no
video stream, no pictures, no timestamps, or a file that ends before it says it does.

Conventions. Second 0 is when the first picture is shown. At any time one sees the latest picture
that was due, as in a player. The film ends when its last picture does. Window i covers
[i * stride, i * stride + window); there are just enough windows to cover the film, and past the
end the last picture stays.

Memory holds one picture of the file and the windows that are open, however long the film is.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import ceil, inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tvg_lib import paths
from tvg_lib.checkpoints import read_state, write_state
from tvg_lib.data.dataset import Video
from tvg_lib.data.features import check_sequence
from tvg_lib.encoders.protocols import Resize, VideoEncoder
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.fingerprint import value_fingerprint
from tvg_lib.moments import TimeGrid

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

FORMAT = "tvg-companion/encoded-video/1"
BATCH = 32  # windows encoded together
EPSILON = 1e-6  # seconds; time bases in use are coarser, rounding errors finer
ATTACHED_PICTURE = 0x400  # a stream that is the cover of a record (FFmpeg's disposition flag)


@dataclass(frozen=True)
class WindowPlan:
    """Which windows of a film are looked at, and how its pictures are brought to size.

    Attributes:
        frames, size, window, stride, resize: as of `VideoEncoder`.
    """

    frames: int
    size: tuple[int, int]
    window: float
    stride: float
    resize: Resize = "fit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        if self.frames < 1 or min(self.size) < 1:
            raise ConfigurationError(f"a window has frames and pixels, found {self}")
        if not (0 < self.window < inf and 0 < self.stride < inf):
            raise ConfigurationError(f"window and stride are positive seconds, found {self}")
        if self.resize not in ("fit", "crop", "stretch"):
            raise ConfigurationError(f"resize is 'fit', 'crop' or 'stretch': {self.resize!r}")

    @classmethod
    def of(cls, encoder: VideoEncoder) -> "WindowPlan":
        """What an encoder asks for."""
        return cls(encoder.frames, encoder.size, encoder.window, encoder.stride, encoder.resize)

    @property
    def grid(self) -> TimeGrid:
        """The grid of the windows, in seconds."""
        return TimeGrid(clip_size=self.window, stride=self.stride, fps=1.0)

    def count(self, duration: float) -> int:
        """How many windows cover a film: the last one reaches its end."""
        return max(1, ceil((duration - self.window - EPSILON) / self.stride) + 1)

    def times(self, index: int) -> np.ndarray:
        """(F,) the seconds at which window `index` looks."""
        return index * self.stride + (np.arange(self.frames) + 0.5) * (self.window / self.frames)


def read_windows(
    path: Path | str, plan: WindowPlan, batch: int = BATCH
) -> Iterator[tuple[np.ndarray, float]]:
    """Windows of a film in order, while it is being decoded.

    Args:
        path: of the file.
        plan: which windows.
        batch: windows at a time; the last batch may be smaller.

    Yields:
        windows (N, F, H, W, 3) uint8, and up to which second the film has been read; with the last
        batch that is its duration.

    Raises:
        DataError: the file cannot be read, or not whole; see the module.
    """
    waiting = _OpenWindows(plan)
    done: list[np.ndarray] = []
    shown: _Picture | None = None
    end = 0.0
    with _opened(Path(path)) as film:
        draw = _Drawing(film, plan.size, plan.resize)
        for frame, start, end in film.pictures():  # noqa: B007 (the last end is needed)
            if shown is not None:
                for window in waiting.show(shown, start):
                    if len(done) == batch:
                        yield np.stack(done), start
                        done = []
                    done.append(window)
            shown = _Picture(frame, draw)
        film.check_whole(end)
        if shown is None:
            raise DataError(f"{path}: the video stream holds no picture")
        for window in waiting.finish(shown, plan.count(end)):
            if len(done) == batch:
                yield np.stack(done), end
                done = []
            done.append(window)
    yield np.stack(done), end


class _OpenWindows:
    """Windows that have begun and wait for pictures; they fill in the order they began."""

    def __init__(self, plan: WindowPlan) -> None:
        self.plan = plan
        self.first = 0  # number of the oldest one
        self.windows: deque[tuple[np.ndarray, np.ndarray]] = deque()  # times, pixels
        self.clock = -inf

    def show(self, shown: "_Picture", until: float) -> Iterator[np.ndarray]:
        """Let a picture stand up to a time; yields windows that are full and surely needed."""
        number = self.first
        while self._fill(number, shown, until):
            times, pixels = self.windows[number - self.first]
            needed = number < self.plan.count(until)
            if number == self.first and times[-1] < until - EPSILON and needed:
                self.windows.popleft()
                self.first += 1
                yield pixels
            number += 1
        self.clock = until - EPSILON

    def finish(self, shown: "_Picture", count: int) -> Iterator[np.ndarray]:
        """The rest of `count` windows; the last picture fills them."""
        for number in range(self.first, count):
            self._fill(number, shown, inf)
            self.first += 1
            yield self.windows.popleft()[1]

    def _fill(self, number: int, shown: "_Picture", until: float) -> bool:
        """Put a picture wherever a window looks before `until`; False if it begins later."""
        if number - self.first == len(self.windows):
            times = self.plan.times(number)
            if times[0] >= until - EPSILON:
                return False
            shape = (self.plan.frames, *self.plan.size, 3)
            self.windows.append((times, np.empty(shape, np.uint8)))
        times, pixels = self.windows[number - self.first]
        looks = (times >= self.clock) & (times < until - EPSILON)
        if looks.any():
            pixels[looks] = shown.pixels
        return True


class _Picture:
    """A decoded frame that is brought to size only if somebody looks at it."""

    def __init__(self, frame: "VideoFrame", draw: "_Drawing") -> None:
        self.frame = frame
        self.draw = draw

    @cached_property
    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.draw(self.frame)


class _Drawing:
    """Brings frames of a film upright and to size; transparent ones stand before black."""

    def __init__(self, film: "_Film", size: tuple[int, int] | None, resize: Resize) -> None:
        from av.video.reformatter import VideoReformatter

        self.size, self.resize = size, resize
        self.aspect = float(film.stream.sample_aspect_ratio or 1)
        self.scaler = VideoReformatter()  # keeps its tables from frame to frame

    def __call__(self, frame: "VideoFrame") -> np.ndarray:
        """(H, W, 3) uint8, as a viewer sees it."""
        transposed, flip_rows, flip_columns = _orientation(frame)
        width, height = max(1, round(frame.width * self.aspect)), frame.height
        if self.size is not None:
            tall, wide = self.size[::-1] if transposed else self.size
            across, down = wide / width, tall / height
            if self.resize != "stretch":
                across = down = (min if self.resize == "fit" else max)(across, down)
            width, height = max(1, round(width * across)), max(1, round(height * down))
        clear = any(part.is_alpha for part in frame.format.components)
        pixels = self.scaler.reformat(
            frame, width, height, "rgba" if clear else "rgb24", interpolation="BICUBIC"
        ).to_ndarray()
        if clear:
            opaque = pixels[..., 3:].astype(np.uint16)
            pixels = ((pixels[..., :3] * opaque + 127) // 255).astype(np.uint8)
        if transposed:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return pixels if self.size is None else _placed(pixels, self.size)


def _orientation(frame: "VideoFrame") -> tuple[bool, bool, bool]:
    """Whether a frame is to be transposed, then turned upside down, then mirrored.

    A display matrix maps a point (x, y) to (a x + c y, b x + d y), y downwards; cameras write
    quarter turns and mirrors only.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5]
    if abs(int(a)) >= abs(int(b)):
        return False, bool(d < 0), bool(a < 0)
    return True, bool(b < 0), bool(c < 0)


def _placed(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture (h, w, 3) in one of another size, black where it does not reach."""
    placed = np.zeros((*size, 3), np.uint8)
    source, target = [], []
    for have, want in zip(pixels.shape[:2], size, strict=True):
        length = min(have, want)
        source.append(slice((have - length) // 2, (have - length) // 2 + length))
        target.append(slice((want - length) // 2, (want - length) // 2 + length))
    placed[tuple(target)] = pixels[tuple(source)]
    return placed


class _Film:
    """An open file and its video stream, with times counted from the first picture."""

    def __init__(self, path: Path, container: "InputContainer", stream: "VideoStream") -> None:
        self.path, self.container, self.stream = path, container, stream
        self.origin: float | None = None  # when the first picture is shown
        self.decoded = 0
        self.last_packet = -inf  # the latest end of anything in the file

    def pictures(self) -> Iterator[tuple["VideoFrame", float, float]]:
        """Frames in the order they are shown, with start and end in seconds."""
        latest, interval = -inf, 0.0
        for frame in self._frames():
            if frame.pts is None:
                continue  # a decoder's guess in front of the first real picture
            time = float(frame.pts * frame.time_base)
            if self.origin is None:
                self.origin = time
            start = time - self.origin
            if start < latest - EPSILON:
                raise DataError(
                    f"{self.path}: timestamps go back from {latest:.3f} s to {start:.3f} s; "
                    "remux the file, so that its times are in order"
                )
            if isfinite(latest) and start > latest:
                interval = start - latest
            latest = start
            lasts = float((frame.duration or 0) * frame.time_base) or interval
            yield frame, start, start + (lasts or 1 / self._rate())

    def jump(self, time: float) -> None:
        """Go on reading at the last key frame before a time, where the file can do that."""
        from av.error import FFmpegError

        next(self.pictures(), None)
        if self.origin is not None:
            with suppress(FFmpegError):
                target = int((self.origin + time) / self.stream.time_base)
                self.container.seek(target, stream=self.stream)

    def check_whole(self, end: float) -> None:
        """Compare what was read with what the headers promise.

        Raises:
            DataError: pictures have no times, or much is missing.
        """
        if self.origin is None:
            if self.decoded:
                raise DataError(
                    f"{self.path}: the {self.decoded} pictures have no timestamps; put them into a "
                    "container that has (ffmpeg -framerate 25 -i in.h264 -c copy out.mp4)"
                )
            return
        promises = []
        if self.container.duration:
            # Some containers mean a length, others (Matroska) the time of the end.
            promises.append((self.container.duration / 1e6, self.last_packet))
        if self.stream.duration:
            promises.append((float(self.stream.duration * self.stream.time_base), end))
        for promised, found in promises:
            # Headers round, and streams end some pictures apart: no more than seconds may miss.
            if found < promised - min(max(1.0, 0.02 * promised), 5.0):
                raise DataError(
                    f"{self.path}: expected {promised:.1f} s by its header, but only "
                    f"{max(found, 0):.1f} s can be read: the file is truncated or damaged"
                )

    def _rate(self) -> float:
        rate = self.stream.average_rate or self.stream.guessed_rate
        if not rate:
            raise DataError(f"{self.path}: its only picture has no duration and no frame rate")
        return float(rate)

    def _frames(self) -> Iterator["VideoFrame"]:
        for packet in self.container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if time is not None:
                end = float((time + (packet.duration or 0)) * packet.time_base)
                self.last_packet = max(self.last_packet, end)
            if packet.stream_index == self.stream.index:
                for frame in packet.decode():
                    self.decoded += 1
                    yield frame


@contextmanager
def _opened(path: Path) -> Iterator[_Film]:
    """Open a file and choose its video stream; what FFmpeg refuses becomes a `DataError`."""
    import av
    from av.error import FFmpegError

    if not path.is_file():
        raise DataError(f"{path}: expected a video file, found none there")
    film = None
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & ATTACHED_PICTURE]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
                raise DataError(f"{path}: expected a video stream, found {', '.join(kinds)} only")
            largest = max(streams, key=lambda s: (s.width * s.height, -s.index))
            largest.thread_type = "AUTO"
            film = _Film(path, container, largest)
            yield film
    except FFmpegError as error:
        if film is None or film.origin is None:
            raise DataError(f"{path}: cannot be read as a video: {error.strerror}") from error
        read = film.last_packet - film.origin
        raise DataError(
            f"{path}: cannot be read beyond {read:.1f} s: {error.strerror}; the file is truncated "
            "or damaged"
        ) from error


@dataclass(frozen=True, eq=False)
class EncodedVideo:
    """Features of a video and where they lie in time.

    Attributes:
        name: of the video, for messages and drawings.
        features: (T, D) float32.
        grid: of the clips.
        duration: in seconds.
        encoder: name of the encoder.
        path: of the film, where there is one; pictures are drawn from it.
    """

    name: str
    features: np.ndarray = field(repr=False)
    grid: TimeGrid
    duration: float
    encoder: str
    path: Path | None = None

    def __post_init__(self) -> None:
        where = f"encoded video {self.name!r}"
        object.__setattr__(self, "features", check_sequence(self.features, where, None))
        self.grid.check(len(self.features), self.duration, where)

    @property
    def video(self) -> Video:
        """Its entry in a data set."""
        return Video(self.name, self.duration, self.grid)

    def save(self, path: Path) -> None:
        """Write everything but the path of the film, whole or not at all."""
        state = {
            "format": FORMAT,
            "name": self.name,
            "grid": asdict(self.grid),
            "duration": self.duration,
            "encoder": self.encoder,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state(path, {"features": torch.from_numpy(self.features)}, state)

    @classmethod
    def load(cls, path: Path, film: Path | None = None) -> "EncodedVideo":
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or holds something else.
        """
        tensors, state = read_state(path)
        if state.get("format") != FORMAT or "features" not in tensors:
            raise DataError(
                f"{path}: expected an encoded video ({FORMAT}), found {state.get('format')!r}"
            )
        return cls(
            state["name"],
            tensors["features"].numpy(),
            TimeGrid(**state["grid"]),
            state["duration"],
            state["encoder"],
            film,
        )

    def __repr__(self) -> str:
        clips, width = self.features.shape
        return f"EncodedVideo({self.name}: {self.duration:.1f} s, {clips} clips of {width} numbers)"


def encode_video(
    path: Path | str, encoder: VideoEncoder, batch: int = BATCH, progress: bool = False
) -> EncodedVideo:
    """Decode a film and encode its windows as they come.

    Args:
        path: of the file.
        encoder: which windows, and to what.
        batch: windows at a time.
        progress: show a bar.

    Raises:
        DataError: the file cannot be read whole.
    """
    from tqdm.auto import tqdm

    path, plan = Path(path), WindowPlan.of(encoder)
    parts: list[np.ndarray] = []
    end = 0.0
    with tqdm(desc=path.name, unit="clip", disable=not progress) as bar:
        for windows, end in read_windows(path, plan, batch):  # noqa: B007 (the last end)
            parts.append(encoder.encode(windows))
            bar.update(len(windows))
    return EncodedVideo(path.name, np.concatenate(parts), plan.grid, end, encoder.name, path)


def cached_video(
    path: Path | str, encoder: VideoEncoder, folder: Path | None = None, progress: bool = False
) -> EncodedVideo:
    """`encode_video`, computed once for the same content, encoder and windows.

    Args:
        path: of the film; a renamed or copied file is recognised.
        encoder: called only for what the cache does not hold.
        folder: of the cache; None takes `videos` in `tvg_lib.paths.cache()`.
        progress: show a bar while encoding.

    Raises:
        DataError: the film cannot be read whole, or the cached file is damaged.
    """
    from filelock import FileLock

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a video file, found none there")
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    key = value_fingerprint([FORMAT, content, encoder.name, asdict(WindowPlan.of(encoder))])
    folder = paths.cache() / "videos" if folder is None else folder
    target = folder / f"{key[:24]}.safetensors"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Two notebooks side by side: the second waits and then finds the work done.
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                encode_video(path, encoder, progress=progress).save(target)
    encoded = EncodedVideo.load(target, path)
    return replace(encoded, name=path.name)


def frames_at(
    path: Path | str, times: Sequence[float], size: tuple[int, int] | None = None
) -> list[np.ndarray]:
    """The pictures that are shown at some times, in the order of `times`.

    Args:
        path: of the film.
        times: in seconds; before the film its first picture stands, after it the last.
        size: (H, W) to fit them into; None keeps the film's own.

    Returns:
        one (H, W, 3) uint8 array a time.

    Raises:
        DataError: the file cannot be read.
    """
    return [_picture_at(Path(path), time, size) for time in times]


def _picture_at(
    path: Path, time: float, size: tuple[int, int] | None, jump: bool = True
) -> np.ndarray:
    shown = None
    with _opened(path) as film:
        draw = _Drawing(film, size, "fit")
        if jump:
            film.jump(time)
        for frame, start, _ in film.pictures():
            if start > time + EPSILON and (shown is not None or jump):
                break
            shown = frame
        if shown is not None:
            return draw(shown)
    if not jump:
        raise DataError(f"{path}: the video stream holds no picture")
    # An index that leads too far, or the time lies outside the film: read from the start.
    return _picture_at(path, time, size, jump=False)
