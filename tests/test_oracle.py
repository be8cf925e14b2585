"""The command that holds the library against what the authors' code computed."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tvg_lib.oracle import main

HIERAMAMBA = ["hieramamba_late_padded", "hieramamba_early_padded", "hieramamba_ungated"]
CASES = ["snag", "snag_padded", *HIERAMAMBA, "losses", "points_nms"]
LINE = re.compile(r"^(\S+) (\S+) (\d\.\d{3}e[+-]\d\d|nan|inf) (\de-\d\d) (ok|FAIL)$")


def run(capsys, *paths):
    """Exit status, printed lines cut into fields, and what went to stderr."""
    status = main([str(path) for path in paths])
    captured = capsys.readouterr()
    matches = [LINE.match(line) for line in captured.out.splitlines()]
    assert all(matches), captured.out
    return status, [match.groups() for match in matches], captured.err


@pytest.fixture
def copied(tmp_path, oracles):
    """Copies of a case, with some tensors changed."""

    def copy(name, configure=None, **changes):
        tensors = load_file(oracles / f"{name}.safetensors")
        for key, change in changes.items():
            tensors[key] = change(tensors[key])
        tensors = {key: value for key, value in tensors.items() if value is not None}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        description = json.loads((oracles / f"{name}.json").read_text())
        if configure:
            configure(description)
        (tmp_path / f"{name}.json").write_text(json.dumps(description))
        return tmp_path / f"{name}.safetensors"

    return copy


@pytest.mark.parametrize("name", CASES)
def test_the_published_code_is_matched(capsys, oracles, name):
    status, checks, errors = run(capsys, oracles / f"{name}.safetensors")
    assert status == 0
    assert errors == ""
    assert {check[0] for check in checks} == {name}
    assert {check[4] for check in checks} == {"ok"}
    assert len({check[1] for check in checks}) == len(checks)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("snag", {f"{key}.{n}" for key in ("logits", "offsets", "mask", "fpn") for n in range(4)}),
        *(
            (
                name,
                {
                    f"{key}.{n}"
                    for key in ("logits", "offsets", "mask", "anchor", "anchor_mask")
                    for n in range(4)
                },
            )
            for name in HIERAMAMBA
        ),
        ("losses", {"focal.none", "focal.alpha.25", "seg.iou", "seg.diou"}),
        ("points_nms", {"points", "labels", "offsets"}),
    ],
)
def test_every_output_is_compared(capsys, oracles, name, outputs):
    _, checks, _ = run(capsys, oracles / f"{name}.safetensors")
    assert outputs <= {check[1] for check in checks}
    stored = {
        key
        for key in load_file(oracles / f"{name}.safetensors")
        if key.startswith(
            ("logits", "offsets", "fpn", "anchor", "mask", "nms.vot", "soft_nms", "labels")
        )
    }
    assert stored <= {check[1] for check in checks}


def test_several_cases_at_once(capsys, oracles):
    status, checks, _ = run(capsys, *(oracles / f"{name}.safetensors" for name in CASES))
    assert status == 0
    assert list(dict.fromkeys(check[0] for check in checks)) == CASES


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [
        ("snag", "w.vid_net.branch.2.attn.k_conv.conv.weight", "offsets.3"),
        ("snag", "w.text_net.bkgd_token", "logits.0"),
        ("snag", "w.reg_head.scales.1.scale", "offsets.1"),
        ("snag_padded", "w.fusion.layers.1.xattn.xattn.value.bias", "logits.2"),
        ("hieramamba_early_padded", "w.vid_proj.conv.weight", "anchor.0"),
        ("hieramamba_late_padded", "w.vid_net.branch.2.gate1.0.bias", "anchor.2"),
        ("hieramamba_late_padded", "w.vid_net.branch.3.global_encoder.D", "offsets.3"),
        ("hieramamba_ungated", "w.vid_net.branch.1.ffn.w12.weight", "logits.1"),
        ("losses", "focal.logits", "focal.none"),
        ("points_nms", "soft_nms.voting0.75.segs", "soft_nms.voting0.75.segs"),
    ],
)
def test_one_wrong_tensor_fails(capsys, copied, name, key, wrong):
    status, checks, _ = run(capsys, copied(name, **{key: lambda value: 0.5 - value}))
    assert status == 1
    assert wrong in {check[1] for check in checks if check[4] == "FAIL"}


def test_one_failing_case_among_good_ones_fails(capsys, copied, oracles):
    bad = copied("losses", **{"seg.iou": lambda value: value + 1e-3})
    status, checks, _ = run(capsys, oracles / "points_nms.safetensors", bad)
    assert status == 1
    assert [check[:2] for check in checks if check[4] == "FAIL"] == [("losses", "seg.iou")]


def test_nan_is_not_agreement(capsys, copied):
    status, checks, _ = run(capsys, copied("losses", **{"seg.diou": lambda v: v * torch.nan}))
    assert status == 1
    assert ("losses", "seg.diou", "nan", "1e-05", "FAIL") in checks


class TestErrors:
    def fails(self, capsys, path, message):
        status, checks, errors = run(capsys, path)
        assert status == 1
        assert checks == []
        assert re.search(message, errors), errors
        assert len(errors.splitlines()) == 1

    def test_no_arguments(self, capsys):
        assert main([]) == 2
        assert "CASE.safetensors" in capsys.readouterr().err

    def test_missing_case(self, capsys, tmp_path):
        self.fails(capsys, tmp_path / "none.safetensors", r"none\.safetensors is not a readable")

    def test_missing_description(self, capsys, copied):
        path = copied("losses")
        path.with_suffix(".json").unlink()
        self.fails(capsys, path, r"losses\.json: no readable configuration")

    def test_broken_description(self, capsys, copied):
        path = copied("losses")
        path.with_suffix(".json").write_text("{")
        self.fails(capsys, path, r"losses\.json: no readable configuration")

    def test_truncated_case(self, capsys, copied):
        path = copied("losses")
        path.write_bytes(path.read_bytes()[:200])
        self.fails(capsys, path, "not a readable safetensors file")

    def test_unknown_case(self, capsys, tmp_path):
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        (tmp_path / "other.json").write_text("{}")
        self.fails(capsys, tmp_path / "other.safetensors", "none of the cases this library knows")

    def test_missing_weight(self, capsys, copied):
        path = copied("snag", **{"w.fusion.ln_out.bias": lambda value: None})
        self.fails(capsys, path, r"1 missing \(e\.g\. fusion\.norm\.bias\)")

    def test_output_of_another_shape(self, capsys, copied):
        path = copied("snag", **{"logits.1": lambda value: value[:, :-1].contiguous()})
        self.fails(capsys, path, r"snag\.safetensors cannot be run: .*shape")

    def test_missing_input(self, capsys, copied):
        self.fails(
            capsys, copied("snag", vid=lambda value: None), r"cannot be run: KeyError: 'vid'"
        )

    def test_a_bad_case_does_not_stop_the_others(self, capsys, oracles, tmp_path):
        shutil.copy(oracles / "losses.safetensors", tmp_path)
        status, checks, errors = run(
            capsys, tmp_path / "losses.safetensors", oracles / "points_nms.safetensors"
        )
        assert status == 1
        assert {check[0] for check in checks} == {"points_nms"}
        assert "losses.json" in errors
