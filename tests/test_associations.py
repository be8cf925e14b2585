"""The alternatives of MSCL's Tables 4 and 6 against loops, the mixed view, and equation 6."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from grounding_data import mask_of, randomised, small_snag
from hypothesis import given
from hypothesis import strategies as st
from test_multiscale import a_batch, losses_of, one_term

from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.losses.associations import (
    MemoryBankContrast,
    MomentQueryContrast,
    QueryQueryContrast,
    SimilarSentenceContrast,
    TokenMixContrast,
    mean_word,
    sentence_similarity,
)
from tvg_lib.losses.multiscale import ContrastConfig
from tvg_lib.models.token_mix import TokenMixGrounder, TwoViewPredictions, tube_token_mix
from tvg_lib.nn.printed_fusion import PrintedFusion, PrintedFusionBlock

CONFIG = ContrastConfig(temperature=0.5)
LEVELS, WIDTH = 4, 8


def steps_of(mask):
    return mask.nonzero().squeeze(1).tolist()


def mean_of_means(terms):
    """Over the queries that have terms."""
    means = [sum(t) / len(t) for t in terms if t]
    return sum(means) / len(means)


def unit_sentences():
    """Queries 0 and 2 alike (0.9), 1 far from both (0.1, 0), 3 in between (0.5 of 0)."""
    rows = [[1.0, 0.0, 0.0, 0.0]]
    rows.append([0.1, 0.99**0.5, 0.0, 0.0])
    rows.append([0.9, -0.09 / 0.99**0.5, 0.0, 0.0])
    rows[2][2] = (1 - rows[2][0] ** 2 - rows[2][1] ** 2) ** 0.5
    rows.append([0.5, 0.0, 0.0, 0.75**0.5])
    return torch.tensor(rows, dtype=torch.float64)


class TestTokenMix:
    def test_a_tube_takes_whole_channels_of_one_other_video(self):
        torch.manual_seed(0)
        mask = mask_of([9, 6, 7])
        video = torch.randn(3, 9, 12) * mask[..., None]
        shares = []
        for _ in range(40):
            mixed = tube_token_mix(video, mask, groups=6)
            found = []
            for b in range(3):
                changed = mixed[b] != video[b]
                both = [o for o in range(3) if o != b]
                other = [o for o in both if torch.equal(mixed[b][changed], video[o][changed])]
                assert other or not changed.any()
                if changed.any():
                    o = other[0]
                    shared = mask[b] & mask[o]
                    assert not changed[~shared].any()
                    channels = changed[shared].any(0)
                    assert (changed[shared] == channels).all()  # constant in time
                    pairs = channels.view(6, 2)
                    assert (pairs[:, 0] == pairs[:, 1]).all()  # whole tokens
                    found.append(channels)
                    shares.append(channels.float().mean().item())
            assert all(torch.equal(found[0], c) for c in found[1:])  # one mask for the batch
        assert 0 < max(shares) <= 0.5

    def test_a_single_video_is_left_alone(self):
        video = torch.randn(1, 5, 8)
        assert torch.equal(tube_token_mix(video, mask_of([5])), video)

    def test_second_view_in_training_only(self):
        torch.manual_seed(0)
        model, batch = TokenMixGrounder(small_snag(dropout=0.0, drop_path=0.0)).double(), a_batch()
        plain = model.eval()(batch)
        assert not isinstance(plain, TwoViewPredictions)
        output = model.train()(batch)
        assert isinstance(output, TwoViewPredictions)
        torch.testing.assert_close(output.logits, plain.logits)
        changed = [
            not torch.allclose(a, b)
            for a, b in zip(output.view.levels, output.pyramid.levels, strict=True)
        ]
        assert all(changed)
        with pytest.raises(ConfigurationError, match="second view"):
            TokenMixContrast()(plain, batch)

    def test_the_loop(self):
        torch.manual_seed(0)
        model, batch = TokenMixGrounder(small_snag(dropout=0.0, drop_path=0.0)).double(), a_batch()
        output, loss = model.train()(batch), TokenMixContrast(CONFIG)
        draw = loss.draw(output, batch)
        within, cross = losses_of(loss, output, batch, draw)
        slow_within, slow_cross = [], []
        for q in range(4):
            row, own, across = int(draw.row[q]), [], []
            for level in range(LEVELS):
                z, view = output.pyramid.levels[level][row], output.view.levels[level][row]
                negatives = [view[n] for n in steps_of(draw.negatives[level][q])]
                for j in steps_of(draw.targets[level][q]) if negatives else ():
                    for i in steps_of(draw.targets[level][q]):
                        own.append(one_term(z[i], view[j], negatives, CONFIG))
                    for i in steps_of(draw.targets[0][q]):
                        anchor = output.pyramid.base[row, i]
                        across.append(one_term(anchor, view[j], negatives, CONFIG))
            slow_within.append(own)
            slow_cross.append(across)
        torch.testing.assert_close(within, mean_of_means(slow_within))
        torch.testing.assert_close(cross, mean_of_means(slow_cross))


class TestMemoryBank:
    def test_first_step_has_no_positive_and_the_bank_fills(self):
        torch.manual_seed(0)
        model, batch = small_snag(), a_batch()
        output = model(batch)
        loss = MemoryBankContrast(CONFIG, WIDTH, LEVELS, size=997, momentum=0.75).double().train()
        terms = loss(output, batch)
        assert terms["within"] == terms["cross"] == 0
        assert int(loss.present.any(1).sum()) == 4

        draw = loss.draw(output, batch)
        slots = loss.present.any(1).nonzero().squeeze(1)
        for level, x in enumerate(output.pyramid.levels):
            with_targets = [q for q in range(4) if draw.targets[level][q].any()]
            means = {
                tuple(x[draw.row[q]][draw.targets[level][q]].mean(0).tolist()) for q in with_targets
            }
            filled = slots[loss.present[slots, level]]
            assert {tuple(loss.bank[s, level].tolist()) for s in filled} == means

    def test_running_mean_with_momentum(self):
        model, batch = small_snag(), a_batch()
        first, second = model(batch), small_snag(seed=1)(batch)
        loss = MemoryBankContrast(CONFIG, WIDTH, LEVELS, size=997, momentum=0.75).double().train()
        loss(first, batch)
        before = loss.bank.clone()
        loss(second, batch)
        alone = MemoryBankContrast(CONFIG, WIDTH, LEVELS, size=997).double().train()
        alone(second, batch)
        torch.testing.assert_close(loss.bank, 0.75 * before + 0.25 * alone.bank)

    def test_update_frequency_and_evaluation(self):
        model, batch = small_snag(), a_batch()
        output, other = model(batch), small_snag(seed=1)(batch)
        loss = MemoryBankContrast(CONFIG, WIDTH, LEVELS, size=997, update_every=2).double().train()
        loss(output, batch)
        kept = loss.bank.clone()
        loss(other, batch)
        assert torch.equal(loss.bank, kept)
        loss(other, batch)
        assert not torch.equal(loss.bank, kept)
        kept = loss.bank.clone()
        loss.eval()(output, batch)
        assert torch.equal(loss.bank, kept)

    def test_positive_is_the_own_slot_and_negatives_are_of_other_videos(self):
        torch.manual_seed(0)
        model, batch = small_snag(), a_batch()
        output = model(batch)
        loss = MemoryBankContrast(CONFIG, WIDTH, LEVELS, size=997).double().train()
        loss(output, batch)
        loss.eval()
        draw = loss.draw(output, batch)
        means = [
            torch.stack([x[draw.row[q]][t[q]].mean(0) for q in range(4)])
            for x, t in zip(output.pyramid.levels, draw.targets, strict=True)
        ]
        seen = 0
        for _ in range(20):
            for level, pool in enumerate(loss.pools(output, batch, draw)):
                for q in range(4):
                    own = pool.features[q][pool.positive[q]]
                    if draw.targets[level][q].any():
                        torch.testing.assert_close(own, means[level][q][None])
                    else:
                        assert len(own) == 0
                    foreign = pool.features[q][pool.negative[q]]
                    assert len(foreign) <= int(draw.targets[level][q].sum())
                    others = means[level][batch.query_video != batch.query_video[q]]
                    for vector in foreign:
                        assert (others - vector).abs().amax(1).nan_to_num(1.0).min() < 1e-9
                        seen += 1
        assert seen > 100

    def test_a_newcomer_takes_the_slot_over(self):
        model, batch = small_snag(), a_batch((40, 31), (0, 1, 1, 1))
        loss = MemoryBankContrast(CONFIG, WIDTH, LEVELS, size=1).double().train()
        batch = replace(
            batch,
            text=batch.text[:1],
            text_mask=batch.text_mask[:1],
            query_video=batch.query_video[:1],
            moments=batch.moments[:1],
            moment_mask=batch.moment_mask[:1],
            query_ids=("first",),
        )
        loss(model(batch), batch)
        owner, kept = loss.owner.clone(), loss.bank.clone()
        newcomer = replace(batch, query_ids=("second",), moments=batch.moments + 6)
        loss(model(newcomer), newcomer)
        assert loss.owner != owner
        fresh = MemoryBankContrast(CONFIG, WIDTH, LEVELS, size=1).double().train()
        fresh(model(newcomer), newcomer)
        torch.testing.assert_close(loss.bank, fresh.bank)
        assert not torch.allclose(loss.bank, kept)

    def test_the_bank_is_part_of_the_checkpoint(self):
        loss = MemoryBankContrast(CONFIG, WIDTH, LEVELS, size=5)
        assert set(loss.state_dict()) == {"bank", "present", "owner", "video", "step"}

    def test_bad_settings_are_refused(self):
        with pytest.raises(ConfigurationError, match="momentum"):
            MemoryBankContrast(CONFIG, WIDTH, LEVELS, momentum=1.0)


class TestSentences:
    def batch(self):
        return replace(a_batch(), sentence=unit_sentences())

    def test_similarity_of_the_made_up_sentences(self):
        expected = [[1, 0.1, 0.9, 0.5], [0.1, 1, 0, 0.05], [0.9, 0, 1, 0.45], [0.5, 0.05, 0.45, 1]]
        found = sentence_similarity(self.batch())
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        with pytest.raises(DataError, match="sentence features"):
            sentence_similarity(a_batch())

    def test_moments_of_similar_sentences_against_a_loop(self, monkeypatch):
        # Every distant target as a negative: nothing random is left.
        monkeypatch.setattr("tvg_lib.losses.associations.random_subset", lambda mask, count: mask)
        batch = self.batch()
        output, loss = small_snag()(batch), SimilarSentenceContrast(CONFIG)
        draw = loss.draw(output, batch)
        within, cross = losses_of(loss, output, batch, draw)
        alike = {0: [0, 2], 1: [1], 2: [0, 2], 3: [3]}
        distant = {0: [1], 1: [0, 2, 3], 2: [1], 3: [1]}
        slow = [[], []]
        for q in range(4):
            own, across = [], []
            for level in range(LEVELS):
                z = output.pyramid.levels[level]

                def targets(queries, level=level, z=z):
                    return [
                        (int(draw.row[r]), s, z[draw.row[r], s])
                        for r in queries
                        for s in steps_of(draw.targets[level][r])
                    ]

                negatives = [v for *_, v in targets(distant[q])]
                for row, step, vector in targets(alike[q]) if negatives else ():
                    for i in steps_of(draw.targets[level][q]):
                        if (row, step) != (int(draw.row[q]), i):
                            own.append(one_term(z[draw.row[q], i], vector, negatives, CONFIG))
                    for i in steps_of(draw.targets[0][q]):
                        anchor = output.pyramid.base[draw.row[q], i]
                        across.append(one_term(anchor, vector, negatives, CONFIG))
            slow[0].append(own)
            slow[1].append(across)
        torch.testing.assert_close(within, mean_of_means(slow[0]))
        torch.testing.assert_close(cross, mean_of_means(slow[1]))

    def test_as_many_negatives_as_targets(self):
        torch.manual_seed(0)
        batch = self.batch()
        output, loss = small_snag()(batch), SimilarSentenceContrast(CONFIG)
        draw = loss.draw(output, batch)
        for pool, targets in zip(loss.pools(output, batch, draw), draw.targets, strict=True):
            assert (pool.negative.sum(1) <= targets.sum(1)).all()
            assert pool.negative.any()

    def test_queries_with_queries(self):
        batch = self.batch()
        output = small_snag()(batch)
        terms = QueryQueryContrast(CONFIG)(output, batch)
        words = mean_word(output)
        # 0 and 2 have each other; both are distant to 1 only. 1 and 3 have no positive.
        expected = [one_term(words[a], words[b], [words[1]], CONFIG) for a, b in ((0, 2), (2, 0))]
        torch.testing.assert_close(terms["association"], sum(expected) / 2)

    def test_queries_with_queries_leave_the_video_alone(self):
        model, batch = small_snag(), self.batch()
        QueryQueryContrast(CONFIG)(model(batch), batch)["association"].backward()
        assert all(p.grad is None for p in model.video_encoder.parameters())
        assert any(p.grad is not None for p in model.text_encoder.parameters())


class TestMomentQuery:
    def test_the_loop(self, monkeypatch):
        monkeypatch.setattr("tvg_lib.losses.associations.random_subset", lambda mask, count: mask)
        torch.manual_seed(0)
        batch = a_batch()
        output = small_snag()(batch)
        loss = MomentQueryContrast(CONFIG, 12, WIDTH).double()
        terms = loss(output, batch)
        draw = loss.moments.draw(output, batch)
        anchors = loss.projection(mean_word(output))
        means = []
        for q in range(4):
            found = []
            for level, z in enumerate(output.pyramid.levels):
                negatives = [
                    z[draw.row[r], s]
                    for r in range(4)
                    if batch.query_video[r] != batch.query_video[q]
                    for s in steps_of(draw.targets[level][r])
                ]
                for s in steps_of(draw.targets[level][q]):
                    found.append(one_term(anchors[q], z[draw.row[q], s], negatives, CONFIG))
            means.append(found)
        torch.testing.assert_close(terms["association"], mean_of_means(means))

    def test_one_video_has_no_negatives(self):
        batch = a_batch((40,), (0, 0, 0, 0))
        terms = MomentQueryContrast(CONFIG, 12, WIDTH).double()(small_snag()(batch), batch)
        assert terms["association"] == 0

    def test_the_projection_learns(self):
        torch.manual_seed(0)
        batch = a_batch()
        loss = MomentQueryContrast(CONFIG, 12, WIDTH).double()
        loss(small_snag()(batch), batch)["association"].backward()
        assert loss.projection.weight.grad.abs().max() > 0


class TestPrintedFusion:
    def looped(self, block, x, mask, text, text_mask):
        """Equations 5 to 7, query by query, without padding."""
        rows = torch.zeros_like(x)
        for q in range(len(x)):
            z = block.video_norm(x[q][mask[q]])
            e = block.text_norm(text[q][text_mask[q]])
            scores = z @ e.T / math.sqrt(z.shape[1])
            if block.values == "words":
                o = torch.stack([(row.exp() / row.exp().sum()) @ e for row in scores])
            else:
                weights = torch.stack([c.exp() / c.exp().sum() for c in scores.T], dim=1)
                o = len(z) * weights.mean(1)[:, None] * z
            hidden = block.feed_forward(block.feed_forward_norm(o))
            rows[q][mask[q]] = block.feed_forward_scale.scale * hidden + o
        return rows

    @pytest.mark.parametrize("values", ["words", "video"])
    def test_the_equations(self, values):
        torch.manual_seed(0)
        block = randomised(PrintedFusionBlock(8, values))
        x, text = torch.randn(2, 9, 8).double(), torch.randn(2, 5, 8).double()
        mask, text_mask = mask_of([9, 6]), mask_of([3, 5])
        expected = self.looped(block, x, mask, text, text_mask)
        tolerance = {} if values == "words" else {"rtol": 1e-5, "atol": 1e-5}  # softmax in float32
        torch.testing.assert_close(block(x, mask, text, text_mask), expected, **tolerance)

    @pytest.mark.parametrize("values", ["words", "video"])
    def test_levels_are_apart(self, values):
        """Levels laid end to end, a step between them, fuse as each of them alone."""
        torch.manual_seed(0)
        block = randomised(PrintedFusionBlock(8, values))
        text, text_mask = torch.randn(2, 5, 8).double(), mask_of([3, 5])
        levels = [torch.randn(2, steps, 8).double() for steps in (8, 4, 2)]
        masks = [mask_of([8, 5]), mask_of([4, 3]), mask_of([2, 2])]
        gap, no = torch.zeros(2, 1, 8).double(), torch.zeros(2, 1, dtype=torch.bool)
        x = torch.cat([levels[0], gap, levels[1], gap, levels[2]], dim=1)
        mask = torch.cat([masks[0], no, masks[1], no, masks[2]], dim=1)
        fused = block(x, mask, text, text_mask)
        for part, level, there in zip(
            (fused[:, :8], fused[:, 9:13], fused[:, 14:]), levels, masks, strict=True
        ):
            torch.testing.assert_close(part, block(level, there, text, text_mask))

    def test_even_attention_leaves_the_video(self):
        block = PrintedFusionBlock(8, "video").eval()
        x, text = torch.randn(1, 9, 8), torch.zeros(1, 4, 8)
        fused = block(x, mask_of([9]), text, mask_of([4]))
        o = block.video_norm(x)
        torch.testing.assert_close(fused, o + block.feed_forward(block.feed_forward_norm(o)))

    @pytest.mark.parametrize("values", ["words", "video"])
    @given(extra=st.integers(1, 9), words=st.integers(1, 4))
    def test_padding_changes_nothing(self, values, extra, words):
        torch.manual_seed(0)
        fusion = randomised(PrintedFusion(8, 6, layers=2, values=values))
        x, text = torch.randn(2, 9, 8).double(), torch.randn(3, 5, 6).double()
        mask, text_mask, row = mask_of([9, 6]), mask_of([3, 5, 2]), torch.tensor([1, 0, 1])
        fused, kept = fusion(x, mask, text, text_mask, row)
        padded, longer = fusion(
            F.pad(x, (0, 0, 0, extra), value=5.0),
            F.pad(mask, (0, extra)),
            F.pad(text, (0, 0, 0, words), value=5.0),
            F.pad(text_mask, (0, words)),
            row,
        )
        torch.testing.assert_close(padded[:, :9][kept], fused[kept], rtol=1e-5, atol=1e-6)
        assert not longer[:, 9:].any()

    @pytest.mark.parametrize("values", ["words", "video"])
    def test_in_a_model(self, values):
        model, batch = small_snag(), a_batch()
        model.fusion = randomised(PrintedFusion(8, 12, values=values))
        output = model(batch)
        output.logits[output.mask].sum().backward()
        assert output.fused.shape[-1] == 8
        # The query matters in both readings.
        other = replace(batch, text=batch.text + torch.randn_like(batch.text))
        assert not torch.allclose(model(other).logits, output.logits)
        assert model.fusion.layers[0].text_norm.weight.grad.abs().max() > 0
