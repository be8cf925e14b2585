"""SnAG's and HieraMamba's released configurations and weights as this library's models.

The two share text encoders, late fusion, heads, targets and decoding, in code and in names.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tvg_lib.decoding import DecodingConfig
from tvg_lib.errors import DataError
from tvg_lib.interop.files import read_configuration, read_weights
from tvg_lib.models.hieramamba import HieraMamba, HieraMambaConfig
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.models.snag import SnAG, SnagConfig
from tvg_lib.nn.points import PointGrid

Model = TypeVar("Model", bound=PointGrounder)

# Published prefix or part -> ours, applied in order to every name.
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^text_net\.embd_fc\.conv\.", "text_encoder.input."),
        (r"^text_net\.bkgd_token$", "text_encoder.background"),
        (r"^text_net\.attn_pool\.attn\.", "text_encoder.pool."),
        (r"^text_net\.transformer\.", "text_encoder.layers."),
        (r"^vid_net\.embd_fc\.conv\.", "video_encoder.embedding.projection."),
        (r"^vid_net\.embd_convs\.(\d+)\.conv\.", r"video_encoder.embedding.convolutions.\1."),
        (r"^vid_net\.embd_norms\.", "video_encoder.embedding.norms."),
        (r"^vid_net\.(stem|branch)\.", r"video_encoder.\1."),
        (r"^fusion\.ln_out\.", "fusion.norm."),
        (r"^cls_head\.cls_head\.conv\.", "classification.output."),
        (r"^reg_head\.reg_head\.conv\.", "regression.output."),
        (r"^cls_head\.", "classification."),
        (r"^reg_head\.", "regression."),
        (r"\.convs\.(\d+)\.conv\.", r".convolutions.\1."),
        (r"\.ln_xattn_q\.", ".video_norm."),
        (r"\.ln_xattn_kv\.", ".text_norm."),
        (r"\.xattn\.q_conv\.conv\.", ".query.convolution."),
        (r"\.xattn\.q_norm\.", ".query.norm."),
        (r"\.xattn\.xattn\.", ".attention."),
        (r"\.ln_attn\.", ".attention_norm."),
        (r"\.ln_ffn\.", ".feed_forward_norm."),
        (r"^vid_proj\.conv\.", "video_projection."),
        (r"\.norm_(global|local)(?:_in)?\.", r".\1_norm."),
        (r"\.drop_path_(global|local)(?:_1)?\.", r".\1_scale."),
        (r"\.gate1\.0\.", ".global_gate."),
        (r"\.gate2\.0\.", ".local_gate."),
        (r"\.norm_ffn(?:_in)?\.", ".feed_forward_norm."),
        (r"\.ffn\.0\.", ".feed_forward.0."),
        (r"\.ffn\.w12\.", ".feed_forward.gate_and_value."),
        (r"\.ffn\.w2\.", ".feed_forward.output."),
        (r"\.anchor_pooling\.pooler\.gate_proj\.", ".pooling.gate."),
        (r"\.anchor_pooling\.pooler\.pool_q$", ".pooling.query"),
        (r"\.anchor_pooling\.pooler\.pool_attn\.out_proj\.", ".pooling.attention.output."),
        (r"\.anchor_pooling\.pooler\.pool_attn\.in_proj_", ".pooling.attention.in_proj."),
        (r"\.drop_path_attn\.", ".attention_scale."),
        (r"\.drop_path_ffn\.", ".feed_forward_scale."),
        (r"\.ffn\.fc\.", ".feed_forward.0."),
        (r"\.ffn\.proj\.", ".feed_forward.3."),
        (r"\.attn\.q_conv\.conv\.", ".projections.query.convolution."),
        (r"\.attn\.k_conv\.conv\.", ".projections.key.convolution."),
        (r"\.attn\.v_conv\.conv\.", ".projections.value.convolution."),
        (r"\.attn\.q_norm\.", ".projections.query.norm."),
        (r"\.attn\.k_norm\.", ".projections.key.norm."),
        (r"\.attn\.v_norm\.", ".projections.value.norm."),
        (r"\.attn\.attn\.", ".attention."),
        (r"\.(attention|pool)\.proj\.", r".\1.output."),
    ]
]


def snag_config(published: Mapping, as_published: bool = True) -> SnagConfig:
    """The architecture that a released SnAG configuration describes.

    Args:
        published: the parsed YAML file, or its `model` part in a mapping {"model": ...}. Values it
            leaves out take the released code's defaults.
        as_published: stretch positions over padding too, as the released code does for videos
            beyond the trained length.

    Raises:
        DataError: it is not a SnAG configuration.
    """
    fields, video = _common_fields(published, "SnAG", "transformer", as_published)
    return SnagConfig(window=video.get("mha_win_size", 5), **fields)


def hieramamba_config(published: Mapping, as_published: bool = True) -> HieraMambaConfig:
    """The architecture that a released HieraMamba configuration describes.

    Args:
        published: as in `snag_config`.
        as_published: let padding into scans, anchors and stretched positions, as the released code
            does. (Its masks summed over a batch are not reproduced.)

    Raises:
        DataError: it is not a HieraMamba configuration.
    """
    fields, video = _common_fields(published, "HieraMamba", "hieramamba_backbone", as_published)
    merges = {"AnchorMambaPoolingBlockGated": "gate", "AnchorMambaPoolingBlock": "scaled_skip"}
    block = video.get("block_type", "AnchorMambaPoolingBlockGated")
    poolings = {"mean": "mean", "max": "max", "attn": "attention", "gated": "gated"}
    pooling = video.get("pool_method", "mean")
    local = video.get("local_encoder_type", "transformer")
    for name, value, known in (
        ("block_type", block, merges),
        ("pool_method", pooling, poolings),
        ("local_encoder_type", local, ("transformer",)),
    ):
        if value not in known:
            raise DataError(f"unknown {name} {value!r}; expected one of {list(known)}")
    bidirectional = video.get("bidirectional", True)
    return HieraMambaConfig(
        window=video.get("local_window_size", 5) if video.get("local_encode", False) else None,
        pooling=poolings[pooling],
        bidirectional=bidirectional,
        state=video.get("mamba_dstate", 64),
        expand=video.get("mamba_expand", 2),
        # The released code gives its one-directional layer fixed sizes.
        head_channels=video.get("mamba_headdim", 64) if bidirectional else 48,
        taps=video.get("mamba_dconv", 7) if bidirectional else 4,
        local_levels=video.get("local_encode_num_layers", 0) or None,
        merge=merges[block],
        stem_window=video.get("mha_win_size", 0),
        early_fusion=published["model"].get("early_fusion", True),
        leak_padding=as_published,
        **fields,
    )


def _common_fields(
    published: Mapping, system: str, video_name: str, as_published: bool
) -> tuple[dict[str, Any], Mapping]:
    """What the configurations of both systems say alike, and the video encoder's part."""
    try:
        model = published["model"]
        text, video = model["text_net"], model["vid_net"]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"not a {system} configuration: 'model' with 'text_net' and 'vid_net' expected, "
            f"{error} is missing"
        ) from None
    name = video.get("name", "transformer")
    if name != video_name:
        raise DataError(f"{system}'s video encoder is {video_name!r}, found {name!r}")
    text_names = {"transformer": "transformer", "identity": "projection"}
    if text.get("name", "transformer") not in text_names:
        raise DataError(f"unknown text encoder {text['name']!r}; expected {sorted(text_names)}")
    is_projection = text.get("name") == "identity"
    fusion, heads = model.get("fusion", {}), model.get("cls_head", {})
    convolutions, stem, levels = video.get("arch", (2, 0, 7))
    fields = {
        "video_dim": video.get("in_dim", 500),
        "text_dim": text.get("in_dim", 300),
        "channels": video.get("embd_dim", 128),
        "heads": video.get("n_heads", 4),
        "levels": levels,
        "stem": stem,
        "max_clips": video.get("max_seq_len", 256),
        "embedding_convolutions": convolutions,
        "input_stride": video.get("stride", 1),
        "positions": video.get("use_abs_pe", True),
        "text_encoder": text_names[text.get("name", "transformer")],
        "text_channels": text.get("embd_dim", 128),
        "text_heads": text.get("n_heads", 4),
        "text_layers": text.get("n_layers", 5),
        "max_words": text.get("max_seq_len", 24),
        "text_positions": text.get("use_abs_pe", not is_projection),
        "background_token": text.get("use_bkgd_token", True),
        "fusion_layers": fusion.get("n_layers", 2),
        "fusion_heads": fusion.get("n_heads", 4),
        "modulation": fusion.get("xattn_mode", "adaln"),
        "head_layers": heads.get("n_layers", 2),
        "prior": heads.get("prior_prob") or None,
        "attention_dropout": video.get("attn_pdrop", 0.0),
        "dropout": video.get("proj_pdrop", 0.1),
        "drop_path": video.get("path_pdrop", 0.1),
        "stretch_over_padding": as_published,
    }
    return fields, video


def point_grid(published: Mapping) -> PointGrid:
    """The rules of points and targets that a released configuration describes."""
    points, train = published.get("pt_gen", {}), published.get("train", {})
    return PointGrid(
        regression_range=points.get("regression_range", 4),
        sigma=points.get("sigma", 0.5),
        center_radius=train.get("center_sampling_radius", 1.5),
    )


def decoding_config(published: Mapping) -> DecodingConfig:
    """How a released configuration turns points into moments.

    Raises:
        DataError: it asks for another kind of suppression.
    """
    evaluation = published.get("eval", {})
    nms = evaluation.get("nms", {})
    kinds = {"soft_nms": "soft", "nms": "hard", None: None}
    mode = nms.get("mode", "soft_nms")
    if mode not in kinds:
        raise DataError(f"unknown suppression {mode!r}; expected one of {list(kinds)}")
    return DecodingConfig(
        score_threshold=evaluation.get("pre_nms_thresh", 0.001),
        pre_top_k=evaluation.get("pre_nms_topk", 2000),
        min_length=evaluation.get("seg_len_thresh", 0.1),
        suppression=kinds[mode],
        sigma=nms.get("sigma", 0.9),
        iou_threshold=nms.get("iou_thresh", 0.1),
        min_score=nms.get("min_score", 0.001),
        keep=nms.get("max_num_segs", 5),
        voting_threshold=nms.get("voting_thresh", 0.95),
    )


def convert_grounder(published: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Published parameters under this library's names and shapes.

    Args:
        published: state dict of the released code.
        model: the model they are meant for.

    Raises:
        DataError: names or shapes do not match `model`, naming the first of each kind.
    """
    expected = model.state_dict()
    converted: dict[str, Tensor] = {}
    scales: dict[int, Tensor] = {}
    # SnAG's encoder keeps stem and pyramid in one list, HieraMamba's in two.
    stem = getattr(model.video_encoder, "stem_layers", None)
    for name, value in published.items():
        ours = name
        for pattern, replacement in _RENAMES:
            ours = pattern.sub(replacement, ours)
        if stem is not None:
            ours = re.sub(r"^video_encoder\.stem\.", "video_encoder.blocks.", ours)
        ours = re.sub(
            r"^video_encoder\.branch\.(\d+)",
            lambda match: f"video_encoder.blocks.{int(match[1]) + (stem or 0)}",
            ours,
        )
        if packed := re.fullmatch(r"(.*\.attention)\.in_proj\.(weight|bias)", ours):
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[f"{packed[1]}.{part}.{packed[2]}"] = piece
            continue
        if scale := re.fullmatch(r"regression\.scales\.(\d+)\.scale", ours):
            scales[int(scale[1])] = value
            continue
        converted[ours] = value
    if scales:
        converted["regression.scales"] = torch.stack([scales[i] for i in sorted(scales)])
    missing, unknown = set(expected) - set(converted), set(converted) - set(expected)
    if missing or unknown:
        raise DataError(
            f"published weights do not fit {type(model).__name__}: {len(missing)} missing "
            f"(e.g. {min(missing, default=None)}), {len(unknown)} unknown "
            f"(e.g. {min(unknown, default=None)})"
        )
    for name, value in converted.items():
        target = expected[name].shape
        if [n for n in value.shape if n != 1] != [n for n in target if n != 1]:
            raise DataError(
                f"published weight {name} has shape {tuple(value.shape)}, expected {tuple(target)}"
            )
        converted[name] = value.reshape(target)
    return converted


def load_snag(
    checkpoint: Path,
    configuration: Path,
    ema: bool = True,
    device: str | torch.device = "cpu",
    as_published: bool = True,
) -> SnAG:
    """A released SnAG checkpoint and its YAML file as a model ready to ground, in eval mode.

    Raises:
        DataError: a file cannot be read, or the two do not fit each other.
    """
    return _loaded(SnAG, snag_config, checkpoint, configuration, ema, device, as_published)


def load_hieramamba(
    folder: Path,
    checkpoint: str | None = None,
    ema: bool = True,
    device: str | torch.device = "cpu",
    as_published: bool = True,
) -> HieraMamba:
    """A folder that HieraMamba's released code has written, as a model ready to ground.

    Args:
        folder: with `opt.yaml` and `models/NAME.pth`.
        checkpoint: NAME; None takes `last`, or the only one there is.
        ema: take the averaged weights that the paper evaluates.
        device: where the model goes; no compiled extension is needed on any.
        as_published: see `hieramamba_config`. The released evaluation pads short videos to the
            trained length, and with `as_published` an answer depends on padding: to reproduce its
            numbers to the last digit, pad the input likewise.

    Raises:
        DataError: a file is missing or cannot be read, or the two do not fit each other.
    """
    folder = Path(folder)
    found = sorted(path.stem for path in folder.glob("models/*.pth"))
    name = checkpoint or ("last" if "last" in found or len(found) != 1 else found[0])
    if name not in found:
        raise DataError(f"{folder / 'models'} holds no {name}.pth; found {found or 'none'}")
    path = folder / "models" / f"{name}.pth"
    return _loaded(
        HieraMamba, hieramamba_config, path, folder / "opt.yaml", ema, device, as_published
    )


def _loaded(
    kind: Callable[[Any], Model],
    read: Callable[[Mapping, bool], SnagConfig],
    checkpoint: Path,
    configuration: Path,
    ema: bool,
    device: str | torch.device,
    as_published: bool,
) -> Model:
    published = read_configuration(configuration)
    try:
        model = kind(read(published, as_published))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{configuration} describes no {kind.__name__}: {error}") from error
    weights = read_weights(checkpoint, ema)
    try:
        model.load_state_dict(convert_grounder(weights, model))
    except DataError as error:
        raise DataError(f"{checkpoint} with {configuration}: {error}") from error
    return model.to(device).eval()
