"""Points, regression ranges and targets: by hand, and against a plain loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvg_lib.nn.points import PointGrid


def slow_targets(grid, lengths, moments):
    """Labels and offsets of one query, point by point, moment by moment; the plain rules.

    Args:
        moments: list of (start, end) in clips.
    """
    labels, offsets = [], []
    for level, length in enumerate(lengths):
        stride = 2**level
        last = level == len(lengths) - 1
        top = grid.regression_range * 2**level
        low = 0.0 if level == 0 else grid.sigma * top / 2
        high = math.inf if last and level > 0 else top
        for step in range(length):
            position = step * stride
            answers = []
            for start, end in moments:
                center = (start + end) / 2
                near = abs(position - center) < grid.center_radius * stride
                inside = start < position < end
                reach = max(position - start, end - position)
                if near and inside and low <= reach < high:
                    answers.append(
                        (end - start, (position - start) / stride, (end - position) / stride)
                    )
            labels.append(bool(answers))
            offsets.append(min(answers)[1:] if answers else (0.0, 0.0))
    return labels, offsets


def test_points_of_a_tiny_pyramid():
    assert PointGrid().points([4, 2, 1]).tolist() == [
        [0, 0, 4, 1],
        [1, 0, 4, 1],
        [2, 0, 4, 1],
        [3, 0, 4, 1],
        [0, 2, 8, 2],
        [2, 2, 8, 2],
        [0, 4, math.inf, 4],
    ]


def test_ranges_overlap_by_sigma_and_the_last_is_open():
    assert PointGrid().ranges(4) == [(0, 4), (2, 8), (4, 16), (8, math.inf)]
    assert PointGrid(sigma=1).ranges(3) == [(0, 4), (4, 8), (8, math.inf)]
    assert PointGrid(8).ranges(2) == [(0, 8), (4, math.inf)]
    assert PointGrid().ranges(1) == [(0, 4)]
    assert PointGrid().ranges(3, max_length=64) == [(0, 4), (2, 8), (4, 65)]
    assert PointGrid().ranges(3, max_length=5) == [(0, 4), (2, 8), (4, 16)]


def test_targets_by_hand():
    """Moment [1.5, 4.5], centre 3: clips 2, 3 and 4 of level 0, clips 2 and 4 of level 1."""
    grid = PointGrid()
    points = grid.points([8, 4, 2])
    labels, offsets = grid.targets(points, torch.tensor([[[1.5, 4.5]]]))
    assert labels[0].nonzero().flatten().tolist() == [2, 3, 4, 8 + 1, 8 + 2]
    assert offsets[0, 2].tolist() == [0.5, 2.5]
    assert offsets[0, 4].tolist() == [2.5, 0.5]
    assert offsets[0, 9].tolist() == [0.25, 1.25]  # in strides of two clips


def test_the_open_last_level_answers_for_any_length():
    grid = PointGrid()
    points = grid.points([64, 32, 16])
    labels, _ = grid.targets(points, torch.tensor([[[0.5, 63.5]]]))
    assert labels[0].nonzero().flatten().tolist() == [96 + 7, 96 + 8, 96 + 9]


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ([2.0, 4.0], [3]),  # points on the boundary do not lie inside
        ([1.9, 4.1], [2, 3, 4]),
        ([1.5, 7.5], [4, 5]),  # centre 4.5, radius 1.5: 3 and 6 stand exactly at the radius
        ([1.4, 7.4], [3, 4, 5]),
        ([3.0, 3.0], []),
        ([3.2, 3.8], []),  # no point inside
        ([-9.0, -5.0], []),
    ],
)
def test_near_center_is_strict(moment, expected):
    near = PointGrid().near_center(PointGrid().points([10]), torch.tensor([[moment]]))
    assert near.shape == (1, 1, 10)
    assert near[0, 0].nonzero().flatten().tolist() == expected


def test_range_takes_its_low_end_and_leaves_its_high_end():
    grid = PointGrid()
    points = grid.points([5, 3])
    # Point 4 of level 0 and point 4 (step 2) of level 1; reach 4 and 2.
    for reach, level_0, level_1 in ((4.0, False, True), (3.999, True, True), (2.0, True, True)):
        ranges = grid.in_range(points, torch.tensor([[[4 - reach, 4 + reach]]]))[0, 0]
        assert (ranges[4].item(), ranges[7].item()) == (level_0, level_1)
    below = grid.in_range(points[7:], torch.tensor([[[4 - 1.999, 4.0]]]))
    assert not below.any()


quarters = st.integers(-8, 150).map(lambda n: n / 4)
spans = st.tuples(quarters, quarters).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=60, deadline=None)
@given(
    moments=st.lists(spans, min_size=1, max_size=4, unique_by=lambda m: m[1] - m[0]),
    levels=st.integers(1, 4),
    grid=st.builds(
        PointGrid,
        regression_range=st.sampled_from([2.0, 4.0, 8.0]),
        sigma=st.sampled_from([0.5, 1.0]),
        center_radius=st.sampled_from([0.75, 1.5, 3.0]),
    ),
)
def test_targets_equal_the_plain_loop(moments, levels, grid):
    lengths = [32 >> level for level in range(levels)]
    labels, offsets = slow_targets(grid, lengths, moments)
    # A second query without those moments, and a masked-out moment that would answer everywhere.
    batch = torch.full((2, len(moments) + 1, 2), 16.0)
    batch[:, :, 0] -= 15.9
    batch[:, :, 1] += 15.9
    batch[0, : len(moments)] = torch.tensor(moments)
    mask = torch.zeros(2, len(moments) + 1, dtype=torch.bool)
    mask[0, : len(moments)] = True
    ours, distances = grid.targets(grid.points(lengths), batch, mask)
    assert ours[0].tolist() == labels
    assert not ours[1].any()
    for point in ours[0].nonzero().flatten().tolist():
        assert distances[0, point].tolist() == pytest.approx(offsets[point])


def test_without_a_mask_every_moment_counts():
    grid, moments = PointGrid(), torch.tensor([[[1.5, 4.5], [8.5, 12.5]]])
    points = grid.points([16, 8])
    both, _ = grid.targets(points, moments)
    either = [grid.targets(points, moments[:, [n]])[0] for n in (0, 1)]
    assert torch.equal(both, either[0] | either[1])
    assert either[0].any()
    assert either[1].any()
