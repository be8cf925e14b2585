"""CLIP through transformers: real footage and English sentences in one space.

    pair = CLIP.from_pretrained("openai/clip-vit-base-patch32")     # weights from cache or hub
    pair.video.encode(windows) @ pair.text.encode(["a dog runs on a beach"]).T

A window is the mean of its frames' vectors, scaled to length 1 again. QVHighlights and most papers
after it use windows of 2 s side by side; its frames are cut to a square in the middle, as CLIP was
trained. Source: Radford et al. 2021; means and deviations are those of the released preprocessing.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tvg_lib.encoders.protocols import Resize, weights_name
from tvg_lib.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPFrames:
    """The image half; a `tvg_lib.encoders.protocols.VideoEncoder`."""

    BATCH = 32  # frames at a time
    resize: Resize = "crop"

    def __init__(
        self,
        model: "CLIPModel",
        frames: int,
        window: float,
        stride: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.model = model
        self.frames, self.window, self.stride = frames, window, stride
        side = model.config.vision_config.image_size
        self.size = (side, side)
        self.dim: int = model.config.projection_dim
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    @cached_property
    def name(self) -> str:
        """Names the weights."""
        seen = (self.frames, self.mean.tolist(), self.std.tolist())
        return weights_name("clip-frames", self.model, *seen)

    @torch.inference_mode()
    def encode(self, windows: np.ndarray) -> np.ndarray:
        """(N, D) float32 unit vectors of windows (N, F, H, W, 3) uint8.

        Raises:
            DataError: windows of another shape or kind.
        """
        expected = (self.frames, *self.size, 3)
        if windows.dtype != np.uint8 or windows.shape[1:] != expected:
            raise DataError(
                f"expected uint8 windows (N, {', '.join(map(str, expected))}), found "
                f"{windows.dtype} {windows.shape}"
            )
        frames = torch.from_numpy(np.ascontiguousarray(windows)).flatten(0, 1)
        rows = [self._images(frames[i : i + self.BATCH]) for i in range(0, len(frames), self.BATCH)]
        if not rows:
            return np.empty((0, self.dim), np.float32)
        mean = torch.cat(rows).unflatten(0, (-1, self.frames)).mean(1)
        return F.normalize(mean, dim=-1).numpy()

    def _images(self, frames: Tensor) -> Tensor:
        """(N, D) unit vectors of frames (N, H, W, 3) uint8."""
        pixels = (frames / 255 - self.mean) / self.std
        pixels = pixels.permute(0, 3, 1, 2).to(self.model.device, self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu()


class CLIPWords:
    """The text half; a `tvg_lib.encoders.sentence.SentenceEncoder`."""

    BATCH = 64  # sentences at a time

    def __init__(self, model: "CLIPModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.dim: int = model.config.projection_dim
        self.max_words: int = model.config.text_config.max_position_embeddings

    @cached_property
    def name(self) -> str:
        """Names the weights."""
        return weights_name("clip-words", self.model, sorted(self.tokenizer.get_vocab().items()))

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, D) float32 unit vectors.

        Raises:
            DataError: a sentence has no word piece.
        """
        rows = [sentence for sentence, _, _ in self._batches(sentences)]
        if not rows:
            return np.empty((0, self.dim), np.float32)
        return F.normalize(torch.cat(rows), dim=-1).numpy()

    def encode_tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """N arrays (K, D) float32: the word pieces in context, put into the common space.

        The marks of start and end are left out; the vector of the end is the sentence's.

        Raises:
            DataError: a sentence has no word piece.
        """
        return [
            states[row, 1 : length - 1].numpy()
            for _, states, lengths in self._batches(sentences)
            for row, length in enumerate(lengths)
        ]

    def tokens(self, sentence: str) -> list[str]:
        """The word pieces that the rows of `encode_tokens` stand for."""
        ids = self.tokenizer(sentence, truncation=True, max_length=self.max_words)["input_ids"]
        return self.tokenizer.convert_ids_to_tokens(ids)[1:-1]

    @torch.inference_mode()
    def _batches(self, sentences: Sequence[str]) -> list[tuple[Tensor, Tensor, list[int]]]:
        """Per batch: sentences (N, D), word pieces (N, K, D) and how many each has, marks too."""
        batches = []
        for start in range(0, len(sentences), self.BATCH):
            part = list(sentences[start : start + self.BATCH])
            inputs = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.max_words, return_tensors="pt"
            )
            lengths = inputs["attention_mask"].sum(1).tolist()
            empty = [text for text, length in zip(part, lengths, strict=True) if length < 3]
            if empty:
                raise DataError(f"the sentence {empty[0]!r} has no word piece the encoder knows")
            output = self.model.text_model(
                input_ids=inputs["input_ids"].to(self.model.device),
                attention_mask=inputs["attention_mask"].to(self.model.device),
            )
            project = self.model.text_projection
            sentence = project(output.pooler_output).float().cpu()
            batches.append((sentence, project(output.last_hidden_state).float().cpu(), lengths))
        return batches


class CLIP:
    """Both halves of a CLIP model, `video` and `text`.

    Args:
        model, tokenizer: of transformers.
        frames, window, stride: of the windows; window and stride in seconds.
        mean, std: of the model's preprocessing.
    """

    def __init__(
        self,
        model: "CLIPModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        frames: int = 2,
        window: float = 2.0,
        stride: float = 2.0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        model.eval()
        self.video = CLIPFrames(model, frames, window, stride, mean, std)
        self.text = CLIPWords(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str = "openai/clip-vit-base-patch32",
        *,
        frames: int = 2,
        window: float = 2.0,
        stride: float = 2.0,
        device: str = "cpu",
    ) -> Self:
        """Weights from a folder, the user's cache or the model hub.

        Args:
            name: of the model on the hub, or its folder.
            frames, window, stride: of the windows.
            device: where it runs.

        Raises:
            ConfigurationError: the weights are not here and the hub cannot be reached.
        """
        from transformers import AutoTokenizer, CLIPModel
        from transformers.utils import cached_file

        try:
            model = CLIPModel.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
            # Its two triples of numbers are all that is needed of the image processor.
            prepared = json.loads(Path(cached_file(name, "preprocessor_config.json")).read_text())
        except OSError as error:
            raise ConfigurationError(
                f"no weights of the CLIP model {name!r} on this machine, and none from the model "
                f"hub: {str(error).splitlines()[0]} Fetch them once with network access "
                f"(hf download {name}), or give the folder of a copy"
            ) from error
        return cls(
            model.to(device),
            tokenizer,
            frames=frames,
            window=window,
            stride=stride,
            mean=prepared["image_mean"],
            std=prepared["image_std"],
        )
