"""A2FA and the aligners it is compared with, against loops that read like the paper."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from grounding_data import mask_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvg_lib.data import planted
from tvg_lib.data.batching import BatchPlan
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.models.a2fa import (
    A2FA,
    A2FAConfig,
    AnchorInterval,
    anchor_frames,
    coarse_intervals,
    inside,
    query_embedded,
    transition_points,
)
from tvg_lib.models.alignment import (
    AlignmentInput,
    CrossAttentionAlignment,
    QueryDependentAlignment,
    SimilarityAlignment,
    smoothed,
    standardised,
)

C, W = 6, 5


def make_inputs(lengths=(9, 5, 1), words=(3, 2, 4), seed=0, channels=C) -> AlignmentInput:
    generator = torch.Generator().manual_seed(seed)
    mask, text_mask = mask_of(lengths), mask_of(words)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return AlignmentInput(
        draw(*mask.shape, channels) * mask[..., None],
        mask,
        draw(len(lengths), channels),
        draw(*text_mask.shape, W) * text_mask[..., None],
        text_mask,
    )


def padded(inputs: AlignmentInput, steps: int = 4, words: int = 3) -> AlignmentInput:
    """The same rows with more padding, filled with what must not be read."""

    def more(x: Tensor, count: int, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, count), value=value)

    return replace(
        inputs,
        video=more(inputs.video, steps, 7.0),
        mask=torch.nn.functional.pad(inputs.mask, (0, steps)),
        text=more(inputs.text, words, -5.0),
        text_mask=torch.nn.functional.pad(inputs.text_mask, (0, words)),
    )


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def splits_by_search(frames: np.ndarray, anchor: int) -> tuple[list[float], list[float]]:
    """The sums of equations 3 and 4 for every b, frames counted from 1 as printed."""
    v = [None, *frames]
    n, a = len(frames), anchor + 1
    left = [
        sum(cos(v[1], v[i]) for i in range(2, b + 1))
        + sum(cos(v[a], v[j]) for j in range(b + 1, a + 1))
        for b in range(1, a + 1)
    ]
    right = [
        sum(cos(v[a], v[i]) for i in range(a, b + 1))
        + sum(cos(v[n], v[j]) for j in range(b + 1, n + 1))
        for b in range(a, n + 1)
    ]
    return left, right


@given(st.integers(1, 14), st.integers(0, 13), st.integers(0, 10_000), st.integers(0, 5))
def test_transition_points_are_those_of_a_search(frames, anchor, seed, padding):
    anchor = min(anchor, frames - 1)
    v = np.random.default_rng(seed).standard_normal((frames + padding, 4))
    mask = torch.arange(frames + padding)[None] < frames
    left, right = transition_points(torch.from_numpy(v)[None], torch.tensor([anchor]), mask)
    sums_left, sums_right = splits_by_search(v[:frames], anchor)
    assert 0 <= int(left) <= anchor <= int(right) < frames
    assert math.isclose(sums_left[int(left)], max(sums_left), abs_tol=1e-9)
    assert math.isclose(sums_right[int(right) - anchor], max(sums_right), abs_tol=1e-9)


def test_transition_points_stand_at_the_cut_between_scenes():
    scenes = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]][None]
    left, right = transition_points(scenes, torch.tensor([4]), torch.ones(1, 10, dtype=torch.bool))
    # b^L is the last frame of the scene before, b^R the last of the anchor's own: as printed.
    assert (int(left), int(right)) == (2, 6)


def test_equations_1_and_2_frame_by_frame():
    inputs = make_inputs()
    embedded = query_embedded(inputs.video, inputs.sentence)
    anchors = anchor_frames(embedded, inputs.sentence, inputs.mask)
    for row, count in enumerate((9, 5, 1)):
        q = inputs.sentence[row].numpy()
        similar = []
        for t in range(count):
            v = inputs.video[row, t].numpy()
            mixed = cos(q, v) * q + (1 - cos(q, v)) * v
            np.testing.assert_allclose(embedded[row, t], mixed, atol=1e-12)
            similar.append(cos(mixed, q))
        assert int(anchors[row]) == int(np.argmax(similar))


def test_mask_keeps_the_interval_and_its_anchor():
    inputs = make_inputs()
    interval, anchor = coarse_intervals(inputs.video, inputs.sentence, inputs.mask)
    kept = inside(interval, inputs.mask.shape[1])
    assert kept.gather(1, anchor[:, None]).all()
    assert not (kept & ~inputs.mask).any()
    for row, (first, last) in enumerate(interval.tolist()):
        assert kept[row].nonzero().squeeze(1).tolist() == list(range(first, last + 1))


@pytest.mark.parametrize("unit_length", [False, True])
def test_a2fa_as_printed_is_equations_1_to_12(unit_length):
    """Xavier's matrices, no calibration, no smoothing: the formulas, one frame at a time."""
    config = A2FAConfig(C, start="xavier", calibrated=False, unit_length=unit_length)
    torch.manual_seed(0)
    model = A2FA(config).double()
    model.shift.data.fill_(0.3)
    model.scale.data.fill_(0.8)
    inputs = make_inputs()
    out = model(inputs)
    M = {name: matrix.weight.detach().numpy() for name, matrix in model.matrices.items()}
    for row, count in enumerate((9, 5, 1)):
        V = inputs.video[row, :count].numpy()
        q = inputs.sentence[row].numpy()
        if unit_length:
            V = V / np.linalg.norm(V, axis=1, keepdims=True)
            q = q / np.linalg.norm(q)
        embedded = [cos(q, v) * q + (1 - cos(q, v)) * v for v in V]
        anchor = int(np.argmax([cos(v, q) for v in embedded]))
        left, right = splits_by_search(np.array(embedded), anchor)
        first, last = int(np.argmax(left)), anchor + int(np.argmax(right))
        m = np.array([0 if first <= i <= last else -np.inf for i in range(count)])  # 6
        scores = np.array([(M["query"] @ q) @ (M["key"] @ v) for v in V]) + m
        weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()  # 7
        g = sum(a * (M["value"] @ v) for a, v in zip(weights, V, strict=True))  # 8
        for i, v in enumerate(V):
            r = np.tanh(0.8 * (M["compare_frame"] @ v) @ (M["compare_aggregate"] @ g) + 0.3)  # 9
            v_r = r * v  # 10
            logit = (M["match_frame"] @ v_r) @ (M["match_query"] @ q)
            alpha = 1 / (1 + np.exp(-(logit + m[i])))  # 11
            np.testing.assert_allclose(
                out.features[row, i].detach(), alpha * q + (1 - alpha) * v_r, atol=1e-10
            )  # 12
            assert math.isclose(out.relevance[row, i].item(), logit, abs_tol=1e-10)
        assert not out.features[row, count:].any()


def test_a_fresh_a2fa_ranks_frames_by_their_similarity():
    """The start "similarity": what the matrices give is the cosine of frame and query."""
    config = A2FAConfig(C, reweighted=False)
    inputs = make_inputs((9, 8), (2, 2))
    relevance = A2FA(config).double()(inputs).relevance
    similar = torch.nn.functional.cosine_similarity(inputs.sentence[:, None], inputs.video, dim=-1)
    for row, count in enumerate((9, 8)):
        assert relevance[row, :count].argsort().tolist() == similar[row, :count].argsort().tolist()


ALIGNERS = {
    "none": lambda: SimilarityAlignment(C, smoothing=3),
    "cross": lambda: CrossAttentionAlignment(C, W, 8, heads=2, layers=1),
    "query-dependent": lambda: QueryDependentAlignment(C, W, 8, heads=2, layers=1),
    "A2FA": lambda: A2FA(A2FAConfig(C, smoothing=3)),
    "A2FA, two encoders": lambda: A2FA(A2FAConfig(C, guide_channels=2)),
    "A2FA as printed": lambda: A2FA(A2FAConfig(C, start="xavier", calibrated=False)),
}


@pytest.mark.parametrize("name", ALIGNERS)
def test_padding_changes_nothing(name):
    torch.manual_seed(0)
    model = ALIGNERS[name]().double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = make_inputs()
    steps = inputs.mask.shape[1]
    plain, more = model(inputs), model(padded(inputs))
    assert torch.allclose(plain.features, more.features[:, :steps], atol=1e-10)
    assert torch.allclose(plain.relevance, more.relevance[:, :steps], atol=1e-10)
    assert not more.features[:, steps:].any()
    assert not more.relevance[:, steps:].any()


@pytest.mark.parametrize("name", ALIGNERS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = ALIGNERS[name]().double().train()
    out = model(make_inputs())
    (out.features.square().sum() + out.relevance.square().sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_two_encoders_mask_and_features_come_from_their_own():
    """Table 4: other mask features move the mask and leave the frames' relevance alone."""
    inputs = make_inputs((9,) * 4, (2,) * 4)
    config = A2FAConfig(C, guide_channels=3, reweighted=False)
    model = A2FA(config).double()
    other = replace(inputs, video=inputs.video.clone())
    other.video[..., 3:] = other.video[..., 3:].flip(1)
    assert torch.equal(model(inputs).relevance, model(other).relevance)
    assert not torch.equal(model(inputs).features, model(other).features)


def test_configurations_that_cannot_be():
    with pytest.raises(ConfigurationError, match="smoothing is odd, found 4"):
        A2FAConfig(8, smoothing=4)
    with pytest.raises(ConfigurationError, match=r"guide_channels lies in 0\.\.7, found 8"):
        A2FAConfig(8, guide_channels=8)


def test_alignment_needs_sentence_vectors():
    data = planted.planted("test")
    plan = BatchPlan(replace(data, sentence_features=None), 1, 1)
    with pytest.raises(DataError, match="no sentence vectors"):
        AlignmentInput.of(plan.load(plan.epoch(0)[0]))


def test_queries_of_one_video_share_its_features():
    data = planted.planted("test")
    plan = BatchPlan(data, 3, 4)
    batch = plan.load(plan.epoch(0)[0])
    inputs = AlignmentInput.of(batch)
    for row, query_id in enumerate(batch.query_ids):
        clips = data.clips(data.query(query_id).video_id)
        assert np.array_equal(inputs.video[row, : len(clips)].numpy(), clips)
        assert np.array_equal(inputs.sentence[row].numpy(), data.sentence_features[query_id][0])


def test_smoothing_and_standardising_by_hand():
    x = torch.tensor([[[1.0], [2.0], [6.0], [9.0]]])
    mask = torch.tensor([[True, True, True, False]])
    assert smoothed(x, mask, 3).flatten().tolist() == [1.5, 3.0, 4.0, 0.0]
    z = standardised(x[..., 0], mask)[0]
    assert z[3] == 0
    assert torch.allclose(z[:3].mean(), torch.tensor(0.0), atol=1e-6)
    assert torch.allclose(z[:3].std(correction=0), torch.tensor(1.0), atol=1e-4)


class TestAnchorInterval:
    def test_first_answer_is_equation_5_in_seconds(self):
        data = planted.planted("test").subset(sorted(planted.planted("test").videos)[:6], "six")
        for answer in AnchorInterval(keep=1).predict(data):
            video = data.videos[answer.video_id]
            clips = torch.from_numpy(data.clips(video.id))[None]
            sentence = torch.from_numpy(data.sentence_features[answer.query_id])
            clips, sentence = (torch.nn.functional.normalize(x, dim=-1) for x in (clips, sentence))
            mask = torch.ones(1, clips.shape[1], dtype=torch.bool)
            interval, _ = coarse_intervals(clips, sentence, mask)
            start, end = video.grid.span_to_seconds(*interval[0].tolist())
            assert answer.moments[0, :2].tolist() == pytest.approx(
                [start, min(end, video.duration)]
            )

    def test_answers_are_ranked_and_start_from_frames_left_over(self):
        data = planted.planted("test").subset(sorted(planted.planted("test").videos)[:6], "six")
        for answer in AnchorInterval(keep=5).predict(data):
            scores = answer.moments[:, 2]
            assert (np.diff(scores) <= 0).all()
            assert len(answer.saliency) == len(data.clips(answer.video_id))
            assert scores[0] == pytest.approx(answer.saliency.max(), abs=1e-6)
