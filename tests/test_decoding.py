"""Suppression and voting against the plain O(n^2) loop; predictions in seconds; grounding."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from grounding_data import SMALL, make_batch, make_dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_suppression import slow_iou, slow_suppress, slow_vote

from tvg_lib.decoding import (
    DecodingConfig,
    Prediction,
    decode,
    ground,
    point_moments,
    suppress,
    to_predictions,
    vote,
)
from tvg_lib.models.snag import SnAG
from tvg_lib.moments import QVHIGHLIGHTS_2S, TACOS_C3D, Moment
from tvg_lib.nn.points import PointGrid
from tvg_lib.nn.pyramid import PointPredictions, Pyramid


def tensors(moments, scores):
    return (
        torch.tensor(moments, dtype=torch.float64).reshape(1, -1, 2),
        torch.tensor(scores, dtype=torch.float64).reshape(1, -1),
    )


ends = st.integers(0, 60)
candidates = st.lists(
    st.tuples(ends, ends, st.integers(1, 997)).map(
        lambda t: ((min(t[:2]) / 4, max(t[:2]) / 4), t[2] / 1000)
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda pair: pair[1],
)
kinds = st.sampled_from(["soft", "hard"])


@settings(max_examples=50, deadline=None)
@given(
    found=candidates,
    kind=kinds,
    keep=st.integers(1, 30),
    sigma=st.sampled_from([0.001, 0.3, 0.9]),
    iou_threshold=st.sampled_from([0.0, 0.1, 0.55]),
    min_score=st.sampled_from([0.0, 0.001, 0.25]),
)
def test_suppression_equals_the_loop(found, kind, keep, sigma, iou_threshold, min_score):
    spans, scores = map(list, zip(*found, strict=True))
    overlaps = [slow_iou(a, b, 1e-6) for a in spans for b in spans]
    assume(all(abs(overlap - iou_threshold) > 1e-9 or overlap == 0 for overlap in overlaps))
    expected, expected_scores = slow_suppress(
        spans, scores, keep, kind, sigma, iou_threshold, min_score
    )
    # A second query with one sure candidate must not be disturbed by the first.
    moments, values = tensors(spans, scores)
    other = values.new_full(values.shape, -math.inf)
    other[0, -1] = 0.5
    picked, picked_scores = suppress(
        moments.expand(2, -1, -1),
        torch.cat([values, other]),
        keep,
        kind,
        sigma,
        iou_threshold,
        min_score,
    )
    assert picked.shape == (2, min(keep, len(spans)), 2)
    real = picked_scores[0].isfinite()
    assert real.sum() == len(expected)
    assert real[: len(expected)].all()
    assert picked_scores[0, real].tolist() == pytest.approx(expected_scores)
    assert picked[0, real].tolist() == [list(map(float, moment)) for moment in expected]
    assert picked_scores[0, real].diff().le(0).all()
    assert picked_scores[1].isfinite().sum() == 1
    assert picked[1, 0].tolist() == [float(x) for x in spans[-1]]


@settings(max_examples=50, deadline=None)
@given(found=candidates, threshold=st.sampled_from([0.31, 0.75, 0.95]))
def test_voting_equals_the_loop(found, threshold):
    spans, scores = map(list, zip(*found, strict=True))
    picked = [span for span in spans if span[1] > span[0]][:5]
    assume(picked)
    moments, values = tensors(spans, scores)
    ours = vote(torch.tensor(picked, dtype=torch.float64)[None], moments, values, threshold)
    expected = slow_vote(picked, spans, scores, threshold)
    assert ours[0].tolist() == [pytest.approx(moment) for moment in expected]


def test_soft_suppression_by_hand():
    moments, scores = tensors([[0, 10], [5, 15], [20, 30]], [0.9, 0.8, 0.3])
    picked, picked_scores = suppress(moments, scores, 3, "soft", sigma=0.5)
    weakened = 0.8 * math.exp(-((1 / 3) ** 2) / 0.5)
    assert picked[0].tolist() == [[0, 10], [5, 15], [20, 30]]
    assert picked_scores[0].tolist() == pytest.approx([0.9, weakened, 0.3])


def test_hard_suppression_by_hand():
    moments, scores = tensors([[0, 10], [5, 15], [20, 30]], [0.9, 0.8, 0.3])
    picked, picked_scores = suppress(moments, scores, 3, "hard", iou_threshold=0.3)
    assert picked[0, :2].tolist() == [[0, 10], [20, 30]]
    assert picked_scores[0].tolist() == pytest.approx([0.9, 0.3, -math.inf])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_no_candidate_at_all(kind):
    moments = torch.zeros(2, 4, 2)
    scores = torch.full((2, 4), -math.inf)
    picked, picked_scores = suppress(moments, scores, 3, kind)
    assert picked.shape == (2, 3, 2)
    assert picked_scores.eq(-math.inf).all()
    empty, empty_scores = suppress(moments[:, :0], scores[:, :0], 3, kind)
    assert empty.shape == (2, 0, 2)
    assert empty_scores.shape == (2, 0)


def test_inputs_are_left_alone():
    moments, scores = tensors([[0, 10], [5, 15]], [0.9, 0.8])
    for kind in ("soft", "hard"):
        suppress(moments, scores, 2, kind, min_score=0.85)
    assert scores.tolist() == [[0.9, 0.8]]


def test_ranking_without_suppression():
    moments, scores = tensors([[0, 1], [0, 1.1], [5, 6], [7, 8]], [0.2, 0.9, -math.inf, 0.5])
    picked, picked_scores = decode(moments, scores, DecodingConfig(suppression=None, keep=3))
    assert picked[0].tolist() == [[0, 1.1], [7, 8], [0, 1]]
    assert picked_scores[0].tolist() == [0.9, 0.5, 0.2]


def test_voting_can_be_switched_off():
    moments, scores = tensors([[0, 10], [0, 10.2]], [0.6, 0.3])
    plain, _ = decode(moments, scores, DecodingConfig(keep=1, voting_threshold=0))
    voted, _ = decode(moments, scores, DecodingConfig(keep=1, voting_threshold=0.9))
    assert plain[0, 0].tolist() == [0, 10]
    assert voted[0, 0].tolist() == pytest.approx([0, (0.6 * 10 + 0.3 * 10.2) / 0.9])


def predictions_at(logits, offsets, lengths, mask=None, clips_per_step=1):
    """`PointPredictions` of one video from plain lists."""
    logits = torch.tensor(logits)
    mask = torch.ones_like(logits, dtype=torch.bool) if mask is None else torch.tensor(mask)
    levels = tuple(torch.zeros(1, n, 1) for n in lengths)
    masks = tuple(torch.ones(1, n, dtype=torch.bool) for n in lengths)
    return PointPredictions(
        logits=logits,
        offsets=torch.tensor(offsets),
        mask=mask,
        pyramid=Pyramid(levels, masks, clips_per_step),
        pyramid_row=torch.zeros(len(logits), dtype=torch.long),
        fused=torch.zeros(*logits.shape, 1),
        text=torch.zeros(len(logits), 1, 1),
        text_mask=torch.ones(len(logits), 1, dtype=torch.bool),
    )


class TestCandidates:
    def test_by_hand(self):
        """Points 0, 1, 2, 3 and, one level up in strides of two, 0 and 2."""
        output = predictions_at(
            [[0.0, 2.0, -9.0, 1.0, 3.0, -1.0]],
            [[[0.0, 0.05], [1.0, 2.0], [9.0, 9.0], [0.5, 0.5], [0.0, 1.5], [0.5, 1.0]]],
            [4, 2],
            [[True, True, True, True, True, False]],
        )
        moments, scores = point_moments(output, PointGrid(), DecodingConfig())
        real = scores[0].isfinite()
        # Point 0 is too short, point 2 scores too little, the last lies over padding.
        assert moments[0, real].tolist() == [[0, 3], [0, 3], [2.5, 3.5]]
        expected = torch.tensor([3.0, 2.0, 1.0]).sigmoid()
        torch.testing.assert_close(scores[0, real], expected)

    def test_only_the_best_enter_suppression(self):
        output = predictions_at([[0.0, 1.0, 2.0, 3.0]], [[[1.0, 1.0]] * 4], [4])
        moments, scores = point_moments(output, PointGrid(), DecodingConfig(pre_top_k=2))
        assert moments[0].tolist() == [[2, 4], [1, 3]]
        assert scores.shape == (1, 2)

    def test_low_precision_outputs_give_float32_times(self):
        output = predictions_at([[1.0] * 4], [[[0.25, 0.25]] * 4], [4])
        low = replace(output, logits=output.logits.bfloat16(), offsets=output.offsets.bfloat16())
        moments, scores = point_moments(low, PointGrid(), DecodingConfig())
        assert moments.dtype == scores.dtype == torch.float32


class TestPredictions:
    @pytest.mark.parametrize("grid", [TACOS_C3D, QVHIGHLIGHTS_2S, replace(TACOS_C3D, offset=7.5)])
    def test_seconds_come_from_the_grid_and_stay_inside_the_video(self, grid):
        dataset = make_dataset({"a": 30, "b": 20}, [("b", []), ("a", [])], grid)
        batch = replace(
            make_batch([20, 30], [1, 0], [2, 2]),
            video_ids=("b", "a"),
            query_ids=("q1", "q0"),
            grids=(grid, grid),
            durations=(dataset.videos["b"].duration, dataset.videos["a"].duration),
        )
        moments = torch.tensor([[[3.0, 9.5], [-50.0, 500.0]], [[1.0, 2.0], [4.0, 6.0]]])
        scores = torch.tensor([[0.75, 0.5], [0.25, -math.inf]])
        first, second = to_predictions(moments, scores, batch, dataset)
        start, end = grid.to_seconds(3.0), grid.to_seconds(9.5)
        assert (first.query_id, first.video_id, first.text) == ("q1", "a", "question 1")
        np.testing.assert_allclose(
            first.moments, [[start, end, 0.75], [0, dataset.videos["a"].duration, 0.5]]
        )
        assert (second.query_id, second.video_id, len(second)) == ("q0", "b", 1)

    def test_a_prediction_is_a_ranked_list_of_moments(self):
        prediction = Prediction("q", "v", "what?", np.array([[1.0, 2.0, 0.9], [3.0, 5.0, 0.2]]))
        assert list(prediction) == [Moment(1, 2, 0.9), Moment(3, 5, 0.2)]
        assert prediction.best == Moment(1, 2, 0.9)
        assert repr(prediction) == (
            "Prediction('what?': 2 moments, best Moment(1.00-2.00 s, score=0.900))"
        )
        empty = Prediction("q", "v", "what?", np.zeros((0, 3)))
        assert repr(empty) == "Prediction('what?': 0 moments)"


class TestGround:
    def dataset(self):
        queries = [("b", []), ("a", []), ("c", []), ("a", []), ("b", []), ("a", [])]
        return make_dataset({"a": 50, "b": 17, "c": 33, "silent": 9}, queries)

    def model(self, **changes):
        """Fresh weights; a bias keeps distances from zero, where nothing is long enough."""
        torch.manual_seed(0)
        model = SnAG(replace(SMALL, **changes))
        torch.nn.init.ones_(model.regression.output.bias)
        return model

    @pytest.mark.parametrize("stride", [1, 2])
    def test_every_query_is_answered_in_order_however_it_is_batched(self, stride):
        dataset, model = self.dataset(), self.model(input_stride=stride)
        config = DecodingConfig(keep=4)
        answers = ground(model, dataset, config)
        assert [p.query_id for p in answers] == [q.id for q in dataset.queries]
        assert [p.video_id for p in answers] == [q.video_id for q in dataset.queries]
        assert "silent" not in dataset.video_features.reads
        for prediction in answers:
            assert 1 <= len(prediction) <= 4
            start, end, score = prediction.moments.T
            assert (start >= 0).all()
            assert (start <= end).all()
            assert (end <= dataset.videos[prediction.video_id].duration).all()
            assert (np.diff(score) <= 0).all()
        for limits in ({"videos_per_batch": 1}, {"queries_per_batch": 1}, {"queries_per_batch": 2}):
            for a, b in zip(answers, ground(model, dataset, config, **limits), strict=True):
                np.testing.assert_allclose(a.moments, b.moments, atol=1e-3)

    def test_the_model_is_left_as_it_was(self):
        dataset, model = self.dataset(), self.model()
        first = ground(model.train(), dataset)
        assert model.training
        second = ground(model.eval(), dataset)
        assert not model.training
        np.testing.assert_array_equal(first[0].moments, second[0].moments)  # no dropout in either
        broken = replace(dataset, video_features={})
        with pytest.raises(KeyError):
            ground(model.train(), broken)
        assert model.training

    def test_clips_per_step_scale_the_answer(self):
        """A head that says 'one step to both sides of every point' spans two strided steps."""
        dataset, model = self.dataset(), self.model(input_stride=2)
        with torch.no_grad():
            model.regression.output.weight.zero_()
            model.regression.output.bias.fill_(1.0)
        config = DecodingConfig(suppression=None, keep=200)
        for prediction in ground(model, dataset, config):
            inside = [m for m in prediction if m.start > 0 and m.end < 16]
            assert inside
            assert all(min(abs(m.length - 4 * 2**n) for n in range(4)) < 1e-4 for m in inside)
