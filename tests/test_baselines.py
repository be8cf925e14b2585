"""The two baselines: cases worked out by hand, and properties of every answer."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tvg_lib import baselines
from tvg_lib.baselines import MomentPrior, ZeroShotWindow, grow, similarity, smooth
from tvg_lib.data.dataset import GroundingDataset, Query, Video
from tvg_lib.data.features import ArrayStore
from tvg_lib.data.planted import PlantedConfig, planted
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.metrics import recall_at_k
from tvg_lib.moments import QVHIGHLIGHTS_2S, TimeGrid

CURVES = arrays(np.float64, st.integers(1, 40), elements=st.floats(-1, 1, width=16))


def data_set(
    curves: list[np.ndarray],
    moments: list[list[list[float]]],
    grid: TimeGrid = QVHIGHLIGHTS_2S,
    duration: float | None = None,
) -> GroundingDataset:
    """One video a query, whose clips have the given cosines with it."""
    names = [str(i) for i in range(len(curves))]
    clips = {
        name: 3 * np.stack([curve, np.sqrt(1 - np.square(curve))], axis=1)  # not of length 1
        for name, curve in zip(names, curves, strict=True)
    }
    videos = {name: Video(name, duration or len(clips[name]) * grid.step, grid) for name in names}
    queries = tuple(
        Query(name, name, "x", np.array(m, float)) for name, m in zip(names, moments, strict=True)
    )
    axis = ArrayStore.of({name: np.array([[2.0, 0.0]]) for name in names})
    return GroundingDataset("test", videos, queries, ArrayStore.of(clips), axis, axis)


def slow_smooth(curve: np.ndarray, width: int) -> list[float]:
    half = width // 2
    return [float(np.mean(curve[max(0, i - half) : i + half + 1])) for i in range(len(curve))]


def slow_grow(curve: np.ndarray, peak: int, fraction: float) -> tuple[int, int]:
    level = curve.min() + fraction * (curve[peak] - curve.min())
    first = last = peak
    while first > 0 and curve[first - 1] >= level:
        first -= 1
    while last < len(curve) - 1 and curve[last + 1] >= level:
        last += 1
    return first, last


@given(curve=CURVES, width=st.sampled_from([1, 3, 5, 9, 81]))
def test_smooth_is_the_mean_of_neighbours(curve: np.ndarray, width: int) -> None:
    np.testing.assert_allclose(smooth(curve, width), slow_smooth(curve, width), atol=1e-12)


@given(curve=CURVES, fraction=st.sampled_from([0.0, 0.3, 0.55, 1.0]), data=st.data())
def test_grow_stops_where_the_curve_falls(
    curve: np.ndarray, fraction: float, data: st.DataObject
) -> None:
    peak = data.draw(st.integers(0, len(curve) - 1))
    (first,), (last,) = grow(curve[None], np.array([peak]), fraction)
    assert (first, last) == slow_grow(curve, peak, fraction)


@settings(max_examples=60)
@given(curve=CURVES, fraction=st.floats(0, 1), keep=st.integers(1, 5))
def test_windows_start_at_the_highest_peak(curve: np.ndarray, fraction: float, keep: int) -> None:
    windows = ZeroShotWindow(1, fraction, keep).windows(curve)
    assert 1 <= len(windows) <= keep
    assert windows[0][2] == curve.max()
    scores = [score for *_, score in windows]
    assert scores == sorted(scores, reverse=True)
    for first, last, score in windows:
        assert 0 <= first <= last < len(curve)
        assert score in curve[first : last + 1]


def test_windows_by_hand() -> None:
    curve = np.array([0.0, 0.6, 1.0, 0.5, 0.1, 0.4, 0.8, 0.4, 0.0])
    assert ZeroShotWindow(1, 0.5).windows(curve) == [(1, 3, 1.0), (5, 7, 0.8)]
    assert ZeroShotWindow(1, 0.9).windows(curve) == [(2, 2, 1.0), (6, 6, 0.8)]
    assert ZeroShotWindow(1, 0.0).windows(curve) == [(0, 8, 1.0)]
    assert ZeroShotWindow(1, 0.5, keep=1).windows(curve) == [(1, 3, 1.0)]


def test_zero_shot_answers_in_seconds() -> None:
    curve = np.array([0.0, 0.6, 1.0, 0.5, 0.1, 0.4, 0.8, 0.4])
    (answer,) = ZeroShotWindow(1, 0.5).predict(data_set([curve], [[[0, 4]]]))
    np.testing.assert_allclose(answer.moments, [[2, 8, 1.0], [10, 16, 0.8]], atol=1e-6)
    np.testing.assert_allclose(answer.saliency, curve, atol=1e-6)
    assert (answer.query_id, answer.video_id, answer.text) == ("0", "0", "x")


def test_zero_shot_stays_inside_the_video() -> None:
    curve = np.array([0.0, 0.1, 0.2, 0.9])
    data = data_set([curve], [[[0, 4]]], duration=7.0)
    (answer,) = ZeroShotWindow(1, 0.5).predict(data)
    np.testing.assert_allclose(answer.moments, [[6, 7, 0.9]], atol=1e-6)
    exclusive = TimeGrid(clip_size=2, stride=2, fps=1, end_inclusive=False)
    (answer,) = ZeroShotWindow(1, 0.5).predict(data_set([curve], [[[0, 4]]], exclusive))
    np.testing.assert_allclose(answer.moments[0, :2], [6, 8])


def test_fitting_finds_the_rule_that_was_planted() -> None:
    rng = np.random.default_rng(0)
    curves, moments = [], []
    for _ in range(40):
        first, length = rng.integers(5, 20), int(rng.integers(3, 9))
        curve = np.full(40, 0.1)
        curve[first - 2 : first + length + 2] = 0.5  # a shoulder outside the moment
        curve[first : first + length] = 0.8
        curves.append(curve)
        moments.append([[2.0 * first, 2.0 * (first + length)]])
    rule = ZeroShotWindow(keep=7).fitted(data_set(curves, moments))
    assert rule == ZeroShotWindow(smoothing=1, fraction=0.6, keep=7)


def test_fitting_measures_what_predicting_gives() -> None:
    """The rule chosen quickly is the best by the slow way: predict, then measure."""
    data = planted("val", PlantedConfig(val=12))
    truth = [query.moments for query in data.queries]

    def quality(rule: ZeroShotWindow) -> float:
        answers = [answer.moments for answer in rule.predict(data)]
        values = recall_at_k(answers, truth, ks=(1,), thresholds=(0.5, 0.7)).values
        return round(values["R1@0.5"] + values["R1@0.7"], 6)

    rules = [
        ZeroShotWindow(width, fraction, 1)
        for width in baselines.SMOOTHINGS
        for fraction in baselines.FRACTIONS
    ]
    assert quality(ZeroShotWindow(keep=1).fitted(data)) == max(map(quality, rules))


def test_prior_by_hand() -> None:
    """Three of five moments fill the first half, two the last fifth: so says the prior."""
    curves = [np.zeros(30)] * 5
    first, last = [[0.0, 30.0]], [[48.0, 60.0]]
    prior = MomentPrior.fitted(data_set(curves, [first, last, first, last, first]), keep=3)
    np.testing.assert_allclose(prior.windows[:2], [[0, 0.5, 0.6], [0.8, 1, 0.4]])
    assert prior.windows[2, 2] == 0  # nothing left to hit
    np.testing.assert_allclose(prior.density[:15], 0.6)
    np.testing.assert_allclose(prior.density[-6:], 0.4)
    assert prior.density[15:24].sum() == 0


def test_prior_sees_neither_video_nor_words() -> None:
    train, test = (planted(split, PlantedConfig(train=20, test=5)) for split in ("train", "test"))
    prior = MomentPrior.fitted(train, keep=4)
    blind = GroundingDataset(  # reading any feature would fail
        "blind", test.videos, test.queries, _Unreadable(), _Unreadable(), _Unreadable()
    )
    answers = prior.predict(blind)
    assert [answer.query_id for answer in answers] == [query.id for query in test.queries]
    for answer in answers:
        duration = test.videos[answer.video_id].duration
        np.testing.assert_allclose(answer.moments[:, :2] / duration, prior.windows[:, :2])
        assert (np.diff(answer.moments[:, 2]) <= 0).all()
        assert len(answer.saliency) == duration / 2


class _Unreadable:
    dim = 2

    def __getitem__(self, key: str) -> np.ndarray:
        raise AssertionError("a feature was read")

    def __contains__(self, key: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_zero_shot_beats_the_prior_on_planted_data() -> None:
    train, test = (planted(s, PlantedConfig(train=40, test=30)) for s in ("train", "test"))
    truth = [query.moments for query in test.queries]
    first = {
        name: recall_at_k([a.moments for a in answers], truth).values["R1@0.5"]
        for name, answers in {
            "rule": ZeroShotWindow().fitted(train).predict(test),
            "prior": MomentPrior.fitted(train).predict(test),
        }.items()
    }
    assert first["rule"] > first["prior"] + 20


def test_bad_input_is_refused() -> None:
    for wrong in ({"smoothing": 4}, {"smoothing": 0}, {"fraction": 1.5}, {"keep": 0}):
        with pytest.raises(ConfigurationError):
            ZeroShotWindow(**wrong)
    data = data_set([np.zeros(4)], [[[0, 4]]])
    without = GroundingDataset(
        "plain", data.videos, data.queries, data.video_features, data.text_features
    )
    with pytest.raises(DataError, match="plain has no sentence vectors"):
        similarity(without, data.queries[0])
    empty = data_set([np.zeros(4)], [[[0, 4]]]).subset([], "empty")
    for fit in (ZeroShotWindow().fitted, MomentPrior.fitted):
        with pytest.raises(DataError, match="empty has no queries"):
            fit(empty)
