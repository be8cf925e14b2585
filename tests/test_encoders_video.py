"""Films made on the spot, read back: every picture carries its number as a grey level."""

import os
import shutil
import struct
import subprocess
import sys
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvg_lib.encoders import video
from tvg_lib.encoders.protocols import VideoEncoder
from tvg_lib.encoders.video import (
    EncodedVideo,
    WindowPlan,
    cached_video,
    encode_video,
    frames_at,
    read_windows,
)
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.moments import TimeGrid

av = pytest.importorskip("av")

PLAN = WindowPlan(frames=4, size=(8, 8), window=2.0, stride=1.0, resize="crop")


def level(number: int) -> int:
    """The grey of a picture; neighbours differ by far more than a codec changes."""
    return 20 + 23 * number % 210


def flat(number: int, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level(number), np.uint8)


def write(
    path: Path,
    times: Sequence[Fraction | float],
    picture: Callable[[int], np.ndarray] = flat,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    source: str = "rgb24",
    format: str | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A film whose picture k is shown from `times[k]` on; the last time is its end."""
    base = Fraction(1, 1000)
    ticks = [round(Fraction(t) / base) for t in times]
    lasts = {tick: later - tick for tick, later in pairwise(ticks)}
    with av.open(str(path), "w", format=format, options=container) as out:
        stream = out.add_stream(codec, rate=5, options=options or {"crf": "4", "threads": "1"})
        first = picture(0)
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], pix_fmt
        stream.codec_context.time_base = base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        frames: list[av.VideoFrame | None] = []
        for number, tick in enumerate(ticks[:-1]):
            frame = av.VideoFrame.from_ndarray(picture(number), format=source)
            frame.pts, frame.time_base = tick, base
            frames.append(frame)
        for packet in (packet for frame in [*frames, None] for packet in stream.encode(frame)):
            packet.duration = lasts[packet.pts]
            out.mux(packet)
    return path


def read(path: Path, plan: WindowPlan = PLAN, batch: int = 3) -> tuple[np.ndarray, float]:
    parts = list(read_windows(path, plan, batch))
    assert all(len(windows) == batch for windows, _ in parts[:-1])
    assert [end for _, end in parts] == sorted(end for _, end in parts)
    return np.concatenate([windows for windows, _ in parts]), parts[-1][1]


def expected(times: Sequence[float], plan: WindowPlan = PLAN) -> np.ndarray:
    """(T, F) number of the picture on show, by the plainest search there is."""
    end = times[-1] - times[0]
    rows, index = [], 0
    while index == 0 or (index - 1) * plan.stride + plan.window < end - 1e-6:
        row = []
        for k in range(plan.frames):
            t = index * plan.stride + (k + 0.5) * plan.window / plan.frames
            due = [n for n, start in enumerate(times[:-1]) if start - times[0] <= t + 1e-6]
            row.append(due[-1])
        rows.append(row)
        index += 1
    return np.array(rows)


def assert_shows(windows: np.ndarray, numbers: np.ndarray, tolerance: int = 4) -> None:
    greys = windows.reshape(*windows.shape[:2], -1, 3).mean((2, 3))
    assert greys.shape == numbers.shape
    np.testing.assert_allclose(greys, np.vectorize(level)(numbers), atol=tolerance)


STEADY = [Fraction(k, 5) for k in range(36)]  # 7 s, five pictures a second
UNEVEN = [0, 0.04, 0.08, 0.5, 0.54, 2.0, 2.04, 2.08, 4.7, 4.74, 5.1, 9.3]


@pytest.mark.parametrize("times", [STEADY, UNEVEN], ids=["steady", "variable rate"])
@pytest.mark.parametrize("bframes", [0, 3])
def test_pictures_are_found_by_their_times(
    tmp_path: Path, times: Sequence[float], bframes: int
) -> None:
    options = {"crf": "4", "bf": str(bframes), "b_strategy": "0", "threads": "1"}
    path = write(tmp_path / "film.mp4", times, options=options)
    windows, duration = read(path)
    assert duration == pytest.approx(float(times[-1]), abs=1e-3)
    assert_shows(windows, expected([float(t) for t in times]))


@pytest.mark.parametrize(
    ("name", "start"), [("late.mkv", 7.3), ("late.mp4", 3.0), ("late.ts", 100.0)]
)
def test_seconds_count_from_the_first_picture(tmp_path: Path, name: str, start: float) -> None:
    times = [float(t) for t in STEADY]
    path = write(tmp_path / name, [t + start for t in times], options={"crf": "4", "bf": "0"})
    windows, duration = read(path)
    assert duration == pytest.approx(times[-1], abs=0.01)
    assert_shows(windows, expected(times))
    (picture,) = frames_at(path, [3.3])
    assert picture.mean() == pytest.approx(level(16), abs=4)


def test_a_container_that_does_not_know_its_length(tmp_path: Path) -> None:
    path = write(tmp_path / "live.mkv", STEADY, container={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    windows, duration = read(path)
    assert duration == pytest.approx(7.0, abs=0.05)
    assert_shows(windows, expected([float(t) for t in STEADY]))


def test_a_single_picture_is_a_film(tmp_path: Path) -> None:
    windows, duration = read(write(tmp_path / "one.mp4", [0, 0.5]))
    assert duration == pytest.approx(0.5, abs=0.01)
    assert_shows(windows, np.zeros((1, 4), int))


@given(
    gaps=st.lists(st.integers(1, 4000), min_size=1, max_size=12),
    frames=st.integers(1, 5),
    window=st.sampled_from([0.3, 1.0, 2.0, 2.5]),
    stride=st.sampled_from([0.2, 0.5, 1.0, 2.0, 3.7]),
)
def test_any_times_and_any_windows(
    gaps: list[int], frames: int, window: float, stride: float
) -> None:
    plan = WindowPlan(frames, (1, 1), window, stride)
    times = np.concatenate([[0], np.cumsum(gaps)]) / 1000

    class Shown:
        def __init__(self, number: int) -> None:
            self.pixels = np.full((1, 1, 3), number, np.uint8)

    waiting = video._OpenWindows(plan)
    found = []
    for number, until in enumerate(times[1:-1]):
        found += list(waiting.show(Shown(number), until))
        assert len(waiting.windows) <= window / stride + 2
    found += list(waiting.finish(Shown(len(gaps) - 1), plan.count(times[-1])))
    numbers = np.array([window[:, 0, 0, 0] for window in found])
    np.testing.assert_array_equal(numbers, expected(times.tolist(), plan))
    plan.grid.check(len(found), times[-1], "the film")


# --- pictures -------------------------------------------------------------------------------------


def quarters(height: int = 32, width: int = 48) -> np.ndarray:
    """Red, green, blue and white corners: any turn or mirror shows."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (220, 30, 30)
    picture[: height // 2, width // 2 :] = (30, 200, 30)
    picture[height // 2 :, : width // 2] = (30, 30, 220)
    picture[height // 2 :, width // 2 :] = (230, 230, 230)
    return picture


def corners(picture: np.ndarray) -> np.ndarray:
    """Colours in the middle of the four quarters."""
    height, width = picture.shape[:2]
    rows, columns = [height // 4, 3 * height // 4], [width // 4, 3 * width // 4]
    return picture[np.ix_(rows, columns)].astype(int)


TURNS = {
    "none": ((1, 0, 0, 1), lambda p: p),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "upside down": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "counterclockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_rotation_metadata_is_followed(tmp_path: Path, turn: str) -> None:
    """The matrix is written into the file's track header by hand, as cameras do."""
    (a, b, c, d), seen = TURNS[turn]
    path = write(tmp_path / "phone.mp4", STEADY, lambda _: quarters())
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    matrix = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    (picture,) = frames_at(path, [1.0])
    assert picture.shape == seen(quarters()).shape
    np.testing.assert_allclose(corners(picture), corners(seen(quarters())), atol=12)
    windows, _ = read(path, WindowPlan(1, (24, 24), 2.0, 2.0, "stretch"))
    np.testing.assert_allclose(corners(windows[0, 0]), corners(seen(quarters())), atol=16)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "source", "name"),
    [
        ("ffv1", "gray", "gray", "gray.mkv"),
        ("ffv1", "gray16le", "gray16le", "gray16.mkv"),
        ("ffv1", "yuv420p10le", "rgb24", "ten.mkv"),
        ("libx264", "yuv444p", "rgb24", "full.mp4"),
        ("mpeg4", "yuv420p", "rgb24", "old.avi"),
        ("png", "rgb24", "rgb24", "stills.mov"),
        ("gif", "rgb8", "rgb24", "moving.gif"),
        ("libvpx-vp9", "yuv420p", "rgb24", "web.webm"),
        ("mjpeg", "yuvj420p", "rgb24", "jpeg.mkv"),
    ],
)
@pytest.mark.parametrize("size", [(32, 48), (33, 47)], ids=["even", "odd"])
def test_pixel_formats_and_odd_sizes(
    tmp_path: Path, codec: str, pix_fmt: str, source: str, name: str, size: tuple[int, int]
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")

    def picture(number: int) -> np.ndarray:
        grey = flat(number, *size)
        if source == "rgb24":
            return grey
        return grey[..., 0] if source == "gray" else grey[..., 0].astype(np.uint16) * 257

    options = {"crf": "4"} if codec.startswith("lib") else {}
    path = write(
        tmp_path / name, STEADY, picture, codec=codec, pix_fmt=pix_fmt, source=source,
        options=options,
    )  # fmt: skip
    windows, duration = read(path)
    assert duration == pytest.approx(7.0, abs=0.1)
    # GIF has 256 colours, and old codecs a coarse scale.
    assert_shows(windows, expected([float(t) for t in STEADY]), 26 if codec == "gif" else 8)


def test_transparent_pictures_stand_before_black(tmp_path: Path) -> None:
    picture = np.full((32, 48, 4), 200, np.uint8)
    picture[:, :24, 3], picture[:, 24:, 3] = 0, 128
    path = write(
        tmp_path / "clear.mov", STEADY, lambda _: picture, codec="png", pix_fmt="rgba",
        source="rgba", options={},
    )  # fmt: skip
    (seen,) = frames_at(path, [0.0])
    assert (seen[:, :24] == 0).all()
    assert (seen[:, 24:] == 100).all()  # 200 * 128 / 255 = 100.4


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write(tmp_path / "dvd.mp4", STEADY, lambda _: quarters(), aspect=Fraction(2, 1))
    (picture,) = frames_at(path, [0.0])
    assert picture.shape == (32, 96, 3)
    np.testing.assert_allclose(corners(picture), corners(quarters()), atol=12)


@pytest.mark.parametrize("resize", ["fit", "crop", "stretch"])
def test_resize_policies(tmp_path: Path, resize: str) -> None:
    """A wide picture with white thirds at both sides and red in the middle."""
    picture = np.full((32, 96, 3), 255, np.uint8)
    picture[:, 32:64] = (255, 0, 0)
    path = write(
        tmp_path / "wide.mov", STEADY, lambda _: picture, codec="png", pix_fmt="rgb24", options={}
    )
    windows, _ = read(path, WindowPlan(1, (48, 48), 2.0, 2.0, resize))
    seen = windows[0, 0].astype(int)
    red, white, black = np.array([(255, 0, 0), (255, 255, 255), (0, 0, 0)])
    middle, side, top = seen[24, 24], seen[24, 4], seen[4, 24]
    np.testing.assert_allclose(middle, red, atol=3)
    np.testing.assert_allclose(side, red if resize == "crop" else white, atol=3)
    np.testing.assert_allclose(top, black if resize == "fit" else red, atol=3)


# --- what cannot be right -------------------------------------------------------------------------


def wav(path: Path) -> Path:
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(16000))
    return path


def test_files_without_pictures_are_named(tmp_path: Path) -> None:
    empty, noise = tmp_path / "empty.mp4", tmp_path / "noise.mp4"
    empty.write_bytes(b"")
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    for path, problem in [
        (wav(tmp_path / "sound.wav"), "expected a video stream, found audio"),
        (empty, "cannot be read as a video"),
        (noise, "cannot be read as a video"),
        (tmp_path / "missing.mp4", "expected a video file"),
        (tmp_path, "expected a video file"),
    ]:
        for use in (lambda p: list(read_windows(p, PLAN)), lambda p: frames_at(p, [0.0])):
            with pytest.raises(DataError, match=problem) as raised:
                use(path)
            assert str(path) in str(raised.value)


def long_film(path: Path, **more: object) -> Path:
    """Twenty seconds of noise, so that the file has many bytes everywhere."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (100, 32, 48, 3), dtype=np.uint8)
    return write(path, [k / 5 for k in range(101)], lambda k: noise[k], **more)


@pytest.mark.parametrize("name", ["tail.mp4", "front.mp4", "film.mkv"])
def test_truncated_files_are_refused(tmp_path: Path, name: str) -> None:
    path = long_film(
        tmp_path / name,
        options={},
        container={"movflags": "faststart"} if name.startswith("front") else None,
    )
    assert read(path)[1] == pytest.approx(20, abs=0.1)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(DataError, match=r"truncated|cannot be read") as raised:
        list(read_windows(path, PLAN))
    assert str(path) in str(raised.value)


def test_the_end_of_a_long_film_is_missed(tmp_path: Path) -> None:
    """Two per cent of a film of an hour are more than a minute."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (120, 32, 48, 3), dtype=np.uint8)
    path = tmp_path / "hour.mp4"
    write(
        path,
        [30.0 * k for k in range(121)],
        lambda k: noise[k],
        options={"bf": "0"},
        container={"movflags": "faststart"},
    )
    assert read(path)[1] == pytest.approx(3600, abs=0.1)
    with av.open(str(path)) as film:
        last = max(packet.pos for packet in film.demux() if packet.size)
    path.write_bytes(path.read_bytes()[:last])  # cut between two pictures, 30 s before the end
    with pytest.raises(DataError, match=r"expected 3600\.0 s .* only 3570\.0 s"):
        list(read_windows(path, PLAN))


def test_a_cut_transport_stream_is_a_shorter_film(tmp_path: Path) -> None:
    """It promises no length, as recordings of broadcasts do not."""
    path = long_film(tmp_path / "film.ts", options={"bf": "0"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 // 188 * 188])
    windows, duration = read(path)
    assert 8 < duration < 12
    assert len(windows) == PLAN.count(duration)


def test_pictures_without_timestamps_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "raw.h264", STEADY, format="h264")
    with pytest.raises(DataError, match=r"raw\.h264.*timestamps"):
        list(read_windows(path, PLAN))


def test_impossible_plans_are_refused() -> None:
    for wrong in (
        {"frames": 0},
        {"size": (0, 8)},
        {"window": 0.0},
        {"stride": float("inf")},
        {"resize": "squeeze"},
    ):
        values = {"frames": 4, "size": (8, 8), "window": 2.0, "stride": 1.0} | wrong
        with pytest.raises(ConfigurationError):
            WindowPlan(**values)


# --- features -------------------------------------------------------------------------------------


class Grey:
    """An encoder whose vectors can be computed by hand."""

    dim, frames, size, window, stride, resize = 4, 4, (8, 8), 2.0, 1.0, "fit"

    def __init__(self, name: str = "grey") -> None:
        self.name = name
        self.seen = 0

    def encode(self, windows: np.ndarray) -> np.ndarray:
        self.seen += len(windows)
        return windows.reshape(*windows.shape[:2], -1).mean(2).astype(np.float32)


def test_features_lie_on_their_grid(tmp_path: Path) -> None:
    path = write(tmp_path / "film.mp4", STEADY, lambda k: flat(k, 32, 32))
    encoder = Grey()
    assert isinstance(encoder, VideoEncoder)
    encoded = encode_video(path, encoder, batch=2)
    numbers = expected([float(t) for t in STEADY])
    np.testing.assert_allclose(encoded.features, np.vectorize(level)(numbers), atol=4)
    assert encoded.grid == TimeGrid(clip_size=2, stride=1, fps=1)
    assert encoded.grid.clip_span(len(numbers) - 1)[1] == pytest.approx(encoded.duration, abs=1e-3)
    assert repr(encoded) == "EncodedVideo(film.mp4: 7.0 s, 6 clips of 4 numbers)"


def test_the_cache_is_addressed_by_content(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "film.mp4", STEADY), tmp_path / "cache"
    first, again = Grey(), Grey()
    made = cached_video(path, first, cache)
    copy = tmp_path / "copy.mp4"
    shutil.copy(path, copy)
    read_back = cached_video(copy, again, cache)
    assert (first.seen, again.seen) == (6, 0)
    np.testing.assert_array_equal(made.features, read_back.features)
    assert (read_back.name, read_back.path, read_back.duration) == ("copy.mp4", copy, made.duration)
    for encoder in (Grey("other"), type("Wider", (Grey,), {"stride": 2.0})()):
        cached_video(path, encoder, cache)
        assert encoder.seen
    assert len(list(cache.glob("*.safetensors"))) == 3


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "film.mp4", STEADY)
    cached_video(path, Grey(), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=file.name):
        cached_video(path, Grey(), tmp_path)


def test_a_film_that_cannot_be_read_leaves_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        cached_video(wav(tmp_path / "sound.wav"), Grey(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_encoded_features_are_checked() -> None:
    grid = TimeGrid(clip_size=2, stride=1, fps=1)
    with pytest.raises(DataError, match="NaN"):
        EncodedVideo("film", np.full((3, 2), np.nan, np.float32), grid, 4.0, "x")
    with pytest.raises(DataError, match="film"):
        EncodedVideo("film", np.zeros((3, 2), np.float32), grid, 400.0, "x")


THREE_HOURS = """
import resource, sys
from tests.test_encoders_video import Grey
from tvg_lib.encoders.video import encode_video
short, long = sys.argv[1:]
class Encoder(Grey):
    dim, frames, size = 8, 8, (64, 64)
encode_video(short, Encoder())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encoded = encode_video(long, Encoder())
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(encoded.features), round(encoded.duration), (after - before) // 1024)
"""


def test_three_hours_need_little_memory(tmp_path: Path) -> None:
    """All windows together would take a gigabyte."""
    options = {"crf": "30", "preset": "ultrafast", "threads": "1"}
    long = write(tmp_path / "long.mp4", range(10801), lambda k: flat(k, 16, 16), options=options)
    short = write(tmp_path / "short.mp4", range(41), lambda k: flat(k, 16, 16), options=options)
    run = subprocess.run(
        [sys.executable, "-c", THREE_HOURS, str(short), str(long)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    clips, seconds, megabytes = map(int, run.stdout.split())
    assert (clips, seconds) == (10799, 10800)
    assert megabytes < 100


# --- real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("people_one_by_one.mp4", 139.4), ("bottles.mp4", 39.855), ("big_buck_bunny_30s.mp4", 30.0)],
)
def test_real_files(tvg_data: Path, name: str, seconds: float) -> None:
    """Against a plain loop that keeps every frame: which picture is on show, and how it looks."""
    path = tvg_data / "videos" / name
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        height, width = stream.height // 8, stream.width // 8
        times, frames = [], []
        for frame in container.decode(stream):
            times.append(frame.time)
            frames.append(frame.to_ndarray(width=width, height=height, format="rgb24"))
    plan = WindowPlan(2, (height, width), 2.0, 2.0, "stretch")
    windows, duration = read(path, plan)
    assert duration == pytest.approx(seconds, abs=0.01)
    numbers = expected([*times, times[0] + duration], plan)
    assert len(windows) == len(numbers)
    difference = windows.astype(int) - np.array(frames)[numbers].astype(int)
    assert np.abs(difference).mean((2, 3, 4)).max() < 3
    looks = [0.3, seconds / 2, seconds + 9]
    for time, picture in zip(looks, frames_at(path, looks, (height, width)), strict=True):
        due = max(n for n, t in enumerate(times) if t <= time)
        fits = np.asarray(picture).astype(int) - frames[due].astype(int)
        assert np.abs(fits).mean() < 4
