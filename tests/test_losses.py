"""Detection losses: hand-computed values, plain formulas, gradients, and a loop over points."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from grounding_data import make_batch, small_snag
from test_points import slow_targets

from tvg_lib.losses.detection import (
    DetectionObjective,
    RunningNorm,
    diou_loss,
    focal_loss,
    iou_loss,
)
from tvg_lib.nn.points import PointGrid
from tvg_lib.nn.pyramid import PointPredictions, Pyramid


def slow_focal(logit, target, alpha=None, gamma=2.0):
    p = 1 / (1 + math.exp(-logit))
    entropy = -target * math.log(p) - (1 - target) * math.log(1 - p)
    p_t = p * target + (1 - p) * (1 - target)
    weight = 1.0 if alpha is None else alpha if target >= 0.5 else 1 - alpha
    return weight * (1 - p_t) ** gamma * entropy


def slow_interval_losses(predicted, target):
    """1 - IoU and the DIoU loss of two intervals written out as [start, end]."""
    (a, b), (c, d) = (-predicted[0], predicted[1]), (-target[0], target[1])
    overlap = max(min(b, d) - max(a, c), 0)
    iou = overlap / ((b - a) + (d - c) - overlap)
    shift, hull = (a + b) / 2 - (c + d) / 2, max(b, d) - min(a, c)
    return 1 - iou, 1 - iou + (shift / hull) ** 2


class TestFocal:
    def test_by_hand(self):
        # At even odds p_t = 1/2: loss = (1/2)^2 ln 2.
        even = focal_loss(torch.zeros(2), torch.tensor([0.0, 1.0]))
        assert even.tolist() == pytest.approx([math.log(2) / 4] * 2)
        weighted = focal_loss(torch.zeros(2), torch.tensor([0.0, 1.0]), alpha=0.25)
        assert weighted.tolist() == pytest.approx([math.log(2) * 3 / 16, math.log(2) / 16])
        # odds 3:1 for a positive: p = 3/4, loss = (1/4)^2 ln(4/3)
        assert focal_loss(torch.tensor(3.0).log(), torch.tensor(1.0)).item() == pytest.approx(
            math.log(4 / 3) / 16
        )

    @pytest.mark.parametrize("alpha", [None, 0.5, 0.25])
    @pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
    def test_formula(self, alpha, gamma):
        logits = torch.linspace(-6, 6, 25)
        for target in (0.0, 0.1, 0.5, 0.9, 1.0):
            ours = focal_loss(logits, torch.full_like(logits, target), alpha, gamma)
            expected = [slow_focal(x, target, alpha, gamma) for x in logits.tolist()]
            assert ours.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)

    def test_gamma_zero_is_cross_entropy(self):
        logits, targets = torch.randn(50), (torch.rand(50) < 0.5).float()
        expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        torch.testing.assert_close(focal_loss(logits, targets, gamma=0), expected)

    def test_extreme_logits_stay_finite(self):
        logits = torch.tensor([-500.0, 500.0], requires_grad=True)
        loss = focal_loss(logits, torch.tensor([1.0, 0.0]), 0.5)
        assert loss.tolist() == pytest.approx([250, 250])
        loss.sum().backward()
        assert logits.grad.isfinite().all()


class TestIntervals:
    def test_by_hand(self):
        predicted = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 2.0], [0.0, 0.0]])
        target = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        assert iou_loss(predicted, target).tolist() == pytest.approx([0, 0.5, 1, 1])
        # Third: centres +1 and -1, hull 4. Fourth: centres 0 and 1, hull 4.
        assert diou_loss(predicted, target).tolist() == pytest.approx([0, 0.5, 1.25, 1.0625])

    def test_formula(self):
        torch.manual_seed(0)
        predicted, target = torch.rand(2, 200, 2) * 5 + 0.01
        plain = [
            slow_interval_losses(*pair)
            for pair in zip(predicted.tolist(), target.tolist(), strict=True)
        ]
        assert iou_loss(predicted, target).tolist() == pytest.approx(
            [p[0] for p in plain], abs=1e-5
        )
        assert diou_loss(predicted, target).tolist() == pytest.approx(
            [p[1] for p in plain], abs=1e-5
        )

    def test_two_empty_intervals_are_finite(self):
        zero = torch.zeros(1, 2, requires_grad=True)
        loss = diou_loss(zero, torch.zeros(1, 2))
        loss.sum().backward()
        assert loss.item() == 1
        assert zero.grad.isfinite().all()


@pytest.mark.parametrize("loss", [iou_loss, diou_loss, focal_loss])
def test_gradients_point_the_right_way(loss):
    """The losses compute in float32, so central differences are taken with a wide step."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 12, 2) * 0.4 + torch.tensor([[[0.1, 0.7]], [[0.6, 0.2]]])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, y).sum(), x)
    step = 0.02
    for row in range(12):
        for column in range(2):
            moved = torch.zeros_like(x)
            moved[row, column] = step
            with torch.no_grad():
                slope = (loss(x + moved, y).sum() - loss(x - moved, y).sum()) / (2 * step)
            assert gradient[row, column].item() == pytest.approx(slope.item(), abs=0.02)


def test_running_norm():
    norm = RunningNorm(100, momentum=0.9)
    norm.update(torch.tensor(50))
    assert norm.value.item() == pytest.approx(95)
    norm.update(torch.tensor(0))  # an empty batch counts as one
    assert norm.value.item() == pytest.approx(0.9 * 95 + 0.1)
    assert list(norm.state_dict()) == ["value"]


def random_output(lengths, queries, valid, seed=0):
    """Predictions for `queries` queries of one video with `valid` clips, without a model."""
    generator = torch.Generator().manual_seed(seed)
    points = sum(lengths)
    masks = [torch.arange(n) * 2**level < valid for level, n in enumerate(lengths)]
    mask = torch.cat(masks).expand(queries, -1)
    pyramid = Pyramid(tuple(torch.zeros(1, n, 1) for n in lengths), tuple(m[None] for m in masks))
    return PointPredictions(
        logits=torch.randn(queries, points, generator=generator).requires_grad_(),
        offsets=(torch.rand(queries, points, 2, generator=generator) * 4).requires_grad_(),
        mask=mask,
        pyramid=pyramid,
        pyramid_row=torch.zeros(queries, dtype=torch.long),
        fused=torch.zeros(queries, points, 1),
        text=torch.zeros(queries, 1, 1),
        text_mask=torch.ones(queries, 1, dtype=torch.bool),
    )


class TestObjective:
    @pytest.mark.parametrize("smoothing", [0.2, 0.0])
    @pytest.mark.parametrize("regression", [diou_loss, iou_loss])
    def test_equals_a_loop_over_points(self, smoothing, regression):
        lengths, valid, grid = [16, 8, 4], 13, PointGrid()
        moments = [[(1.3, 5.2)], [(0.2, 12.4)], [(6.1, 6.4)], [(9.3, 15.7)]]
        output = random_output(lengths, 4, valid)
        batch = replace(
            make_batch([valid], [0] * 4, [1] * 4),
            moments=torch.tensor(moments),
            moment_mask=torch.ones(4, 1, dtype=torch.bool),
        )
        objective = DetectionObjective(
            grid,
            label_smoothing=smoothing,
            alpha=0.25,
            regression=regression,
            regression_weight=2.0,
            norm_start=7.0,
        ).eval()
        classification = regressed = 0.0
        for query in range(4):
            labels, offsets = slow_targets(grid, lengths, moments[query])
            for point, (label, offset) in enumerate(zip(labels, offsets, strict=True)):
                if not output.mask[query, point]:
                    continue
                target = 1 - smoothing / 2 if label else smoothing / 2
                classification += slow_focal(output.logits[query, point].item(), target, 0.25)
                if label:
                    pair = slow_interval_losses(output.offsets[query, point].tolist(), offset)
                    regressed += pair[regression is diou_loss]
        losses = objective(output, batch)
        assert regressed > 0
        assert losses["classification"].item() == pytest.approx(classification / 7, rel=1e-5)
        assert losses["regression"].item() == pytest.approx(regressed / 7, rel=1e-5)
        total = (classification + 2 * regressed) / 7
        assert losses["total"].item() == pytest.approx(total, rel=1e-5)

    def test_smoothing_has_its_minimum_inside(self):
        """With targets 0.9 and 0.1 a certain answer costs more than a fairly sure one."""
        smooth = torch.tensor(0.9)
        sure, certain = focal_loss(torch.tensor([5.0, 30.0]), smooth.expand(2))
        assert sure < certain

    def test_the_norm_is_that_of_earlier_batches_and_moves_in_training_only(self):
        output = random_output([16, 8, 4], 1, 16)
        batch = replace(make_batch([16], [0], [1]), moments=torch.tensor([[[2.5, 7.5]]]))
        positives = PointGrid().targets(PointGrid().points([16, 8, 4]), batch.moments)[0].sum()
        objective = DetectionObjective(norm_start=10.0)
        first = objective.train()(output, batch)["total"].item()
        assert objective.norm.value.item() == pytest.approx(9 + 0.1 * positives.item())
        second = objective.eval()(output, batch)["total"].item()
        assert second == pytest.approx(first * 10 / objective.norm.value.item())
        third = objective(output, batch)["total"].item()
        assert third == second
        assert list(objective.state_dict()) == ["norm.value"]

    def test_no_positives(self):
        output = random_output([16, 8, 4], 1, 16)
        batch = replace(make_batch([16], [0], [1]), moments=torch.tensor([[[2.2, 2.3]]]))
        losses = DetectionObjective()(output, batch)
        assert losses["regression"].item() == 0
        losses["total"].backward()
        assert output.logits.grad.isfinite().all()
        assert output.offsets.grad.eq(0).all()

    def test_points_over_padding_count_for_nothing(self):
        output = random_output([16, 8, 4], 2, 9)
        batch = replace(make_batch([9], [0, 0], [1, 1]), moments=torch.tensor([[[2.5, 8.4]]] * 2))
        DetectionObjective()(output, batch)["total"].backward()
        assert output.logits.grad[~output.mask].eq(0).all()
        assert output.offsets.grad[~output.mask].eq(0).all()
        assert output.logits.grad[output.mask].ne(0).all()

    @pytest.mark.parametrize("stride", [1, 2])
    def test_padding_changes_nothing(self, stride):
        model = small_snag(input_stride=stride)
        batch = make_batch([37], [0, 0], [5, 9])
        longer = replace(
            batch,
            video=F.pad(batch.video, (0, 0, 0, 51)),
            video_mask=F.pad(batch.video_mask, (0, 51)),
            moments=F.pad(batch.moments, (0, 0, 0, 2), value=17.3),
            moment_mask=F.pad(batch.moment_mask, (0, 2)),
        )
        short, long = (DetectionObjective()(model(b), b) for b in (batch, longer))
        for name in ("classification", "regression", "total"):
            torch.testing.assert_close(short[name], long[name])
        assert short["regression"] > 0

    def test_moments_are_measured_in_steps_of_the_pyramid(self):
        """A video taken two clips per step has its moments halved, and nothing else changes."""
        output = random_output([16, 8, 4], 1, 16)
        halved = replace(output, pyramid=replace(output.pyramid, clips_per_step=2))
        batch = replace(make_batch([32], [0], [1]), moments=torch.tensor([[[5.0, 15.0]]]))
        same = DetectionObjective()(output, replace(batch, moments=batch.moments / 2))
        assert DetectionObjective()(halved, batch)["total"] == same["total"]
