"""The planted world: deterministic, readable, and neither trivial nor hopeless."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvg_lib.data import planted as world
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.data.planted import PlantedConfig, PlantedWords, captions, planted
from tvg_lib.encoders.sentence import SentenceEncoder
from tvg_lib.errors import ConfigurationError, DataError

SMALL = PlantedConfig(train=6, val=4, test=5, clips=(16, 32))


def same(a: GroundingDataset, b: GroundingDataset) -> bool:
    return a.fingerprint == b.fingerprint


def hit_rate(dataset: GroundingDataset) -> float:
    """Share of queries whose most similar clip lies inside a moment."""
    hits = []
    for query in dataset.queries:
        similarity = dataset.video_features[query.video_id] @ dataset.sentence_features[query.id][0]
        grid = dataset.videos[query.video_id].grid
        at = grid.to_seconds(int(similarity.argmax()))
        hits.append(((query.moments[:, 0] <= at) & (at <= query.moments[:, 1])).any())
    return float(np.mean(hits))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), low=st.integers(8, 30), more=st.integers(0, 30))
def test_every_world_is_a_valid_data_set(seed: int, low: int, more: int) -> None:
    config = replace(SMALL, seed=seed, clips=(low, low + more), dim=16)
    for split in world.SPLITS:
        dataset = planted(split, config)
        dataset.check()
        assert len(dataset.videos) == getattr(config, split)
        for video in dataset.videos.values():
            clips = dataset.video_features[video.id]
            assert low <= len(clips) <= low + more
            assert video.duration == 2 * len(clips)
            np.testing.assert_allclose(np.linalg.norm(clips, axis=1), 1, atol=1e-5)
        for query in dataset.queries:
            words = query.text.split()
            assert dataset.text_features[query.id].shape == (len(words), 16)
            assert dataset.sentence_features[query.id].shape == (1, 16)
            start, end = query.moments.T
            assert (start[1:] > end[:-1]).all()  # apart and in order
            assert (end - start).sum() <= 0.6 * dataset.videos[query.video_id].duration


def test_the_same_seed_gives_the_same_world() -> None:
    assert same(planted("val", SMALL), planted("val", SMALL))
    assert not same(planted("val", SMALL), planted("val", replace(SMALL, seed=1)))


def test_a_video_does_not_depend_on_how_many_there_are() -> None:
    few, many = planted("train", SMALL), planted("train", replace(SMALL, train=9))
    assert same(many.subset(few.videos, few.name), few)


def test_splits_share_the_words_and_no_video() -> None:
    splits = {split: planted(split, SMALL) for split in world.SPLITS}
    assert len({key for data in splits.values() for key in data.videos}) == 6 + 4 + 5
    first = [data.video_features[next(iter(data.videos))][0] for data in splits.values()]
    assert not np.allclose(first[0], first[1])
    by_word: dict[str, list[np.ndarray]] = {}
    for data in splits.values():
        for query in data.queries:
            for word, row in zip(query.text.split(), data.text_features[query.id], strict=True):
                by_word.setdefault(word, []).append(row)
    for rows in by_word.values():
        assert min(row @ rows[0] for row in rows) > 0.9
    assert set(by_word) <= {
        *world.COLOURS,
        *world.SHAPES,
        *world.ACTIONS,
        *world.FUNCTION_WORDS,
    }


def test_moments_are_where_the_script_says() -> None:
    """The script and the moments are read off the events in two different ways."""
    dataset, scripts = planted("test", SMALL), captions("test", SMALL)
    checked = 0
    for query in dataset.queries:
        if not query.text.startswith("the "):
            continue  # names all three words, as captions do
        script = scripts[query.video_id]
        named = np.array([query.text in caption.split(", ") for caption in script])
        middle = dataset.videos[query.video_id].grid.to_seconds(np.arange(len(script)))
        start, end = query.moments[:, :1], query.moments[:, 1:]
        assert not (named & ~((start <= middle) & (middle <= end)).any(0)).any()
        surely = ((start <= middle - 1) & (middle + 1 <= end)).any(0)  # the whole clip
        assert not (surely & ~named).any()
        checked += 1
    assert checked > 5


def test_highlights_lie_on_the_moments() -> None:
    dataset = planted("test", SMALL)
    for query in dataset.queries:
        grid = dataset.videos[query.video_id].grid
        for clip in query.saliency.clips:
            first, last = grid.clip_span(int(clip))
            assert ((query.moments[:, 0] < last) & (first < query.moments[:, 1])).any()
        assert query.saliency.scores.shape == (len(query.saliency.clips), 3)
        assert 0 <= query.saliency.scores.min() <= query.saliency.scores.max() <= 4


def test_some_queries_have_several_moments_and_some_words_differ() -> None:
    dataset = planted("train")
    counts = np.bincount([len(query.moments) for query in dataset.queries])
    assert counts[1] > 0.5 * len(dataset)
    assert counts[2:].sum() > 0.15 * len(dataset)
    lengths = {len(query.text.split()) for query in dataset.queries}
    assert lengths == {2, 3, 4}


def test_difficulty() -> None:
    """Like QVH-captions by default, certain without noise and gap, chance when all is noise."""
    assert 0.72 < hit_rate(planted("train")) < 0.88
    clear = PlantedConfig(noise=0, gap=0, hidden=0, background=0.1, events=(1, 2))
    assert hit_rate(planted("test", clear)) > 0.97
    dataset = planted("train", PlantedConfig(noise=50))
    chance = np.mean(
        [np.diff(q.moments).sum() / dataset.videos[q.video_id].duration for q in dataset.queries]
    )
    assert abs(hit_rate(dataset) - chance) < 0.06


def test_questions_of_ones_own() -> None:
    encoder = PlantedWords(SMALL)
    assert isinstance(encoder, SentenceEncoder)
    dataset = planted("val", SMALL)
    texts = [query.text for query in dataset.queries]
    vectors = encoder.encode(texts)
    assert vectors.shape == (len(texts), encoder.dim)
    for query, vector in zip(dataset.queries, vectors, strict=True):
        assert vector @ dataset.sentence_features[query.id][0] > 0.95
    assert [len(rows) for rows in encoder.encode_tokens(texts)] == [len(t.split()) for t in texts]
    with pytest.raises(DataError, match="'elephant'"):
        encoder.encode(["the elephant jumps"])
    with pytest.raises(DataError, match="no word with a meaning"):
        encoder.encode(["the something"])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(DataError, match="'dev'"):
        planted("dev")  # type: ignore[arg-type]
    for wrong in (
        {"train": 0},
        {"dim": 0},
        {"clips": (4, 8)},
        {"clips": (20, 10)},
        {"events": (0, 3)},
        {"noise": -1.0},
        {"drift": 1.0},
        {"hidden": 1.5},
        {"likeness": 0.9, "again": 0.2},
    ):
        with pytest.raises(ConfigurationError):
            PlantedConfig(**wrong)
