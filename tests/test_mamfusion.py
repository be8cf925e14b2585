"""MamFusion: the released encoders, masks, fusion over time, its ablations and its losses."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.interop import convert_mamfusion, mamfusion_config
from tvg_lib.losses.retrieval import (
    RetrievalObjective,
    contrast_terms,
    query_diverse_terms,
    random_negative,
    triplet_terms,
)
from tvg_lib.models.mamfusion import (
    ACTIVITYNET,
    CHARADES,
    TVR,
    EncodedQueries,
    MamFusion,
    MamFusionConfig,
    gaussian_damping,
    gmmformer_like,
    ms_sl_like,
)
from tvg_lib.oracle import main, run
from tvg_lib.retrieval.data import RetrievalBatch
from tvg_lib.ssm import Mamba

SMALL = MamFusionConfig(
    video_dim=6,
    text_dim=6,
    channels=8,
    heads=2,
    max_words=9,
    max_frames=16,
    d_state=4,
    candidates=2,
)


def randomised(config, seed=0):
    """The model in float64 and eval mode, every parameter large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    model = MamFusion(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", ".D")):
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            scale = 1.0 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(scale * noise + (0.5 if parameter.dim() == 1 else 0))
    return model


def make_batch(frames=(7, 5, 3), query_video=(0, 0, 1, 2), words=(4, 2, 3, 1), segments=6, seed=0):
    """Random float64 features; `frames` and `words` are valid lengths."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    frame_mask = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    text_mask = torch.arange(max(words)) < torch.tensor(words)[:, None]
    return RetrievalBatch(
        segments=noise(len(frames), segments, 6),
        frames=noise(len(frames), max(frames), 6) * frame_mask[..., None],
        frame_mask=frame_mask,
        text=noise(len(words), max(words), 6) * text_mask[..., None],
        text_mask=text_mask,
        sentence=noise(len(words), 6),
        query_video=torch.tensor(query_video),
        video_ids=tuple(f"v{n}" for n in range(len(frames))),
        query_ids=tuple(f"q{n}" for n in range(len(words))),
    )


# --- against the released code ----------------------------------------------------------------


def test_the_released_encoders_are_matched(oracles):
    checks = run(oracles / "mamfusion.safetensors")
    names = {"query_vector", "clip_features", "video_vector", "clip_scores", "frame_scores"}
    assert {check.output for check in checks} == names
    assert all(check.ok for check in checks), [str(check) for check in checks]
    assert main([str(oracles / "mamfusion.safetensors")]) == 0


def test_masks_as_published_matter_only_where_there_is_padding(oracles):
    # The case pads every video: without the option, only the frame branch differs.
    tensors = load_file(oracles / "mamfusion.safetensors")
    published = json.loads((oracles / "mamfusion.json").read_text())["config"]
    config = replace(mamfusion_config(published), fusion="none", masks_as_published=False)
    model = MamFusion(config).eval()
    weights = {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}
    model.load_state_dict(convert_mamfusion(weights, model))
    videos = model.encode_video(tensors["clip"], tensors["frame"], tensors["frame_mask"].bool())
    assert torch.allclose(videos.segments, tensors["clip_features"], atol=2e-4)
    assert not torch.allclose(videos.vector, tensors["video_vector"], atol=1e-3)


@pytest.mark.parametrize(
    ("config", "millions"), [(TVR, 18.37), (ACTIVITYNET, 16.69), (CHARADES, 17.28)]
)
def test_parameter_counts_of_the_released_models(config, millions):
    with torch.device("meta"):
        model = MamFusion(replace(config, fusion_over="batch"))
    count = sum(p.numel() for p in model.parameters())
    dead = 2 * (5 * 15680 + 15680)  # two convolutions that the released code never calls
    assert (count + dead) / 1e6 == pytest.approx(millions, abs=0.006)
    mambas = [m for m in model.modules() if isinstance(m, Mamba)]
    assert len(mambas) == 4
    assert sum(p.numel() for m in mambas for p in m.parameters()) / 1e6 == pytest.approx(
        3.86, abs=0.006
    )
    assert sum(p.numel() for p in model.fusion.parameters()) / 1e6 == pytest.approx(1.18, abs=0.006)


def test_published_names_and_shapes_are_checked():
    model = MamFusion(replace(SMALL, fusion="none"))
    with pytest.raises(DataError, match="missing"):
        convert_mamfusion({}, model)
    with pytest.raises(DataError, match="hidden_size"):
        mamfusion_config({"visual_input_size": 3, "q_feat_size": 4})


def test_released_fusion_weights_are_read():
    model = MamFusion(replace(SMALL, fusion_over="batch"))
    attention = torch.nn.MultiheadAttention(8, 2)
    published = {
        f"{name}_fusion.multihead_attn.{key}": value
        for name in ("v2t", "t2v")
        for key, value in attention.state_dict().items()
    }
    published["v2t_fusion.vid_embed_proj.weight"] = torch.zeros(1)
    theirs = {k: v for k, v in model.state_dict().items() if not k.startswith("fusion.")}
    converted = convert_mamfusion(published | theirs, model)
    model.load_state_dict(converted)
    x, y = torch.randn(5, 8), torch.randn(3, 8)
    expected = x * attention(x, y, y)[0]
    ours = model.fusion.directions["text-to-video"](x[None], y[None], torch.ones(1, 3).bool())
    assert torch.allclose(ours[0], expected, atol=1e-5)


def test_repeating_the_videos_as_the_released_code_does_changes_nothing():
    model = randomised(replace(SMALL, fusion_over="batch"))
    queries, videos = torch.randn(4, 8).double(), torch.randn(3, 8).double()
    once, fourfold = (model.fusion(queries, v) for v in (videos, videos.repeat(4, 1)))
    assert torch.allclose(once, fourfold)


# --- the Gaussian window ------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.5, 1.0, 5.0])
def test_gaussian_damping_by_loops(width):
    lengths, steps = [5, 1, 4], 5
    damping = gaussian_damping(torch.tensor(lengths), steps, width)
    for row, length in enumerate(lengths):
        for i in range(length):
            weights = []
            for j in range(length):
                distance = (j / (length - 1) if length > 1 else 0.0) - i / length
                weights.append(np.exp(-(distance**2) / (2 * (width / 9) ** 2)))
            expected = np.array(weights) / max(weights)
            np.testing.assert_allclose(damping[row, i, :length], expected, rtol=1e-4, atol=1e-7)
    assert torch.isfinite(damping).all()


# --- padding --------------------------------------------------------------------------------------

CONFIGS = [
    SMALL,
    replace(SMALL, bidirectional=True),
    replace(SMALL, given_space=True, smoothing=3),
    gmmformer_like(SMALL),
    replace(ms_sl_like(replace(SMALL, given_space=True)), windows=(1, 2, 4)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_padding_changes_nothing(config):
    model, batch = randomised(config), make_batch()
    alone = model.encode_video(batch.segments[2:], batch.frames[2:, :3], batch.frame_mask[2:, :3])
    dirty = torch.where(batch.frame_mask[..., None], batch.frames, 7.0)
    together = model.encode_video(batch.segments, dirty, batch.frame_mask)
    assert torch.allclose(alone.vector[0], together.vector[2])
    assert torch.allclose(alone.segments[0], together.segments[2])
    one = model.encode_text(batch.text[3:, :1], batch.text_mask[3:, :1], batch.sentence[3:])
    dirty = torch.where(batch.text_mask[..., None], batch.text, 7.0)
    every = model.encode_text(dirty, batch.text_mask, batch.sentence)
    assert torch.allclose(one.vector[0], every.vector[3])
    if config.reranks:
        rows = torch.tensor([3]), torch.tensor([2])
        padded = model.fused_scores(every, together, *rows)
        plain = model.fused_scores(one, alone, torch.tensor([0]), torch.tensor([0]))
        assert torch.allclose(padded, plain)


def test_too_long_input_is_refused():
    model, batch = randomised(SMALL), make_batch(frames=(17,), query_video=(0,), words=(1,))
    with pytest.raises(DataError, match="at most 16 frames"):
        model(batch)


# --- fusion over time -----------------------------------------------------------------------------


def test_fusion_by_loops():
    """Each pair alone, each word and each segment alone, one attention head at a time."""
    config = replace(SMALL, candidates=2)
    model, batch = randomised(config), make_batch()
    queries = model.encode_text(batch.text, batch.text_mask, None)
    videos = model.encode_video(batch.segments, batch.frames, batch.frame_mask)
    rows, columns = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1])
    fused = model.fused_scores(queries, videos, rows, columns)

    def attend(layer, one, several):
        pieces = []
        for head in range(config.heads):
            part = slice(head * 4, head * 4 + 4)
            q = layer.query(one)[part]
            k, v = layer.key(several)[:, part], layer.value(several)[:, part]
            weights = torch.stack([(q * key).sum() / 2 for key in k]).softmax(0)
            pieces.append(sum(w * value for w, value in zip(weights, v, strict=True)))
        return layer.output(torch.cat(pieces))

    for score, row, column in zip(fused, rows, columns, strict=True):
        words = queries.words[row][queries.mask[row]]
        segments = videos.hidden[column]
        mixed = {}
        for name, (ours, other) in {
            "text-to-video": (words, segments),
            "video-to-text": (segments, words),
        }.items():
            direction = model.fusion.directions[name]
            mixed[name] = torch.stack(
                [
                    x + direction.scale.scale * x * attend(direction.attention, x, other)
                    for x in ours
                ]
            )
        weights = (mixed["text-to-video"] @ model.query_pooling.weight[0]).softmax(0)
        pooled = (weights[:, None] * mixed["text-to-video"]).sum(0)
        best = max(F.cosine_similarity(c, pooled, dim=0) for c in mixed["video-to-text"])
        frame = F.cosine_similarity(queries.vector[row], videos.vector[column], dim=0)
        assert torch.isclose(score, 0.7 * best + 0.3 * frame)


def test_a_fused_score_depends_on_its_own_pair_only():
    model, batch = randomised(SMALL), make_batch()
    queries = model.encode_text(batch.text, batch.text_mask, None)
    videos = model.encode_video(batch.segments, batch.frames, batch.frame_mask)
    pair = torch.tensor([0]), torch.tensor([0])
    before = model.fused_scores(queries, videos, *pair)
    other_pairs = replace(videos, hidden=videos.hidden.clone())
    other_pairs.hidden[1:] = 9.0  # other videos of the batch
    assert torch.equal(before, model.fused_scores(queries, other_pairs, *pair))
    words = queries.words.clone()
    words[0, 0] += 1.0  # one word of this query
    changed = EncodedQueries(words, queries.mask, queries.vector)
    assert not torch.allclose(before, model.fused_scores(changed, videos, *pair))


@pytest.mark.parametrize("fusion", ["text-to-video", "video-to-text"])
def test_one_direction_leaves_the_other_side_alone(fusion):
    model, batch = randomised(replace(SMALL, fusion=fusion)), make_batch()
    queries = model.encode_text(batch.text, batch.text_mask, None)
    hidden = model.encode_video(batch.segments, batch.frames, batch.frame_mask).hidden
    words, segments = model.fusion(queries.words[:3], queries.mask[:3], hidden)
    assert torch.equal(words, queries.words[:3]) == (fusion == "video-to-text")
    assert torch.equal(segments, hidden) == (fusion == "text-to-video")


def test_stretches_of_many_lengths():
    config = replace(ms_sl_like(SMALL), windows=(1, 2, 4))
    model, batch = randomised(config), make_batch()
    single = randomised(replace(config, windows=(1,)))
    ours = model.encode_video(batch.segments, batch.frames, batch.frame_mask).segments
    parts = single.encode_video(batch.segments, batch.frames, batch.frame_mask).segments
    every = [parts[:, i : i + w].mean(1) for w in (1, 2, 4) for i in range(6 - w + 1)]
    assert torch.allclose(ours, torch.stack(every, 1))


def test_candidates_are_the_right_video_and_the_best_others():
    model, batch = randomised(SMALL), make_batch()
    output = model(batch)
    first = model.combined(output.clip_scores, output.frame_scores)
    for row, right in enumerate(batch.query_video.tolist()):
        others = sorted((v for v in range(3) if v != right), key=lambda v: -first[row, v])
        assert output.candidates[row].tolist() == [right, *others]
    assert output.candidate_mask.all()
    queries = model.encode_text(batch.text, batch.text_mask, None)
    videos = model.encode_video(batch.segments, batch.frames, batch.frame_mask)
    again = model.fused_scores(queries, videos, torch.tensor([2]), output.candidates[2, 1:2])
    assert torch.isclose(again, output.fused_scores[2, 1])


@pytest.mark.parametrize(
    ("mamba", "bidirectional", "fusion"),
    list(product(["none", "clip", "frame", "both"], [False, True], ["none", "both"])),
)
def test_ablations_have_the_parts_they_name(mamba, bidirectional, fusion):
    config = replace(SMALL, mamba=mamba, bidirectional=bidirectional, fusion=fusion)
    model = MamFusion(config)
    per_branch = 4 if bidirectional else 2
    assert sum(isinstance(m, Mamba) for m in model.clip_branch.modules()) == (
        per_branch if mamba in ("clip", "both") else 0
    )
    assert sum(isinstance(m, Mamba) for m in model.frame_branch.modules()) == (
        per_branch if mamba in ("frame", "both") else 0
    )
    output = model(replace_dtype(make_batch()))
    assert (output.fused_scores is None) == (fusion == "none")


def replace_dtype(batch):
    """The batch in float32."""
    tensors = {k: v for k, v in vars(batch).items() if torch.is_tensor(v) and v.is_floating_point()}
    tensors = {name: value.float() for name, value in tensors.items()}
    return replace(batch, **tensors)


def test_released_fusion_reaches_the_query_diverse_term_only():
    config = replace(SMALL, fusion_over="batch")
    model, batch = randomised(config), make_batch()
    without = MamFusion(replace(config, fusion="none")).double().eval()
    without.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("fusion.")}
    )
    ours, plain = model(batch), without(batch)
    assert ours.fused_scores is None
    assert torch.equal(ours.clip_scores, plain.clip_scores)
    assert torch.equal(ours.frame_scores, plain.frame_scores)
    assert not torch.allclose(ours.queries, plain.queries)


def test_an_untrained_model_of_a_given_space_is_the_rule_without_training():
    config = replace(SMALL, given_space=True, smoothing=3)
    model, batch = MamFusion(config).double().eval(), make_batch()
    output = model(batch)
    q = F.normalize(batch.sentence, dim=-1)
    for row in range(len(q)):
        for video in range(3):
            x = batch.segments[video]
            averaged = [x[max(0, i - 1) : i + 2].mean(0) for i in range(len(x))]
            best = max(F.cosine_similarity(q[row], a, dim=0) for a in averaged)
            assert torch.isclose(output.clip_scores[row, video], best)
            frames = batch.frames[video][batch.frame_mask[video]]
            mean = F.normalize(frames, dim=-1).mean(0)
            expected = F.cosine_similarity(q[row], mean, dim=0)
            assert torch.isclose(output.frame_scores[row, video], expected)
    first = model.combined(output.clip_scores, output.frame_scores)
    assert torch.allclose(output.fused_scores, first.gather(1, output.candidates))


def test_senseless_configurations_are_refused():
    for change in ({"mamba": "all"}, {"fusion": "x"}, {"smoothing": 2}, {"fused_weight": 2.0}):
        with pytest.raises(ConfigurationError, match=next(iter(change))):
            replace(SMALL, **change)
    with pytest.raises(ConfigurationError, match="single segments"):
        replace(SMALL, windows=(1, 2))
    model = randomised(replace(SMALL, fusion="none"))
    batch = make_batch()
    queries = model.encode_text(batch.text, batch.text_mask, None)
    videos = model.encode_video(batch.segments, batch.frames, batch.frame_mask)
    with pytest.raises(ConfigurationError, match="no fusion over time"):
        model.fused_scores(queries, videos, torch.tensor([0]), torch.tensor([0]))


# --- losses ---------------------------------------------------------------------------------------


def test_contrast_by_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    query_video = torch.tensor([0, 0, 1, 3, 3])  # video 2 has no query
    to_videos, to_queries = contrast_terms(logits, query_video)
    for q in range(5):
        expected = -torch.log(logits[q].exp()[query_video[q]] / logits[q].exp().sum())
        assert torch.isclose(to_videos[q], expected)
    for v in range(4):
        own = [q for q in range(5) if query_video[q] == v]
        if not own:
            assert to_queries[v] == 0
            continue
        expected = -torch.log(logits[own, v].exp().sum() / logits[:, v].exp().sum())
        assert torch.isclose(to_queries[v], expected)


def test_hard_triplets_by_loops():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    query_video = torch.tensor([0, 0, 1, 3, 3])
    to_videos, to_queries = triplet_terms(scores, query_video, margin=0.2, pool=1)
    for q in range(5):
        hardest = max(scores[q, v] for v in range(4) if v != query_video[q])
        assert torch.isclose(to_videos[q], (0.2 + hardest - scores[q, query_video[q]]).clamp(min=0))
    for v in (0, 1, 3):
        own = query_video == v
        expected = (0.2 + scores[~own, v].max() - scores[own, v].mean()).clamp(min=0)
        assert torch.isclose(to_queries[v], expected)
    assert to_queries[2] == 0


def test_random_negatives_come_from_the_pool():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    allowed = torch.tensor([[False, True, True, True, True]])
    torch.manual_seed(0)
    drawn = {None: set(), 2: set(), 1: set()}
    for _ in range(200):
        for pool, seen in drawn.items():
            seen.add(float(random_negative(scores, allowed, pool)))
    assert drawn == {None: {4.0, 3.0, 2.0, 1.0}, 2: {4.0, 3.0}, 1: {4.0}}
    assert random_negative(scores, torch.zeros_like(allowed), None) == -torch.inf


def test_query_diverse_by_loops():
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    query_video = torch.tensor([0, 0, 1, 0, 2])
    terms = query_diverse_terms(queries, query_video, margin=0.2, alpha=3.0)
    for q in range(5):
        others = [n for n in range(5) if n != q and query_video[n] == query_video[q]]
        total = sum(
            torch.exp(3 * (F.cosine_similarity(queries[q], queries[o], dim=0) + 0.2))
            for o in others
        )
        assert torch.isclose(terms[q], torch.log1p(torch.as_tensor(total, dtype=torch.float64)))


def test_objective_turns_to_hard_negatives_at_its_epoch():
    model, batch = randomised(SMALL), make_batch()
    objective = RetrievalObjective(hard_from=3, hard_pool=1)
    output = model(batch)
    early, late = (objective(output, replace(batch, epoch=e)) for e in (2, 3))
    hard = triplet_terms(output.clip_scores, batch.query_video, 0.2, 1)
    expected = hard[0].mean() + hard[1].mean()
    assert torch.isclose(late["clip_triplet"], expected)
    assert early["clip_triplet"] <= late["clip_triplet"] + 1e-9
    for terms in (early, late):
        parts = [value for name, value in terms.items() if name != "total"]
        assert torch.isclose(terms["total"], sum(parts))
        assert set(terms) == {
            "clip_triplet",
            "frame_triplet",
            "clip_contrast",
            "frame_contrast",
            "diverse",
            "fused_contrast",
            "total",
        }


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS,
        replace(SMALL, fusion_over="batch"),
        replace(SMALL, fusion_over="batch", given_space=True),
    ],
)
def test_every_parameter_learns(config):
    model, batch = randomised(config).train(), make_batch()
    objective = RetrievalObjective(temperature=0.1 if config.given_space else None, hard_from=0)
    objective(model(batch), batch)["total"].backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A shift of all attention scores is none, and positions beyond the input are unseen.
    assert all(name.endswith("key.bias") for name in silent), silent
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
