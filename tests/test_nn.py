"""Attention, masked convolutions, positions and text encoders against slow readable references."""

import math

import pytest
import torch
import torch.nn.functional as F
from grounding_data import mask_of, randomised
from torch import nn

from tvg_lib.nn import feed_forward, sequence, winograd
from tvg_lib.nn.allocation import keep_freed_memory
from tvg_lib.nn.attention import MultiHeadAttention, TransformerBlock, local_attention
from tvg_lib.nn.convolution import thin_convolution
from tvg_lib.nn.dropout import Dropout
from tvg_lib.nn.feed_forward import FeedForward
from tvg_lib.nn.fusion import CrossAttentionBlock
from tvg_lib.nn.pyramid import Pyramid, RegressionHead
from tvg_lib.nn.sequence import (
    LayerScale,
    MaskedConv1d,
    SinusoidalPositions,
    masked_max_pool,
    pad_time,
)
from tvg_lib.nn.text import TextProjection, TextTransformer
from tvg_lib.nn.winograd import winograd_convolution


def band_attention(q, k, v, mask, radius):
    """Full attention with everything outside the band and every invalid key masked."""
    steps = torch.arange(q.shape[2])
    near = (steps[:, None] - steps).abs() <= radius
    allowed = near & mask[:, None, None, :]
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -1e30)
    weights = scores.softmax(-1).masked_fill(~mask[:, None, :, None], 0.0)
    return weights @ v


def random_qkv(steps, batch=3, heads=2, depth=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, steps, depth)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def awkward_masks(steps, seed=0):
    """A full row, one with holes and padding, one wholly invalid."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, steps, generator=generator) < 0.6
    mask[0], mask[2] = True, False
    mask[1, steps // 2 :] = False
    return mask


class TestLocalAttention:
    @pytest.mark.parametrize("window", range(3, 20, 2))
    def test_equals_full_attention_with_a_band_mask(self, window):
        for steps in range(1, 71):
            q, k, v = random_qkv(steps, seed=steps)
            mask = awkward_masks(steps, seed=steps)
            ours = local_attention(q, k, v, mask, window // 2)
            torch.testing.assert_close(ours, band_attention(q, k, v, mask, window // 2))

    @pytest.mark.parametrize(("steps", "radius"), [(5, 3), (37, 2), (40, 9)])
    def test_gradients_equal_those_of_full_attention(self, steps, radius):
        inputs = [x.requires_grad_() for x in random_qkv(steps)]
        mask = awkward_masks(steps)
        weight = torch.randn(3, 2, steps, 3, dtype=torch.float64)
        ours = torch.autograd.grad((local_attention(*inputs, mask, radius) * weight).sum(), inputs)
        reference = (band_attention(*inputs, mask, radius) * weight).sum()
        expected = torch.autograd.grad(reference, inputs)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
            assert a[2].eq(0).all()

    def test_gradcheck(self):
        inputs = [x.requires_grad_() for x in random_qkv(7, batch=2, heads=1, depth=2)]
        mask = mask_of([7, 4])
        assert torch.autograd.gradcheck(lambda q, k, v: local_attention(q, k, v, mask, 2), inputs)

    def test_what_lies_at_invalid_steps_does_not_matter(self):
        q, k, v = random_qkv(40)
        mask = mask_of([40, 23, 1])
        other = [x + 100 * ~mask[:, None, :, None] for x in (q, k, v)]
        torch.testing.assert_close(
            local_attention(q, k, v, mask, 4), local_attention(*other, mask, 4)
        )

    def test_dropout_follows_the_seed_and_keeps_the_mean(self):
        q, k, v = random_qkv(30, batch=1)
        mask = mask_of([30])

        def draw(seed):
            torch.manual_seed(seed)
            return local_attention(q, k, v, mask, 3, dropout=0.3)

        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
        mean = torch.stack([draw(seed) for seed in range(400)]).mean(0)
        assert (mean - local_attention(q, k, v, mask, 3)).abs().max() < 0.35
        assert (mean - local_attention(q, k, v, mask, 3)).abs().mean() < 0.04

    def test_bfloat16(self):
        q, k, v = random_qkv(50)
        mask = awkward_masks(50)
        low = local_attention(*(x.bfloat16() for x in (q, k, v)), mask, 5)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(
            low.double(), local_attention(q, k, v, mask, 5), atol=0.05, rtol=0.05
        )


class TestMultiHeadAttention:
    @pytest.mark.parametrize(("steps", "words"), [(9, 5), (9, 3), (8, 3)])  # (9, 3): to few
    def test_equals_torchs_own(self, steps, words):
        ours = randomised(MultiHeadAttention(8, 2, key_channels=6))
        theirs = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True).double()
        with torch.no_grad():
            theirs.q_proj_weight.copy_(ours.query.weight)
            theirs.k_proj_weight.copy_(ours.key.weight)
            theirs.v_proj_weight.copy_(ours.value.weight)
            theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
            theirs.out_proj.weight.copy_(ours.output.weight)
            theirs.out_proj.bias.copy_(ours.output.bias)
        q = torch.randn(3, steps, 8, dtype=torch.float64)
        k, v = torch.randn(2, 3, words, 6, dtype=torch.float64)
        mask = mask_of([words, 2, 1])
        expected, _ = theirs(q, k, v, key_padding_mask=~mask)
        torch.testing.assert_close(ours(q, k, v, mask), expected)

    def test_many_queries_and_few_keys_have_the_gradients_of_the_longer_way(self):
        attention = randomised(MultiHeadAttention(8, 2, key_channels=6, out_channels=16))
        q = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
        k = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
        mask, weight = mask_of([3, 2]), torch.randn(2, 11, 16, dtype=torch.float64)
        wanted = [q, k, *attention.parameters()]
        together = attention(q, k, k, mask)
        # Six queries at a time are not many against eight channels.
        apart = torch.cat([attention(part, k, k, mask) for part in q.split(6, 1)], 1)
        torch.testing.assert_close(together, apart)
        ours = torch.autograd.grad((together * weight).sum(), wanted)
        expected = torch.autograd.grad((apart * weight).sum(), wanted)
        torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("words", [5, 3])
    @pytest.mark.parametrize("videos", [1, 2])
    def test_shared_rows_equal_repeated_queries(self, videos, words):
        attention = randomised(MultiHeadAttention(8, 2, key_channels=6, out_channels=10))
        q, k = torch.randn(videos, 9, 8).double(), torch.randn(4, words, 6).double()
        row, mask = torch.tensor([1, 0, 1, 1]) % videos, mask_of([words, 2, 3, 1])
        shared = attention(q, k, k, mask, row)
        assert shared.shape == (4, 9, 10)
        torch.testing.assert_close(shared, attention(q[row], k, k, mask))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"heads": 3}, "8 channels.*3 heads"), ({"heads": 2, "window": 4}, "odd size, found 4")],
    )
    def test_impossible_shapes_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MultiHeadAttention(8, **arguments)


class TestMaskedConvolution:
    @pytest.mark.parametrize(("steps", "wide"), [(12, 128), (300, 128), (300, 4)])
    @pytest.mark.parametrize(
        ("kernel", "stride", "groups", "outputs"),
        [(3, 1, 1, 4), (3, 1, 4, 4), (3, 1, 1, 1), (3, 2, 4, 4), (5, 2, 1, 4)],
    )
    def test_equals_a_convolution_of_each_sequence_alone(
        self, kernel, stride, groups, outputs, steps, wide, monkeypatch
    ):
        monkeypatch.setattr(sequence, "WIDE", wide)  # small layers by Winograd's way, too
        torch.manual_seed(0)
        layer = MaskedConv1d(4, outputs, kernel, stride, groups, bias=True).double()
        nn.init.normal_(layer.bias)
        lengths = [steps, 7, 1]
        x, mask = torch.randn(3, steps, 4, dtype=torch.float64), mask_of(lengths)
        out, out_mask = layer(x + 50 * ~mask[..., None], mask)
        assert out.shape == (3, steps // stride, outputs)
        for row, length in enumerate(lengths):
            alone = F.conv1d(
                x[row, :length].T[None],
                layer.weight,
                layer.bias,
                stride,
                padding=kernel // 2,
                groups=groups,
            )[0].T
            valid = -(-length // stride)
            assert out_mask[row].sum() == valid == len(alone)
            torch.testing.assert_close(out[row, :valid], alone)

    def test_steps_must_fit_the_stride(self):
        with pytest.raises(ValueError, match="7 steps are not a multiple of the stride 2"):
            MaskedConv1d(4, 4, 3, stride=2)(torch.zeros(1, 7, 4), mask_of([7]))

    def test_pad_time(self):
        x, mask = pad_time(torch.ones(2, 5, 3), mask_of([5, 2]), 4)
        assert x.shape == (2, 8, 3)
        assert x[:, 5:].eq(0).all()
        assert mask.sum(1).tolist() == [5, 2]
        same, _ = pad_time(x, mask, 4)
        assert same is x


class TestThreeTaps:
    """The fast ways of a convolution against `F.conv1d`."""

    @pytest.mark.parametrize("steps", [*range(1, 10), 16, 30])
    def test_winograd(self, steps, monkeypatch):
        monkeypatch.setattr(winograd, "STEPS", 8)  # at a time
        torch.manual_seed(steps)
        x = torch.randn(3, steps, 4, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
        mask = awkward_masks(steps, seed=steps)
        ours = winograd_convolution(x, mask, weight)
        zeroed = torch.where(mask[..., None], x, 0.0)
        expected = F.conv1d(zeroed.transpose(1, 2), weight, padding=1).transpose(1, 2)
        torch.testing.assert_close(ours, expected)
        above = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (x, weight), above),
            torch.autograd.grad(expected, (x, weight), above),
        )

    def test_winograd_in_float32_errs_by_rounding_alone(self):
        torch.manual_seed(0)
        x, weight = torch.randn(1, 600, 64), torch.randn(64, 64, 3)
        ours = winograd_convolution(x, mask_of([600]), weight)
        exact = F.conv1d(x.double().transpose(1, 2), weight.double(), padding=1).transpose(1, 2)
        assert (ours - exact).abs().max() < 2e-5 * exact.abs().max()

    def test_invalid_steps_are_not_read(self):
        x, mask = torch.full((1, 9, 2), torch.nan), mask_of([4], 9)
        x[:, :4] = 1.0
        ours = winograd_convolution(x, mask, torch.ones(1, 2, 3))
        assert ours[0, :, 0].tolist() == pytest.approx([4, 6, 6, 4, 2, 0, 0, 0, 0], abs=1e-5)

    @pytest.mark.parametrize("steps", [1, 2, 9])
    def test_few_outputs(self, steps):
        x, weight = torch.randn(2, steps, 8).double(), torch.randn(2, 8, 3).double()
        expected = F.conv1d(x.transpose(1, 2), weight, padding=1).transpose(1, 2)
        torch.testing.assert_close(thin_convolution(x, weight), expected)


class TestDropout:
    def test_keeps_its_share_and_the_mean(self):
        torch.manual_seed(0)
        out = Dropout(0.1).train()(torch.ones(1001, 999))  # not a multiple of four
        assert out.unique().tolist() == pytest.approx([0, 1 / 0.9])
        share = (out == 0).double().mean()
        assert abs(share - 0.1) < 5 * math.sqrt(0.1 * 0.9 / out.numel())

    def test_neighbours_are_independent(self):
        torch.manual_seed(0)
        dropped = (Dropout(0.3).train()(torch.ones(4000, 97)) == 0).double()
        for distance in range(1, 9):  # four elements share a random word
            both = (dropped[:, distance:] * dropped[:, :-distance]).mean()
            assert abs(both - 0.09) < 0.002

    def test_follows_torchs_seed(self):
        def draw(seed):
            torch.manual_seed(seed)
            return Dropout(0.5).train()(torch.ones(50))

        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))

    def test_the_gradient_passes_where_the_value_does(self):
        x = torch.randn(40, requires_grad=True)
        out = Dropout(0.5).train()(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(out, x * gradient)

    def test_extremes_and_evaluation(self):
        x = torch.randn(9)
        assert torch.equal(Dropout(0.0).train()(x), x)
        assert torch.equal(Dropout(0.4).eval()(x), x)
        assert Dropout(1.0).train()(x).eq(0).all()


class TestFeedForward:
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_pieces_equal_the_layers_one_after_the_other(self, monkeypatch, dropout):
        monkeypatch.setattr(feed_forward, "ROWS", 4)
        layer = randomised(FeedForward(3, dropout=dropout)).train()
        x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)
        ours = layer(x)
        torch.manual_seed(1)  # the layers draw the same numbers in the same order
        expected = nn.Sequential.forward(layer, x)
        torch.testing.assert_close(ours, expected)
        wanted, above = [x, *layer.parameters()], torch.randn_like(ours)
        torch.testing.assert_close(
            torch.autograd.grad(ours, wanted, above), torch.autograd.grad(expected, wanted, above)
        )
        with torch.inference_mode():
            torch.testing.assert_close(layer.eval()(x), nn.Sequential.forward(layer, x))


class TestAllocation:
    def test_somebody_elses_choice_is_respected(self, monkeypatch):
        monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
        assert not keep_freed_memory()

    def test_only_where_glibc_may_be(self, monkeypatch):
        monkeypatch.setattr("sys.platform", "darwin")
        assert not keep_freed_memory()


def test_max_pooling_equals_a_loop_and_ignores_invalid_steps():
    torch.manual_seed(0)
    x = -torch.rand(3, 8, 2, dtype=torch.float64) - 1  # zeros at padding would win
    mask = mask_of([8, 5, 2])
    pooled = masked_max_pool(x, mask, 2)
    for row in range(3):
        for step in range(4):
            near = [t for t in range(2 * step - 1, 2 * step + 2) if 0 <= t < 8 and mask[row, t]]
            expected = x[row, near].amax(0) if near else torch.zeros(2, dtype=torch.float64)
            assert torch.equal(pooled[row, step], expected)


class TestSinusoidalPositions:
    def test_formula(self):
        codes = SinusoidalPositions(6, 10)(torch.zeros(1, 10, 6), mask_of([10]))[0]
        for position in range(10):
            for n in range(3):
                angle = position / 10000 ** (n / 3)
                assert codes[position, n] == pytest.approx(math.sin(angle) / 6**0.5, abs=1e-6)
                assert codes[position, 3 + n] == pytest.approx(math.cos(angle) / 6**0.5, abs=1e-6)

    def test_long_rows_stretch_by_their_own_length(self):
        positions = SinusoidalPositions(4, 10)
        codes = positions(torch.zeros(3, 25, 4), mask_of([25, 14, 6]))
        for row, length in ((0, 25), (1, 14)):
            stretched = F.interpolate(
                positions.table.T[None], size=length, mode="linear", align_corners=True
            )[0].T
            torch.testing.assert_close(codes[row, :length], stretched, atol=1e-5, rtol=0)
            assert codes[row, length:].eq(0).all()
        torch.testing.assert_close(codes[2, :6], positions.table[:6])

    def test_stretching_over_padding_uses_the_padded_length(self):
        positions = SinusoidalPositions(4, 10, stretch_over_padding=True)
        codes = positions(torch.zeros(2, 25, 4), mask_of([25, 6]))
        torch.testing.assert_close(codes[1, :6], codes[0, :6])
        assert codes[1, 6:].eq(0).all()

    def test_padding_beyond_the_trained_length_changes_nothing(self):
        positions = SinusoidalPositions(4, 10)
        short = positions(torch.zeros(1, 8, 4), mask_of([8]))
        padded = positions(torch.zeros(1, 30, 4), mask_of([8], 30))
        torch.testing.assert_close(padded[:, :8], short)

    def test_a_row_within_the_trained_length_is_exact_beside_a_longer_one(self):
        # 47 * (1 / 47) is not 1 in floating point: 48 was a length that once went wrong.
        positions = SinusoidalPositions(4, 48)
        lengths = [*range(1, 49), 49]
        codes = positions(torch.zeros(49, 49, 4), mask_of(lengths))
        for row, length in enumerate(lengths[:-1]):
            assert torch.equal(codes[row, :length], positions.table[:length]), length
        assert torch.equal(codes[-1, 48], positions.table[47])


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = LayerScale(3, drop_path=0.25, init=0.5)
    x = torch.ones(2000, 4, 3)
    out = layer.train()(x)
    kept = out[:, 0, 0] != 0
    assert out[kept].eq(torch.tensor(0.5 / 0.75)).all()
    assert out[~kept].eq(0).all()
    assert abs(kept.float().mean() - 0.75) < 0.05
    assert layer.eval()(x).eq(0.5).all()


class TestBlocks:
    @pytest.mark.parametrize("window", [0, 3])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_padding_changes_nothing(self, window, stride):
        block = randomised(TransformerBlock(8, 2, stride=stride, window=window))
        x, length = torch.randn(1, 11, 8, dtype=torch.float64), 11
        short, _ = block(*pad_time(x, mask_of([length]), 2))
        padded = F.pad(x, (0, 0, 0, 13), value=7.0)
        long, mask = block(padded, mask_of([length], 24))
        valid = int(mask.sum())
        assert valid == -(-length // stride)
        torch.testing.assert_close(long[:, :valid], short[:, :valid])
        assert long[:, valid:].eq(0).all()

    def test_only_convolutional_blocks_halve(self):
        with pytest.raises(ValueError, match="only a convolutional block"):
            TransformerBlock(8, 2, convolutional=False, stride=2)

    def test_modulation_by_hand(self):
        """With one word every step finds the same: scale and shift are linear in that word."""
        for modulation in ("affine", "adaln"):
            block = randomised(CrossAttentionBlock(4, 6, heads=2, modulation=modulation))
            x, word = torch.randn(1, 5, 4).double(), torch.randn(1, 1, 6).double()
            found = block.attention.output(block.attention.value(block.text_norm(word)))
            scale, shift = found[0, 0, :4], found[0, 0, 4:]
            base = F.layer_norm(x, (4,)) if modulation == "adaln" else x
            y = base * scale + shift
            y = y + block.feed_forward_scale.scale * block.feed_forward(block.feed_forward_norm(y))
            torch.testing.assert_close(block(x, mask_of([5]), word, mask_of([1])), y)

    def test_regression_scales_are_per_level(self):
        head = RegressionHead(4, levels=2).eval()
        x, mask = torch.randn(1, 6, 4), mask_of([6])
        level = torch.tensor([0, 0, 0, 1, 1, 1])
        plain = head(x, mask, level)
        with torch.no_grad():
            head.scales[1] = 3.0
        scaled = head(x, mask, level)
        torch.testing.assert_close(scaled[:, :3], plain[:, :3])
        torch.testing.assert_close(scaled[:, 3:], 3 * plain[:, 3:])
        assert scaled.ge(0).all()


def test_flat_pyramid_puts_one_invalid_step_between_levels():
    levels = tuple(torch.randn(2, n, 3) for n in (4, 2, 1))
    masks = (mask_of([4, 3]), mask_of([2, 2]), mask_of([1, 1]))
    pyramid = Pyramid(levels, masks)
    x, mask, level = pyramid.flat()
    assert level.tolist() == [0, 0, 0, 0, -1, 1, 1, -1, 2]
    assert mask[1].tolist() == [True, True, True, False, False, True, True, False, True]
    assert torch.equal(x[:, level == 1], levels[1])
    assert x[:, level < 0].eq(0).all()
    chosen = pyramid.select(torch.tensor([1, 1]))
    assert chosen.lengths == (4, 2, 1)
    assert torch.equal(chosen.levels[0][0], levels[0][1])


class TestTextEncoders:
    @pytest.mark.parametrize("positions", [True, False])
    @pytest.mark.parametrize("background", [True, False])
    @pytest.mark.parametrize("kind", [TextTransformer, TextProjection])
    def test_padding_changes_nothing(self, kind, positions, background):
        encoder = randomised(
            kind(5, 8, heads=2, max_length=6, positions=positions, background_token=background)
        )
        text = torch.randn(1, 9, 5, dtype=torch.float64)  # longer than max_length
        for length in (9, 4, 1):
            short, short_mask = encoder(text[:, :length], mask_of([length]))
            padded = F.pad(text[:, :length], (0, 0, 0, 5), value=torch.nan)
            long, mask = encoder(padded, mask_of([length], length + 5))
            assert short_mask.all()
            assert mask.sum() == length + background == short.shape[1]
            torch.testing.assert_close(long[mask], short[0])

    def test_projection_may_keep_the_width(self):
        encoder = TextProjection(6, None, heads=2, background_token=False)
        text = torch.randn(1, 3, 6)
        out, _ = encoder(text, mask_of([3]))
        assert encoder.channels == 6
        assert torch.equal(out, text)

    def test_summary_is_attention_from_the_mean(self):
        encoder = randomised(TextProjection(6, 8, heads=2))
        text = torch.randn(1, 3, 6).double()
        words = encoder.input(text)
        mean = words.mean(1, keepdim=True)
        everything = torch.cat([mean, words], 1)
        out, _ = encoder(text, mask_of([3]))
        expected = encoder.pool(mean, everything, everything, mask_of([4]))
        torch.testing.assert_close(out, torch.cat([expected, words], 1))


@pytest.mark.parametrize("kind", ["feed-forward", "three taps"])
def test_second_derivatives_are_refused_not_wrong(kind):
    x = torch.randn(1, 9, 4, requires_grad=True)
    y = FeedForward(4)(x)
    if kind == "three taps":
        y = winograd_convolution(x, mask_of([9]), torch.randn(4, 4, 3))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
