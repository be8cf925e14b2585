"""Released checkpoints and their YAML files become models; anything else is a clear error."""

import json
import pickle
import re

import pytest
import torch
import yaml
from grounding_data import mask_of
from safetensors.torch import load_file, save_file

from tvg_lib.decoding import DecodingConfig
from tvg_lib.errors import DataError
from tvg_lib.interop import (
    convert_grounder,
    decoding_config,
    load_snag,
    point_grid,
    read_configuration,
    read_weights,
    snag_config,
)
from tvg_lib.models.snag import SnAG
from tvg_lib.nn.points import PointGrid


@pytest.fixture(scope="module")
def case(oracles):
    """Weights under their published names, and the configuration they belong to."""
    tensors = load_file(oracles / "snag.safetensors")
    weights = {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}
    return weights, json.loads((oracles / "snag.json").read_text())["config"]


@pytest.fixture
def released(tmp_path, case):
    """A checkpoint and a YAML file as the released code writes them.

    The plain weights differ from the averaged ones; the YAML leaves defaults and derived values
    out, as the released files do.
    """
    weights, config = case
    plain = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": plain, "model_ema": weights}, tmp_path / "last.pth")
    model = {key: dict(config["model"][key]) for key in ("text_net", "vid_net", "fusion")}
    del model["vid_net"]["stride"], model["vid_net"]["use_abs_pe"], model["text_net"]["use_abs_pe"]
    (tmp_path / "opt.yaml").write_text(yaml.safe_dump({"model": model}))
    return tmp_path / "last.pth", tmp_path / "opt.yaml"


def answers(model):
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(1, 50, 24, generator=generator)
    text = torch.randn(2, 7, 20, generator=generator)
    with torch.no_grad():
        pyramid = model.encode_video(video, mask_of([50]))
        words = model.encode_text(text, mask_of([7, 4]))
        output = model.predict(pyramid, words, torch.tensor([0, 0]))
    return torch.cat([output.logits[output.mask], output.offsets[output.mask].flatten()])


class TestLoading:
    def test_a_released_checkpoint_is_a_ready_model(self, released, case):
        weights, config = case
        model = load_snag(*released)
        assert not model.training
        direct = SnAG(snag_config(config)).eval()
        direct.load_state_dict(convert_grounder(weights, direct))
        assert torch.equal(answers(model), answers(direct))

    def test_the_averaged_weights_are_the_default(self, released, case):
        assert torch.equal(
            read_weights(released[0])["text_net.bkgd_token"], case[0]["text_net.bkgd_token"]
        )
        plain = read_weights(released[0], ema=False)["text_net.bkgd_token"]
        assert torch.equal(plain, case[0]["text_net.bkgd_token"] + 1)
        assert not torch.equal(
            answers(load_snag(*released, ema=False)), answers(load_snag(*released))
        )

    @pytest.mark.parametrize("form", ["prefixed", "bare", "safetensors"])
    def test_other_ways_to_keep_the_same_weights(self, released, case, form):
        weights, expected = case[0], answers(load_snag(*released))
        path = released[0].with_name("other.pth")
        if form == "prefixed":
            torch.save({"model_ema": {f"module.{k}": v for k, v in weights.items()}}, path)
        elif form == "bare":
            torch.save(weights, path)
        else:
            path = path.with_suffix(".safetensors")
            save_file({f"module.{k}": v for k, v in weights.items()}, path)
        assert torch.equal(answers(load_snag(path, released[1])), expected)

    def test_every_published_name_has_a_place_of_its_own(self, case):
        weights, config = case
        model = SnAG(snag_config(config))
        converted = convert_grounder(weights, model)
        scales = sum(".scales." in name for name in weights)
        assert len(converted) == len(weights) - scales + 1
        assert sum(v.numel() for v in converted.values()) == sum(
            v.numel() for v in weights.values()
        )

    def test_positions_may_ignore_padding(self, released):
        faithful, invariant = load_snag(*released), load_snag(*released, as_published=False)
        video = torch.randn(1, 70, 24)  # beyond the trained 64 clips; padded to 96 as published
        levels = [
            m.encode_video(video, mask_of([70])).levels[0][:, :70] for m in (faithful, invariant)
        ]
        assert not torch.allclose(*levels, atol=1e-3)


class TestConfiguration:
    def test_values_left_out_take_the_released_defaults(self):
        config = snag_config({"model": {"text_net": {}, "vid_net": {}}})
        assert (config.video_dim, config.text_dim, config.channels, config.levels) == (
            500,
            300,
            128,
            7,
        )
        assert (config.window, config.max_clips, config.max_words) == (5, 256, 24)
        assert (config.modulation, config.prior, config.input_stride) == ("adaln", None, 1)
        assert config.positions
        assert config.text_positions
        identity = snag_config({"model": {"text_net": {"name": "identity"}, "vid_net": {}}})
        assert identity.text_encoder == "projection"
        assert not identity.text_positions
        assert identity.background_token

    def test_points_and_decoding(self):
        assert point_grid({}) == PointGrid()
        assert decoding_config({}) == DecodingConfig()
        published = {
            "pt_gen": {"regression_range": 8, "sigma": 1},
            "train": {"center_sampling_radius": 2.5},
            "eval": {
                "pre_nms_topk": 200,
                "pre_nms_thresh": 0.01,
                "seg_len_thresh": 0.2,
                "nms": {
                    "mode": "nms",
                    "iou_thresh": 0.4,
                    "min_score": 0.02,
                    "max_num_segs": 50,
                    "sigma": 0.5,
                    "voting_thresh": 0.75,
                },
            },
        }
        assert point_grid(published) == PointGrid(8, 1, 2.5)
        assert decoding_config(published) == DecodingConfig(
            0.01, 200, 0.2, "hard", 0.5, 0.4, 0.02, 50, 0.75
        )
        with pytest.raises(DataError, match="unknown suppression 'nmms'"):
            decoding_config({"eval": {"nms": {"mode": "nmms"}}})

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model: [", "not a readable configuration"),
            ("- 1\n- 2\n", "a mapping expected, found list"),
            ("", "a mapping expected, found NoneType"),
            ("optimizer: adam\n", "not a SnAG configuration"),
            ("model: {vid_net: {}}\n", "'text_net'"),
            ("model: {text_net: {}, vid_net: {name: mamba}}\n", "'transformer', found 'mamba'"),
            ("model: {text_net: {name: bert}, vid_net: {}}\n", "unknown text encoder 'bert'"),
            ("model: {text_net: {}, vid_net: {arch: 3}}\n", "describes no SnAG"),
            ("model: {text_net: {}, vid_net: {embd_dim: wide}}\n", "describes no SnAG"),
            ("model: {text_net: {}, vid_net: {n_heads: 7}}\n", "cannot be shared by 7 heads"),
            ("model: {text_net: {}, vid_net: {embd_dim: -128}}\n", "describes no SnAG"),
            ("model: {text_net: [], vid_net: {}}\n", "describes no SnAG"),
        ],
    )
    def test_a_bad_configuration_is_named(self, released, text, message):
        released[1].write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            load_snag(*released)
        assert str(released[1]) in str(caught.value)

    def test_a_missing_or_binary_configuration_is_named(self, tmp_path):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / "none.yaml"))):
            read_configuration(tmp_path / "none.yaml")
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(DataError, match=r"binary\.yaml"):
            read_configuration(tmp_path / "binary.yaml")


class Exploit:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class TestBadCheckpoints:
    def check(self, released, message):
        with pytest.raises(DataError, match=message) as caught:
            load_snag(*released)
        assert str(released[0]) in str(caught.value)

    def save(self, released, weights):
        torch.save({"model_ema": weights}, released[0])

    def test_missing_file(self, released):
        released[0].unlink()
        self.check(released, "not a readable checkpoint")

    def test_truncated_file(self, released):
        content = released[0].read_bytes()
        released[0].write_bytes(content[: len(content) // 2])
        self.check(released, "not a readable checkpoint")

    def test_another_kind_of_file(self, released):
        released[0].write_text("not a checkpoint")
        self.check(released, "not a readable checkpoint")

    @pytest.mark.parametrize("old_format", [True, False])
    def test_code_is_never_run(self, released, tmp_path, old_format):
        trap = tmp_path / "trap"
        content = {"model_ema": Exploit(trap)}
        if old_format:
            released[0].write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, released[0])
        self.check(released, "not a readable checkpoint")
        assert not trap.exists()

    @pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model_ema": {"a": 1}}])
    def test_no_state_dict(self, released, content):
        torch.save(content, released[0])
        self.check(released, "holds no state dict")

    def test_missing_weight(self, released, case):
        weights = dict(case[0])
        del weights["fusion.ln_out.bias"]
        self.save(released, weights)
        self.check(released, r"1 missing \(e\.g\. fusion\.norm\.bias\), 0 unknown")

    def test_missing_scale(self, released, case):
        weights = dict(case[0])
        del weights["reg_head.scales.2.scale"]
        self.save(released, weights)
        self.check(released, r"regression\.scales has shape \(3,\), expected \(4,\)")

    def test_unknown_weight(self, released, case):
        self.save(released, {**case[0], "fusion.extra": torch.zeros(1)})
        self.check(released, r"0 missing \(e\.g\. None\), 1 unknown \(e\.g\. fusion\.extra\)")

    def test_wrong_shape(self, released, case):
        name = "cls_head.convs.1.conv.weight"
        self.save(released, {**case[0], name: case[0][name][:-1]})
        self.check(released, r"convolutions\.1\.weight has shape \(31, 32, 3\), expected \(32, 32")

    def test_transposed_weight(self, released, case):
        """Same number of values, another order."""
        name = "text_net.embd_fc.conv.weight"
        self.save(released, {**case[0], name: case[0][name].transpose(0, 1).contiguous()})
        self.check(released, r"input\.weight has shape \(20, 32, 1\), expected \(32, 20\)")
