"""Search: an index that can be built, stopped, changed, opened and asked."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from grounding_data import MemoryStore, make_dataset, small_snag

from tvg_lib import search
from tvg_lib.baselines import ZeroShotWindow
from tvg_lib.data.dataset import Video
from tvg_lib.decoding import DecodingConfig, ground
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.models.mamfusion import MamFusion, MamFusionConfig
from tvg_lib.moments import TimeGrid
from tvg_lib.retrieval.data import RetrievalView
from tvg_lib.retrieval.evaluation import score_matrix
from tvg_lib.search import Retriever, VideoIndex, principal_directions, sketch_scores
from tvg_lib.shapestories.film import write_mp4
from tvg_lib.shapestories.generator import SHORT, write_script

DIM = 6
VIEW = RetrievalView(segments=5, max_frames=32, max_words=9)
CONFIG = MamFusionConfig(
    video_dim=DIM,
    text_dim=DIM,
    channels=8,
    heads=2,
    max_words=9,
    max_frames=32,
    d_state=4,
    given_space=True,
)


class Words:
    """An encoder that knows a sentence by its number: "question 3"."""

    name = "numbered"
    dim = DIM

    def encode(self, sentences):
        vectors = np.stack([self.encode_tokens([s])[0].mean(0) for s in sentences])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def encode_tokens(self, sentences):
        numbers = [int(s.split()[1]) for s in sentences]
        return [
            np.random.default_rng(n).standard_normal((2 + n % 3, DIM)).astype(np.float32)
            for n in numbers
        ]


def made_retriever(seed=0, **changes):
    torch.manual_seed(seed)
    model = MamFusion(replace(CONFIG, **changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Retriever(model, VIEW, Words())


@pytest.fixture(scope="module")
def retriever():
    return made_retriever()


@pytest.fixture
def library():
    """Twenty videos of different lengths with a query each, in the words of `Words`."""
    data = make_dataset(
        {f"v{n}": 5 + n for n in range(20)},
        [(f"v{n}", [[0.0, 2.0]]) for n in range(20)],
        video_dim=DIM,
    )
    texts = [query.text for query in data.queries]
    ids = [query.id for query in data.queries]
    words, sentences = Words().encode_tokens(texts), Words().encode(texts)
    return replace(
        data,
        text_features=MemoryStore(dict(zip(ids, words, strict=True))),
        sentence_features=MemoryStore({k: v[None] for k, v in zip(ids, sentences, strict=True)}),
    )


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(search, "SHARD", 6)


@pytest.fixture
def index(tmp_path, retriever, library, small_shards):
    return VideoIndex.create(tmp_path / "index", retriever).add_dataset(library)


def ranking(index, text, **options):
    return [a.video.id for a in index.search(text, top=len(index), **options)]


def test_ranking_is_that_of_the_score_matrix(index, retriever, library):
    for rerank in (0, 4):
        scores = score_matrix(retriever.model, library, VIEW, rerank)
        for row, query in enumerate(library.queries):
            results = index.search(query.text, top=20, shortlist=20, rerank=rerank)
            expected = np.argsort(-scores[row], kind="stable")
            assert [a.video.id for a in results] == [f"v{n}" for n in expected]
            ours = [a.video_score for a in results]
            np.testing.assert_allclose(ours, scores[row][expected], atol=2e-3)  # half precision


def test_a_reopened_index_answers_alike(index, retriever):
    again = VideoIndex.open(index.folder, retriever)
    assert repr(again) == repr(index) == "VideoIndex(20 videos, 0.1 h)"
    assert repr(again.search("question 3")) == repr(index.search("question 3"))
    assert "<b>“question 3”</b>" in again.search("question 3")._repr_html_()


def test_building_goes_on_where_it_stopped(tmp_path, retriever, library, small_shards):
    class Broken(MemoryStore):
        def __getitem__(self, key):
            if key == "v14":
                raise KeyboardInterrupt
            return super().__getitem__(key)

    whole = library.video_features.sequences
    broken = replace(library, video_features=Broken(whole))
    index = VideoIndex.create(tmp_path / "index", retriever)
    with pytest.raises(KeyboardInterrupt):
        index.add_dataset(broken)
    index = VideoIndex.create(tmp_path / "index", retriever)
    assert [video.id for video in index.videos] == [f"v{n}" for n in range(12)]  # two whole shards
    counted = MemoryStore(whole)
    index.add_dataset(replace(library, video_features=counted))
    assert set(counted.reads) == {f"v{n}" for n in range(12, 20)}
    assert len(index) == 20
    other = VideoIndex.create(tmp_path / "other", retriever).add_dataset(library)
    assert ranking(index, "question 5") == ranking(other, "question 5")


def test_a_kill_between_arrays_and_manifest_leaves_the_old_index(index, retriever, monkeypatch):
    video, clips = Video("new", 5.0, index.videos[0].grid), np.ones((5, DIM), np.float32)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search.paths, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        index.add([(video, clips)])
    monkeypatch.undo()
    assert "new" not in VideoIndex.open(index.folder, retriever)


def test_two_that_write_do_not_lose_each_others_videos(index, retriever):
    grid, clips = index.videos[0].grid, np.ones((5, DIM), np.float32)
    other = VideoIndex.open(index.folder, retriever)
    index.add([(Video("mine", 5.0, grid), clips)])
    other.add([(Video("theirs", 5.0, grid), clips)])
    assert {"mine", "theirs"} <= {
        video.id for video in VideoIndex.open(index.folder, retriever).videos
    }


def test_removed_videos_are_gone_and_their_files_too(index, retriever, library):
    before = ranking(index, "question 7")
    gone = {before[0], "v3", *(f"v{n}" for n in range(6))}  # the whole first shard among them
    index.remove(gone)
    expected = [video_id for video_id in before if video_id not in gone]
    assert ranking(index, "question 7", rerank=0) == [
        v for v in ranking_before(retriever, library, 7) if v not in gone
    ]
    assert set(ranking(index, "question 7")) == set(expected)
    assert ranking(VideoIndex.open(index.folder, retriever), "question 7") == ranking(
        index, "question 7"
    )
    manifest = json.loads((index.folder / "index.json").read_text())
    files = {path.name for path in index.folder.glob("[!.]*")} - {"index.json"}
    basis = manifest["basis"]
    assert files == {f"{basis}.npy"} | {
        f"{name}.{end}" for name in manifest["shards"] for end in ("safetensors", f"{basis}.npy")
    }
    np.testing.assert_allclose(index.clips("v19"), library.clips("v19"), atol=2e-2)
    with pytest.raises(DataError, match="no video 'v3'"):
        index.remove(["v19", "v3"])
    assert "v19" in index
    index.add_dataset(library)
    assert len(index) == 20


def test_an_emptied_index_forgets_the_directions_of_what_it_held(index, library):
    basis = json.loads((index.folder / "index.json").read_text())["basis"]
    index.remove(["v0"])
    assert json.loads((index.folder / "index.json").read_text())["fitted"] <= 19
    index.remove([video_id for video_id in library.videos if video_id in index])
    empty = json.loads((index.folder / "index.json").read_text())
    assert (empty["basis"], empty["fitted"], empty["shards"]) == (None, 0, [])
    assert not list(index.folder.glob("basis-*"))
    index.add_dataset(library)
    assert json.loads((index.folder / "index.json").read_text())["basis"] not in (None, basis)


def test_a_finder_may_answer_in_any_order_but_must_answer(index):
    rule = ZeroShotWindow().predict
    plain = index.search("question 7", top=5, finder=rule)
    turned = index.search("question 7", top=5, finder=lambda asked: rule(asked)[::-1])
    assert turned.answers == plain.answers
    with pytest.raises(DataError, match="no prediction for video"):
        index.search("question 7", top=5, finder=lambda asked: rule(asked)[1:])


def ranking_before(retriever, library, number):
    scores = score_matrix(retriever.model, library, VIEW)[number]
    return [f"v{n}" for n in np.argsort(-scores, kind="stable")]


def test_another_retriever_is_refused(index):
    for other, part in (
        (made_retriever(seed=1), "weights"),
        (made_retriever(mamba="none"), "architecture"),
        (replace(made_retriever(), view=replace(VIEW, segments=4)), "view"),
        (replace(made_retriever(), clips="another encoder"), "clips"),
    ):
        with pytest.raises(DataError, match=f"another retriever: {part}"):
            VideoIndex.open(index.folder, other)
    with pytest.raises(ConfigurationError, match="width"):
        Retriever(MamFusion(replace(CONFIG, text_dim=7)), VIEW, Words())


@pytest.mark.parametrize("kind", ["shard-*.safetensors", "shard-*.npy", "basis-*.npy"])
def test_a_damaged_file_is_named(index, retriever, kind):
    path = next(index.folder.glob(kind))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=path.name):
        VideoIndex.open(index.folder, retriever)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        VideoIndex.open(index.folder, retriever)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-5],
        lambda text: json.dumps(json.loads(text) | {"basis": None}),
        lambda text: json.dumps(json.loads(text) | {"fitted": None}),
        lambda text: json.dumps(json.loads(text) | {"shards": ["../other"]}),
        lambda text: text.replace("video-index/2", "video-index/1"),
    ],
)
def test_a_damaged_manifest_is_refused(index, retriever, change):
    manifest = index.folder / "index.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(DataError, match=r"index\.json"):
        VideoIndex.open(index.folder, retriever)
    with pytest.raises(DataError, match="manifest"):
        VideoIndex.open(index.folder / "nowhere", retriever)


def test_a_library_of_many_shards_holds_no_file_open(tmp_path, retriever, library, monkeypatch):
    monkeypatch.setattr(search, "SHARD", 1)
    held = Path("/proc/self/fd")
    if not held.exists():
        pytest.skip("counts open files where the system lists them")
    before = len(list(held.iterdir()))
    index = VideoIndex.create(tmp_path / "index", retriever).add_dataset(library)
    again = VideoIndex.open(index.folder, retriever)
    assert len(list(index.folder.glob("*.safetensors"))) == 20
    assert len(list(held.iterdir())) < before + 10
    assert ranking(again, "question 2") == ranking(index, "question 2")


def test_the_manifest_names_shards_not_videos(index, library):
    text = (index.folder / "index.json").read_text()
    assert len(json.loads(text)["shards"]) == 4
    assert not any(f'"{video_id}"' in text for video_id in library.videos)


def test_the_sketch_is_fitted_again_when_the_library_has_grown(
    tmp_path, library, small_shards, monkeypatch
):
    monkeypatch.setattr(search, "SKETCH", 2)
    retriever = made_retriever()
    grid, rng = TimeGrid(clip_size=1, stride=1, fps=1), np.random.default_rng(0)

    def films(name, plane, count):
        for number in range(count):
            clips = 0.05 * rng.standard_normal((8, DIM))
            clips[:, plane] += rng.standard_normal((8, 2))
            yield Video(f"{name}-{number}", 8.0, grid), clips.astype(np.float32)

    def kept(index, name):
        """Share of the length of its segments that the sketch of some videos keeps."""
        rows = [i for i, video in enumerate(index.videos) if video.id.startswith(name)]
        sketch = index._sketch[:, rows].norm(dim=-1)
        return float((sketch**2).mean())

    index = VideoIndex.create(tmp_path / "index", retriever)
    index.add(films("first", [0, 1], 6))
    basis = json.loads((index.folder / "index.json").read_text())["basis"]
    index.add(films("later", [2, 3], 12))
    assert json.loads((index.folder / "index.json").read_text())["basis"] == basis
    before = kept(index, "later")
    index.add(films("again", [2, 3], 6))  # four times as many as the first fit
    manifest = json.loads((index.folder / "index.json").read_text())
    assert (manifest["basis"] != basis, manifest["fitted"]) == (True, 24)
    assert kept(index, "later") > before + 0.1
    again = VideoIndex.open(index.folder, retriever)
    assert torch.equal(again._sketch, index._sketch)
    assert not list(index.folder.glob(f"*{basis}*"))


def test_what_a_killed_writer_left_is_swept_away(index, retriever):
    left = [index.folder / name for name in ("shard-1.safetensors", "basis-1.npy", ".part-1-x.npy")]
    for path in left:
        path.write_bytes(b"half")
    VideoIndex.open(index.folder, retriever)  # a reader leaves everything alone
    assert all(path.exists() for path in left)
    index.remove(["v0"])
    assert not any(path.exists() for path in left)


def test_a_reader_that_loses_its_shards_to_a_writer_reads_the_newer_index(
    index, retriever, monkeypatch
):
    read = search._read_manifest
    stale = [read(index.folder, retriever)]
    index.remove(["v0"])

    def racing(folder, retriever):
        return stale.pop() if stale else read(folder, retriever)

    monkeypatch.setattr(search, "_read_manifest", racing)
    late = VideoIndex.open(index.folder, retriever)
    assert "v0" not in late
    assert len(late) == 19


def test_an_index_is_created_once(tmp_path, retriever):
    folder = tmp_path / "index"
    first = VideoIndex.create(folder, retriever)
    grid = TimeGrid(clip_size=1, stride=1, fps=1)
    first.add([(Video("mine", 5.0, grid), np.ones((5, DIM), np.float32))])
    assert "mine" in VideoIndex.create(folder, retriever)
    with pytest.raises(DataError, match="another retriever"):
        VideoIndex.create(folder, made_retriever(seed=1))


def test_bad_videos_and_questions_are_refused(index, retriever, tmp_path):
    grid = TimeGrid(clip_size=1, stride=1, fps=1)
    with pytest.raises(DataError, match="width 6"):
        index.add([(Video("bad", 5.0, grid), np.ones((5, 4), np.float32))])
    with pytest.raises(DataError, match="bad"):
        index.add([(Video("bad", 50.0, grid), np.ones((5, DIM), np.float32))])
    with pytest.raises(DataError, match="words"):
        index.search("  ")
    with pytest.raises(DataError, match="empty"):
        VideoIndex.create(tmp_path / "empty", retriever).search("question 1")


def test_what_was_added_before_a_bad_video_stays(index, retriever):
    grid, clips = index.videos[0].grid, np.ones((5, DIM), np.float32)
    good = [(Video(f"good-{i}", 5.0, grid), clips) for i in range(search.SHARD)]
    before = len(index)
    with pytest.raises(DataError, match="width 6"):
        index.add([*good, (Video("bad", 5.0, grid), np.ones((5, 4), np.float32))])
    assert len(index) == before + search.SHARD
    assert index.clips("good-0").shape == (5, DIM)
    index.remove(["good-0"])
    assert "good-0" not in index
    assert "good-1" in VideoIndex.open(index.folder, retriever)


# --- moments ----------------------------------------------------------------------------------


def test_moments_are_those_of_the_rule(index, library):
    results = index.search("question 4", top=3)
    asked = replace(
        library.subset([a.video.id for a in results], "asked"),
        queries=tuple(
            replace(library.query("q4"), id=a.video.id, video_id=a.video.id) for a in results
        ),
    )
    sentences = MemoryStore({a.video.id: library.sentence_features["q4"] for a in results})
    expected = ZeroShotWindow().predict(replace(asked, sentence_features=sentences))
    for answer, prediction in zip(results, expected, strict=True):
        assert (answer.start, answer.end) == tuple(prediction.moments[0, :2])
        assert answer.score == answer.video_score


def test_several_moments_of_a_video_compete(index):
    rule = ZeroShotWindow(smoothing=1, fraction=0.9)
    results = index.search("question 4", top=12, finder=rule.predict, moments=3)
    scores = [answer.score for answer in results]
    assert scores == sorted(scores, reverse=True)
    by_video = {}
    for answer in results:
        by_video.setdefault(answer.video.id, []).append(answer)
    assert max(map(len, by_video.values())) > 1
    for answers in by_video.values():
        assert answers[0].score == pytest.approx(answers[0].video_score)
        for later in answers[1:]:
            share = later.moment_score / answers[0].moment_score
            assert later.score == pytest.approx(later.video_score * share)
    assert len(results.corpus_answers()) == 12


def test_a_worse_moment_never_rises_above_a_better_one(library):
    prediction = ZeroShotWindow(smoothing=1, fraction=0.9).predict(library)[19]
    assert len(prediction) > 2
    for score in (0.4, -0.4):  # of the video: a cosine may be below zero
        answers = list(search._answers(library.videos["v19"], score, prediction, 3))
        assert answers[0].score == score
        assert answers[0].score > answers[1].score > answers[2].score


def test_a_point_grounder_finds_the_moment(index):
    model = small_snag(video_dim=DIM, text_dim=DIM).float()
    finder = partial(ground, model, config=DecodingConfig(keep=2))
    results = index.search("question 4", top=4, finder=finder)
    assert len(results) == 4
    assert all(0 <= a.start < a.end <= a.video.duration for a in results)


def test_captions_are_shown_under_the_answers(index):
    captions = {f"v{n}": [f"clip {i} of v{n}" for i in range(5 + n)] for n in range(20)}
    results = index.search("question 4", top=1, captions=captions)
    (answer,) = results
    middle = answer.video.grid.to_index((answer.start + answer.end) / 2)
    assert f"clip {round(middle)} of {answer.video.id}" in results._repr_html_()


# --- the sketch -----------------------------------------------------------------------------------


def test_a_full_sketch_is_exact_and_a_short_one_keeps_the_most():
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0)
    basis = principal_directions(rows, 6)
    assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-5)
    segments, question = rows.view(20, 10, 6), torch.randn(6)
    sketch = (segments @ basis).transpose(0, 1).contiguous()
    expected = (segments @ question).amax(1)
    assert torch.allclose(sketch_scores(sketch, basis.T @ question), expected, atol=1e-4)
    short = principal_directions(rows, 2)
    kept = (rows @ short).square().sum()
    for _ in range(20):
        other, _ = torch.linalg.qr(torch.randn(6, 2))
        assert (rows @ other).square().sum() <= kept


def test_a_film_of_another_encoder_is_refused(index, tmp_path):
    class Encoder:
        name = "another"

    bound = VideoIndex.create(tmp_path / "bound", replace(made_retriever(), clips="this one"))
    with pytest.raises(ConfigurationError, match="this one"):
        bound.add_films(tmp_path, Encoder())
    with pytest.raises(DataError, match="found none"):
        index.add_films(tmp_path, Encoder())


class Brightness:
    """The mean colour of a window, as unit vectors of the library's width."""

    name, dim, frames, size = "brightness", DIM, 1, (8, 8)
    window, stride, resize = 1.0, 1.0, "stretch"
    seen = 0

    def encode(self, windows):
        self.seen += len(windows)
        means = np.zeros((len(windows), DIM), np.float32)
        means[:, :3] = windows.mean((1, 2, 3)) / 255 + 0.1
        return means / np.linalg.norm(means, axis=1, keepdims=True)


def test_a_folder_of_films_is_added_and_grows(tmp_path, monkeypatch):
    monkeypatch.setenv("TVG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "films"
    folder.mkdir()
    for number in (0, 1):
        write_mp4(write_script(SHORT, "val", number), folder / f"film-{number}.mp4", fps=2)
    (folder / "notes.txt").write_text("no film")
    films = VideoIndex.create(tmp_path / "index", replace(made_retriever(), clips="brightness"))
    films.add_films(folder, Brightness())
    lengths = [write_script(SHORT, "val", number).duration for number in (0, 1)]
    assert [video.id for video in films.videos] == ["film-0.mp4", "film-1.mp4"]
    assert [video.duration for video in films.videos] == pytest.approx(lengths, abs=0.6)
    answers = films.search("question 3", top=2)
    assert {answer.video.id for answer in answers} == {"film-0.mp4", "film-1.mp4"}
    assert all(0 <= a.start < a.end <= a.video.duration + 0.5 for a in answers)

    write_mp4(write_script(SHORT, "val", 2), folder / "film-2.mp4", fps=2)
    counting = Brightness()
    films.add_films(folder, counting)
    assert len(films) == 3
    assert counting.seen == len(films.clips("film-2.mp4"))  # only the new one was read
    again = VideoIndex.open(tmp_path / "index", replace(made_retriever(), clips="brightness"))
    assert [video.id for video in again.videos] == [video.id for video in films.videos]
