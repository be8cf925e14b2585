"""SnAG as a whole: padding, batching, sharing of videos, the flat pyramid, released sizes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from grounding_data import SMALL, make_batch, mask_of, small_snag

from tvg_lib.models import point_grounder, snag
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.models.snag import ClipEmbedding, SnAG

VARIANTS = {
    "transformer-affine": {},
    "projection-adaln-stride": {
        "text_encoder": "projection",
        "modulation": "adaln",
        "input_stride": 2,
        "text_positions": False,
    },
    "full-attention-stem": {"window": 0, "stem": 1, "positions": False},
    "projection-as-is": {"text_encoder": "projection", "text_channels": None},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def padded(batch, clips=0, words=0, value=torch.nan):
    """The batch with more padding, holding `value` (NaN spreads if it is ever read)."""
    video = F.pad(batch.video, (0, 0, 0, clips)).masked_fill(
        ~F.pad(batch.video_mask, (0, clips))[..., None], value
    )
    text = F.pad(batch.text, (0, 0, 0, words)).masked_fill(
        ~F.pad(batch.text_mask, (0, words))[..., None], value
    )
    return replace(
        batch,
        video=video,
        video_mask=F.pad(batch.video_mask, (0, clips)),
        text=text,
        text_mask=F.pad(batch.text_mask, (0, words)),
    )


def valid_outputs(output, query):
    """(logits, offsets) of each level of one query at its valid points."""
    masks = output.per_level(output.mask)
    return [
        (logits[query][mask[query]], offsets[query][mask[query]])
        for logits, offsets, mask in zip(
            output.per_level(output.logits), output.per_level(output.offsets), masks, strict=True
        )
    ]


def assert_same_answers(ours, theirs, queries, other_queries=None):
    for a, b in zip(queries, other_queries or queries, strict=True):
        for mine, other in zip(valid_outputs(ours, a), valid_outputs(theirs, b), strict=True):
            torch.testing.assert_close(mine[0], other[0])
            torch.testing.assert_close(mine[1], other[1])


class TestPadding:
    @variants
    @pytest.mark.parametrize("length", [1, 37, 75])  # 75 is beyond the trained 48 steps
    def test_logits_and_offsets(self, changes, length):
        model = small_snag(**changes)
        batch = make_batch([length], [0, 0], [5, 9])
        assert_same_answers(model(batch), model(padded(batch, clips=61, words=4)), [0, 1])

    @variants
    def test_gradients(self, changes):
        model = small_snag(**changes)
        batch = make_batch([37, 75], [0, 1, 1], [5, 9, 2])
        gradients = []
        for some in (batch, padded(batch, clips=61, words=4)):
            output = model(some)
            loss = 0
            for query in range(3):
                for level, (logits, offsets) in enumerate(valid_outputs(output, query)):
                    weight = torch.arange(len(logits)).cos() + level
                    loss = loss + (logits * weight).sum() + (offsets * weight[:, None]).sum()
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
            assert a.isfinite().all(), name
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
        assert sum(a.abs().sum() > 0 for a in gradients[0]) > 0.9 * len(gradients[0])

    def test_number_of_points(self):
        model = small_snag()
        output = model(make_batch([37], [0], [3]))
        assert output.lengths == (40, 20, 10, 5)  # padded to a multiple of 2**3
        assert [m.sum().item() for m in output.per_level(output.mask)] == [37, 19, 10, 5]
        strided = small_snag(input_stride=2)(make_batch([37], [0], [3]))
        assert strided.lengths == (24, 12, 6, 3)
        assert strided.pyramid.clips_per_step == 2


class TestBatching:
    @variants
    def test_a_batch_of_many_equals_batches_of_one(self, changes):
        model = small_snag(**changes)
        rows = [0, 0, 1, 2, 2, 2]
        batch = make_batch([75, 9, 37], rows, [4, 7, 9, 1, 2, 5])
        together = model(batch)
        for query, video in enumerate(rows):
            clips, words = int(batch.video_mask[video].sum()), int(batch.text_mask[query].sum())
            alone = replace(
                batch,
                video=batch.video[[video], :clips],
                video_mask=batch.video_mask[[video], :clips],
                text=batch.text[[query], :words],
                text_mask=batch.text_mask[[query], :words],
                query_video=torch.tensor([0]),
            )
            assert_same_answers(together, model(alone), [query], [0])

    def test_a_few_queries_at_a_time_answer_as_all_at_once(self, monkeypatch):
        model = small_snag()
        batch = make_batch([40, 22], [0, 1, 0, 1, 1], [4, 7, 3, 5, 1])
        together = model(batch)
        for points in (1, 200):  # one query, two queries of 78 points at a time
            monkeypatch.setattr(point_grounder, "POINTS", points)
            assert_same_answers(together, model(batch), range(5), range(5))

    def test_permuted_queries_permute_the_answers(self):
        model, order = small_snag(), [3, 0, 2, 1]
        batch = make_batch([40, 22], [0, 1, 0, 1], [4, 7, 3, 5])
        mixed = replace(
            batch,
            text=batch.text[order],
            text_mask=batch.text_mask[order],
            query_video=batch.query_video[order],
        )
        assert_same_answers(model(mixed), model(batch), range(4), order)

    @variants
    def test_sharing_a_video_equals_repeating_it(self, changes):
        model = small_snag(**changes)
        batch = make_batch([40, 22], [0, 1, 1, 0, 1], [4, 7, 3, 5, 5])
        repeated = replace(
            batch,
            video=batch.video[batch.query_video],
            video_mask=batch.video_mask[batch.query_video],
            query_video=torch.arange(5),
        )
        assert_same_answers(model(batch), model(repeated), range(5))

    def test_encoding_once_and_asking_later_is_the_same(self):
        model = small_snag()
        batch = make_batch([40, 22], [0, 1, 1], [4, 7, 3])
        pyramid = model.encode_video(batch.video, batch.video_mask)
        text = model.encode_text(batch.text[2:], batch.text_mask[2:])
        later = model.predict(pyramid.select(torch.tensor([1])), text, torch.tensor([0]))
        assert_same_answers(later, model(batch), [0], [2])


def level_by_level(model: PointGrounder, batch):
    """The plain way: fusion and heads run once per level of the pyramid."""
    pyramid = model.encode_video(batch.video, batch.video_mask)
    text = model.encode_text(batch.text, batch.text_mask)
    for level, (x, mask) in enumerate(zip(pyramid.levels, pyramid.masks, strict=True)):
        fused, valid = model.fusion(x, mask, text.features, text.mask, batch.query_video)
        number = torch.full((x.shape[1],), level)
        yield model.classification(fused, valid), model.regression(fused, valid, number), valid


@variants
def test_the_flat_pyramid_equals_a_loop_over_levels(changes):
    model = small_snag(**changes)
    batch = make_batch([64, 29], [0, 1, 1], [4, 7, 3])  # levels full to their last step, and not
    output = model(batch)
    levels = zip(
        level_by_level(model, batch),
        output.per_level(output.logits),
        output.per_level(output.offsets),
        strict=True,
    )
    for (logits, offsets, valid), flat_logits, flat_offsets in levels:
        torch.testing.assert_close(flat_logits[valid], logits[valid])
        torch.testing.assert_close(flat_offsets[valid], offsets[valid])


@pytest.mark.parametrize("stride", [1, 2])
def test_shifting_the_video_shifts_the_answers(stride):
    """Without positions and away from the ends, a shift by the largest stride moves all levels."""
    model = small_snag(positions=False, window=3, levels=3, input_stride=stride)
    shift, steps = 4, 160
    batch = make_batch([stride * (steps + shift)], [0], [4])
    earlier = replace(
        batch,
        video=batch.video[:, stride * shift :],
        video_mask=batch.video_mask[:, stride * shift :],
    )
    before, after = model(batch), model(earlier)
    for level in range(3):
        moved = shift // 2**level
        inner = slice(48 // 2**level, (steps - 48) // 2**level)
        for key in ("logits", "offsets"):
            a = before.per_level(getattr(before, key))[level][:, moved:]
            b = after.per_level(getattr(after, key))[level]
            torch.testing.assert_close(a[:, inner], b[:, inner])
    assert not torch.allclose(before.per_level(before.logits)[0], after.logits[:, :1])


def test_positions_break_that_symmetry():
    model = small_snag(window=3, levels=3)
    video = torch.randn(1, 40, SMALL.video_dim, dtype=torch.float64)
    whole = model.encode_video(video, mask_of([40])).levels[0]
    part = model.encode_video(video[:, 4:], mask_of([36])).levels[0]
    assert not torch.allclose(whole[:, 16:24], part[:, 12:20])


def test_published_positions_stretch_over_the_published_padding():
    """The released code pads to a multiple of every level's window as well as of every stride."""
    published = small_snag(stretch_over_padding=True)  # window 5, four levels: 4 * 8 steps
    video = torch.randn(1, 75, SMALL.video_dim, dtype=torch.float64)
    pyramid = published.encode_video(video, mask_of([75]))
    assert pyramid.lengths[0] == 96
    by_hand = published.encode_video(F.pad(video, (0, 0, 0, 21)), mask_of([75], 96))
    assert torch.equal(pyramid.levels[0][:, :75], by_hand.levels[0][:, :75])


def test_training_is_random_and_follows_the_seed():
    model = small_snag().train()
    batch = make_batch([40], [0, 0], [4, 7])

    def draw(seed):
        torch.manual_seed(seed)
        return model(batch).logits

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_every_parameter_learns():
    model = small_snag()
    output = model(make_batch([64], [0], [4]))
    (output.logits.sum() + output.offsets.sum()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to every key moves no attention weight.
    assert [name for name in still if not name.endswith("key.bias")] == []


def test_the_prior_sets_the_starting_probability():
    model = SnAG(replace(SMALL, prior=0.02)).eval()
    with torch.no_grad():
        model.classification.output.weight.zero_()
        batch = make_batch([16], [0], [3])
        output = model(replace(batch, video=batch.video.float(), text=batch.text.float()))
    assert output.logits.sigmoid().sub(0.02).abs().max() < 1e-6


@pytest.mark.parametrize(("stride", "convolutions"), [(3, 2), (8, 2), (0, 2)])
def test_impossible_input_strides_are_refused(stride, convolutions):
    with pytest.raises(ValueError, match=f"power of two.*found {stride}"):
        ClipEmbedding(4, 4, 16, convolutions, stride)


def test_low_precision_is_close():
    model = small_snag()
    batch = make_batch([40], [0], [4])
    exact = model(batch).logits
    low = model.bfloat16()(batch.to("cpu", torch.bfloat16)).logits
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).abs().mean() < 0.2 * exact.abs().mean()


# Total and, where the source gives it, of the video encoder; facts of the released modules.
RELEASED = {
    "TACOS": (11.20, 7.80),
    "EGO4D_SLOWFAST": (37.55, None),
    "EGO4D_EGOVLP": (24.41, 15.23),  # 24.40 by rounding: 24,404,747
    "MAD": (42.12, 30.81),
    "CHARADES_C3D": (10.41, None),
    "CHARADES_I3D": (9.88, None),
    "ACTIVITYNET": (3.23, None),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_have_the_released_size(name):
    with torch.device("meta"):
        model = SnAG(getattr(snag, name))
    total, video = RELEASED[name]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(total, abs=0.0055)
    if video is not None:
        video_millions = sum(p.numel() for p in model.video_encoder.parameters()) / 1e6
        assert video_millions == pytest.approx(video, abs=0.0055)


def test_released_lengths_are_whole_pyramids():
    """A training video of the released length needs no padding, for strides or for attention."""
    for name in RELEASED:
        config = getattr(snag, name)
        assert config.max_clips % (config.window // 2 * 2 * 2 ** (config.levels - 1)) == 0


@pytest.mark.parametrize("kind", ["transformer", "projection"])
def test_linear_layers_start_without_bias(kind):
    """As in the released code; torch's own start is uniform."""
    for name, layer in SnAG(replace(SMALL, text_encoder=kind)).named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.bias.eq(0).all(), name
            assert layer.weight.ne(0).any(), name
