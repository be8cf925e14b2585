"""Check this library against what the authors' code computed.

    python -m tvg_lib.oracle CASE.safetensors [CASE.safetensors ...]

A case is a safetensors file (weights under their published names as `w.<name>`, inputs, outputs)
with a JSON file of the same name (its configuration). Prints, per output,
`case output max_abs_error tolerance ok`; the exit status is 0 only if all hold. Tolerances: 2e-4
on whole models, 1e-5 on layers, losses and geometry. Errors are taken at valid positions: the
published code leaves arbitrary values at padding.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tvg_lib.decoding import DecodingConfig, decode
from tvg_lib.errors import DataError
from tvg_lib.interop import (
    convert_grounder,
    convert_mamfusion,
    hieramamba_config,
    mamfusion_config,
    snag_config,
)
from tvg_lib.losses.contrastive import ContrastiveProjector, anchor_contrast, segment_contrast
from tvg_lib.losses.detection import diou_loss, focal_loss, iou_loss
from tvg_lib.models.hieramamba import AnchorPyramid, HieraMamba
from tvg_lib.models.mamfusion import MamFusion
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.models.snag import SnAG
from tvg_lib.nn.points import PointGrid
from tvg_lib.ssm import Hydra, Mamba

MODEL_TOLERANCE, LAYER_TOLERANCE = 2e-4, 1e-5


@dataclass(frozen=True)
class Case:
    """One oracle file in memory."""

    name: str
    description: dict
    tensors: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Published parameters under their published names."""
        return {k.removeprefix("w."): v for k, v in self.tensors.items() if k.startswith("w.")}

    def option(self, name: str, default: float) -> float:
        """A number from the configuration, where it gives one."""
        value = self.description.get("config", {}).get(name, default)
        return value if isinstance(value, (int, float)) else default


@dataclass(frozen=True)
class Check:
    """One output of a case compared with ours."""

    case: str
    output: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within tolerance (NaN is not)."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAIL"
        return f"{self.case} {self.output} {self.error:.3e} {self.tolerance:.0e} {verdict}"


def read_case(path: Path) -> Case:
    """Read a case and its configuration.

    Raises:
        DataError: one of the two files is missing or unreadable.
    """
    path = Path(path)
    try:
        tensors = load_file(path)
    except Exception as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path.with_suffix('.json')}: no readable configuration: {error}"
        ) from error
    return Case(path.stem, description, tensors)


def run(path: Path) -> list[Check]:
    """Run one case and compare every output.

    Raises:
        DataError: the file is not a case this library knows, or lacks a part.
    """
    case = read_case(path)
    try:
        for belongs, check in _KINDS:
            if belongs(case):
                with torch.no_grad():
                    return list(check(case))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    raise DataError(f"{path} holds none of the cases this library knows")


def _compare(case: Case, output: str, ours: Tensor, theirs: Tensor, tolerance: float) -> Check:
    if ours.shape != theirs.shape:
        raise DataError(
            f"{case.name} {output}: our shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
        )
    difference = (ours.double() - theirs.double()).abs()
    error = difference.max().item() if difference.numel() else 0.0
    return Check(case.name, output, error, tolerance)


def _video_encoder(case: Case) -> str | None:
    """Published name of the video encoder, for whole models."""
    return case.description.get("config", {}).get("model", {}).get("vid_net", {}).get("name")


def _snag(case: Case) -> Iterator[Check]:
    yield from _grounder(case, SnAG(snag_config(case.description["config"])))


def _hieramamba(case: Case) -> Iterator[Check]:
    yield from _grounder(case, HieraMamba(hieramamba_config(case.description["config"])))


def _grounder(case: Case, model: PointGrounder) -> Iterator[Check]:
    model.eval()
    model.load_state_dict(convert_grounder(case.weights, model))
    video, text = case.tensors["vid"].transpose(1, 2), case.tensors["text"].transpose(2, 3)
    videos, queries = text.shape[:2]
    encoded = model.encode_video(video, case.tensors["vid_mask"].bool().view(videos, -1))
    words = model.encode_text(
        text.flatten(0, 1), case.tensors["text_mask"].bool().view(videos * queries, -1)
    )
    output = model.predict(encoded, words, torch.arange(videos).repeat_interleave(queries))
    pyramid = output.pyramid
    outputs = {
        "mask": output.per_level(output.mask),
        "fpn": pyramid.levels,
        "logits": output.per_level(output.logits),
        "offsets": output.per_level(output.offsets),
    }
    valid = {"fpn": pyramid.masks, "logits": outputs["mask"], "offsets": outputs["mask"]}
    if isinstance(pyramid, AnchorPyramid):
        outputs |= {"anchor_mask": pyramid.anchor_masks, "anchor": pyramid.anchors}
        valid["anchor"] = pyramid.anchor_masks
    for number in range(len(pyramid.levels)):
        for key, levels in outputs.items():
            theirs = case.tensors.get(f"{key}.{number}")
            if theirs is None and key in ("fpn", "anchor", "anchor_mask"):
                continue  # not every case holds what lies inside the model
            if theirs is None:
                raise KeyError(f"{key}.{number}")
            ours, output_name = levels[number], f"{key}.{number}"
            if key in valid:
                mask = valid[key][number]
                theirs = theirs.transpose(1, 2) if key in ("fpn", "anchor") else theirs
                ours, theirs = ours[mask], theirs[mask]
                yield _compare(case, output_name, ours, theirs, MODEL_TOLERANCE)
            else:
                theirs = theirs.view(ours.shape)
                yield _compare(case, output_name, ours, theirs, LAYER_TOLERANCE)


def _mamfusion(case: Case) -> Iterator[Check]:
    # The released fusion acts in training only; no case holds it.
    config = replace(mamfusion_config(case.description["config"]), fusion="none")
    model = MamFusion(config).eval()
    model.load_state_dict(convert_mamfusion(case.weights, model))
    tensors = case.tensors
    queries = model.encode_text(tensors["query"], tensors["query_mask"].bool(), None)
    videos = model.encode_video(tensors["clip"], tensors["frame"], tensors["frame_mask"].bool())
    clip_scores, frame_scores = model.score_parts(queries, videos)
    for output, ours in (
        ("query_vector", queries.vector),
        ("clip_features", videos.segments),
        ("video_vector", videos.vector),
        ("clip_scores", clip_scores),
        ("frame_scores", frame_scores),
    ):
        yield _compare(case, output, ours, tensors[output], MODEL_TOLERANCE)


def _losses(case: Case) -> Iterator[Check]:
    tensors = case.tensors
    logits, targets = tensors["focal.logits"], tensors["focal.targets"]
    for key in sorted(key for key in tensors if key.startswith("focal.")):
        kind = key.removeprefix("focal.")
        if kind in ("logits", "targets"):
            continue
        alpha = None if kind == "none" else float(kind.removeprefix("alpha"))
        yield _compare(case, key, focal_loss(logits, targets, alpha), tensors[key], LAYER_TOLERANCE)
    for key, loss in (("seg.iou", iou_loss), ("seg.diou", diou_loss)):
        ours = loss(tensors["seg.pred"], tensors["seg.gt"])
        yield _compare(case, key, ours, tensors[key], LAYER_TOLERANCE)
    levels = range(sum(key.startswith("acc.seq.") for key in tensors))
    project = {kind: _projector(case, kind) for kind in ("acc", "spc")}
    features = [tensors[f"acc.seq.{level}"].transpose(1, 2) for level in levels]
    anchor_loss = sum(
        anchor_contrast(
            project["acc"](features[level]),
            tensors[f"acc.seq_mask.{level}"].bool().squeeze(1),
            project["acc"](tensors[f"acc.anchor.{level}"].transpose(1, 2)),
            tensors[f"acc.anchor_mask.{level}"].bool().squeeze(1),
        )
        for level in levels
    )
    yield _compare(case, "acc.loss", anchor_loss, tensors["acc.loss"], LAYER_TOLERANCE)
    segment_loss = 0
    for level in levels:
        valid, label, span = (
            tensors[f"spc.{name}.{level}"].bool() for name in ("mask", "label", "span")
        )
        points = project["spc"](features[level])
        segment_loss = segment_loss + segment_contrast(points, label & valid, valid & ~span)
    yield _compare(case, "spc.loss", segment_loss, tensors["spc.loss"], LAYER_TOLERANCE)


def _projector(case: Case, kind: str) -> ContrastiveProjector:
    """The contrastive projector of a case, from its published names."""
    names = {"fc1": "hidden", "ln1": "norm", "fc2": "output"}
    prefix = f"{kind}.w.projector."
    weights = {}
    for key in (key for key in case.tensors if key.startswith(prefix)):
        layer, parameter = key.removeprefix(prefix).split(".")
        weights[f"{names[layer]}.{parameter}"] = case.tensors[key]
    hidden, channels = weights["hidden.weight"].shape
    projector = ContrastiveProjector(channels, hidden, len(weights["output.weight"]))
    projector.load_state_dict(weights)
    return projector


def _is_layer(case: Case) -> bool:
    return {"w.A_log", "x", "y"} <= set(case.tensors)


def _layer(case: Case) -> Iterator[Check]:
    kind = Hydra if "w.fc_D.weight" in case.tensors else Mamba
    layer = kind(**case.description["config"]).eval()
    layer.load_state_dict(case.weights)
    yield _compare(case, "y", layer(case.tensors["x"]), case.tensors["y"], LAYER_TOLERANCE)


def _points_and_suppression(case: Case) -> Iterator[Check]:
    theirs = case.tensors["points"]
    strides, lengths = theirs[:, 3].unique(return_counts=True)
    first, second = (theirs[theirs[:, 3] == stride][0] for stride in strides[:2])
    grid = PointGrid(
        regression_range=first[2].item(),
        sigma=(second[1] / first[2]).item(),
        center_radius=case.option("center_sampling_radius", 1.5),
    )
    points = grid.points(lengths.tolist(), max_length=int(lengths[0]))
    yield _compare(case, "points", points, theirs, LAYER_TOLERANCE)
    moments = case.tensors["targets"][:, None]
    labels, offsets = grid.targets(points, moments)
    yield _compare(case, "labels", labels, case.tensors["labels"], LAYER_TOLERANCE)
    yield _compare(case, "offsets", offsets, case.tensors["offsets"], LAYER_TOLERANCE)
    segments, scores = case.tensors["nms.segs"][None], case.tensors["nms.scores"][None]
    for key in sorted(key for key in case.tensors if ".voting" in key and key.endswith(".segs")):
        kind, voting = key.removesuffix(".segs").split(".voting")
        config = DecodingConfig(
            suppression="soft" if kind == "soft_nms" else "hard",
            sigma=case.option("sigma", 0.9),
            iou_threshold=case.option("iou_thresh", 0.1),
            min_score=case.option("min_score", 1e-3),
            keep=len(case.tensors[key]),
            voting_threshold=float(voting),
        )
        picked, picked_scores = decode(segments, scores, config)
        yield _compare(case, key, picked[0], case.tensors[key], LAYER_TOLERANCE)
        score_key = key.removesuffix("segs") + "scores"
        yield _compare(case, score_key, picked_scores[0], case.tensors[score_key], LAYER_TOLERANCE)


_KINDS: list[tuple[Callable[[Case], bool], Callable[[Case], Iterator[Check]]]] = [
    (lambda case: _video_encoder(case) == "transformer", _snag),
    (lambda case: _video_encoder(case) == "hieramamba_backbone", _hieramamba),
    (lambda case: "video_vector" in case.tensors, _mamfusion),
    (_is_layer, _layer),
    (lambda case: "focal.logits" in case.tensors, _losses),
    (lambda case: "nms.segs" in case.tensors, _points_and_suppression),
]


def main(arguments: list[str]) -> int:
    """Run the cases named on the command line; see the module's docstring."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    all_ok = True
    for argument in arguments:
        try:
            checks = run(Path(argument))
        except DataError as error:
            print(error, file=sys.stderr)
            all_ok = False
            continue
        for check in checks:
            print(check)
            all_ok &= check.ok
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
