"""Retrieval: cuts of videos and queries, MS-SL's layout, batches, scores, reports, experiments."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from grounding_data import MemoryStore, make_dataset

from tvg_lib import paths
from tvg_lib.data.dataset import Video
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.metrics import retrieval_report
from tvg_lib.metrics.retrieval import CorpusAnswer, corpus_moment_report, moment_ratio_report
from tvg_lib.models.mamfusion import MamFusion, MamFusionConfig
from tvg_lib.retrieval.baselines import best_clip_scores, fitted_width, mean_pooled_scores
from tvg_lib.retrieval.data import RetrievalPlan, RetrievalView, averaged, query_batches
from tvg_lib.retrieval.evaluation import (
    encode_library,
    encode_queries,
    moment_ratios,
    report_of_scores,
    score_matrix,
)
from tvg_lib.retrieval.experiments import (
    RetrievalRecipe,
    evaluate_retriever,
    recorded_model,
    train_retriever,
)
from tvg_lib.retrieval.layout import FrameStore, read_captions, read_collection
from tvg_lib.training import TrainingConfig

DIM = 6
MODEL = MamFusionConfig(
    video_dim=DIM, text_dim=DIM, channels=8, heads=2, max_words=9, max_frames=32, d_state=4
)
VIEW = RetrievalView(segments=5, max_frames=32, max_words=9)


@pytest.fixture
def library():
    """Six videos of 5 to 25 clips, two queries of the first, none of the last."""
    lengths = {f"v{n}": 5 + 4 * n for n in range(6)}
    asked = ["v0", "v0", "v1", "v2", "v3", "v4"]
    data = make_dataset(
        lengths, [(v, [[0.0, 2.0 + n]]) for n, v in enumerate(asked)], video_dim=DIM, text_dim=DIM
    )
    rng = np.random.default_rng(3)
    sentences = {q.id: rng.standard_normal((1, DIM)).astype(np.float32) for q in data.queries}
    return replace(data, sentence_features=MemoryStore(sentences))


# --- cuts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 31, 64, 75])
def test_segments_by_loops(steps):
    clips = np.random.default_rng(steps).standard_normal((steps, 3)).astype(np.float32)
    bounds = [round(i / 8 * steps) for i in range(9)]
    for drop_last in (False, True):
        ours = averaged(clips, 8, drop_last)
        for i in range(8):
            first, last = min(bounds[i], steps - 1), bounds[i + 1]
            last = min(last, steps - 1) if drop_last else last
            expected = clips[first:last].mean(0) if last > first else clips[first]
            np.testing.assert_allclose(ours[i], expected, atol=1e-5)


def test_published_bounds_lose_the_last_clip():
    clips = np.zeros((64, 1), np.float32)
    clips[-1] = 1
    assert averaged(clips, 32)[-1] == 0.5
    assert averaged(clips, 32, drop_last=True)[-1] == 0


def test_the_view_cuts_and_scales(library):
    view = RetrievalView(segments=4, max_frames=10, max_words=2)
    segments, frames = view.video(library.clips("v4"))  # 21 clips
    assert segments.shape == (4, DIM)
    assert frames.shape == (10, DIM)
    np.testing.assert_allclose(np.linalg.norm(frames, axis=1), 1, atol=1e-4)
    assert view.video(library.clips("v0"))[1].shape == (5, DIM)
    batch = next(iter(query_batches(library, view)))
    assert batch.text.shape == (6, 2, DIM)
    words_only = replace(library, sentence_features=None)
    batch = next(iter(query_batches(words_only, view)))
    np.testing.assert_allclose(batch.sentence[1], library.text_features["q1"].mean(0), rtol=1e-5)


def test_senseless_views_and_plans_are_refused(library):
    with pytest.raises(ConfigurationError, match="segments"):
        RetrievalView(segments=0)
    with pytest.raises(ConfigurationError, match="two videos"):
        RetrievalPlan(library, VIEW, videos_per_batch=1)
    with pytest.raises(ConfigurationError, match="one query"):
        RetrievalPlan(library, VIEW, queries_per_video=0)
    with pytest.raises(DataError, match="fewer than two"):
        RetrievalPlan(library.subset(["v0", "v5"], "one"), VIEW)


# --- batches ------------------------------------------------------------------------------------


def test_an_epoch_has_every_asked_video_once(library):
    plan = RetrievalPlan(library, VIEW, videos_per_batch=2, queries_per_video=1, seed=1)
    drawn = set()
    for epoch in range(20):
        specs = plan.epoch(epoch)
        assert specs == plan.epoch(epoch)
        ids = [sample.video_id for spec in specs for sample in spec.samples]
        assert sorted(ids) == ["v0", "v1", "v2", "v3", "v4"]
        assert [len(spec.samples) for spec in specs] == [2, 3]  # nobody is left alone
        drawn |= {
            q for spec in specs for s in spec.samples if s.video_id == "v0" for q in s.queries
        }
    assert drawn == {0, 1}
    assert plan.epoch(0) != plan.epoch(1)


def test_a_batch_holds_what_its_spec_says(library):
    plan = RetrievalPlan(library, VIEW, videos_per_batch=5)
    (spec,) = plan.epoch(7)
    batch = plan.load(spec)
    assert batch.epoch == 7
    assert batch.video_ids == tuple(sample.video_id for sample in spec.samples)
    for row, query_id in zip(batch.query_video, batch.query_ids, strict=True):
        assert library.query(query_id).video_id == batch.video_ids[row]
    lengths = [len(library.clips(video_id)) for video_id in batch.video_ids]
    assert batch.frame_mask.sum(1).tolist() == lengths
    assert batch.to("cpu").query_video.equal(batch.query_video)


# --- MS-SL's layout -----------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """A small collection in MS-SL's layout."""
    rng = np.random.default_rng(0)
    text = tmp_path / "tvr" / "TextData"
    visual = tmp_path / "tvr" / "FeatureData" / "i3d_resnet"
    text.mkdir(parents=True)
    visual.mkdir(parents=True)
    frames = {"a": ["a_0", "a_1", "a_2"], "b": ["b_0"], "c": ["c_0", "c_1"]}
    ids = ["b_0", *frames["a"], *frames["c"]]
    features = rng.standard_normal((len(ids), 4)).astype("<f4")
    (visual / "shape.txt").write_text(f"{len(ids)} 4")
    (visual / "id.txt").write_text(" ".join(ids))
    (visual / "video2frames.txt").write_text(str(frames))
    (visual / "feature.bin").write_bytes(features.tobytes())
    lines = ["a#enc#0 a man eats", "a#enc#1 he leaves  the room", "b#enc#0 rain"]
    (text / "tvrtrain.caption.txt").write_text("\n".join(lines) + "\n")
    words = {line.split()[0]: rng.standard_normal((3, 5)).astype(np.float32) for line in lines}
    with h5py.File(text / "roberta_tvr_query_feat.hdf5", "w") as file:
        for key, value in words.items():
            file[key] = value
    return tmp_path, features, words


def test_ms_sl_layout(published):
    root, features, words = published
    data = read_collection(root, "tvr", "i3d_resnet", "train")
    assert data.name == "tvr/train"
    assert [q.id for q in data.queries] == list(words)
    assert [q.text for q in data.queries] == ["a man eats", "he leaves  the room", "rain"]
    assert {k: v.duration for k, v in data.videos.items()} == {"a": 3.0, "b": 1.0}
    np.testing.assert_array_equal(data.clips("a"), features[1:4])
    np.testing.assert_array_equal(data.clips("b"), features[:1])
    np.testing.assert_array_equal(data.text_features["b#enc#0"], words["b#enc#0"])
    data.check()
    batch = RetrievalPlan(data, VIEW).load(RetrievalPlan(data, VIEW).epoch(0)[0])
    assert batch.segments.shape == (2, 5, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("shape.txt", "6", "rows width"),
        ("shape.txt", "6 5", "bytes"),
        ("id.txt", "b_0 a_0", "expected 6 ids"),
        ("id.txt", "b_0 a_0 a_1 a_2 c_0 c_0", "twice"),
        ("video2frames.txt", "{'a': ['zzz']}", "no feature of frame 'zzz'"),
        ("video2frames.txt", "__import__('os').getcwd()", "not a Python literal"),
        ("video2frames.txt", "{'../a': ['a_0']}", "plain name"),
        ("video2frames.txt", "{'a': []}", "no list of frames"),
    ],
)
def test_broken_layouts_are_named(published, name, content, message):
    folder = published[0] / "tvr" / "FeatureData" / "i3d_resnet"
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        FrameStore(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a#enc#0", "line 2"),
        ("a a man", "line 2"),
        ("a#enc#9 x", "twice"),
        ("..#0 x", "plain name"),
    ],
)
def test_broken_captions_are_named(tmp_path, line, message):
    path = tmp_path / "captions.txt"
    path.write_text(f"a#enc#9 first\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_captions(path)


def test_a_query_without_words_is_named(published):
    captions = published[0] / "tvr" / "TextData" / "tvrtrain.caption.txt"
    captions.write_text(captions.read_text() + "c#enc#0 unknown\n")
    with pytest.raises(DataError, match="c#enc#0"):
        read_collection(published[0], "tvr", "i3d_resnet", "train")


# --- scores -------------------------------------------------------------------------------------


def test_rules_by_loops(library):
    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    mean, best, wide = (
        mean_pooled_scores(library),
        best_clip_scores(library),
        best_clip_scores(library, 3),
    )
    for q, query in enumerate(library.queries):
        sentence = library.sentence_features[query.id][0]
        for v, video_id in enumerate(library.videos):
            clips = library.clips(video_id)
            units = clips / np.linalg.norm(clips, axis=1, keepdims=True)
            assert mean[q, v] == pytest.approx(cosine(sentence, units.mean(0)), abs=1e-3)
            assert best[q, v] == pytest.approx(max(cosine(sentence, c) for c in clips), abs=1e-3)
            smooth = [clips[max(0, i - 1) : i + 2].mean(0) for i in range(len(clips))]
            assert wide[q, v] == pytest.approx(max(cosine(sentence, c) for c in smooth), abs=1e-3)
    assert fitted_width(library, (1, 3)) in (1, 3)
    with pytest.raises(DataError, match="odd"):
        best_clip_scores(library, 2)
    with pytest.raises(DataError, match="no sentence vectors"):
        mean_pooled_scores(replace(library, sentence_features=None))


@pytest.mark.parametrize("given_space", [False, True])
def test_score_matrix_is_that_of_pairs(library, given_space):
    torch.manual_seed(0)
    model = MamFusion(replace(MODEL, given_space=given_space)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    videos = encode_library(model, library, VIEW, batch_size=4)
    scores = score_matrix(model, library, VIEW)
    reranked = score_matrix(model, library, VIEW, rerank=3)
    row = 0
    for queries in encode_queries(model, library, VIEW, batch_size=4):
        first = model.scores(queries, videos)
        for q in range(len(first)):
            np.testing.assert_allclose(scores[row], first[q].detach(), atol=1e-5)
            best = first[q].topk(3).indices
            fused = model.fused_scores(queries, videos, torch.full((3,), q), best)
            both = model.reranked(first[q, best], fused)
            expected = best[both.argsort(descending=True)].tolist()
            order = np.argsort(-reranked[row], kind="stable")
            assert order[:3].tolist() == expected
            rest = np.argsort(-scores[row], kind="stable")[3:]
            np.testing.assert_array_equal(order[3:], rest)
            row += 1
    assert row == len(library)


def test_a_library_does_not_depend_on_its_batches(library):
    torch.manual_seed(0)
    model = MamFusion(MODEL).eval()
    whole, parts = encode_library(model, library, VIEW), encode_library(model, library, VIEW, 2)
    assert len(parts.hidden) == len(library.videos)
    for name, expected in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), expected)


def test_moment_ratios_count_overlaps_once():
    data = make_dataset(
        {"a": 10}, [("a", [[0, 4], [2, 6], [8, 9]]), ("a", [[0, 10]]), ("a", [[5, 6], [1, 2]])]
    )
    np.testing.assert_allclose(moment_ratios(data), [0.7, 1.0, 0.2])


def test_report_by_ratio_and_recording(library):
    videos = {
        key: Video(key, video.duration, video.grid, recording="r" if key < "v2" else None)
        for key, video in library.videos.items()
    }
    library = replace(library, videos=videos)
    scores = np.zeros((6, 6))
    scores[[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]] = [1, 1, 1, -1, 1, 1]
    report = report_of_scores(scores, library)
    assert report.values["R@1"] == pytest.approx(100 * 5 / 6)
    assert report.groups == ("r", "r", "r", "v2", "v3", "v4")
    ratios = [2 / 5, 3 / 5, 4 / 9, 5 / 13, 6 / 17, 7 / 21]
    np.testing.assert_allclose(moment_ratios(library), ratios)
    # The failing query (rank 6) is found among the first 10 and 100.
    assert report.values["SumR, M/V (0.2, 0.4]"] == pytest.approx((400 * 3 + 200) / 4)
    assert report.values["SumR, M/V (0.4, 1]"] == pytest.approx(400)
    assert np.isnan(report.values["SumR, M/V (0, 0.2]"])


def test_ratio_intervals_are_half_open():
    report = retrieval_report([1, 1, 200])
    by_ratio = moment_ratio_report(report, [0.2, 0.2001, 0.4])
    assert by_ratio.values["SumR, M/V (0, 0.2]"] == 400
    assert by_ratio.values["SumR, M/V (0.2, 0.4]"] == 200
    for ratios in ([0.0, 0.1, 0.1], [0.1, 1.1, 0.1], [0.1, 0.1]):
        with pytest.raises(DataError, match="ratio"):
            moment_ratio_report(report, ratios)
    with pytest.raises(DataError, match="ascend"):
        moment_ratio_report(report, [0.1] * 3, edges=(0.5, 0.2))


def test_corpus_moments_by_hand():
    ranked = [
        [CorpusAnswer("b", 0, 10), CorpusAnswer("a", 0, 10)],  # video right at rank 2, IoU 1
        [CorpusAnswer("a", 0, 10), CorpusAnswer("a", 20, 26)],  # IoU 0.5 at 1, 0.6 at 2
        [CorpusAnswer("b", 0, 10)],
    ]
    moments = [np.array([[0, 10]]), np.array([[0, 20], [20, 30]]), np.array([[0, 10]])]
    report = corpus_moment_report(
        ranked, ["a", "a", "a"], moments, ks=(1, 2), thresholds=(0.5, 0.7)
    )
    assert report.brief(1) == {
        "corpus R1@0.5": 33.3,
        "corpus R1@0.7": 0.0,
        "corpus R2@0.5": 66.7,
        "corpus R2@0.7": 33.3,
    }
    with pytest.raises(DataError, match="no moment"):
        corpus_moment_report(ranked, ["a"] * 3, [np.zeros((0, 2))] * 3)
    with pytest.raises(DataError, match="one list"):
        corpus_moment_report(ranked, ["a"], moments)


# --- experiments --------------------------------------------------------------------------------


def test_an_experiment_is_trained_once_and_recorded(library, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "runs", lambda scale=None: tmp_path / (scale or ""))
    recipe = RetrievalRecipe(
        training=TrainingConfig(epochs=2, warmup_epochs=0, select_by="SumR", progress=False),
        view=VIEW,
        videos_per_batch=3,
        objective={"hard_from": 1, "temperature": 0.1},
        rerank=2,
    ).with_seed(3)
    held = library.subset(["v3", "v4"], "held")
    kept = library.subset(["v0", "v1", "v2"], "kept")
    architecture = replace(MODEL, given_space=True)
    trained = train_retriever(architecture, recipe, kept, held, scale="smoke")
    again = train_retriever(architecture, recipe, kept, held, scale="smoke")
    assert not trained.training.loaded
    assert again.training.loaded
    other = train_retriever(replace(architecture, mamba="none"), recipe, kept, held, scale="smoke")
    assert not other.training.loaded
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    test = evaluate_retriever(again, library, variant="no fusion", rerank=0)
    model, view = recorded_model(test.record)
    assert view == VIEW
    np.testing.assert_array_equal(score_matrix(model, library, view), test.scores)
    with pytest.raises(DataError, match="names no run"):
        recorded_model(replace(test.record, artifacts=()))
    expected = report_of_scores(score_matrix(trained.model, library, VIEW, 0), library)
    assert test.report.values["SumR"] == pytest.approx(expected.values["SumR"])
    (path,) = (tmp_path / "smoke" / "records").glob("*.json")
    record = json.loads(path.read_text())
    assert record["method"] == "mamfusion"
    assert record["variant"] == "no fusion"
    assert record["seed"] == 3
    assert record["parameters"]["rerank"] == 0
    assert record["metrics"]["R@1"]["value"] == pytest.approx(test.report.values["R@1"])
