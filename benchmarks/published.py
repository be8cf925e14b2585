"""SnAG and HieraMamba beside the arithmetic of their published code: time, and where it goes.

    python benchmarks/published.py --out benchmarks/results/published_cpu.json

The released TACoS configurations; one video of 2,304 clips, four queries of 20 to 48 words,
float32, no dropout. `published` is what the released code does, written again on *our* parameters:
channels first, one ordinary layer after the other, masks multiplied in, local attention in
overlapping stretches, cross-attention at full width, fusion and heads level by level, and for Hydra
a PyTorch reference of mamba-ssm for both directions at once. Its chunks have 64 steps, where the
released call asks for 256: the reference takes half as long then. Both sides hold the same weights,
and before anything is timed their outputs and gradients must agree.

    forward     from features to logits and offsets of every point
    step        the same and the gradients of all parameters from the sum of all outputs

Ours and theirs take turns and medians are reported, so a busy machine slows both alike; processor
time of all threads stands beside the wall clock's. `parts` says where our forward pass spends its
time and how many operations (10^9, two per product) matrix products and convolutions take by their
definition and in ours. Ours are fewer where Winograd halves those of a convolution or where
attention to few words avoids two projections. `gemm_gflops` is what one large product reaches, so
operations over it are the time that no layer can go below.

A question to an encoded video costs the part `points` once, 4,590 points in this configuration.
Next to nothing of it can be prepared with the video: the first layer multiplies the video by what
the words say, and all that follows depends on both.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from grounders import multiplication_rate, random_batch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tvg_lib import paths
from tvg_lib.data.batching import GroundingBatch
from tvg_lib.models import hieramamba, snag
from tvg_lib.models.anchor_mamba import AnchorMambaPooling
from tvg_lib.models.hieramamba import HieraMamba
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.nn.allocation import keep_freed_memory
from tvg_lib.nn.attention import ConvolutionalProjection, MultiHeadAttention, TransformerBlock
from tvg_lib.nn.feed_forward import FeedForward
from tvg_lib.nn.fusion import CrossAttentionBlock
from tvg_lib.nn.pyramid import ConvolutionalHead
from tvg_lib.nn.sequence import LayerScale, MaskedConv1d
from tvg_lib.nn.text import TextTransformer
from tvg_lib.results import environment
from tvg_lib.ssm import Hydra, kernels

MODELS: dict[str, Callable[[], PointGrounder]] = {
    "SnAG": lambda: snag.SnAG(snag.TACOS),
    "HieraMamba": lambda: HieraMamba(hieramamba.TACOS),
}
CLIPS, QUERIES = 2304, 4
SCAN_CHUNK = 64

# -- the published arithmetic, on (B, C, T) and masks (B, 1, T) ----------------------------------


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the channels of (B, C, T), operation by operation."""
    x = x - x.mean(1, keepdim=True)
    x = x / torch.sqrt((x**2).mean(1, keepdim=True) + layer.eps)
    return x if layer.weight is None else x * layer.weight[:, None] + layer.bias[:, None]


def pointwise(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer as a convolution with one tap."""
    return F.conv1d(x, layer.weight[:, :, None], layer.bias)


def convolution(layer: MaskedConv1d, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A masked convolution and the mask of its output."""
    stride = layer.stride[0]
    x = F.conv1d(
        x * mask.to(x.dtype), layer.weight, layer.bias, stride, layer.padding, groups=layer.groups
    )
    return x, mask[:, :, ::stride]


def scaled(layer: LayerScale, x: Tensor) -> Tensor:
    """Layer scale."""
    return layer.scale[:, None] * x


def feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    """The feed-forward network of a transformer."""
    return pointwise(layer[3], F.gelu(pointwise(layer[0], x)))


def local_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Windowed attention of (B, H, T, D); mask (B, T); T a multiple of `radius`.

    Blocks of `radius` steps meet the overlapping stretches of three times as many round them.
    """
    q = q.unflatten(2, (-1, radius))
    k, v = (F.pad(x, (0, 0, radius, radius)).unfold(2, 3 * radius, radius) for x in (k, v))
    valid = F.pad(mask, (radius, radius)).unfold(1, 3 * radius, radius)[:, None, :, None]
    distance = torch.arange(3 * radius) - radius - torch.arange(radius)[:, None]
    allowed = valid & (distance.abs() <= radius)
    scores = (q @ k).masked_fill(~allowed, torch.finfo(q.dtype).min)
    out = (scores.softmax(-1) @ v.transpose(3, 4)).flatten(2, 3)
    return out.masked_fill(~mask[:, None, :, None], 0.0)


def attention(
    layer: MultiHeadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, repeats: int = 1
) -> Tensor:
    """Multi-head attention; each row of `q` is asked by `repeats` rows of `k` and `v`."""
    q, k, v = pointwise(layer.query, q), pointwise(layer.key, k), pointwise(layer.value, v)
    q, k, v = (
        x.unflatten(1, (layer.heads, -1)).transpose(2, 3)
        for x in (q.repeat_interleave(repeats, 0), k, v)
    )
    root = q.shape[-1] ** -0.25
    if layer.window:
        out = local_attention(q * root, k * root, v, mask[:, 0], layer.window // 2)
    else:
        scores = (q * root) @ (k * root).transpose(2, 3)
        out = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1) @ v
    return pointwise(layer.output, out.transpose(2, 3).flatten(1, 2))


def projected(layer: ConvolutionalProjection, x: Tensor, mask: Tensor) -> Tensor:
    """Depthwise convolution and norm in front of an attention input."""
    return norm(layer.norm, convolution(layer.convolution, x, mask)[0])


def max_pool(x: Tensor, mask: Tensor, stride: int) -> Tensor:
    """Skip connection of a block that halves the sequence."""
    pooled = F.max_pool1d(x.masked_fill(~mask, torch.finfo(x.dtype).min), 3, stride, 1)
    return pooled * F.max_pool1d(mask.to(x.dtype), 3, stride, 1)


def transformer(block: TransformerBlock, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention and feed-forward."""
    x = x * mask.to(x.dtype)
    q = k = v = norm(block.attention_norm, x)
    if block.projections:
        q, k, v = (projected(block.projections[n], q, mask) for n in ("query", "key", "value"))
    if block.stride > 1:
        x = max_pool(x, mask, block.stride)
        mask = mask[:, :, :: block.stride]
    valid = mask.to(x.dtype)
    x = x * valid + scaled(block.attention_scale, attention(block.attention, q, k, v, mask))
    h = feed_forward(block.feed_forward, norm(block.feed_forward_norm, x)) * valid
    return x + scaled(block.feed_forward_scale, h), mask


def fusion_layer(
    layer: CrossAttentionBlock, x: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-attention that scales and shifts, then a feed-forward, of one level."""
    repeats = len(text) // len(x)
    x = x * mask.to(x.dtype)
    q = projected(layer.query, norm(layer.video_norm, x), mask)
    words = norm(layer.text_norm, text)
    found = attention(layer.attention, q, words, words, text_mask, repeats)
    mask = mask.repeat_interleave(repeats, 0)
    valid = mask.to(x.dtype)
    scale, shift = found.chunk(2, 1)
    x = x.repeat_interleave(repeats, 0) * valid
    x = x * scale + shift
    h = feed_forward(layer.feed_forward, norm(layer.feed_forward_norm, x)) * valid
    return x + scaled(layer.feed_forward_scale, h), mask


def head(layers: ConvolutionalHead, x: Tensor, mask: Tensor) -> Tensor:
    """Convolutions with norm and ReLU, and the output convolution, of one level."""
    for layer, layer_norm in zip(layers.convolutions, layers.norms, strict=True):
        x = F.relu(norm(layer_norm, convolution(layer, x, mask)[0]))
    return convolution(layers.output, x, mask)[0]


def encoded_words(encoder: TextTransformer, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The text encoder of the TACoS configurations."""
    mask = mask[:, None]
    x = pointwise(encoder.input, text.transpose(1, 2) * mask.to(text.dtype))
    x = x + encoder.positions.table[: x.shape[2]].t() * mask.to(x.dtype)
    x = torch.cat([encoder.background[:, None].expand(len(x), -1, 1), x], 2)
    mask = F.pad(mask, (1, 0), value=True)
    for block in encoder.layers:
        x, mask = transformer(block, x, mask)
    return x, mask


def embedded(embedding: snag.ClipEmbedding, x: Tensor, mask: Tensor) -> Tensor:
    """Projection, convolutions and positions."""
    x = pointwise(embedding.projection, x * mask.to(x.dtype))
    for layer, layer_norm in zip(embedding.convolutions, embedding.norms, strict=True):
        x = F.relu(norm(layer_norm, convolution(layer, x, mask)[0]))
    return x + embedding.positions.table[: x.shape[2]].t() * mask.to(x.dtype)


def hydra(layer: Hydra, x: Tensor) -> Tensor:
    """Both directions in one batch, by mamba-ssm's PyTorch reference; x (B, T, C)."""
    batch, steps, _ = x.shape
    z, inner, dt = layer.in_proj(x).split(layer.parts, 2)
    dt = torch.cat([dt[..., : layer.nheads], dt[..., layer.nheads :].flip(1)])
    dt = F.softplus(dt + layer.dt_bias)
    conv = layer.conv1d
    inner = F.conv1d(
        inner.transpose(1, 2), conv.weight, conv.bias, padding=conv.kernel_size[0] // 2,
        groups=conv.groups,
    )  # fmt: skip
    u, forward, backward = F.silu(inner.transpose(1, 2)).split(layer.sizes, 2)
    both = torch.cat([u, u.flip(1)]).unflatten(2, (layer.nheads, -1))
    B, C = torch.cat([forward, backward.flip(1)]).unsqueeze(2).chunk(2, 3)
    B, C = (v.expand(-1, -1, layer.nheads, -1) for v in (B, C))
    missing = -steps % SCAN_CHUNK  # a step of size zero leaves the state as it is
    written, decay, B, C = (
        F.pad(v, (0, 0) * (v.dim() - 2) + (0, missing))
        for v in (both * dt[..., None], dt * -layer.A_log.exp(), B, C)
    )
    y = reference_scan()(written, decay, B, C, SCAN_CHUNK)[0][:, :steps].flatten(2)
    y = F.pad(y[:, :-1], (0, 0, 1, 0))
    y = y[:batch] + y[batch:].flip(1)
    diagonal = F.linear(u, layer.fc_D.weight, layer.D).repeat_interleave(
        u.shape[2] // layer.nheads, 2
    )
    y = y + u * diagonal
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + layer.norm.eps) * layer.norm.weight
    return layer.out_proj(y * F.silu(z))


def reference_scan() -> Callable[..., tuple[Tensor, Tensor]]:
    """The chunked scan as mamba-ssm has it in plain PyTorch (Dao and Gu 2024, listing 1).

    Its other reference, `ssd_chunk_scan_combined_ref`, takes as long and overflows on the way back.

    Raises:
        ImportError: mamba-ssm is not installed.
    """
    kernels.chunk_scan()  # imports mamba-ssm whether or not it was built with its extension
    return importlib.import_module("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete


def anchor_block(
    block: AnchorMambaPooling, x: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of HieraMamba's TACoS configuration: tokens, anchors and their mask."""
    stride, batch, channels = block.stride, len(x), x.shape[1]
    x = (x * mask.to(x.dtype)).unflatten(2, (-1, stride))
    mixed = torch.cat([x.mean(3, keepdim=True), x], 3).permute(0, 2, 3, 1)
    mixed = mixed.reshape(batch, -1, channels)
    valid = mask.unflatten(2, (-1, stride))
    anchor_mask = valid.any(3)
    valid = torch.cat([anchor_mask[..., None], valid], 3).flatten(2)

    def merged(x: Tensor, branch: Tensor, gate: nn.Linear) -> Tensor:
        share = F.linear(torch.cat([x, branch], -1), gate.weight, gate.bias).sigmoid()
        return share * branch + (1 - share) * x

    h = mixed + block.global_scale.scale * hydra(block.global_encoder, block.global_norm(mixed))
    h = merged(mixed, h, block.global_gate)
    found = transformer(block.local_encoder, block.local_norm(h).transpose(1, 2), valid)[0]
    h = merged(h, h + block.local_scale.scale * found.transpose(1, 2), block.local_gate)
    fed = block.feed_forward(block.feed_forward_norm(h))
    h = (h + block.feed_forward_scale.scale * fed).unflatten(1, (-1, stride + 1))
    return (
        h[:, :, 1:].flatten(1, 2).transpose(1, 2) * mask.to(h.dtype),
        h[:, :, 0].transpose(1, 2) * anchor_mask.to(h.dtype),
        anchor_mask,
    )


def pyramid(model: PointGrounder, video: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Features and mask of every level."""
    encoder = model.video_encoder
    mask = mask[:, None]
    x = embedded(encoder.embedding, video.transpose(1, 2), mask)
    levels = []
    for block in encoder.blocks:
        if isinstance(block, AnchorMambaPooling):
            tokens, x, anchor_mask = anchor_block(block, x, mask)
            levels.append((tokens, mask))
            mask = anchor_mask
        else:
            x, mask = transformer(block, x, mask)
            levels.append((x, mask))
    return levels


def published(model: PointGrounder, batch: GroundingBatch) -> tuple[Tensor, Tensor]:
    """Logits (Q, P) and offsets (Q, P, 2), queries of one video."""
    levels = pyramid(model, batch.video, batch.video_mask)
    text, text_mask = encoded_words(model.text_encoder, batch.text, batch.text_mask)
    logits, offsets = [], []
    for number, (x, mask) in enumerate(levels):
        for layer in model.fusion.layers:
            x, mask = fusion_layer(layer, x, mask, text, text_mask)
        x = norm(model.fusion.norm, x)
        logits.append(head(model.classification, x, mask)[:, 0])
        scale = model.regression.scales[number]
        offsets.append(F.relu(head(model.regression, x, mask) * scale).transpose(1, 2))
    return torch.cat(logits, 1), torch.cat(offsets, 1)


def ours(model: PointGrounder, batch: GroundingBatch) -> tuple[Tensor, Tensor]:
    """The same by the library."""
    output = model(batch)
    return output.logits, output.offsets


# -- measuring -----------------------------------------------------------------------------------

Way = Callable[[PointGrounder, GroundingBatch], tuple[Tensor, Tensor]]


def forward(way: Way, model: PointGrounder, batch: GroundingBatch) -> None:
    """Outputs alone."""
    with torch.inference_mode():
        way(model, batch)


def step(way: Way, model: PointGrounder, batch: GroundingBatch) -> dict[str, Tensor]:
    """Gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    logits, offsets = way(model, batch)
    (logits.sum() + offsets.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def build(name: str) -> tuple[PointGrounder, GroundingBatch]:
    """A model without dropout, its layer scales at one: at their start they would hide errors."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for layer in model.modules():
        if isinstance(layer, LayerScale):
            nn.init.ones_(layer.scale)
    return model, random_batch(CLIPS, QUERIES, model.config.video_dim, model.config.text_dim)


def compare_results(model: PointGrounder, batch: GroundingBatch) -> dict[str, float]:
    """Largest difference of outputs and of gradients, each over the largest value there is.

    Raises:
        AssertionError: they are not the same but for rounding.
    """
    with torch.inference_mode():
        pairs = zip(ours(model, batch), published(model, batch), strict=True)
        outputs = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    mine, theirs = step(ours, model, batch), step(published, model, batch)
    largest = max(g.abs().max() for g in theirs.values())
    assert mine.keys() == theirs.keys()
    gradients = max(((mine[n] - g).abs().max() / largest).item() for n, g in theirs.items())
    assert outputs < 1e-3, outputs
    assert gradients < 1e-3, gradients
    return {"outputs": outputs, "gradients": gradients}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the wall clock, and of all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def medians(times: list[tuple[float, float]]) -> dict[str, float]:
    """Of the wall clock and of processor time."""
    walls, processors = zip(*times, strict=True)
    return {
        "seconds": statistics.median(walls),
        "processor_seconds": statistics.median(processors),
    }


def race(
    mode: Callable[..., object], model: PointGrounder, batch: GroundingBatch, rounds: int
) -> dict[str, object]:
    """Ours and the published way by turns."""
    ways: dict[str, Way] = {"ours": ours, "published": published}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(timed(partial(mode, way, model, batch)))
    rows = {name: medians(of) for name, of in times.items()}
    return rows | {
        f"times_ours{kind}": rows["published"][key] / rows["ours"][key]
        for kind, key in (("", "seconds"), ("_processor", "processor_seconds"))
    }


def operations(work: Callable[[], object]) -> float:
    """10^9 operations of the matrix products and convolutions of some work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def parts(model: PointGrounder, batch: GroundingBatch, rounds: int) -> dict[str, dict[str, float]]:
    """Our forward pass in three: the video, the words, and fusion and heads of all points."""
    video = model.encode_video(batch.video, batch.video_mask)
    text = model.encode_text(batch.text, batch.text_mask)
    work = {
        "video": lambda: model.encode_video(batch.video, batch.video_mask),
        "words": lambda: model.encode_text(batch.text, batch.text_mask),
        "points": lambda: model.predict(video, text, batch.query_video),
    }
    theirs = {
        "video": operations(lambda: pyramid(model, batch.video, batch.video_mask)),
        "words": operations(lambda: encoded_words(model.text_encoder, batch.text, batch.text_mask)),
    }
    theirs["points"] = operations(lambda: published(model, batch)) - sum(theirs.values())
    return {
        name: medians([timed(run) for _ in range(rounds)])
        | {"gflop": operations(run), "gflop_by_definition": theirs[name]}
        for name, run in work.items()
    }


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    record: dict[str, object] = {
        "configuration": "TACOS",
        "clips": CLIPS,
        "queries": QUERIES,
        "precision": "float32",
        "freed_memory_kept": keep_freed_memory(),  # as in training, for both sides
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gemm_gflops": multiplication_rate(torch.device("cpu")),
        "environment": environment(),
    }
    for name in arguments.models:
        model, batch = build(name)
        row: dict[str, object] = {"largest_difference": compare_results(model, batch)}
        for mode in (forward, step):
            row[mode.__name__] = result = race(mode, model, batch, arguments.rounds)
            print(f"{name} {mode.__name__}: {result}", flush=True)
        row["parts"] = parts(model, batch, arguments.rounds)
        print(f"{name} parts: {row['parts']}", flush=True)
        record[name] = row
    paths.write_text(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
