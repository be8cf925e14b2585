"""MSCL's losses against loops that follow the equations symbol by symbol, and their properties."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from grounding_data import make_batch, mask_of, randomised, small_snag

from tvg_lib.errors import ConfigurationError
from tvg_lib.losses import multiscale
from tvg_lib.losses.detection import DetectionObjective
from tvg_lib.losses.multiscale import (
    AS_PRINTED,
    ContrastConfig,
    ContrastiveObjective,
    Draw,
    MultiScaleContrast,
    contrast,
    gather_steps,
    one_query_per_video,
    target_sets,
)
from tvg_lib.models.hieramamba import HieraMamba, HieraMambaConfig
from tvg_lib.nn.points import PointGrid

SANE = ContrastConfig()
LOWEST = ContrastConfig(anchors="lowest", temperature=0.3)


def a_batch(lengths=(40, 31), rows=(0, 0, 1, 1), seed=0, moments=None):
    """Four queries about two videos; one with two moments."""
    batch = make_batch(lengths, rows, [3, 4, 2, 5][: len(rows)], seed=seed)
    if moments is None:
        moments = [
            [[3.2, 24.9], [0, 0]],
            [[30.0, 36.0], [5.5, 9.0]],
            [[0.0, 30.0], [0, 0]],
            [[11.0, 15.5], [0, 0]],
        ]
    moments = torch.tensor(moments, dtype=torch.float64)
    return replace(batch, moments=moments, moment_mask=moments[..., 1] > 0)


def every_negative(loss, output, batch):
    """The draw of all queries with all candidates as negatives: nothing random is left."""
    config = loss.config
    targets, outside = target_sets(
        output.lengths,
        batch.moments,
        batch.moment_mask,
        output.mask,
        config.center_radius,
        config.inside,
    )
    return Draw(
        torch.arange(len(targets)),
        output.pyramid_row,
        targets.split(output.lengths, 1),
        outside.split(output.lengths, 1),
    )


def losses_of(loss, output, batch, draw):
    pools = loss.pools(output, batch, draw)
    return loss.within(output, draw, pools), loss.cross(output, draw, pools)


def similar(a, b, config):
    if config.similarity == "cosine":
        a, b = a / a.norm(), b / b.norm()
    return (a * b).sum() / config.temperature


def one_term(anchor, positive, negatives, config):
    """-log(e^{z_i.z_j} / (e^{z_i.z_j} + sum_n e^{z_i.z_n})), divided by its largest exponential."""
    pair = similar(anchor, positive, config)
    others = [similar(anchor, n, config) for n in negatives]
    top = max([pair, *others]).detach()
    return -((pair - top).exp() / sum((x - top).exp() for x in [pair, *others])).log()


def looped(output, draw, config):
    """Equations 11 and 12 by loops over queries, levels, anchors and positives."""
    within_all, cross_all = [], []
    base = output.pyramid.base if config.anchors == "embedding" else output.pyramid.levels[0]
    first = 0 if config.anchors == "embedding" else 1
    for q in range(len(draw.query)):
        row = int(draw.row[q])
        within, cross = [], []
        for number, z in enumerate(output.pyramid.levels):
            positives = draw.targets[number][q].nonzero().squeeze(1).tolist()
            negatives = [z[row, n] for n in draw.negatives[number][q].nonzero().squeeze(1)]
            if not negatives:
                continue
            for i in positives:
                for j in positives:
                    if i != j:
                        within.append(one_term(z[row, i], z[row, j], negatives, config))
            if number >= first:
                for i in draw.targets[0][q].nonzero().squeeze(1).tolist():
                    for j in positives:
                        cross.append(one_term(base[row, i], z[row, j], negatives, config))
        within_all.append(within)
        cross_all.append(cross)
    results = []
    for terms in (within_all, cross_all):
        if config.reduction == "sum":
            results.append(sum(sum(t) for t in terms) / len(terms))
        else:
            means = [sum(t) / len(t) for t in terms if t]
            results.append(sum(means) / len(means))
    return results


class TestEquations:
    @pytest.mark.parametrize(
        "config",
        [
            SANE,
            LOWEST,
            replace(AS_PRINTED, queries="all"),
            AS_PRINTED,
            ContrastConfig("dot", 3.0, "mean", "one", inside=False),
        ],
        ids=str,
    )
    def test_values_and_gradients_of_the_loop(self, config):
        torch.manual_seed(0)
        model, batch = small_snag(), a_batch()
        loss = MultiScaleContrast(config)
        output = model(batch)
        draw = loss.draw(output, batch)
        watched = [*output.pyramid.levels, output.pyramid.base, *model.video_encoder.parameters()]
        for mine, slow in zip(
            losses_of(loss, output, batch, draw), looped(output, draw, config), strict=True
        ):
            assert mine.item() > 0
            torch.testing.assert_close(mine, slow)
            gradients = [
                torch.autograd.grad(
                    value, watched, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for value in (mine, slow)
            ]
            torch.testing.assert_close(*gradients)

    def test_forward_is_the_two_losses_of_its_draw(self):
        model, batch = small_snag(), a_batch()
        output, loss = model(batch), MultiScaleContrast()
        torch.manual_seed(5)
        terms = loss(output, batch)
        torch.manual_seed(5)
        draw = loss.draw(output, batch)
        within, cross = losses_of(loss, output, batch, draw)
        assert terms == {"within": within, "cross": cross}

    def test_by_hand(self):
        # Two positives and one negative on a line: -log(e^2 / (e^2 + e^0)) for each order.
        logits = torch.tensor([[[1.0, 2.0, 0.0], [2.0, 1.0, 0.0]]])
        positive = torch.tensor([[[False, True, False], [True, False, False]]])
        total, number = contrast(logits, positive, torch.tensor([[[False, False, True]]]))
        assert number.tolist() == [2]
        assert total.item() == pytest.approx(2 * math.log(1 + math.exp(-2)))

    def test_without_negatives_nothing_counts(self):
        logits = torch.ones(1, 2, 3, requires_grad=True)
        total, number = contrast(
            logits, torch.ones(1, 2, 3, dtype=torch.bool), torch.zeros(1, 1, 3, dtype=torch.bool)
        )
        total.sum().backward()
        assert (total.item(), number.item()) == (0, 0)
        assert logits.grad.abs().sum() == 0


class TestTargets:
    def test_a_loop_over_points(self):
        batch = a_batch()
        lengths = (40, 20, 10, 5)
        masks = [mask_of([-(-n // 2**k) for n in (40, 31)], lengths[k]) for k in range(4)]
        valid = torch.cat(masks, 1)[batch.query_video]
        for inside in (True, False):
            targets, outside = target_sets(
                lengths, batch.moments, batch.moment_mask, valid, 1.5, inside
            )
            place = 0
            for level, length in enumerate(lengths):
                for step in range(length):
                    at = step * 2**level
                    for q in range(4):
                        moments = batch.moments[q][batch.moment_mask[q]].tolist()
                        ok = bool(valid[q, place])
                        reach = 1.5 * 2**level
                        near = any(
                            abs(at - (s + e) / 2) < reach and s < at < e
                            if inside
                            else abs(at - (s + e) / 2) <= reach
                            for s, e in moments
                        )
                        touched = any(s <= at <= e for s, e in moments)
                        assert bool(targets[q, place]) == (near and ok), (q, level, step)
                        assert bool(outside[q, place]) == (ok and not touched and not near)
                    place += 1

    def test_the_range_would_leave_long_moments_without_anchors(self):
        lengths = (256, 128, 64, 32, 16)
        grid = PointGrid()
        points = grid.points(lengths)
        moment = torch.tensor([[[50.3, 150.9]]])
        valid = torch.ones(1, sum(lengths), dtype=torch.bool)
        targets, _ = target_sets(lengths, moment, valid[:, :1], valid)
        per_level = [int(t.sum()) for t in targets.split(lengths, 1)]
        assert per_level == [3, 3, 3, 3, 3]
        ranged = (grid.near_center(points, moment) & grid.in_range(points, moment))[:, 0]
        counts = [int(t.sum()) for t in ranged.split(lengths, 1)]
        assert counts[0] == 0
        assert sum(c > 0 for c in counts) <= 2

    def test_as_many_negatives_as_targets_and_none_inside(self):
        torch.manual_seed(0)
        batch = a_batch()
        output = small_snag()(batch)
        draw = MultiScaleContrast().draw(output, batch)
        for level, (targets, negatives) in enumerate(
            zip(draw.targets, draw.negatives, strict=True)
        ):
            at = torch.arange(targets.shape[1]) * 2**level
            for q in range(4):
                moments = batch.moments[q][batch.moment_mask[q]]
                free = [
                    not any(s <= t <= e for s, e in moments.tolist())
                    and t < (40, 31)[batch.query_video[q]]
                    for t in at.tolist()
                ]
                assert not targets[q].logical_and(negatives[q]).any()
                assert all(free[n] for n in negatives[q].nonzero().squeeze(1).tolist())
                free_points = sum(
                    f and not t for f, t in zip(free, targets[q].tolist(), strict=True)
                )
                assert int(negatives[q].sum()) == min(int(targets[q].sum()), free_points)

    def test_negatives_are_drawn_evenly(self):
        batch = a_batch()
        output = small_snag()(batch)
        loss = MultiScaleContrast()
        counts = sum(loss.draw(output, batch).negatives[1][3].float() for _ in range(600))
        candidates = every_negative(loss, output, batch).negatives[1][3]
        assert (counts[~candidates] == 0).all()
        expected = 600 * 2 / int(candidates.sum())
        assert ((counts[candidates] - expected).abs() < 5 * expected**0.5).all()

    def test_one_query_of_every_video_evenly(self):
        videos = torch.tensor([0, 1, 0, 2, 0, 1])
        counts = torch.zeros(6)
        for _ in range(600):
            chosen = one_query_per_video(videos)
            assert sorted(videos[chosen].tolist()) == [0, 1, 2]
            counts += chosen
        assert (
            (counts / 600 - torch.tensor([1 / 3, 1 / 2, 1 / 3, 1, 1 / 3, 1 / 2])).abs() < 0.1
        ).all()

    def test_gather_packs_to_the_left(self):
        x = torch.arange(12.0).view(2, 6, 1)
        chosen = torch.tensor([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]) > 0
        features, mask, step = gather_steps(x, torch.tensor([1, 0, 0]), chosen)
        assert features[0, :, 0].tolist() == [7, 10, 11]
        assert step[0].tolist() == [1, 4, 5]
        assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]


class TestProperties:
    @pytest.mark.parametrize("config", [SANE, replace(AS_PRINTED, queries="all")], ids=str)
    def test_padding_changes_nothing(self, config):
        model, loss, batch = small_snag(), MultiScaleContrast(config), a_batch()
        padded = replace(
            batch,
            video=F.pad(batch.video, (0, 0, 0, 24), value=7.0),
            video_mask=F.pad(batch.video_mask, (0, 24)),
            text=F.pad(batch.text, (0, 0, 0, 2), value=7.0),
            text_mask=F.pad(batch.text_mask, (0, 2)),
        )
        results = []
        for b in (batch, padded):
            output = model(b)
            results.append(losses_of(loss, output, b, every_negative(loss, output, b)))
        torch.testing.assert_close(*results)

    def test_the_order_of_queries_changes_nothing(self):
        model, loss, batch = small_snag(), MultiScaleContrast(), a_batch()
        order = torch.tensor([2, 0, 3, 1])
        shuffled = replace(
            batch,
            text=batch.text[order],
            text_mask=batch.text_mask[order],
            query_video=batch.query_video[order],
            moments=batch.moments[order],
            moment_mask=batch.moment_mask[order],
            query_ids=tuple(batch.query_ids[i] for i in order.tolist()),
        )
        results = []
        for b in (batch, shuffled):
            output = model(b)
            results.append(losses_of(loss, output, b, every_negative(loss, output, b)))
        torch.testing.assert_close(*results)

    def test_a_shift_in_time_shifts_the_sets_with_it(self):
        batch = a_batch((64,), (0, 0), moments=[[[3.2, 24.9]], [[30.0, 36.0]]])
        lengths = (64, 32, 16, 8)
        valid = torch.ones(2, 120, dtype=torch.bool)
        before = target_sets(lengths, batch.moments, batch.moment_mask, valid)[0]
        after = target_sets(lengths, batch.moments + 16, batch.moment_mask, valid)[0]
        pairs = zip(before.split(lengths, 1), after.split(lengths, 1), strict=True)
        for level, (old, new) in enumerate(pairs):
            assert old.any()
            assert torch.equal(old.roll(16 >> level, dims=1), new)

    def test_the_length_of_features_matters_as_printed_only(self):
        """Multiplying all features by 10 multiplies raw products by 100, and leaves cosines."""
        model, batch = small_snag(), a_batch()
        output = model(batch)
        larger = replace(
            output,
            pyramid=replace(
                output.pyramid,
                levels=tuple(10 * x for x in output.pyramid.levels),
                base=10 * output.pyramid.base,
            ),
        )
        for config, same in ((SANE, True), (replace(AS_PRINTED, queries="all"), False)):
            loss = MultiScaleContrast(config)
            draw = every_negative(loss, output, batch)
            a, b = (losses_of(loss, o, batch, draw)[1] for o in (output, larger))
            assert torch.isclose(a, b) == same

    @pytest.mark.parametrize("config", [SANE, replace(AS_PRINTED, queries="all")], ids=str)
    def test_bfloat16_is_close_and_finite(self, config):
        torch.manual_seed(0)
        model, batch = small_snag().float(), a_batch().to("cpu", torch.float32)
        loss = MultiScaleContrast(config)
        output = model(batch)
        draw = every_negative(loss, output, batch)
        exact = losses_of(loss, output, batch, draw)
        half = replace(
            output,
            pyramid=replace(
                output.pyramid,
                levels=tuple(x.bfloat16() for x in output.pyramid.levels),
                base=output.pyramid.base.bfloat16(),
            ),
        )
        with torch.autocast("cpu", torch.bfloat16):
            terms = loss(half, batch)
        assert all(v.dtype == torch.float32 and v.isfinite() for v in terms.values())
        rough = losses_of(loss, half, batch, draw)
        for a, b in zip(exact, rough, strict=True):
            assert b.item() == pytest.approx(a.item(), rel=0.05)
        sum(rough).backward()
        assert all(
            p.grad.isfinite().all() for p in model.video_encoder.parameters() if p.grad is not None
        )

    def test_huge_products_stay_finite(self):
        loss = MultiScaleContrast(AS_PRINTED)
        logits = loss.similarity(1e3 * torch.randn(1, 3, 64), 1e3 * torch.randn(1, 5, 64))
        logits.requires_grad_()
        positive = torch.tensor([True, True, False, False, False]).expand(1, 3, 5)
        total, _ = contrast(logits, positive, ~positive)
        total.sum().backward()
        assert logits.abs().max() > 1e6
        assert total.isfinite().all()
        assert logits.grad.isfinite().all()

    def test_shares_of_two_processes_add_up(self, monkeypatch):
        """Two halves of a batch, divided by the numbers of the whole, sum to the whole."""
        model = small_snag()
        whole = a_batch()
        halves = [
            replace(
                whole,
                video=whole.video[n : n + 1],
                video_mask=whole.video_mask[n : n + 1],
                text=whole.text[2 * n : 2 * n + 2],
                text_mask=whole.text_mask[2 * n : 2 * n + 2],
                query_video=torch.zeros(2, dtype=torch.long),
                moments=whole.moments[2 * n : 2 * n + 2],
                moment_mask=whole.moment_mask[2 * n : 2 * n + 2],
            )
            for n in range(2)
        ]
        for config in (SANE, replace(AS_PRINTED, queries="all")):
            loss = MultiScaleContrast(config)

            def of(batch, loss=loss):
                output = model(batch)
                return losses_of(loss, output, batch, every_negative(loss, output, batch))

            expected = of(whole)
            seen = []
            with monkeypatch.context() as patch:
                patch.setattr(multiscale, "reduce_sum", lambda n, seen=seen: seen.append(n) or n)
                for half in halves:
                    of(half)
                joint = [a + b for a, b in zip(seen[:2], seen[2:], strict=True)]
                answers = iter(2 * joint)
                patch.setattr(multiscale, "reduce_sum", lambda _, answers=answers: next(answers))
                shares = [of(half) for half in halves]
            for number in range(2):
                torch.testing.assert_close(shares[0][number] + shares[1][number], expected[number])

    def test_on_hieramamba(self):
        config = HieraMambaConfig(
            video_dim=5,
            text_dim=6,
            channels=16,
            heads=2,
            levels=3,
            max_clips=48,
            text_channels=12,
            text_heads=2,
            text_layers=1,
            max_words=7,
            local_heads=2,
            head_channels=8,
            state=4,
        )
        torch.manual_seed(0)
        model, batch = randomised(HieraMamba(config)), a_batch()
        output = model(batch)
        for contrast_config in (SANE, LOWEST):
            loss = MultiScaleContrast(contrast_config)
            draw = every_negative(loss, output, batch)
            mine, slow = losses_of(loss, output, batch, draw), looped(output, draw, contrast_config)
            torch.testing.assert_close(mine, tuple(slow))
            assert all(value > 0 for value in mine)
            weights = [p for p in model.parameters() if p.requires_grad]
            found, expected = (
                torch.autograd.grad(sum(terms), weights, retain_graph=True, allow_unused=True)
                for terms in (mine, slow)
            )
            assert any(gradient is not None for gradient in found)
            torch.testing.assert_close(found, expected)

    def test_an_encoder_without_base_says_what_to_do(self):
        batch = a_batch()
        output = small_snag()(batch)
        output = replace(output, pyramid=replace(output.pyramid, base=None))
        with pytest.raises(ConfigurationError, match="anchors='lowest'"):
            MultiScaleContrast()(output, batch)
        assert MultiScaleContrast(LOWEST)(output, batch)["cross"] > 0


class TestObjective:
    def test_total_is_the_weighted_sum(self):
        batch = a_batch()
        output = small_snag()(batch)
        detection = DetectionObjective().eval()
        objective = ContrastiveObjective(
            detection, MultiScaleContrast(), {"within": 0.5, "cross": 2.0}
        )
        plain, terms = detection(output, batch), objective(output, batch)
        assert set(terms) == {"total", "classification", "regression", "within", "cross"}
        expected = plain["total"] + 0.5 * terms["within"] + 2 * terms["cross"]
        assert terms["total"].item() == pytest.approx(expected.item(), rel=1e-5)

    def test_unnamed_terms_are_reported_only(self):
        batch = a_batch()
        output = small_snag()(batch)
        objective = ContrastiveObjective(
            DetectionObjective().eval(), MultiScaleContrast(), {"cross": 1.0, "within": 0.0}
        )
        terms = objective(output, batch)
        rest = terms["total"] - terms["cross"]
        expected = terms["classification"] + terms["regression"]
        assert rest.item() == pytest.approx(expected.item(), rel=1e-5)
        assert terms["within"] > 0

    def test_unknown_terms_are_refused(self):
        batch = a_batch()
        objective = ContrastiveObjective(DetectionObjective(), MultiScaleContrast(), {"crosss": 1})
        with pytest.raises(ConfigurationError, match=r"crosss.*cross.*within"):
            objective(small_snag()(batch), batch)

    def test_bad_settings_are_refused(self):
        with pytest.raises(ConfigurationError, match="positive"):
            ContrastConfig(temperature=0)


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    batch = a_batch().to("cuda", torch.float32)
    batch = replace(batch, moments=batch.moments.float())
    model = small_snag().float().cuda()
    for config in (SANE, AS_PRINTED):
        loss = MultiScaleContrast(config)
        with torch.autocast("cuda", torch.bfloat16):
            output = model(batch)
            terms = loss(output, batch)
        sum(terms.values()).backward()
        assert all(value.isfinite() for value in terms.values())
        draw = every_negative(loss, output, batch)
        slow = looped(output, draw, replace(config, queries="all"))
        for mine, expected in zip(losses_of(loss, output, batch, draw), slow, strict=True):
            assert mine.item() == pytest.approx(expected.item(), rel=0.05)
