"""Released MamFusion weights under this library's names.

    clip_encoder[_2], frame_encoder_1/2          clip_branch.blocks.0/1, frame_branch.blocks.0/1
    *_mamba.0, *_mamba.1                         mambas.N.forwards, mambas.N.norm
    modular_vector_mapping[_2]                   query_pooling, frame_pooling
    v2t_fusion, t2v_fusion                       fusion.directions."video-to-text" and the reverse

`vid_embed_proj` of the two fusion modules (188,160 numbers) is never used by the released code and
has no place here.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tvg_lib.errors import DataError
from tvg_lib.models.mamfusion import MamFusion, MamFusionConfig

_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^modular_vector_mapping\.", "query_pooling."),
        (r"^modular_vector_mapping_2\.", "frame_pooling."),
        (r"^(clip|frame)_input_proj\.", r"\1_branch.input_proj."),
        (r"^(clip|frame)_pos_embed\.", r"\1_branch.pos_embed."),
        (r"^clip_encoder(_mamba)?\.", r"clip_branch.1\1."),
        (r"^clip_encoder_2(_mamba)?\.", r"clip_branch.2\1."),
        (r"^frame_encoder_([12])(_mamba)?\.", r"frame_branch.\1\2."),
        (r"_branch\.1\.attn", "_branch.blocks.0.attentions."),
        (r"_branch\.2\.attn", "_branch.blocks.1.attentions."),
        (r"_branch\.1_mamba\.", "_branch.mambas.0."),
        (r"_branch\.2_mamba\.", "_branch.mambas.1."),
        (r"(mambas\.\d)\.0\.", r"\1.forwards."),
        (r"(mambas\.\d)\.1\.", r"\1.norm."),
        (r"^query_(input_proj|pos_embed)\.", r"query_input.\1."),
        (r"_branch\.(input_proj|pos_embed)\.", r"_branch.input.\1."),
        (r"\.input_proj\.LayerNorm\.", ".input_norm."),
        (r"\.input_proj\.net\.1\.", ".projection."),
        (r"\.pos_embed\.position_embeddings\.", ".positions."),
        (r"\.pos_embed\.LayerNorm\.", ".norm."),
        (r"\.self\.", "."),
        (r"\.output\.dense\.", ".output."),
        (r"\.output\.LayerNorm\.", ".norm."),
        (r"^v2t_fusion\.multihead_attn\.", "fusion.directions.video-to-text.attention."),
        (r"^t2v_fusion\.multihead_attn\.", "fusion.directions.text-to-video.attention."),
        (r"\.attention\.out_proj\.", ".attention.output."),
    ]
]
_DEAD = re.compile(r"^(v2t|t2v)_fusion\.vid_embed_proj\.")


def mamfusion_config(published: Mapping, as_published: bool = True) -> MamFusionConfig:
    """The architecture that a released configuration describes.

    Args:
        published: the parsed YAML file; `query_input_size` and `visual_input_size`, which the
            released code reads off the features, must be among it (`q_feat_size` stands for the
            first).
        as_published: masks and the fusion over the batch as in the released code; False builds the
            model of this library with the same numbers.

    Raises:
        DataError: a number is missing.
    """
    try:
        return MamFusionConfig(
            video_dim=published["visual_input_size"],
            text_dim=published.get("query_input_size") or published["q_feat_size"],
            channels=published["hidden_size"],
            heads=published["n_heads"],
            max_words=published["max_desc_l"],
            max_frames=published["max_ctx_l"],
            dropout=published["drop"],
            input_dropout=published["input_drop"],
            initial_std=published["initializer_range"],
            fusion_over="batch" if as_published else "time",
            masks_as_published=as_published,
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"not a MamFusion configuration: {error} is missing") from None


def convert_mamfusion(published: Mapping[str, Tensor], model: MamFusion) -> dict[str, Tensor]:
    """Published parameters under this library's names and shapes.

    Args:
        published: state dict of the released code.
        model: the model they are meant for; without fusion, weights of fusion are left out.

    Raises:
        DataError: names or shapes do not match `model`, naming the first of each kind.
    """
    expected = model.state_dict()
    converted: dict[str, Tensor] = {}
    for name, value in published.items():
        ours = name
        for pattern, replacement in _RENAMES:
            ours = pattern.sub(replacement, ours)
        if _DEAD.match(name) or (ours.startswith("fusion.") and model.fusion is None):
            continue
        packed = re.fullmatch(r"(.*\.attention\.)in_proj_(weight|bias)", ours)
        if packed is None:
            converted[ours] = value
            continue
        for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
            converted[f"{packed[1]}{part}.{packed[2]}"] = piece
    missing, unknown = set(expected) - set(converted), set(converted) - set(expected)
    if missing or unknown:
        raise DataError(
            f"published weights do not fit this MamFusion: {len(missing)} missing "
            f"(e.g. {min(missing, default=None)}), {len(unknown)} unknown "
            f"(e.g. {min(unknown, default=None)})"
        )
    for name, value in converted.items():
        if value.shape != expected[name].shape:
            raise DataError(
                f"published weight {name} has shape {tuple(value.shape)}, expected "
                f"{tuple(expected[name].shape)}"
            )
        converted[name] = torch.as_tensor(value)
    return converted
