"""CLIP against transformers' own forward pass, on random weights made on the spot."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tvg_lib.encoders.clip import CLIP
from tvg_lib.encoders.protocols import VideoEncoder
from tvg_lib.encoders.sentence import SentenceEncoder
from tvg_lib.errors import ConfigurationError, DataError

pytest.importorskip("transformers")

WORDS = ["<pad>", "<start>", "a", "dog", "runs", "cat", "sleeps", ".", "<end>"]
END = len(WORDS) - 1


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="."))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )


def model():
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config=shape
        | {
            "num_attention_heads": 2,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 12,
            "bos_token_id": 1,
            "eos_token_id": END,
            "pad_token_id": 0,
        },
        vision_config=shape | {"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    torch.manual_seed(0)
    return CLIPModel(config)


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return CLIP(model(), tokenizer(), frames=3)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (13, 3, 32, 32, 3), dtype=np.uint8)


TEXTS = ["a dog runs", "cat", "a cat sleeps a dog runs"]


def test_both_halves_are_what_the_library_calls_encoders(clip: CLIP, windows: np.ndarray) -> None:
    assert isinstance(clip.video, VideoEncoder)
    assert isinstance(clip.text, SentenceEncoder)
    assert (clip.video.size, clip.video.resize) == ((32, 32), "crop")
    for rows in (clip.video.encode(windows), clip.text.encode(TEXTS)):
        assert rows.dtype == np.float32
        assert rows.shape[1] == clip.video.dim == clip.text.dim == 24
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert clip.video.encode(windows[:0]).shape == clip.text.encode([]).shape == (0, 24)


def test_pictures_and_sentences_agree_with_transformers(clip: CLIP, windows: np.ndarray) -> None:
    """The image processor and the whole model give the cosines; windows are means over frames."""
    from transformers import CLIPImageProcessor

    prepare = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = prepare(list(windows.reshape(-1, 32, 32, 3)), return_tensors="pt")["pixel_values"]
    words = clip.text.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = clip.video.model(
            pixel_values=pixels,
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
        )
    mean = output.image_embeds.reshape(13, 3, -1).mean(1)
    mean = mean / mean.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(clip.video.encode(windows), mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(clip.text.encode(TEXTS), output.text_embeds.numpy(), atol=1e-5)


def test_words_have_no_marks_and_no_padding(clip: CLIP) -> None:
    rows = clip.text.encode_tokens(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        assert clip.text.tokens(text) == text.split()
        assert row.shape == (len(text.split()), 24)
        np.testing.assert_allclose(row, clip.text.encode_tokens([text])[0], atol=1e-5)
    inputs = clip.text.tokenizer([TEXTS[0]], return_tensors="pt")
    with torch.inference_mode():
        states = clip.text.model.text_model(**inputs).last_hidden_state
        projected = clip.text.model.text_projection(states)[0]
    np.testing.assert_allclose(rows[0], projected[1:-1].numpy(), atol=1e-5)
    end = projected[-1] / projected[-1].norm()
    np.testing.assert_allclose(clip.text.encode(TEXTS[:1])[0], end.numpy(), atol=1e-5)


def test_long_sentences_are_cut_and_empty_ones_refused(clip: CLIP) -> None:
    assert len(clip.text.tokens("dog " * 50)) == 10
    assert len(clip.text.encode_tokens(["dog " * 50])[0]) == 10
    with pytest.raises(DataError, match="no word piece"):
        clip.text.encode(["a dog", " "])
    with pytest.raises(DataError, match="uint8 windows"):
        clip.video.encode(np.zeros((1, 3, 8, 8, 3), np.uint8))


def test_names_follow_the_weights(clip: CLIP) -> None:
    same, changed = CLIP(model(), tokenizer(), frames=3), model()
    with torch.no_grad():
        changed.visual_projection.weight[0, 0] += 1e-3
    other = CLIP(changed, tokenizer(), frames=3)
    assert (same.video.name, same.text.name) == (clip.video.name, clip.text.name)
    assert other.video.name != clip.video.name
    assert CLIP(model(), tokenizer(), frames=4).video.name != clip.video.name


def test_weights_from_a_folder(clip: CLIP, windows: np.ndarray, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    clip.video.model.save_pretrained(tmp_path)
    clip.text.tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    loaded = CLIP.from_pretrained(str(tmp_path), frames=3, stride=1.0)
    assert loaded.video.stride == 1.0
    assert loaded.video.mean.tolist() == [0.5, 0.5, 0.5]
    np.testing.assert_allclose(loaded.text.encode(TEXTS), clip.text.encode(TEXTS), atol=1e-5)
    again = CLIP(clip.video.model, clip.text.tokenizer, frames=3, mean=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(loaded.video.encode(windows), again.video.encode(windows), atol=1e-5)


def test_missing_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"hf download|folder of a copy"):
        CLIP.from_pretrained(str(tmp_path / "nowhere"))
