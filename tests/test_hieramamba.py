"""HieraMamba: blocks against plain loops, padding, batching, time, released sizes, its losses."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from grounding_data import SMALL, make_batch, make_dataset, mask_of, randomised, small_snag
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_snag import assert_same_answers, padded, valid_outputs

from tvg_lib.decoding import ground
from tvg_lib.errors import DataError
from tvg_lib.interop import convert_grounder, hieramamba_config, load_hieramamba
from tvg_lib.losses.contrastive import anchor_contrast, segment_contrast
from tvg_lib.losses.detection import DetectionObjective
from tvg_lib.losses.hieramamba import AnchorContrast, HieraMambaObjective, SegmentContrast
from tvg_lib.models import hieramamba
from tvg_lib.models.anchor_mamba import AnchorMambaPooling
from tvg_lib.models.hieramamba import HieraMamba, HieraMambaConfig
from tvg_lib.nn.anchor_pooling import AnchorPooling, group, interleave, separate

TINY = HieraMambaConfig(
    **{name: value for name, value in vars(SMALL).items() if name != "window"},
    window=5,
    windowed_levels=2,
    state=4,
    head_channels=8,
)
VARIANTS = {
    "late-gated": {},
    "early-adaln-stride": {"early_fusion": True, "modulation": "adaln", "input_stride": 2},
    "one-directional-gated-pooling": {"bidirectional": False, "pooling": "gated", "stem": 1},
    "ungated-no-local-max": {"merge": "scaled_skip", "window": None, "pooling": "max"},
    "strided": {"anchored": False},
    "residual-attention-pooling": {"merge": "residual", "pooling": "attention", "local_levels": 2},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def small(seed=0, **changes):
    """A small float64 model, all weights far from their first values."""
    return randomised(HieraMamba(replace(TINY, **changes)), seed)


# ---------------------------------------------------------------- blocks


def plain_pooling(pool, tokens):
    """One anchor of the valid tokens (S, C) of one group."""
    mean, high = tokens.mean(0), tokens.max(0).values
    if pool.method == "mean":
        return mean
    if pool.method == "max":
        return high
    if pool.method == "gated":
        share = torch.sigmoid(pool.gate.weight @ torch.cat([mean, high]) + pool.gate.bias)
        return share * high + (1 - share) * mean
    inner = pool.attention
    query, keys, values = inner.query(pool.query), inner.key(tokens), inner.value(tokens)
    weights = (keys @ query / len(query) ** 0.5).softmax(0)
    return inner.output(weights @ values)


def plain_block(block, x):
    """A block on one sequence (T, C) without padding, group by group and step by step."""
    rms = [
        lambda y, norm=norm: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        for norm in (block.global_norm, block.feed_forward_norm)
    ]
    rows, kinds = [], []
    starts = range(0, len(x), block.stride)
    if not block.anchored:
        rows, kinds = list(x), ["token"] * len(x)
    for start in starts if block.anchored else ():
        tokens = x[start : start + block.stride]
        rows += [plain_pooling(block.pooling, tokens), *tokens]
        kinds += ["anchor"] + ["token"] * len(tokens)
    x = torch.stack(rows)

    def merged(x, branch, gate):
        whole = x + branch
        if gate is None:
            return whole
        share = torch.sigmoid(torch.cat([x, whole], -1) @ gate.weight.T + gate.bias)
        return share * whole + (1 - share) * x

    branch = block.global_encoder(rms[0](x)[None])[0]
    if block.merge == "scaled_skip":
        x = branch + block.global_scale.scale * x
    else:
        x = merged(x, block.global_scale.scale * branch, block.global_gate)
    if block.local_encoder is not None:
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.local_norm.weight
        branch, _ = block.local_encoder(normed[None], torch.ones(1, len(x), dtype=torch.bool))
        x = merged(x, block.local_scale.scale * branch[0], block.local_gate)
    x = x + block.feed_forward_scale.scale * block.feed_forward(rms[1](x))
    tokens = torch.stack([row for row, kind in zip(x, kinds, strict=True) if kind == "token"])
    if not block.anchored:
        pooled = [plain_pooling(block.pooling, tokens[n : n + block.stride]) for n in starts]
        return tokens, torch.stack(pooled)
    return tokens, torch.stack(
        [row for row, kind in zip(x, kinds, strict=True) if kind == "anchor"]
    )


BLOCKS = [
    {"pooling": pooling, "window": window, "merge": merge}
    for pooling, window, merge in zip(
        itertools.cycle(("mean", "max", "attention", "gated")),
        (5, None, 0, 5, 3, None),
        itertools.cycle(("gate", "residual", "scaled_skip")),
        strict=False,
    )
] + [
    {"bidirectional": False, "stride": 3},
    {"feed_forward": "swiglu", "stride": 4, "taps": 3, "expand": 1},
    {"feed_forward": "linear", "window": None},
    {"anchored": False, "pooling": "gated"},
]


class TestBlock:
    @pytest.mark.parametrize("settings", BLOCKS)
    def test_equals_a_plain_one_row_by_row(self, settings):
        block = randomised(AnchorMambaPooling(8, state=4, head_channels=4, **settings))
        lengths = [17, 1, 12, 9]
        mask = mask_of(lengths, 19)
        x = torch.randn(4, 19, 8, dtype=torch.float64) * mask[..., None]
        tokens, anchors, anchor_mask = block(x, mask)
        assert tokens[~mask].eq(0).all()
        assert anchors[~anchor_mask].eq(0).all()
        for row, length in enumerate(lengths):
            count = -(-length // block.stride)
            expected_tokens, expected_anchors = plain_block(block, x[row, :length])
            assert anchor_mask[row].sum() == count
            torch.testing.assert_close(tokens[row, :length], expected_tokens)
            torch.testing.assert_close(anchors[row, :count], expected_anchors)

    @pytest.mark.parametrize("length", [1, 2, 5, 8])
    @pytest.mark.parametrize("stride", [2, 3])
    def test_interleaving_is_undone(self, length, stride):
        x = torch.randn(2, length, 3)
        tokens, valid = group(x, torch.ones(2, length, dtype=torch.bool), stride)
        anchors = -torch.arange(1.0, tokens.shape[1] + 1)[None, :, None].expand(2, -1, 3)
        mixed = interleave(anchors, tokens)
        assert mixed[0, :: stride + 1, 0].tolist() == anchors[0, :, 0].tolist()
        assert interleave(valid.any(2), valid).sum() == 2 * (length + tokens.shape[1])
        back_anchors, back = separate(mixed, stride, length)
        assert torch.equal(back, x)
        assert torch.equal(back_anchors, anchors)

    def test_leaked_padding_halves_the_last_anchor_of_an_odd_row(self):
        tokens = torch.tensor([[[[2.0], [4.0]], [[6.0], [0.0]]]])
        valid = torch.tensor([[[True, True], [True, False]]])
        ours, theirs = (
            AnchorPooling(1, "mean", leak_padding=leak)(tokens, valid).flatten().tolist()
            for leak in (False, True)
        )
        assert ours == [3, 6]
        assert theirs == [3, 3]

    @pytest.mark.parametrize("settings", [{"pooling": "median"}, {"merge": "sum"}])
    def test_unknown_options_are_named(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings.values()))):
            AnchorMambaPooling(8, head_channels=4, **settings)


# ---------------------------------------------------------------- the whole model


class TestPaddingAndBatches:
    @variants
    @pytest.mark.parametrize("length", [1, 37, 75])  # 75 is beyond the trained 48 steps
    def test_padding_changes_nothing(self, changes, length):
        model = small(**changes)
        batch = make_batch([length], [0, 0], [5, 9])
        assert_same_answers(model(batch), model(padded(batch, clips=61, words=4)), [0, 1])

    @variants
    def test_gradients_reach_all_and_do_not_see_padding(self, changes):
        model = small(**changes)
        batch = make_batch([37, 75], [0, 1, 1], [5, 9, 2])
        gradients = []
        for some in (batch, padded(batch, clips=61, words=4)):
            output = model(some)
            loss = output.pyramid.anchors[-1].square().sum()
            for query in range(3):
                for level, (logits, offsets) in enumerate(valid_outputs(output, query)):
                    weight = torch.arange(len(logits)).cos() + level
                    loss = loss + (logits * weight).sum() + (offsets * weight[:, None]).sum()
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
            assert a.isfinite().all(), name
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
            # A bias that all keys share moves no softmax.
            assert a.abs().max() > (0 if not name.endswith("key.bias") else -1), name

    @variants
    def test_a_batch_of_many_equals_batches_of_one(self, changes):
        model = small(**changes)
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

    @settings(max_examples=12, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4),
        words=st.lists(st.integers(1, 9), min_size=4, max_size=4),
        more=st.integers(0, 70),
        changes=st.sampled_from(list(VARIANTS.values())),
    )
    @example(lengths=[48, 49], words=[1, 1, 1, 1], more=0, changes={})
    def test_any_video_is_answered_as_if_it_were_alone(self, lengths, words, more, changes):
        model = small(**changes)
        videos = range(len(lengths))
        batch = make_batch(lengths, list(videos), words[: len(lengths)])
        together = model(padded(batch, clips=more, words=2))
        for video in videos:
            own = replace(
                batch,
                video=batch.video[[video], : lengths[video]],
                video_mask=batch.video_mask[[video], : lengths[video]],
                text=batch.text[[video], : words[video]],
                text_mask=batch.text_mask[[video], : words[video]],
                query_video=torch.tensor([0]),
            )
            assert_same_answers(together, model(own), [video], [0])

    @pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of PyTorch's RMS norm
    @variants
    def test_bf16_is_about_the_same(self, changes):
        torch.manual_seed(0)
        model = HieraMamba(replace(TINY, **changes)).eval()
        batch = make_batch([75, 9], [0, 1], [4, 7])
        batch = replace(batch, video=batch.video.float(), text=batch.text.float())
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch)
        output.logits.float().sum().backward()
        difference = (output.logits.float() - exact.logits)[exact.mask].abs().mean()
        assert difference < 0.1 * exact.logits[exact.mask].std()

    @pytest.mark.parametrize("early_fusion", [False, True])
    def test_encoding_once_and_asking_later_is_the_same(self, early_fusion):
        model = small(early_fusion=early_fusion)
        batch = make_batch([40, 22], [0, 1, 1], [4, 7, 3])
        encoded = model.encode_video(batch.video, batch.video_mask)
        text = model.encode_text(batch.text[2:], batch.text_mask[2:])
        later = model.predict(encoded.select(torch.tensor([1])), text, torch.tensor([0]))
        assert_same_answers(later, model(batch), [0], [2])

    def test_leaked_padding_is_heard(self):
        batch = make_batch([37], [0], [5])
        model = small(leak_padding=True)
        short, long = (
            valid_outputs(model(b), 0)[0][0] for b in (batch, padded(batch, clips=8, value=0))
        )
        assert (short - long).abs().max() > 1e-4

    def test_levels_and_anchors(self):
        pyramid = small()(make_batch([37, 20], [0, 1], [3, 3])).pyramid
        assert pyramid.lengths == (37, 19, 10, 5)  # the caller's padding, and no more
        assert [m.sum(1).tolist() for m in pyramid.masks] == [[37, 20], [19, 10], [10, 5], [5, 3]]
        assert [a.shape[1] for a in pyramid.anchors] == [19, 10, 5, 3]
        assert [m.sum(1).tolist() for m in pyramid.anchor_masks] == [
            [19, 10],
            [10, 5],
            [5, 3],
            [3, 2],
        ]

    def test_early_fusion_has_one_pyramid_per_query(self):
        batch = make_batch([37, 20], [1, 0, 1], [3, 3, 4])
        late, early = small()(batch), small(early_fusion=True)(batch)
        assert len(late.pyramid.levels[0]) == 2
        assert late.pyramid_row.tolist() == [1, 0, 1]
        assert len(early.pyramid.levels[0]) == 3
        assert early.pyramid_row.tolist() == [0, 1, 2]


class TestTime:
    def heard(self, clip, **changes):
        """Steps of level 0 that change when one clip of 64 does."""
        model = small(positions=False, **changes)
        for block in model.video_encoder.blocks:
            block.global_encoder.A_log.data.fill_(-4.0)  # remembers for long
        batch = make_batch([64], [0], [3])
        video = batch.video.clone()
        video[0, clip] += 1
        before, after = (
            model.encode_video(v, batch.video_mask).levels[0] for v in (batch.video, video)
        )
        return (before - after).abs().amax(-1)[0].gt(1e-12).nonzero().flatten().tolist()

    def test_one_direction_hears_only_the_past(self):
        """But for two embedding convolutions of reach 1 and the anchor in front of a pair."""
        steps = self.heard(40, bidirectional=False, window=None)
        assert 38 <= steps[0] <= 40
        assert steps[-1] == 63

    def test_hydra_hears_both_ways(self):
        steps = self.heard(40, window=None)
        assert steps[0] == 0
        assert steps[-1] == 63

    def test_reversed_weights_hear_the_reversed_video(self):
        """A block on a reversed sequence, its directions exchanged, reverses its answer."""
        torch.manual_seed(0)
        block = randomised(AnchorMambaPooling(8, state=4, head_channels=4, window=3))
        mirrored = AnchorMambaPooling(8, state=4, head_channels=4, window=3).double().eval()
        weights = dict(block.state_dict())
        hydra, heads = block.global_encoder, block.global_encoder.nheads
        width, state = hydra.sizes[0], 4
        rows = torch.arange(hydra.in_proj.out_features)
        start = 2 * width
        pieces = [rows[:start]]
        pieces += [rows[start + 2 * state : start + 4 * state], rows[start : start + 2 * state]]
        pieces += [rows[start + 4 * state + heads :], rows[start + 4 * state :][:heads]]
        order = torch.cat(pieces)
        inner = order[width : width + sum(hydra.sizes)] - width
        name = "global_encoder."
        weights[name + "in_proj.weight"] = weights[name + "in_proj.weight"][order]
        for part in ("weight", "bias"):
            weights[name + f"conv1d.{part}"] = weights[name + f"conv1d.{part}"][inner]
        weights[name + "conv1d.weight"] = weights[name + "conv1d.weight"].flip(-1)
        for part in ("query", "key", "value"):
            key = f"local_encoder.projections.{part}.convolution.weight"
            weights[key] = weights[key].flip(-1)
        mirrored.load_state_dict(weights)
        x = torch.randn(1, 21, 8, dtype=torch.float64)
        mask = torch.ones(1, 21, dtype=torch.bool)
        # The encoders are symmetric; only the anchor's place in front of its tokens is not.
        one = block.global_encoder(x, mask)
        other = mirrored.global_encoder(x.flip(1), mask).flip(1)
        torch.testing.assert_close(one, other)
        one, _ = block.local_encoder(x, mask)
        other, _ = mirrored.local_encoder(x.flip(1), mask)
        torch.testing.assert_close(one, other.flip(1))

    def test_a_shift_by_the_largest_stride_moves_all_levels(self):
        """Without state-space layers' endless memory: their steps are made short-lived."""
        model = small(positions=False, levels=3, window=3)
        for block in model.video_encoder.blocks:
            block.global_encoder.A_log.data.fill_(3.0)  # forgets within a step or two
            block.global_encoder.dt_bias.data.fill_(3.0)
        batch = make_batch([168], [0], [4])
        later = replace(batch, video=batch.video[:, 8:], video_mask=batch.video_mask[:, 8:])
        before, after = model(batch), model(later)
        for level in range(3):
            moved, steps = 8 // 2**level, 160 // 2**level
            inner = slice(48 // 2**level, steps - 48 // 2**level)
            a = before.per_level(before.logits)[level][:, moved:]
            torch.testing.assert_close(
                a[:, inner], after.per_level(after.logits)[level][:, inner], rtol=1e-4, atol=1e-4
            )


def test_windows_of_levels():
    config = replace(TINY, levels=4, windowed_levels=2, local_levels=3)
    assert [config.window_of(level) for level in range(4)] == [5, 5, 0, None]
    model = HieraMamba(config)
    found = [
        None if block.local_encoder is None else block.local_encoder.attention.window
        for block in model.video_encoder.blocks
    ]
    assert found == [5, 5, 0, None]
    assert [type(b.feed_forward).__name__ for b in model.video_encoder.blocks][2:] == [
        "Sequential",
        "SwiGLU",
    ]


# ---------------------------------------------------------------- released files

RELEASED = {
    "tacos": hieramamba.TACOS,
    "ego4d": hieramamba.EGO4D,
    "mad": hieramamba.MAD,
    "madv2": hieramamba.MAD_V2,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_parameters_by_name_shape_and_number(oracles, name):
    published = json.loads((oracles / "hieramamba_state_dicts.json").read_text())[name]
    with torch.device("meta"):
        model = HieraMamba(RELEASED[name])
        weights = {key: torch.empty(size) for key, size in published["state_dict"].items()}
    model.load_state_dict(convert_grounder(weights, model), assign=True)
    assert sum(p.numel() for p in model.parameters()) == published["parameters"]


class TestReleasedFolder:
    @pytest.fixture
    def folder(self, oracles, tmp_path):
        """A folder as the released training writes it, with the weights of an oracle case."""
        case = oracles / "hieramamba_early_padded"
        tensors = load_file(case.with_suffix(".safetensors"))
        weights = {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}
        (tmp_path / "models").mkdir()
        worse = {name: value + 1 for name, value in weights.items()}
        torch.save({"model": worse, "model_ema": weights}, tmp_path / "models" / "last.pth")
        description = json.loads(case.with_suffix(".json").read_text())
        # JSON is YAML.
        (tmp_path / "opt.yaml").write_text(json.dumps(description["config"]))
        return tmp_path, tensors

    def answers(self, model, tensors, device="cpu"):
        video = tensors["vid"].transpose(1, 2).to(device)
        encoded = model.encode_video(video, tensors["vid_mask"].bool().view(1, -1).to(device))
        text = tensors["text"].transpose(2, 3)[0].to(device)
        words = model.encode_text(text, tensors["text_mask"].bool()[0].to(device))
        return model.predict(encoded, words, torch.zeros(1, dtype=torch.long, device=device))

    def check(self, folder, device="cpu"):
        path, tensors = folder
        model = load_hieramamba(path, device=device)
        assert not model.training
        with torch.no_grad():
            output = self.answers(model, tensors, device)
        valid = tensors["mask.0"].bool()
        ours = output.per_level(output.logits)[0].cpu()
        assert (ours - tensors["logits.0"])[valid].abs().max() < 2e-4

    def test_a_ready_model(self, folder):
        self.check(folder)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_a_ready_model_on_the_gpu(self, folder):
        self.check(folder, "cuda")

    def test_the_other_weights_and_the_clean_masks(self, folder):
        path, tensors = folder
        published = load_hieramamba(path)
        raw, clean = load_hieramamba(path, ema=False), load_hieramamba(path, as_published=False)
        difference = raw.fusion.norm.weight - published.fusion.norm.weight
        torch.testing.assert_close(difference, torch.ones_like(difference))
        assert published.config.leak_padding
        assert not clean.config.leak_padding
        with torch.no_grad():
            ours, theirs = (self.answers(m, tensors).logits for m in (clean, published))
        assert (ours - theirs).abs().max() > 1e-5

    def test_a_checkpoint_is_chosen(self, folder):
        path, _ = folder
        (path / "models" / "last.pth").rename(path / "models" / "07.pth")
        load_hieramamba(path)  # the only one
        (path / "models" / "08.pth").write_bytes(b"")
        with pytest.raises(DataError, match=r"holds no last\.pth; found \['07', '08'\]"):
            load_hieramamba(path)
        load_hieramamba(path, "07")
        with pytest.raises(DataError, match=r"08\.pth is not a readable checkpoint"):
            load_hieramamba(path, "08")

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"holds no last\.pth; found none"):
            load_hieramamba(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"block_type": "Other"}, "unknown block_type 'Other'"),
            ({"pool_method": "sum"}, "unknown pool_method 'sum'"),
            ({"local_encoder_type": "mamba"}, "unknown local_encoder_type 'mamba'"),
            ({"name": "transformer"}, "'hieramamba_backbone', found 'transformer'"),
            ({"mamba_headdim": 7}, "describes no HieraMamba"),
        ],
    )
    def test_a_bad_configuration_is_named(self, folder, changes, message):
        path, _ = folder
        published = json.loads((path / "opt.yaml").read_text())
        published["model"]["vid_net"] |= changes
        (path / "opt.yaml").write_text(json.dumps(published))
        with pytest.raises(DataError, match=message) as caught:
            load_hieramamba(path)
        assert "opt.yaml" in str(caught.value)

    def test_options_of_the_configuration(self):
        video = {
            "name": "hieramamba_backbone",
            "arch": [2, 1, 6],
            "pool_method": "attn",
            "local_encode": True,
            "local_window_size": 3,
            "local_encode_num_layers": 4,
            "bidirectional": False,
            "mamba_headdim": 64,
            "mha_win_size": 9,
        }
        config = hieramamba_config({"model": {"text_net": {}, "vid_net": video}})
        assert (config.stem, config.levels, config.stem_window) == (1, 6, 9)
        assert (config.pooling, config.merge) == ("attention", "gate")
        # The released one-directional switch ignores the configured sizes.
        assert (config.bidirectional, config.head_channels, config.taps) == (False, 48, 4)
        assert [config.window_of(level) for level in range(6)] == [3, 3, 3, 3, None, None]
        assert config.early_fusion
        without = hieramamba_config({"model": {"text_net": {}, "vid_net": {"name": video["name"]}}})
        assert without.window is None


# ---------------------------------------------------------------- losses


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


class TestAnchorContrast:
    lengths = (13, 20, 7)

    def inputs(self):
        token_mask, anchor_mask = mask_of(self.lengths, 21), mask_of([7, 10, 4], 11)
        return unit(3, 21, 6), token_mask, unit(3, 11, 6, seed=1), anchor_mask

    def admissible(self, b, n, across):
        """Anchors of 3 videos with 11 places that may be negatives of anchor n of video b."""
        gap = max(1, int(0.2 * 11))
        return [
            (c, m)
            for c, valid in enumerate([7, 10, 4])
            for m in range(valid)
            if (c != b and across) or (c == b and abs(m - n) > gap)
        ]

    @pytest.mark.parametrize("hard", [False, True])
    @pytest.mark.parametrize("across", [False, True])
    def test_equals_a_loop(self, hard, across):
        tokens, token_mask, anchors, anchor_mask = self.inputs()
        ratio = 1.5 if hard else None
        ours = anchor_contrast(
            tokens,
            token_mask,
            anchors,
            anchor_mask,
            0.2,
            ratio,
            hard_negatives=hard,
            other_videos=~torch.eye(3, dtype=torch.bool) if across else None,
        )
        losses = []
        for b, valid in enumerate([7, 10, 4]):
            for n in range(valid):
                here = [2 * n + k for k in range(2) if 2 * n + k < self.lengths[b]]
                own = sum(((anchors[b, n] @ tokens[b, t]) / 0.07).exp() for t in here)
                others = sorted(
                    ((anchors[b, n] @ anchors[c, m]) / 0.07).exp().item()
                    for c, m in self.admissible(b, n, across)
                )
                if hard:
                    others = others[::-1][: -(-3 * len(here) // 2)]
                losses.append(-torch.log(own / (own + sum(others))))
        torch.testing.assert_close(ours, torch.stack(losses).mean())

    def test_random_negatives_are_drawn_anew_and_average_out(self):
        tokens, token_mask, anchors, anchor_mask = self.inputs()
        torch.manual_seed(0)
        arguments = (tokens, token_mask, anchors, anchor_mask, 0.2)
        drawn = torch.stack([anchor_contrast(*arguments, 1.0) for _ in range(400)])
        everything = anchor_contrast(*arguments, 1000.0)
        torch.testing.assert_close(everything, anchor_contrast(*arguments))
        assert drawn.std() > 0
        hard = anchor_contrast(*arguments, 1.0, hard_negatives=True)
        assert drawn.min() < drawn.mean() < hard
        assert drawn.max() <= everything
        assert hard <= everything

    def test_padding_changes_nothing_but_the_gap(self):
        tokens, token_mask, anchors, anchor_mask = self.inputs()
        short = anchor_contrast(tokens, token_mask, anchors, anchor_mask, gap_ratio=0.0)
        longer = anchor_contrast(
            F.pad(tokens, (0, 0, 0, 5), value=9),
            F.pad(token_mask, (0, 5)),
            F.pad(anchors, (0, 0, 0, 2), value=9),
            F.pad(anchor_mask, (0, 2)),
            gap_ratio=0.0,
        )
        torch.testing.assert_close(short, longer)

    def test_nothing_to_contrast(self):
        tokens, anchors = unit(1, 2, 4).requires_grad_(), unit(1, 1, 4, seed=1)
        loss = anchor_contrast(tokens, mask_of([2]), anchors, mask_of([1]), 0.2, 4.0)
        loss.backward()
        assert loss == 0
        assert tokens.grad.eq(0).all()


def test_segment_negatives_are_rounded_down():
    features = unit(1, 6, 4)
    positive = torch.tensor([[True, False, False, False, False, False]])
    torch.manual_seed(0)
    assert segment_contrast(features, positive, ~positive, 0.9) == 0
    one = {round(float(segment_contrast(features, positive, ~positive, 1.9)), 6) for _ in range(80)}
    assert len(one) == 5  # each of the five alone


def test_hard_segment_negatives_are_the_most_similar_of_here_and_elsewhere():
    features, elsewhere = unit(2, 6, 4), unit(5, 4, seed=1)
    positive = torch.tensor([[True, True, False, False, False, False]] * 2)
    admissible = torch.tensor([[True, True, True, False, False], [False] * 5])
    ours = segment_contrast(
        features,
        positive,
        ~positive,
        1.0,
        hard_negatives=True,
        elsewhere=elsewhere,
        elsewhere_negative=admissible,
    )
    losses = []
    for query, others in enumerate(([*features[0, 2:], *elsewhere[:3]], features[1, 2:])):
        prototype = F.normalize(features[query, :2].sum(0), dim=-1)
        hardest = sorted((float(x @ prototype) for x in others), reverse=True)[:2]
        own = (features[query, :2] @ prototype / 0.07).exp().sum()
        losses.append(-torch.log(own / (own + (torch.tensor(hardest) / 0.07).exp().sum())))
    torch.testing.assert_close(ours, torch.stack(losses).mean(), check_dtype=False)


class TestObjective:
    def setup_method(self):
        torch.manual_seed(0)
        self.batch = make_batch([40, 22], [0, 1, 1, 0], [4, 7, 3, 3])

    def objective(self, **settings):
        settings = {"anchor": AnchorContrast(), "segment": SegmentContrast()} | settings
        return HieraMambaObjective(8, projector_channels=5, **settings).double()

    def moment_of(self, query, level, row, pyramid, *, every_level, whole_moment):
        """Points of a level inside of a query's moment and outside, as SPC takes them."""
        start, end = (self.batch.moments[query, 0] / 2).tolist()
        center, radius, inside, outside = (start + end) / 2, 1.5 * 2**level, [], []
        low, high = (0, 4) if level == 0 else (2**level, 2 ** (level + 2))
        for t in range(int(pyramid.masks[level][row].sum())):
            place = t * 2**level
            reach = max(place - start, end - place)
            in_range = low <= reach < (high if level < 3 else torch.inf) or every_level
            near = max(start, center - radius) < place < min(end, center + radius)
            within = start <= place <= end
            if in_range and (within if whole_moment else near):
                inside.append(t)
            elif not within:
                outside.append(t)
        return inside, outside

    @pytest.mark.parametrize("early_fusion", [False, True])
    @pytest.mark.parametrize("every_level", [False, True])
    @pytest.mark.parametrize("whole_moment", [False, True])
    @pytest.mark.parametrize("across", [False, True])
    def test_equals_loops_over_queries_and_levels(
        self, early_fusion, every_level, whole_moment, across
    ):
        model = small(early_fusion=early_fusion, input_stride=2)
        segment = SegmentContrast(
            2.0, None, every_level=every_level, whole_moment=whole_moment, across_videos=across
        )
        objective = self.objective(
            anchor=AnchorContrast(3.0, None, 0.2, across_videos=across),
            segment=segment,
            detection=DetectionObjective(norm_start=7.0),
        )
        output = model(self.batch)
        terms = objective(output, self.batch)
        detection = DetectionObjective(norm_start=7.0)(output, self.batch)
        video_of_query = [0, 1, 1, 0]
        rows, video_of_row = (range(4), [0, 1, 1, 0]) if early_fusion else ([0, 1, 1, 0], [0, 1])
        # A row with the same video under another query is neither its own nor another video.
        elsewhere = torch.tensor([[a != b for b in video_of_row] for a in video_of_row])
        anchor = segment = 0
        pyramid = output.pyramid
        for level in range(4):
            anchor += anchor_contrast(
                objective.anchor_projector(pyramid.levels[level]).double(),
                pyramid.masks[level],
                objective.anchor_projector(pyramid.anchors[level]).double(),
                pyramid.anchor_masks[level],
                0.2,
                other_videos=elsewhere if across else None,
            )
            losses = []
            z = objective.segment_projector(pyramid.levels[level]).double()
            for query, row in enumerate(rows):
                inside, outside = self.moment_of(
                    query, level, row, pyramid, every_level=every_level, whole_moment=whole_moment
                )
                negatives = [z[row, t] for t in outside]
                for other, video in enumerate(video_of_row):
                    if across and video != video_of_query[query]:
                        negatives += z[other][pyramid.masks[level][other]]
                if not inside or not negatives:
                    continue
                prototype = F.normalize(z[row, inside].mean(0), dim=-1)
                own = (z[row, inside] @ prototype / 0.07).exp().sum()
                others = (torch.stack(negatives) @ prototype / 0.07).exp().sum()
                losses.append(-torch.log(own / (own + others)))
            segment += torch.stack(losses).mean() if losses else 0
        anchor = anchor * (1 if early_fusion else 2) / 7
        torch.testing.assert_close(terms["anchor"], anchor, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(terms["segment"], segment / 7, rtol=1e-5, atol=1e-6)
        total = detection["total"] + 3 * terms["anchor"] + 2 * terms["segment"]
        torch.testing.assert_close(terms["total"], total)

    def test_switched_off(self):
        output = small()(self.batch)
        plain = self.objective(anchor=None, segment=None)
        assert list(plain.parameters()) == []
        assert set(plain(output, self.batch)) == {"total", "classification", "regression"}
        only = self.objective(segment=None)(output, self.batch)
        assert set(only) == {"total", "classification", "regression", "anchor"}

    @pytest.mark.parametrize("trained", [True, False])
    def test_projectors_learn_or_stay(self, trained):
        objective = self.objective(trained_projectors=trained)
        objective(small()(self.batch), self.batch)["total"].backward()
        for name, parameter in objective.named_parameters():
            if trained:
                assert parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name

    def test_contrast_reaches_the_video_encoder_alone(self):
        model, objective = small(), self.objective()
        terms = objective(model(self.batch), self.batch)
        (terms["anchor"] + terms["segment"]).backward()
        reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        assert reached == {"video_encoder"}

    def test_a_model_without_anchors_is_refused(self):
        with pytest.raises(ValueError, match="needs a model whose pyramid has anchors"):
            self.objective()(small_snag()(self.batch), self.batch)


@pytest.mark.parametrize("early_fusion", [False, True])
def test_grounding_a_data_set_does_not_depend_on_its_batches(early_fusion):
    data = make_dataset(
        {"a": 40, "b": 23}, [("a", [[3, 9]]), ("b", [[1, 20]]), ("a", [[30, 34]]), ("a", [[0, 40]])]
    )
    model = small(early_fusion=early_fusion).float()
    together, apart = (ground(model, data, videos_per_batch=n, queries_per_batch=n) for n in (8, 1))
    for one, other in zip(together, apart, strict=True):
        assert one.query_id == other.query_id
        assert len(one.moments) > 0
        assert abs(one.moments - other.moments).max() < 1e-3


def test_published_attention_pooling_is_packed(oracles):
    """Its query, keys and values are one tensor there, and PyTorch's own layer."""
    description = json.loads((oracles / "hieramamba_late_padded.json").read_text())["config"]
    description["model"]["vid_net"] |= {"pool_method": "attn"}
    tensors = load_file(oracles / "hieramamba_late_padded.safetensors")
    weights = {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}
    torch.manual_seed(0)
    layers = [torch.nn.MultiheadAttention(32, 1, dropout=0.1).eval() for _ in range(4)]
    queries = torch.randn(4, 1, 1, 32)
    for number, layer in enumerate(layers):
        torch.nn.init.normal_(layer.in_proj_bias)
        prefix = f"vid_net.branch.{number}.anchor_pooling.pooler."
        weights[prefix + "pool_q"] = queries[number]
        for name, value in layer.state_dict().items():
            weights[f"{prefix}pool_attn.{name}"] = value
    model = HieraMamba(hieramamba_config({"model": description["model"]})).eval()
    model.load_state_dict(convert_grounder(weights, model))
    tokens = torch.randn(2, 5, 2, 32)
    for number, layer in enumerate(layers):
        pooled = model.video_encoder.blocks[number].pooling(tokens, torch.ones(2, 5, 2).bool())
        pairs = tokens.flatten(0, 1).transpose(0, 1)
        expected, _ = layer(queries[number].expand(-1, 10, -1), pairs, pairs)
        torch.testing.assert_close(pooled, expected[0].unflatten(0, (2, 5)), rtol=1e-4, atol=1e-5)


def test_a_published_stem(oracles):
    """Stem layers keep their own list; the blocks of the pyramid start at 0 behind them."""
    description = json.loads((oracles / "hieramamba_late_padded.json").read_text())["config"]
    description["model"]["vid_net"] |= {"arch": [2, 1, 4]}
    tensors = load_file(oracles / "hieramamba_late_padded.safetensors")
    weights = {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}
    of_text = "text_net.transformer.0."
    stem = {k.replace(of_text, "vid_net.stem.0."): v for k, v in weights.items() if of_text in k}
    local = "vid_net.branch.0.local_encoder.attn."
    stem |= {k.replace(local, "vid_net.stem.0.attn."): v for k, v in weights.items() if local in k}
    model = HieraMamba(hieramamba_config({"model": description["model"]}))
    model.load_state_dict(convert_grounder(weights | stem, model))
    first = model.video_encoder.stem[0]
    name = "vid_net.branch.0.local_encoder.attn.k_conv.conv.weight"
    assert torch.equal(first.projections["key"].convolution.weight, weights[name])
    assert len(model.video_encoder.blocks) == 4
