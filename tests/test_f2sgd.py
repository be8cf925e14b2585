"""F2SGD, its rivals, their losses, and the large convolution, against slow readable forms."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grounding_data import make_batch, make_dataset, mask_of
from hypothesis import given
from hypothesis import strategies as st

from tvg_lib.data import planted
from tvg_lib.data.batching import BatchPlan
from tvg_lib.decoding import DecodingConfig
from tvg_lib.errors import ConfigurationError
from tvg_lib.evaluation import qvhighlights_report
from tvg_lib.losses.cells import (
    PRINTED,
    CellLossConfig,
    CellObjective,
    corner_targets,
    moment_cells,
    overlap_targets,
    relevance_loss,
)
from tvg_lib.losses.detectors import BoundaryObjective, SetObjective, generalised_iou
from tvg_lib.models.a2fa import A2FA, A2FAConfig
from tvg_lib.models.aligned_grounder import TOP_K, AlignedGrounder, ground_aligned
from tvg_lib.models.alignment import (
    Alignment,
    CrossAttentionAlignment,
    QueryDependentAlignment,
    SimilarityAlignment,
)
from tvg_lib.models.detectors import (
    BoundaryRegression,
    Enumeration,
    FrameBoundaries,
    MomentSet,
    SetPrediction,
)
from tvg_lib.models.f2sgd import F2SGD, CellScores, F2SGDConfig, map_contrast, similarity_map
from tvg_lib.moments import interval_iou
from tvg_lib.nn.square import SquareConvolution, fast_length, fourier_convolution

D = 5
SMALL = F2SGDConfig(kernel=7, channels=3, hidden=4)
APART = DecodingConfig(
    pre_top_k=300, suppression="hard", iou_threshold=0.7, min_score=0.0, voting_threshold=0
)


def make_alignment(lengths=(11, 6, 1), seed=0, steps=None) -> Alignment:
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(lengths, steps)
    features = torch.zeros(*mask.shape, D, dtype=torch.float64)
    relevance = torch.zeros(*mask.shape, dtype=torch.float64)
    for row, count in enumerate(lengths):
        draw = torch.randn(count, D + 1, generator=generator, dtype=torch.float64)
        features[row, :count], relevance[row, :count] = draw[:, :D], draw[:, D]
    return Alignment(features, mask, relevance)


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Float64, evaluation mode, no parameter at a special value."""
    torch.manual_seed(seed)
    module = module.double().eval()
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module


class TestSquareConvolution:
    @given(st.integers(0, 6), st.integers(0, 6), st.sampled_from([7, 9, 21]), st.integers(0, 1000))
    def test_fourier_is_direct(self, rows, columns, kernel, seed):
        generator = torch.Generator().manual_seed(seed)
        shape = (2, 3, kernel + rows, kernel + columns)
        x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        w = torch.randn(2, 3, kernel, kernel, generator=generator, dtype=torch.float64)
        w.requires_grad_()
        ours, theirs = fourier_convolution(x, w), F.conv2d(x, w, padding=kernel // 2)
        assert torch.allclose(ours, theirs, atol=1e-10)
        upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        for a, b in zip(
            torch.autograd.grad(ours, (x, w), upstream),
            torch.autograd.grad(theirs, (x, w), upstream),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-9)

    def test_single_precision_at_the_size_of_the_paper(self):
        torch.manual_seed(0)
        layer = SquareConvolution(2, 2, 21)
        x = torch.rand(1, 2, 75, 75)
        mask = torch.ones(1, 1, 75, 75, dtype=torch.bool)
        direct = F.conv2d(x.double(), layer.weight.double(), padding=10)
        assert (layer(x, mask) - direct).abs().max() < 1e-5 * direct.abs().max()

    def test_small_maps_and_kernels_go_the_direct_way_with_the_same_result(self):
        layer = shaken(SquareConvolution(2, 3, 9))
        x = torch.randn(1, 2, 20, 20, dtype=torch.float64)
        mask = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
        mask[..., :5, :5] = True
        assert torch.allclose(
            layer(x, mask)[..., :5, :5], layer(x[..., :5, :5], mask[..., :5, :5]), atol=1e-12
        )

    def test_weights_made_in_inference_mode_serve_and_may_change(self):
        x, mask = torch.randn(1, 2, 30, 30), torch.ones(1, 1, 30, 30, dtype=torch.bool)
        with torch.inference_mode():
            layer = SquareConvolution(2, 3, 9)
            for _ in range(2):
                expected = F.conv2d(x, layer.weight, layer.bias, padding=4)
                torch.testing.assert_close(layer(x, mask), expected, atol=1e-4, rtol=1e-4)
                layer.weight.mul_(2)

    def test_a_kernel_kept_ready_follows_its_weights(self):
        layer = shaken(SquareConvolution(2, 3, 7))
        mask = torch.ones(1, 1, 12, 14, dtype=torch.bool)
        x = torch.randn(1, 2, 12, 14, dtype=torch.float64)
        for _ in range(3):
            expected = F.conv2d(x, layer.weight, layer.bias, padding=3)
            for _ in range(2):  # made, then found
                with torch.inference_mode():
                    assert torch.allclose(layer(x, mask), expected, atol=1e-10)
            assert torch.allclose(deepcopy(layer)(x, mask), expected, atol=1e-10)
            with torch.no_grad():
                layer.weight.mul_(1.5)
        narrow = x[..., :9]
        with torch.inference_mode():
            expected = F.conv2d(narrow, layer.weight, layer.bias, padding=3)
            assert torch.allclose(layer(narrow, mask[..., :9]), expected, atol=1e-10)

    @given(st.integers(1, 3000))
    def test_fast_lengths(self, least):
        length = fast_length(least)
        assert length >= least
        assert length % 2 == 0
        for prime in (2, 3, 5):
            while length % prime == 0:
                length //= prime
        assert length == 1

    def test_even_kernels_have_no_centre(self):
        with pytest.raises(ValueError, match="odd size, found 4"):
            SquareConvolution(1, 1, 4)


class TestF2SGD:
    def test_similarity_map_cell_by_cell(self):
        x = make_alignment()
        maps = similarity_map(x.features, x.mask)
        for row, count in enumerate((11, 6, 1)):
            v = x.features[row, :count].numpy()
            v = v / np.linalg.norm(v, axis=1, keepdims=True)
            np.testing.assert_allclose(maps[row, :count, :count], v @ v.T, atol=1e-12)
        assert not maps[1, 6:].any()
        assert not maps[1, :, 6:].any()

    @pytest.mark.parametrize("steps", [None, 30])
    def test_contrast_is_that_of_the_valid_cells(self, steps):
        x = make_alignment((4, 3) if steps is None else (11, 6), steps=steps)
        maps = similarity_map(x.features, x.mask)
        mean, deviation = map_contrast(F.normalize(x.features, dim=-1), x.mask)
        for row, count in enumerate(x.mask.sum(1).tolist()):
            cells = maps[row, :count, :count]
            assert torch.isclose(mean[row, 0, 0], cells.mean())
            assert torch.isclose(deviation[row, 0, 0] ** 2, cells.var(correction=0) + 1e-4)

    def test_as_printed_it_reads_the_similarity_map_alone(self):
        """Equation 13 by direct convolutions."""
        detector = shaken(F2SGD(replace(SMALL, evidence=False, standardised=False)))
        x = make_alignment((11, 11))
        h = similarity_map(x.features, x.mask)[:, None]
        for layer in detector.convolutions:
            h = F.relu(F.conv2d(h, layer.weight, layer.bias, padding=3))
        expected = detector.mlp(h.movedim(1, -1)).squeeze(-1)
        assert torch.allclose(detector(x).logits, expected, atol=1e-10)
        blind = detector(replace(x, relevance=x.relevance.flip(1))).logits
        assert torch.allclose(blind, expected, atol=1e-12)

    def test_standardising_changes_the_map_and_nothing_else(self):
        plain = shaken(F2SGD(replace(SMALL, evidence=False, standardised=False)))
        scaled = F2SGD(replace(SMALL, evidence=False)).double()
        scaled.load_state_dict(plain.state_dict())
        x = make_alignment((11, 9))
        maps = similarity_map(x.features, x.mask)
        mean, deviation = map_contrast(F.normalize(x.features, dim=-1), x.mask)
        rows = torch.arange(11)
        for row, count in enumerate((11, 9)):
            valid = (rows < count)[:, None] & (rows < count)
            h = ((maps[row] - mean[row, 0, 0]) / deviation[row, 0, 0] * valid)[None, None]
            for layer in plain.convolutions:
                h = F.relu(F.conv2d(h, layer.weight, layer.bias, padding=3)) * valid
            expected = plain.mlp(h.movedim(1, -1)).squeeze(-1)[0]
            found = scaled(x).logits[row]
            assert torch.allclose(found[valid], expected[valid], atol=1e-10)

    @pytest.mark.parametrize("evidence", [False, True])
    def test_a_zero_start_is_a_map_without_an_opinion(self, evidence):
        x = make_alignment()
        for zero in (True, False):
            torch.manual_seed(0)
            config = replace(SMALL, evidence=evidence, zero_start=zero)
            detector = F2SGD(config).double().eval()
            learnt = detector(replace(x, relevance=torch.zeros_like(x.relevance))).logits
            assert bool((learnt == 0).all()) is zero

    def test_a_fresh_one_with_evidence_ranks_by_the_sum_of_the_frames_logits(self):
        detector = F2SGD(SMALL).double().eval()
        x = make_alignment()
        moments, _ = detector(x).ranked(1)
        for row, count in enumerate((11, 6, 1)):
            logits = x.relevance[row, :count].numpy()
            sums = {(i, j): logits[i : j + 1].sum() for i in range(count) for j in range(i, count)}
            first, last = max(sums, key=sums.get)
            assert moments[row, 0].tolist() == [first - 0.5, last + 0.5]

    @pytest.mark.parametrize("evidence", [False, True])
    def test_padding_changes_nothing(self, evidence):
        detector = shaken(F2SGD(replace(SMALL, evidence=evidence)))
        short, long = detector(make_alignment()), detector(make_alignment(steps=19))
        steps = short.mask.shape[1]
        assert torch.equal(short.mask, long.mask[:, :steps, :steps])
        assert not long.mask[:, steps:].any()
        assert not long.mask[..., steps:].any()
        kept = short.mask
        assert torch.allclose(short.logits[kept], long.logits[:, :steps, :steps][kept], atol=1e-10)

    @pytest.mark.parametrize("evidence", [False, True])
    @pytest.mark.parametrize(("band", "tile"), [(4, 5), (9, 3), (30, 128), (1, 1)])
    def test_banded_equals_dense(self, evidence, band, tile):
        detector = shaken(F2SGD(replace(SMALL, evidence=evidence)))
        x = make_alignment((23, 14, 2))
        dense, banded = detector.dense(x), detector.banded(x, band, tile)
        steps = x.mask.shape[1]
        first = torch.arange(steps)[:, None]
        last = first + torch.arange(band)
        inside = last < steps
        last = last.clamp(max=steps - 1)
        assert torch.equal(banded.mask, dense.mask[:, first, last] & inside)
        kept = banded.mask
        assert torch.allclose(banded.logits[kept], dense.logits[:, first, last][kept], atol=1e-10)

    def test_long_videos_are_banded_by_themselves(self):
        detector = shaken(F2SGD(replace(SMALL, band=8)))
        assert not detector(make_alignment((8, 3))).banded
        long = detector(make_alignment((9, 3)))
        assert long.banded
        assert long.logits.shape == (2, 9, 8)

    def test_memory_of_an_hour_grows_with_its_length_not_its_square(self):
        detector = F2SGD(F2SGDConfig(kernel=3, channels=1, hidden=1, band=16))
        mask = torch.ones(1, 1800, dtype=torch.bool)
        x = Alignment(torch.randn(1, 1800, 2), mask, torch.randn(1, 1800))
        with torch.inference_mode():
            out = detector(x)
        assert out.logits.shape == (1, 1800, 16)
        moments, scores = out.ranked(3)
        assert torch.isfinite(scores).all()
        assert ((moments[..., 1] - moments[..., 0]) <= 16).all()

    @pytest.mark.parametrize("banded", [False, True])
    def test_ranked_is_the_top_of_a_sorted_list(self, banded):
        detector = shaken(F2SGD(SMALL))
        x = make_alignment()
        out = detector.banded(x, 5, 4) if banded else detector.dense(x)
        moments, scores = out.ranked(6)
        for row in range(3):
            cells = [
                (float(out.logits[row, i, j].detach()), i, i + j if banded else j)
                for i, j in out.mask[row].nonzero().tolist()
            ]
            best = sorted(cells, reverse=True)[:6]
            expected = [[i - 0.5, j + 0.5] for _, i, j in best]
            assert moments[row, : len(best)].tolist() == expected
            assert torch.isfinite(scores[row]).sum() == len(best)
            total = sum(np.exp(logit) for logit, *_ in cells)
            assert scores[row, 0].item() == pytest.approx(np.exp(best[0][0]) / total, rel=1e-4)

    def test_configurations_that_cannot_be(self):
        with pytest.raises(ConfigurationError, match="kernel is odd, found 20"):
            F2SGDConfig(kernel=20)
        with pytest.raises(ConfigurationError, match="band is positive, found 0"):
            F2SGDConfig(band=0)


def make_output(lengths, banded=False, band=4, seed=0) -> CellScores:
    detector = shaken(F2SGD(replace(SMALL, kernel=3)), seed)
    x = make_alignment(lengths, seed)
    return detector.banded(x, band, 5) if banded else detector.dense(x)


class TestCellLosses:
    def test_moments_of_qvhighlights_become_their_clips_and_come_back(self):
        """Even seconds on a grid of 2 s: index units are clip - 1/2 and clip + 1/2."""
        moments = torch.tensor([[[-0.5, 0.5], [3.5, 8.5], [70.5, 74.5]]])
        cells = moment_cells(moments, torch.tensor([75]))
        assert cells.tolist() == [[[0, 0], [4, 8], [71, 74]]]

    def test_moments_between_middles_get_the_nearest_frame(self):
        cells = moment_cells(
            torch.tensor([[[3.1, 3.3], [3.6, 3.9], [-3.0, -2.0]]]), torch.tensor([5])
        )
        assert cells.tolist() == [[[3, 3], [4, 4], [0, 0]]]

    @given(st.integers(1, 20), st.floats(-1, 20), st.floats(0, 20))
    def test_cells_lie_in_the_video(self, length, start, width):
        moment = torch.tensor([[[start, start + width]]])
        first, last = moment_cells(moment, torch.tensor([length]))[0, 0].tolist()
        assert 0 <= first <= last < length

    @pytest.mark.parametrize("banded", [False, True])
    def test_targets_by_hand(self, banded):
        out = make_output((8, 6), banded)
        batch = make_batch((8, 6), (0, 1), (2, 2))
        moments = torch.tensor([[[1.5, 4.5], [5.5, 6.5]], [[0.5, 5.5], [0.0, 0.0]]])
        moment_mask = torch.tensor([[True, True], [True, False]])
        batch = replace(batch, moments=moments, moment_mask=moment_mask)
        cells = moment_cells(moments, torch.tensor([8, 6]))
        corners = corner_targets(out, cells, moment_mask)
        truth = {(0, 2, 4), (0, 6, 6), (1, 1, 5)}
        if banded:  # the last one is five frames long and the band holds four
            truth = {(0, 2, 2), (0, 6, 0)}
        assert {tuple(cell) for cell in corners.nonzero().tolist()} == truth
        overlap = overlap_targets(out, moments, moment_mask)
        for q, i, j in out.mask.nonzero().tolist():
            span = np.array([[i - 0.5, (i + j if banded else j) + 0.5]])
            iou = interval_iou(span, moments[q, moment_mask[q]].numpy()).max()
            assert float(overlap[q, i, j]) == pytest.approx(iou, abs=1e-6)

    @pytest.mark.parametrize("end", ["linear", "sigmoid"])
    def test_equation_14_is_the_sum_of_squares_over_the_whole_map(self, end):
        out = make_output((7,))
        batch = replace(
            make_batch((7,), (0,), (2,)), moments=torch.tensor([[[1.5, 3.5]]], dtype=torch.float64)
        )
        total = 0.0
        P = out.logits[0].detach()
        P = (P if end == "linear" else P.sigmoid()).numpy()
        for i in range(7):
            for j in range(7):
                total += (P[i, j] - float((i, j) == (2, 3))) ** 2
        loss = CellObjective(replace(PRINTED, end=end))(out, batch)["total"]
        assert loss.item() == pytest.approx(total, rel=1e-5)
        assert PRINTED.end == "linear"  # equation 13 ends with the MLP

    @pytest.mark.parametrize("banded", [False, True])
    @pytest.mark.parametrize("kind", ["squared", "cross-entropy", "binary"])
    @pytest.mark.parametrize("targets", ["corner", "overlap"])
    def test_losses_are_finite_padding_free_and_fall(self, kind, targets, banded):
        config = CellLossConfig(kind, targets=targets, positive_weight=5, relevance_weight=0.5)
        batch = make_batch((8, 6), (0, 1), (2, 2))
        long = replace(
            batch,
            video=F.pad(batch.video, (0, 0, 0, 5)),
            video_mask=F.pad(batch.video_mask, (0, 5)),
        )
        detector = shaken(F2SGD(replace(SMALL, kernel=3)))

        def loss(rows, steps=None):
            x = make_alignment((8, 6), steps=steps)
            out = detector.banded(x, 6, 5) if banded else detector.dense(x)
            return CellObjective(config)(out, rows)["total"]

        start = loss(batch)
        assert float(start) == pytest.approx(float(loss(long, 13)), rel=1e-6)
        optimiser = torch.optim.Adam(detector.parameters(), 0.02)
        for _ in range(15):
            optimiser.zero_grad()
            value = loss(batch)
            value.backward()
            optimiser.step()
        assert float(value) < float(start)

    def test_relevance_counts_frames_whose_middle_is_inside(self):
        batch = replace(
            make_batch((4,), (0,), (2,)), moments=torch.tensor([[[0.5, 2.0]]], dtype=torch.float64)
        )
        logits = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
        truth = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
        expected = F.binary_cross_entropy_with_logits(logits, truth)
        assert torch.isclose(relevance_loss(logits, batch)[0], expected)


class TestRivals:
    def test_enumeration_features_are_means_of_frames(self):
        detector = shaken(Enumeration(D, channels=2, kernel=3))
        for layer in detector.convolutions:  # the map as it is before neighbours are compared
            layer.weight.data.zero_()
            layer.bias.data.zero_()
        x = make_alignment((5,))
        out = detector(x)
        inner, start, end = detector.project(x.features)[0].chunk(3, dim=-1)
        for i, j in out.mask[0].nonzero().tolist():
            relevance = x.relevance[0, i : j + 1].mean()
            h = inner[i : j + 1].mean(0) + start[i] + end[j]
            h = F.relu(h + detector.relevance(relevance[None]))
            evidence = detector.gain * x.relevance[0, i : j + 1].sum()
            assert torch.isclose(out.logits[0, i, j], detector.score(h)[0] + evidence)

    def test_matching_is_the_cheapest_of_all(self):
        from itertools import permutations

        torch.manual_seed(0)
        out = MomentSet(
            torch.rand(2, 4, 2), torch.randn(2, 4), torch.tensor([9, 7]), torch.zeros(2, 9)
        )
        batch = make_batch((9, 7), (0, 1), (2, 2))
        moments = torch.tensor([[[0.5, 3.5], [5.5, 8.5]], [[1.5, 4.5], [0.0, 0.0]]])
        batch = replace(
            batch, moments=moments, moment_mask=torch.tensor([[True, True], [True, False]])
        )
        objective = SetObjective()
        spans = objective._spans(moments, out.lengths)
        rows, slots, truths = objective.matching(out, batch, spans)

        def cost(row, slot, truth):
            return (
                10 * (out.spans[row, slot] - spans[row, truth]).abs().sum()
                - generalised_iou(out.moments[row, slot][None], moments[row, truth][None])[0, 0]
                - 4 * out.logits[row, slot].sigmoid()
            )

        for row, count in enumerate((2, 1)):
            mine = rows == row
            found = sum(cost(row, s, t) for s, t in zip(slots[mine], truths[mine], strict=True))
            assert sorted(truths[mine].tolist()) == list(range(count))
            best = min(
                sum(cost(row, s, t) for t, s in enumerate(chosen))
                for chosen in permutations(range(4), count)
            )
            assert float(found) == pytest.approx(float(best), abs=1e-5)

    def test_a_perfect_set_and_perfect_boundaries_lose_little(self):
        batch = make_batch((8,), (0,), (2,))
        batch = replace(batch, moments=torch.tensor([[[1.5, 5.5]]]))
        relevance = torch.where((torch.arange(8) >= 2) & (torch.arange(8) <= 5), 9.0, -9.0)[None]
        spans = torch.tensor([[[0.5, 0.5], [0.1, 0.1]]])  # [2, 6) of 8 frames, and something else
        good = MomentSet(spans, torch.tensor([[9.0, -9.0]]), torch.tensor([8]), relevance)
        bad = replace(good, logits=-good.logits)
        assert float(SetObjective()(good, batch)["total"]) < 0.01
        assert float(SetObjective()(bad, batch)["total"]) > 1
        index = torch.arange(8.0)
        offsets = torch.stack([index - 1.5, 5.5 - index], dim=-1)[None]
        mask = torch.ones(1, 8, dtype=torch.bool)
        exact = FrameBoundaries(relevance, offsets, mask, relevance)
        assert float(BoundaryObjective()(exact, batch)["total"]) < 0.01
        assert exact.ranked(1)[0].tolist() == [[[1.5, 5.5]]]

    def test_generalised_iou_by_hand(self):
        a, b = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 3.0], [4.0, 6.0], [0.0, 2.0]])
        assert torch.allclose(generalised_iou(a, b), torch.tensor([[1 / 3, -1 / 3, 1.0]]))

    @pytest.mark.parametrize("kind", [Enumeration, SetPrediction, BoundaryRegression])
    def test_padding_changes_nothing(self, kind):
        detector = shaken(kind(D, 8))
        short, long = detector(make_alignment()), detector(make_alignment(steps=17))
        (a, b), (c, d) = short.ranked(1), long.ranked(1)
        assert torch.allclose(a, c, atol=1e-8)
        if kind is not Enumeration:
            assert torch.allclose(b, d, atol=1e-8)


def aligners(c: int, w: int) -> dict:
    return {
        "none": SimilarityAlignment(c),
        "cross": CrossAttentionAlignment(c, w, 16, heads=2, layers=1),
        "query-dependent": QueryDependentAlignment(c, w, 16, heads=2, layers=1),
        "A2FA": A2FA(A2FAConfig(c)),
    }


def detectors(d: int) -> dict:
    return {
        "F2SGD": (F2SGD(SMALL), CellObjective()),
        "enumeration": (Enumeration(d, 4), CellObjective()),
        "set": (SetPrediction(d, 16, heads=2, layers=1), SetObjective()),
        "regression": (BoundaryRegression(d, 16), BoundaryObjective()),
    }


@pytest.mark.parametrize("aligner", ["none", "cross", "query-dependent", "A2FA"])
@pytest.mark.parametrize("detector", ["F2SGD", "enumeration", "set", "regression"])
def test_every_pairing_trains_and_answers(aligner, detector):
    data = planted.planted("train")
    data = data.subset(sorted(data.videos)[:6], "six")
    plan = BatchPlan(data, 6, 2)
    batch = plan.load(plan.epoch(0)[0])
    torch.manual_seed(0)
    front = aligners(data.video_features.dim, data.text_features.dim)[aligner]
    back, objective = detectors(front.channels)[detector]
    model = AlignedGrounder(front, back)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        terms = objective(model(batch), batch)
        terms["total"].backward()
        optimiser.step()
        losses.append(float(terms["total"].detach()))
    assert losses[-1] < losses[0]
    answers = ground_aligned(model, data, TOP_K)
    assert [answer.query_id for answer in answers] == [query.id for query in data.queries]
    for answer in answers:
        duration = data.videos[answer.video_id].duration
        assert len(answer)
        assert (answer.moments[:, 0] >= 0).all()
        assert (answer.moments[:, 1] <= duration).all()
        assert len(answer.saliency) == len(data.clips(answer.video_id))
    assert model.training


@pytest.mark.parametrize(
    ("detector", "at_least"),
    [("F2SGD", 1.5), ("enumeration", 1.5), ("set", 3.0), ("regression", 15.0)],
)
def test_every_detector_learns_the_planted_world(detector, at_least):
    """mAP over moments, after seconds of training behind no alignment at all.

    F2SGD and enumeration start from the best sum of relevance, a good rule; the others from less.
    """
    config = planted.PlantedConfig(train=250, val=100, clips=(16, 24), noise=0.3, hidden=0.1)
    data, held = planted.planted("train", config), planted.planted("val", config)
    torch.manual_seed(0)
    front = SimilarityAlignment(data.video_features.dim)
    back, objective = {
        "F2SGD": (F2SGD(F2SGDConfig(kernel=9, channels=4)), CellObjective()),
        "enumeration": (Enumeration(front.channels, 8), CellObjective()),
        "set": (SetPrediction(front.channels, 32), SetObjective()),
        "regression": (BoundaryRegression(front.channels, 32), BoundaryObjective()),
    }[detector]
    model = AlignedGrounder(front, back)

    def score() -> float:
        return qvhighlights_report(ground_aligned(model, held, APART), held).values["MR-full-mAP"]

    before = score()
    plan = BatchPlan(data, 32, 2)
    specs = [spec for epoch in range(8) for spec in plan.epoch(epoch)]
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(specs))
    for spec in specs:
        batch = plan.load(spec)
        optimiser.zero_grad()
        objective(model(batch), batch)["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    after = score()
    assert after > before + at_least, f"{before:.1f} before, {after:.1f} after"


def test_suppression_removes_overlapping_answers():
    data = planted.planted("test")
    data = data.subset(sorted(data.videos)[:3], "three")
    model = AlignedGrounder(SimilarityAlignment(data.video_features.dim), F2SGD(SMALL))
    for answer in ground_aligned(model, data, APART):
        overlap = interval_iou(answer.moments[:, :2], answer.moments[:, :2])
        assert (overlap - np.eye(len(answer)) < 0.7 + 1e-5).all()
    crowded = ground_aligned(model, data, TOP_K)
    assert any(
        (interval_iou(a.moments[:, :2], a.moments[:, :2]) - np.eye(len(a)) >= 0.7).any()
        for a in crowded
    )


def test_data_without_sentence_vectors_give_batches_without():
    data = make_dataset({"v": 6}, [("v", [[1.0, 3.0]])])
    plan = BatchPlan(data, 1, 1)
    assert plan.load(plan.epoch(0)[0]).sentence is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_in_bfloat16():
    """One step in autocast: the transforms stay in float32, the answers those of the CPU."""
    data = planted.planted("test")
    plan = BatchPlan(data.subset(sorted(data.videos)[:4], "four"), 4, 1)
    batch = plan.load(plan.epoch(0)[0])
    torch.manual_seed(0)
    model = AlignedGrounder(A2FA(A2FAConfig(data.video_features.dim)), F2SGD(SMALL))
    expected = model.eval()(batch).ranked(1)[0]
    model, there = model.cuda(), batch.to("cuda")
    assert torch.equal(model(there).ranked(1)[0].cpu(), expected)
    with torch.autocast("cuda", torch.bfloat16):
        output = model.train()(there)
    CellObjective()(output, there)["total"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
