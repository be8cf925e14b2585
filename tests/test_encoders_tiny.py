"""The tiny dual encoder: its loss against loops, its training on a world of eight sentences."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tvg_lib.checkpoints import write_state
from tvg_lib.encoders.protocols import VideoEncoder
from tvg_lib.encoders.sentence import SentenceEncoder
from tvg_lib.encoders.tiny import (
    ContrastiveObjective,
    PairEmbeddings,
    PairPlan,
    TinyConfig,
    TinyDualEncoder,
    info_nce,
    pair_batch,
    pair_recall,
    read_recipe,
    split_words,
)
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.training import TrainingConfig, train

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
MOTIONS = ("rises", "falls", "grows", "shrinks")
WORDS = ("the", *COLOURS, "square", *MOTIONS)
CONFIG = TinyConfig(frames=4, size=32, channels=(8, 16, 32), width=16, text_layers=1, dim=16)


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[str], None]:
    """A square does something; what it does shows in no single frame."""
    windows = np.full((count, 4, 32, 32, 3), 20, np.uint8)
    sentences = []
    for window in windows:
        colour, motion = str(rng.choice(list(COLOURS))), str(rng.choice(MOTIONS))
        x, y = rng.uniform(10, 22, 2)
        for number, time in enumerate((-1.5, -0.5, 0.5, 1.5)):
            at = y + {"rises": -4, "falls": 4}.get(motion, 0) * time
            radius = 4 + {"grows": 1.5, "shrinks": -1.5}.get(motion, 0) * time
            top, left = round(at - radius), round(x - radius)
            side = round(2 * radius)
            frame = window[number]
            frame[max(top, 0) : top + side, max(left, 0) : left + side] = COLOURS[colour]
        sentences.append(f"the {colour} square {motion}")
    return windows, sentences, None


@pytest.fixture(scope="module")
def model() -> TinyDualEncoder:
    torch.manual_seed(0)
    return TinyDualEncoder(CONFIG, WORDS).eval()


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return draw(np.random.default_rng(1), 9)[0]


def test_both_halves_are_what_the_library_calls_encoders(
    model: TinyDualEncoder, windows: np.ndarray
) -> None:
    assert isinstance(model.video, VideoEncoder)
    assert isinstance(model.text, SentenceEncoder)
    seen, read = model.video.encode(windows), model.text.encode(["the red square", "blue"])
    for rows, count in ((seen, 9), (read, 2)):
        assert rows.shape == (count, CONFIG.dim)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert model.video.encode(windows[:0]).shape == (0, 16)
    assert model.text.encode([]).shape == (0, 16)


def test_the_default_is_small() -> None:
    model = TinyDualEncoder(TinyConfig(), [f"word{i}" for i in range(300)])
    assert sum(p.numel() for p in model.parameters()) < 3_000_000


def test_neither_batches_nor_padding_change_a_vector(
    model: TinyDualEncoder, windows: np.ndarray
) -> None:
    alone = np.concatenate([model.video.encode(window[None]) for window in windows])
    np.testing.assert_allclose(model.video.encode(windows), alone, atol=1e-5)
    texts = ["the red square rises", "blue", "the square"]
    np.testing.assert_allclose(
        model.text.encode(texts),
        np.concatenate([model.text.encode([text]) for text in texts]),
        atol=1e-5,
    )
    for text, rows in zip(texts, model.text.encode_tokens(texts), strict=True):
        assert len(rows) == len(model.text.tokens(text)) == len(text.split())
        np.testing.assert_allclose(rows, model.text.encode_tokens([text])[0], atol=1e-5)


def test_the_order_of_frames_and_words_matters(model: TinyDualEncoder, windows: np.ndarray) -> None:
    assert np.abs(model.video.encode(windows) - model.video.encode(windows[:, ::-1])).max() > 1e-3
    one, other = model.text.encode(["red blue", "blue red"])
    assert np.abs(one - other).max() > 1e-4


def test_outlines_are_read_at_every_pixel_of_two_frames(model: TinyDualEncoder) -> None:
    rng = np.random.default_rng(3)
    plain = draw(rng, 1)[0]
    plain += rng.integers(0, 20, plain.shape, np.uint8)
    for number in range(CONFIG.frames):
        finer = plain.copy()  # the same at half the size: neighbours change places
        finer[:, number] = (
            plain[:, number].reshape(1, 32, 16, 2, 3)[:, :, :, ::-1].reshape(1, 32, 32, 3)
        )
        same = np.array_equal(model.video.encode(finer), model.video.encode(plain))
        assert same == (number not in model.video.looks)


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("size", [16, 64])
def test_every_shape_of_window_has_a_vector_even_an_empty_one(frames: int, size: int) -> None:
    torch.manual_seed(0)
    video = TinyDualEncoder(replace(CONFIG, frames=frames, size=size), WORDS).video
    empty = torch.full((3, frames, size, size, 3), 20, dtype=torch.uint8)
    seen = empty.clone()
    seen[:, :, 4:10, 4:10] = torch.tensor(COLOURS["red"], dtype=torch.uint8)
    for windows in (seen, empty):
        vectors = video.train()(windows)
        vectors.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in video.parameters())
        lengths = np.linalg.norm(video.eval().encode(windows.numpy()), axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_what_an_encoder_cannot_read_is_refused(
    model: TinyDualEncoder, windows: np.ndarray
) -> None:
    with pytest.raises(DataError, match=r"uint8 windows \(N, 4, 32, 32, 3\)"):
        model.video.encode(windows[:, :2])
    with pytest.raises(DataError, match="uint8"):
        model.video.encode(windows.astype(np.float32))
    with pytest.raises(DataError, match=r"'raises'.*rises"):
        model.text.encode(["the red square raises"])
    for text in ("", "?!", "red " * (CONFIG.max_words + 1)):
        with pytest.raises(DataError, match="words, found"):
            model.text.encode([text])
    for words in (["Red"], ["red", "red"], ["two words"], []):
        with pytest.raises(ConfigurationError, match="vocabulary"):
            TinyDualEncoder(CONFIG, words)
    for wrong in ({"size": 60}, {"frames": 0}, {"window": 0}, {"heads": 5}):
        with pytest.raises(ConfigurationError):
            TinyConfig(**wrong)


def test_words_are_read_without_case_and_punctuation(model: TinyDualEncoder) -> None:
    assert split_words("The red square's 2nd jump, again!") == [
        "the", "red", "square's", "2nd", "jump", "again",
    ]  # fmt: skip
    one, other = model.text.encode(["The RED square.", "the red square"])
    # Rows of one product, which need not round alike.
    np.testing.assert_allclose(one, other, atol=1e-6)


# --- the loss -------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.float64, (4, 5), elements=st.floats(-8, 8)),
    hnp.arrays(bool, (4, 5)),
    st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
def test_info_nce_is_the_cross_entropy_of_shared_targets(
    logits: np.ndarray, matches: np.ndarray, own: list[int]
) -> None:
    matches[np.arange(4), own] = True
    loss = info_nce(torch.tensor(logits), torch.tensor(matches))
    for i in range(4):
        positives = [j for j in range(5) if matches[i, j]]
        total = sum(np.exp(logits[i, j]) for j in range(5))
        plain = -np.mean([np.log(np.exp(logits[i, j]) / total) for j in positives])
        assert float(loss[i]) == pytest.approx(plain, abs=1e-9)


def test_pairs_that_say_the_same_are_no_negatives() -> None:
    """Two windows of one sentence: perfect vectors cost log 2, not more, and nothing pulls."""
    objective = ContrastiveObjective(temperature=0.01)
    vectors = torch.eye(3)[[0, 0, 1]].requires_grad_()
    batch = pair_batch(np.zeros((3, 1, 1, 1, 3), np.uint8), ["A red", "a red!", "blue"])
    assert batch.matches.tolist() == [
        [True, True, False],
        [True, True, False],
        [False, False, True],
    ]
    terms = objective(PairEmbeddings(vectors, vectors), batch)
    assert terms["total"].item() == pytest.approx(2 / 3 * np.log(2), abs=1e-4)
    terms["total"].backward()
    assert float(vectors.grad.abs().max()) < 1e-4


def test_the_temperature_is_learnt_within_bounds() -> None:
    objective = ContrastiveObjective(temperature=0.07, lowest=0.05)
    with torch.no_grad():
        objective.log_scale.fill_(100.0)
    vectors = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    batch = pair_batch(np.zeros((4, 1, 1, 1, 3), np.uint8), ["a", "b", "c", "d"])
    found = objective(PairEmbeddings(vectors, vectors), batch)["video_to_text"]
    plain = info_nce(vectors @ vectors.T / 0.05, batch.matches).mean()
    torch.testing.assert_close(found, plain)
    with pytest.raises(ConfigurationError):
        ContrastiveObjective(temperature=0.001)


def test_batches_are_checked() -> None:
    one = np.zeros((1, 1, 1, 1, 3), np.uint8)
    with pytest.raises(DataError, match="one sentence a window"):
        pair_batch(np.repeat(one, 2, axis=0), ["a", "b", "c"])
    for sentences, matches in (
        ([], None),
        (["a"], np.array([[False]])),
        (["a"], np.ones((2, 2), bool)),
    ):
        with pytest.raises(DataError, match="one sentence a window"):
            pair_batch(one, sentences, matches)


def test_a_window_may_come_with_several_sentences() -> None:
    two = np.zeros((2, 1, 1, 1, 3), np.uint8)
    batch = pair_batch(two, ["red", "it jumps", "blue", "it jumps"])
    assert batch.matches.tolist() == [[True, True, False, True], [False, True, True, True]]
    vectors = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    terms = ContrastiveObjective()(PairEmbeddings(vectors[:2], vectors), batch)
    logits = vectors[:2] @ vectors.T / 0.07
    torch.testing.assert_close(terms["video_to_text"], info_nce(logits, batch.matches).mean())
    torch.testing.assert_close(terms["text_to_video"], info_nce(logits.T, batch.matches.T).mean())


# --- training -------------------------------------------------------------------------------------


def test_a_plan_draws_the_same_pairs_for_everyone() -> None:
    plan = PairPlan(draw, batch_size=6, batches=3, seed=4)
    first, second, _ = plan.epoch(0)
    whole, again, other = plan.load(first), plan.load(first), plan.load(second)
    assert torch.equal(whole.windows, again.windows)
    assert not torch.equal(whole.windows, other.windows)
    shares = [plan.load(first.share(rank, 2)) for rank in range(2)]
    for rank, share in enumerate(shares):
        assert share.sentences == whole.sentences[rank::2]
        assert torch.equal(share.windows, whole.windows[rank::2])
        assert torch.equal(share.matches, whole.matches[rank::2, rank::2])


def fit(folder: Path) -> TinyDualEncoder:
    set_seed(0)
    model = TinyDualEncoder(CONFIG, WORDS)
    training = TrainingConfig(
        epochs=2, warmup_epochs=0.2, learning_rate=3e-3, schedule="cosine", ema_decay=0.9,
        progress=False,
    )  # fmt: skip
    plan = PairPlan(draw, batch_size=32, batches=60)
    return train(model, ContrastiveObjective(), plan, training, folder).model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TinyDualEncoder:
    return fit(tmp_path_factory.mktemp("run"))


def test_training_tells_motions_apart(trained: TinyDualEncoder) -> None:
    """Chance is 12.5 %; colour alone reaches 25 %."""
    held_out, sentences, _ = draw(np.random.default_rng(99), 200)
    every = sorted(set(sentences))
    best = (trained.video.encode(held_out) @ trained.text.encode(every).T).argmax(1)
    right = np.mean([every[i] == sentence for i, sentence in zip(best, sentences, strict=True)])
    assert right > 0.7
    batch = pair_batch(held_out[:40], sentences[:40])
    assert pair_recall(trained, [batch])["text R1"] > 60


def test_training_again_gives_the_same_weights(trained: TinyDualEncoder, tmp_path: Path) -> None:
    again = fit(tmp_path)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-4)


# --- files ----------------------------------------------------------------------------------------


def test_weights_come_back_as_they_were(
    model: TinyDualEncoder, windows: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "tiny.safetensors"
    model.save(path, recipe={"seed": 0, "steps": 120})
    loaded = TinyDualEncoder.load(path)
    assert not loaded.training
    assert loaded.config == CONFIG
    assert loaded.text.vocabulary == WORDS
    assert (loaded.video.name, loaded.text.name) == (model.video.name, model.text.name)
    assert read_recipe(path) == {"seed": 0, "steps": 120}
    np.testing.assert_array_equal(loaded.video.encode(windows), model.video.encode(windows))
    np.testing.assert_array_equal(loaded.text.encode(["red"]), model.text.encode(["red"]))


def test_a_changed_weight_changes_the_name(model: TinyDualEncoder, tmp_path: Path) -> None:
    model.save(tmp_path / "tiny.safetensors")
    other = TinyDualEncoder.load(tmp_path / "tiny.safetensors")
    with torch.no_grad():
        other.video.cones.bias[0] += 1e-3
    assert other.video.name != model.video.name
    assert other.text.name == model.text.name


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_by_another(path: Path) -> None:
    write_state(path, {"weight": torch.zeros(2)}, {"format": "something else"})


def forget_a_word(path: Path) -> None:
    from tvg_lib.checkpoints import read_state

    tensors, state = read_state(path)
    write_state(path, tensors, state | {"vocabulary": state["vocabulary"][:-1]})


@pytest.mark.parametrize(
    "harm", [damage, cut, replace_by_another, forget_a_word, Path.unlink], ids=lambda f: f.__name__
)
def test_files_that_do_not_fit_are_named(model: TinyDualEncoder, tmp_path: Path, harm) -> None:
    path = tmp_path / "tiny.safetensors"
    model.save(path)
    harm(path)
    with pytest.raises(DataError, match=r"tiny\.safetensors"):
        TinyDualEncoder.load(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(model: TinyDualEncoder, windows: np.ndarray) -> None:
    texts: Sequence[str] = ["the red square rises", "blue"]
    expected = model.video.encode(windows), model.text.encode(texts)
    try:
        model.cuda()
        np.testing.assert_allclose(model.video.encode(windows), expected[0], atol=1e-3)
        np.testing.assert_allclose(model.text.encode(texts), expected[1], atol=1e-3)
    finally:
        model.cpu()
