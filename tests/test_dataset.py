"""The one in-memory data set: what it refuses, what it gives, and when features are read."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvg_lib.data.batching import BatchPlan
from tvg_lib.data.dataset import GroundingDataset, Query, Saliency, Video
from tvg_lib.data.features import ArrayStore
from tvg_lib.errors import DataError, GridMismatchError
from tvg_lib.moments import QVHIGHLIGHTS_2S


def query(key: str, video: str, *moments: tuple[float, float]) -> Query:
    return Query(key, video, f"what happens in {key}", np.array(moments, float).reshape(-1, 2))


def dataset(
    durations: dict[str, float], queries: list[Query], clips: dict[str, int] | None = None
) -> GroundingDataset:
    """Videos of 2-second clips with as many clips as they last, or as many as `clips` says."""
    lengths = {key: round(s / 2) for key, s in durations.items()} | (clips or {})
    return GroundingDataset(
        "toy",
        {key: Video(key, s, QVHIGHLIGHTS_2S) for key, s in durations.items()},
        tuple(queries),
        ArrayStore.of({key: np.full((n, 3), n) for key, n in lengths.items()}, "clips"),
        ArrayStore.of({q.id: np.ones((4, 5)) for q in queries} or {"none": np.ones((1, 5))}),
    )


@pytest.fixture
def toy() -> GroundingDataset:
    return dataset(
        {"v": 20.0, "w": 30.0, "x": 10.0},
        [query("a", "v", (0, 4)), query("b", "w", (2, 8), (20, 30)), query("c", "v", (18, 20))],
    )


def test_queries_by_id_and_by_video(toy):
    assert len(toy) == 3
    assert toy.query("b").video_id == "w"
    assert toy.positions_of("v") == (0, 2)
    assert [q.id for q in toy.queries_of("v")] == ["a", "c"]
    assert toy.queries_of("x") == []
    with pytest.raises(DataError, match="toy has no query 'z'"):
        toy.query("z")


def test_features_are_given_when_they_fit_their_grid(toy):
    assert toy.clips("w").shape == (15, 3)
    toy.check()
    with pytest.raises(DataError, match="toy has no video 'z'"):
        toy.clips("z")


def test_features_off_their_grid_name_both_numbers_wherever_they_are_read():
    wrong = dataset({"v": 150.0}, [query("a", "v", (0, 4))], clips={"v": 150})
    plan = BatchPlan(wrong)
    for read in (lambda: wrong.clips("v"), wrong.check, lambda: plan.load(plan.epoch(0)[0])):
        with pytest.raises(GridMismatchError, match=r"toy: video 'v': 150 clips .*300.00 .*150.00"):
            read()


def test_two_queries_of_one_id_are_refused():
    with pytest.raises(DataError, match="toy: query id 'a' occurs twice"):
        dataset({"v": 20}, [query("a", "v", (0, 4)), query("a", "v", (4, 6))])


def test_a_query_about_no_video_is_refused():
    with pytest.raises(DataError, match="query 'a' asks about video 'w'"):
        dataset({"v": 20}, [query("a", "w", (0, 4))])


def test_a_video_under_another_name_is_refused(toy):
    with pytest.raises(DataError, match="under 'v' is called 'w'"):
        GroundingDataset("toy", {"v": toy.videos["w"]}, (), toy.video_features, toy.text_features)


@pytest.mark.parametrize(
    "moment", [(-1, 4), (18, 22), (25, 30), (5, 2), (np.nan, 2), (0, np.nan), (0, np.inf)]
)
def test_a_moment_outside_its_video_is_named(moment):
    with pytest.raises(DataError, match=r"query 'b' has the moment .* its video 'v' of 20"):
        dataset({"v": 20}, [query("a", "v", (0, 4)), query("b", "v", (2, 3), moment)])


def test_rounding_of_published_times_is_no_fault():
    dataset({"v": 19.9999}, [query("a", "v", (0, 20.0))])


def test_queries_without_annotations_are_allowed():
    assert dataset({"v": 20}, [query("a", "v")]).query("a").moments.shape == (0, 2)
    assert len(dataset({"v": 20}, [])) == 0


@pytest.mark.parametrize("shape", [(2,), (2, 3), (1, 2, 2), (0,)])
def test_moments_of_another_shape_are_refused(shape):
    with pytest.raises(DataError, match=r"query 'a': moments are a \(M, 2\) array"):
        Query("a", "v", "text", np.zeros(shape))


@pytest.mark.parametrize(("clips", "scores"), [((3,), (2, 3)), ((3,), (3,)), ((3, 1), (3, 3))])
def test_saliency_of_another_shape_is_refused(clips, scores):
    with pytest.raises(DataError, match=r"\(K,\) clips and \(K, A\) scores"):
        Saliency(np.zeros(clips, int), np.zeros(scores, int))


@pytest.mark.parametrize("duration", [0, -1, float("nan"), float("inf")])
def test_impossible_durations_are_refused(duration):
    with pytest.raises(DataError, match="video 'v': a duration"):
        Video("v", duration, QVHIGHLIGHTS_2S)


def test_records_can_be_compared_and_collected(toy):
    """Arrays make fields incomparable: records are equal when they are the same one."""
    assert toy.queries[0] != toy.queries[1]
    assert len({*toy.queries, toy.queries[0], toy}) == 4
    assert toy == toy


def test_a_subset_keeps_the_order(toy):
    part = toy.subset(["x", "v"], "part")
    assert (part.name, list(part.videos)) == ("part", ["v", "x"])
    assert [q.id for q in part.queries] == ["a", "c"]
    assert part.positions_of("v") == (0, 1)
    with pytest.raises(DataError, match="toy has no video 'z'"):
        toy.subset(["v", "z"], "part")


@given(count=st.integers(2, 30), fraction=st.floats(0.01, 0.9), seed=st.integers(0, 99))
def test_a_split_is_by_video_and_repeatable(count, fraction, seed):
    whole = dataset(
        {f"v{i}": 10 for i in range(count)}, [query(f"q{i}", f"v{i}", (0, 4)) for i in range(count)]
    )
    if max(1, round(fraction * count)) == count:
        with pytest.raises(DataError, match="leaves none"):
            whole.split(fraction, seed)
        return
    kept, held = whole.split(fraction, seed)
    assert not set(kept.videos) & set(held.videos)
    assert set(kept.videos) | set(held.videos) == set(whole.videos)
    assert len(held.videos) == max(1, round(fraction * count))
    assert (kept.name, held.name) == ("toy-train", "toy-held")
    for part in (kept, held):
        assert {q.video_id for q in part.queries} == set(part.videos)
    assert list(whole.split(fraction, seed)[1].videos) == list(held.videos)


def cut_recordings(sizes):
    """One query about each of so many videos per recording: without recordings named, and with."""
    names = {f"v{r}-{i}": f"r{r}" for r, size in enumerate(sizes) for i in range(size)}
    plain = dataset(dict.fromkeys(names, 10), [query(f"q-{key}", key, (0, 4)) for key in names])
    named = {key: replace(v, recording=names[key]) for key, v in plain.videos.items()}
    return plain, replace(plain, videos=named)


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_a_split_keeps_recordings_whole(sizes, seed):
    plain, whole = cut_recordings(sizes)
    assert whole.fingerprint == plain.fingerprint  # a model does not see it
    try:
        kept, held = whole.split(0.3, seed)
    except DataError:  # a recording so large that nothing remains
        assert max(sizes) > 0.5 * sum(sizes)
        return
    sides = [{video.recording for video in part.videos.values()} for part in (kept, held)]
    assert not sides[0] & sides[1]
    assert {whole.recording_of(q) for q in held.queries} == sides[1]
    assert len(held.videos) < round(0.3 * sum(sizes)) + max(sizes)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=12),
    count=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_folds_hold_every_recording_out_once(sizes, count, seed):
    _, whole = cut_recordings(sizes)
    folds = whole.folds(count, seed)
    assert sorted(key for _, held in folds for key in held.videos) == sorted(whole.videos)
    for kept, held in folds:
        assert set(kept.videos) == set(whole.videos) - set(held.videos)
        sides = [{video.recording for video in part.videos.values()} for part in (kept, held)]
        assert not sides[0] & sides[1]
    lengths = [len(held.videos) for _, held in folds]
    assert max(lengths) - min(lengths) <= max(sizes)
    assert len({held.name for _, held in folds}) == count


@pytest.mark.parametrize("count", [1, 3])
def test_an_impossible_number_of_folds_is_refused(count):
    two = dataset({"v": 20, "w": 20}, [query("a", "v", (0, 4))])
    with pytest.raises(DataError, match="2 recordings: expected 2 to as many folds"):
        two.folds(count, 0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_impossible_fractions_are_refused(toy, fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        toy.split(fraction, 0)


def test_one_video_cannot_be_split():
    with pytest.raises(DataError, match="leaves none to train on"):
        dataset({"v": 20}, [query("a", "v", (0, 4))]).split(0.15, 0)


class Spy:
    """A store that notes what is read from it, and may hold what no store should."""

    dim = 3

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.read: list[str] = []

    def __getitem__(self, key: str) -> np.ndarray:
        self.read.append(key)
        return self.arrays[key]

    def __contains__(self, key: object) -> bool:
        return key in self.arrays

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def with_spies(toy: GroundingDataset, **broken: np.ndarray) -> GroundingDataset:
    video = {key: np.ones((round(v.duration / 2), 3)) for key, v in toy.videos.items()}
    words = {q.id: np.ones((4, 3)) for q in toy.queries}
    pick = {key: array for key, array in broken.items() if key in video}
    return GroundingDataset(
        toy.name,
        toy.videos,
        toy.queries,
        Spy(video | pick),
        Spy(words | {key: array for key, array in broken.items() if key in words}),
        Spy(words),
    )


def test_only_what_is_asked_for_is_read(toy):
    spied = with_spies(toy)
    spied.subset(["v", "w"], "part").split(0.5, 0)
    repr(spied)
    assert spied.video_features.read == spied.text_features.read == []
    spied.clips("w")
    assert spied.video_features.read == ["w"]
    spied.check()
    assert sorted(spied.video_features.read) == ["v", "w", "w", "x"]
    assert spied.text_features.read == spied.sentence_features.read == ["a", "b", "c"]


@pytest.mark.parametrize(
    "broken",
    [
        {"w": np.ones((15, 4))},
        {"w": np.full((15, 3), np.nan)},
        {"b": np.ones((4, 2))},
        {"b": np.full((4, 3), np.inf)},
        {"b": np.ones(3)},
    ],
)
def test_checking_finds_what_a_careless_store_lets_through(toy, broken):
    with pytest.raises(DataError, match=rf"toy: the features of '{next(iter(broken))}'"):
        with_spies(toy, **broken).check()


def test_it_shows_itself(toy):
    assert repr(toy) == "GroundingDataset(toy: 3 videos, 0.0 h, 3 queries)"
    html = toy.subset(["v"], "<part>")._repr_html_()
    assert "&lt;part&gt;" in html
    assert "<td>2</td>" in html
