"""Moments, their overlap, and the time grid: the one place where clip indices become seconds."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvg_lib.errors import DataError, GridMismatchError
from tvg_lib.moments import (
    EGO4D_30FPS,
    MAD_5FPS,
    QVHIGHLIGHTS_2S,
    TACOS_C3D,
    Moment,
    TimeGrid,
    interval_iou,
)

REAL_GRIDS = {
    "tacos": TACOS_C3D,
    "tacos on disk": TimeGrid(16, 4, 29.4),
    "ego4d": EGO4D_30FPS,
    "egovlp on disk": TimeGrid(32, 8, 30),
    "mad": MAD_5FPS,
    "qvhighlights": QVHIGHLIGHTS_2S,
    "charades": TimeGrid(16, 4, 24),
}
real_grid = pytest.mark.parametrize("grid", REAL_GRIDS.values(), ids=REAL_GRIDS.keys())

seconds = st.floats(0, 1e4, allow_nan=False)
intervals = st.tuples(seconds, seconds).map(sorted)
positive = st.floats(1e-2, 1e3)
grids = st.builds(TimeGrid, positive, positive, positive, st.floats(-1e3, 1e3), st.booleans())


# Moment --------------------------------------------------------------------------------------


def test_a_moment_knows_its_length_and_centre():
    moment = Moment(2.0, 5.0, score=0.25)
    assert (moment.length, moment.center) == (3.0, 3.5)
    assert repr(moment) == "Moment(2.00-5.00 s, score=0.250)"
    assert repr(Moment(2.0, 5.0)) == "Moment(2.00-5.00 s)"


@pytest.mark.parametrize(
    ("start", "end", "score"),
    [
        (5, 2, None),
        (float("nan"), 2, None),
        (0, float("inf"), None),
        (0, 1, float("nan")),
    ],
)
def test_impossible_moments_are_refused(start, end, score):
    with pytest.raises(DataError, match="moment"):
        Moment(start, end, score)


def test_moments_of_equal_times_differ_by_their_score():
    assert Moment(0, 1, 0.5) == Moment(0, 1, 0.5) != Moment(0, 1, 0.7)
    assert sorted([Moment(0, 1, 0.5), Moment(0, 1)], key=lambda m: m.score or 0)[1].score == 0.5


# Overlap -------------------------------------------------------------------------------------


def brute_force_iou(a, b):
    """By measure: the length of points in both over the length of points in either."""
    points = sorted({*a, *b})
    both = either = 0.0
    for low, high in pairwise(points):
        inside = [x[0] <= low and high <= x[1] for x in (a, b)]
        both += (high - low) * all(inside)
        either += (high - low) * any(inside)
    return both / either if either > 0 else 0.0


@given(st.lists(intervals, min_size=1, max_size=5), st.lists(intervals, min_size=1, max_size=4))
def test_overlap_equals_the_brute_force_measure(a, b):
    iou = interval_iou(np.array(a), np.array(b))
    expected = [[brute_force_iou(x, y) for y in b] for x in a]
    # Where an end exceeds a length by far, differences of ends round: 1e4 s, double precision.
    np.testing.assert_allclose(iou, expected, atol=1e-6)
    assert ((iou >= 0) & (iou <= 1)).all()
    np.testing.assert_array_equal(
        interval_iou(torch.tensor(a), torch.tensor(b)).numpy(),
        interval_iou(np.array(a, np.float32), np.array(b, np.float32)),
    )


@given(intervals, intervals)
def test_overlap_is_symmetric_and_one_with_itself(a, b):
    x, y = np.array([a]), np.array([b])
    assert interval_iou(x, y) == interval_iou(y, x)
    assert interval_iou(x, x) == (1.0 if a[1] > a[0] else 0.0)


def test_overlap_by_hand_with_leading_axes():
    a = torch.tensor([[0.0, 10.0], [5.0, 5.0]]).expand(3, 2, 2)
    b = torch.tensor([[5.0, 15.0], [10.0, 20.0], [0.0, 10.0]])
    iou = interval_iou(a, b)
    assert iou.shape == (3, 2, 3)
    torch.testing.assert_close(iou[1], torch.tensor([[1 / 3, 0, 1], [0, 0, 0]]))
    assert Moment(0, 10).iou(Moment(5, 15)) == pytest.approx(1 / 3)


def test_overlap_of_whole_seconds():
    assert interval_iou(np.array([[0, 4]]), np.array([[2, 4]]))[0, 0] == 0.5
    assert interval_iou(torch.tensor([[0, 4]]), torch.tensor([[2, 4]]))[0, 0] == 0.5


def test_overlap_keeps_gradients():
    a = torch.tensor([[0.0, 4.0]], requires_grad=True)
    interval_iou(a, torch.tensor([[2.0, 4.0], [9.0, 9.0]])).sum().backward()
    assert torch.isfinite(a.grad).all()


# Time grid -----------------------------------------------------------------------------------


def test_released_grids_by_hand():
    # TACoS: clip 0 is frames 0..15 at 29.4 fps, so its middle is 8 / 29.4 s.
    assert TACOS_C3D.to_seconds(0) == pytest.approx(8 / 29.4)
    assert TACOS_C3D.to_seconds(10) == pytest.approx((160 + 8) / 29.4)
    # Ego4D: 32-frame clips every 16 frames overlap by half.
    assert EGO4D_30FPS.clip_span(1) == pytest.approx((16 / 30, 48 / 30))
    assert EGO4D_30FPS.step == pytest.approx(0.5333, abs=1e-4)
    # MAD: one frame every 0.2 s.
    assert MAD_5FPS.step == pytest.approx(0.2)
    assert MAD_5FPS.to_index(60.1) == pytest.approx(300)
    # QVHighlights: clip i is the seconds [2 i, 2 i + 2).
    assert QVHIGHLIGHTS_2S.span_to_seconds(41, 74) == (82, 150)
    assert QVHIGHLIGHTS_2S.seconds_to_span(82, 150, 75) == (41, 74)


@real_grid
@given(index=st.floats(-10, 4e4), offset=st.floats(-100, 100))
def test_index_to_seconds_and_back(grid, index, offset):
    moved = TimeGrid(grid.clip_size, grid.stride, grid.fps, offset)
    assert moved.to_index(moved.to_seconds(index)) == pytest.approx(index, abs=1e-6)


@given(grid=grids, time=seconds)
def test_any_grid_goes_to_the_index_and_back(grid, time):
    scale = max(1.0, abs(time), abs(grid.offset), grid.clip_seconds)
    assert grid.to_seconds(grid.to_index(time)) == pytest.approx(time, abs=1e-9 * scale)


@given(grid=grids, index=st.integers(0, 1000))
def test_an_index_stands_at_the_middle_of_its_clip(grid, index):
    start, end = grid.clip_span(index)
    scale = max(1.0, abs(start), abs(end))
    assert grid.to_seconds(index) == pytest.approx((start + end) / 2, abs=1e-9 * scale)


@real_grid
def test_arrays_and_tensors_convert_alike(grid):
    index = np.linspace(-0.5, 99.5, 33)
    array = grid.to_seconds(index)
    tensor = grid.to_seconds(torch.from_numpy(index))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(array, tensor.numpy())
    np.testing.assert_allclose(grid.to_index(array), index, atol=1e-9)
    first, last = grid.span_to_seconds(np.array([0, 3]), np.array([1, 3]))
    assert first.tolist() == [grid.span_to_seconds(0, 1)[0], grid.span_to_seconds(3, 3)[0]]
    assert last.tolist() == [grid.span_to_seconds(0, 1)[1], grid.span_to_seconds(3, 3)[1]]


@given(data=st.data(), grid=grids, clips=st.integers(1, 500))
def test_spans_of_clips_go_to_seconds_and_back(data, grid, clips):
    first = data.draw(st.integers(0, clips - 1))
    last = data.draw(st.integers(first, clips - 1))
    span = (first, last) if grid.end_inclusive else (first, last + 1)
    start, end = grid.span_to_seconds(*span)
    assert end - start == pytest.approx((last - first + 1) * grid.step, rel=1e-6, abs=1e-6)
    if abs(grid.offset) < 1e6 * grid.step:  # else the grid is finer than double precision
        assert grid.seconds_to_span(start, end, clips) == span


@given(grid=grids, clips=st.integers(1, 300), moment=intervals)
def test_a_span_holds_the_clips_that_are_half_covered(grid, clips, moment):
    first, last = grid.seconds_to_span(*moment, clips)
    if not grid.end_inclusive:
        last -= 1
    assert 0 <= first <= last < clips
    starts = grid.offset + np.arange(clips) * grid.step
    covered = np.minimum(moment[1], starts + grid.step) - np.maximum(moment[0], starts)
    share = covered / grid.step
    inside = np.zeros(clips, bool)
    inside[first : last + 1] = True
    rounding = 1e-6 * (1 + abs(grid.offset) + moment[1]) / grid.step
    assert inside[share > 0.5 + rounding].all()
    if last > first:
        assert (share[inside] >= 0.5 - rounding).all()


def test_a_clip_covered_by_exactly_half_counts_at_both_ends():
    assert QVHIGHLIGHTS_2S.seconds_to_span(1, 5, 10) == (0, 2)
    assert QVHIGHLIGHTS_2S.seconds_to_span(1.1, 4.9, 10) == (1, 1)


def test_a_moment_shorter_than_a_clip_takes_the_one_under_its_centre():
    assert QVHIGHLIGHTS_2S.seconds_to_span(4.6, 4.8, 75) == (2, 2)
    assert QVHIGHLIGHTS_2S.seconds_to_span(3.9, 4.2, 75) == (2, 2)
    assert QVHIGHLIGHTS_2S.seconds_to_span(500, 510, 75) == (74, 74)
    half_open = TimeGrid(2, 2, 1, end_inclusive=False)
    assert half_open.seconds_to_span(4.6, 4.8, 75) == (2, 3)


@pytest.mark.parametrize(
    ("start", "end", "clips"), [(2, 1, 5), (float("nan"), 1, 5), (0, float("inf"), 5), (0, 1, 0)]
)
def test_impossible_spans_are_refused(start, end, clips):
    with pytest.raises(DataError):
        QVHIGHLIGHTS_2S.seconds_to_span(start, end, clips)


@real_grid
@given(index=st.integers(0, 999), factor=st.integers(1, 8))
def test_downsampling_keeps_every_factor_th_clip_where_it_was(grid, index, factor):
    assert grid.downsample(factor).clip_span(index) == pytest.approx(grid.clip_span(index * factor))


def test_tacos_is_its_files_downsampled_by_four():
    assert TimeGrid(16, 4, 29.4).downsample(4) == TACOS_C3D


@given(grid=grids, clips=st.integers(1, 500), length=st.integers(1, 500))
def test_resampling_divides_the_same_footage(grid, clips, length):
    resampled = grid.resample(clips, length)
    scale = max(1.0, abs(grid.offset), grid.clip_span(clips - 1)[1])
    assert resampled.clip_span(0)[0] == grid.clip_span(0)[0]
    assert resampled.clip_span(length - 1)[1] == pytest.approx(
        grid.clip_span(clips - 1)[1], abs=1e-9 * scale
    )
    assert resampled.clip_seconds == resampled.step


def test_resampling_a_charades_video_as_snag_does():
    # ((200 - 1) * 4 + 16) / 256 frames a clip, both its size and its stride.
    grid = TimeGrid(16, 4, 24).resample(200, 256)
    assert grid.clip_size == grid.stride == pytest.approx(3.171875)


@pytest.mark.parametrize("arguments", [(0, 5), (5, 0), (-1, 5)])
def test_resampling_needs_clips(arguments):
    with pytest.raises(DataError, match="resampled"):
        QVHIGHLIGHTS_2S.resample(*arguments)


@pytest.mark.parametrize("factor", [0, -1])
def test_downsampling_needs_a_positive_factor(factor):
    with pytest.raises(DataError, match=str(factor)):
        QVHIGHLIGHTS_2S.downsample(factor)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((n, v) for n in ("clip_size", "stride", "fps") for v in (0, -1, float("nan"))),
        *((n, float("inf")) for n in ("clip_size", "stride", "fps", "offset")),
        ("offset", float("nan")),
    ],
)
def test_impossible_grids_are_refused(name, value):
    with pytest.raises(DataError, match=name):
        TimeGrid(**({"clip_size": 2, "stride": 2, "fps": 1} | {name: value}))


# Does a sequence of features fit? ------------------------------------------------------------


def extractor_counts(grid: TimeGrid, duration: float) -> set[int]:
    """Clips that real extractors make of a video: whole ones only, or with the tail padded."""
    frames = int(duration * grid.fps)
    whole = max(0, int((frames - grid.clip_size) // grid.stride) + 1)
    padded = int(np.ceil(frames / grid.stride))
    return {n for n in (whole, padded) if n > 0}


@real_grid
@given(duration=st.floats(5, 7200))
def test_what_extractors_make_fits(grid, duration):
    for clips in extractor_counts(grid, duration):
        grid.check(clips, duration, "video")


@real_grid
@given(duration=st.floats(60, 7200), factor=st.sampled_from([0.25, 0.5, 2, 4]))
def test_a_wrong_stride_is_caught(grid, duration, factor):
    wrong = TimeGrid(grid.clip_size, grid.stride * factor, grid.fps)
    for clips in extractor_counts(wrong, duration):
        with pytest.raises(GridMismatchError):
            grid.check(clips, duration, "video")


def test_the_message_names_both_numbers():
    with pytest.raises(GridMismatchError) as caught:
        QVHIGHLIGHTS_2S.check(150, 150.0, "RoripwjYFp8")
    message = str(caught.value)
    assert "RoripwjYFp8" in message
    assert "150 clips" in message
    assert "300.00 s" in message  # where the features reach to
    assert "150.00 s" in message  # what the annotation says


def test_the_real_captions_of_qvhighlights_fit_and_half_of_them_do_not():
    for clips in (74, 75, 76):
        QVHIGHLIGHTS_2S.check(clips, 150, "video")
    for clips in (37, 71, 80):
        with pytest.raises(GridMismatchError):
            QVHIGHLIGHTS_2S.check(clips, 150, "video")


@pytest.mark.parametrize("duration", [0, -3, float("nan"), float("inf")])
def test_an_impossible_duration_is_refused(duration):
    with pytest.raises(DataError, match="duration"):
        QVHIGHLIGHTS_2S.check(5, duration, "video")


def test_a_video_without_clips_is_refused():
    with pytest.raises(DataError, match="video: a video has at least one clip"):
        QVHIGHLIGHTS_2S.check(0, 1.0, "video")
