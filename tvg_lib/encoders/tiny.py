"""A tiny dual encoder: windows of frames and sentences in one space, CLIP's recipe at toy size.

    frames (N, F, H, W, 3) ─▶ cones: which of K hues is it, if any? ─▶ K maps of F frames
                                 │        all frames, half the size ─▶ convolutions: motion ┐
                                 │        two frames, every pixel ───▶ convolutions: shape ─┤
                                 └▶ the mean of each row              strongest place ◀─────┘
                                              └──────────▶ (N, D) ◀────────┘
    words  (N, K) ─▶ embedding, positions ─▶ transformer ─▶ mean over words ─▶ (N, D)

Minutes of training on a laptop must suffice, so the architecture brings what they cannot teach. The
first layer is a retina: *cones*, each for one hue, compete for every pixel with one another and
with the background. They see its colour and how it differs from its row of the picture, so that a
red shape is red by day and at night. What one cone wins is looked at by the same convolutions as
what the others win. As in the eye, motion and shape go two ways: all frames of the window, coarse,
as channels (what stays and what changes, apart), and the outline in two of the frames, fine; the
ways join at every place, so a motion stays with the shape that moves. Whatever is learnt of either
is learnt for every colour at once, and stays joined to its colour. The hues are trained too, from
where the configuration starts them. A hue that wins next to nothing is taken to be absent.

Training is CLIP's symmetric InfoNCE (Radford et al. 2021, figure 3), with one change. A generated
world says the same thing twice within a batch, or in other words; such pairs are no negatives.
Every sentence that is true of a window is a positive of it, and the positives share the target
(Yang et al. 2022, "Unified Contrastive Learning", equation 2).

    model = TinyDualEncoder(TinyConfig(), vocabulary)
    result = train(model, ContrastiveObjective(), PairPlan(draw), TrainingConfig(...), run_dir)
    model.save(path, recipe={...})
    pair = TinyDualEncoder.load(path)
    pair.video.encode(windows) @ pair.text.encode(["the red circle jumps"]).T
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.checkpoints import read_state, write_state
from tvg_lib.distributed import reduce_sum
from tvg_lib.encoders.protocols import weights_name
from tvg_lib.errors import ConfigurationError, DataError

FORMAT = "tvg-companion/tiny-dual-encoder/4"
_SHARPNESS = 24.0  # of the choice between hues, before training
_SPECK = 1.5  # pixels, at half the size: what is smaller is not looked at
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


@dataclass(frozen=True)
class TinyConfig:
    """Architecture, and the windows it looks at.

    Attributes:
        frames: frames of a window, evenly spaced, each in the middle of its share of the window.
        size: height and width of a frame, a multiple of 16.
        window, stride: length of a window and distance between the starts of neighbours, seconds.
        cones: RGB, in [0, 1], of the hue that each cone stands for before training.
        channels: of the three convolutions that see motion; those that see shape have half the
            first, the first and the second of them.
        scene: width of what is known of the background.
        width, text_layers, heads: of the transformer that reads sentences.
        dim: of the common space.
        max_words: longest sentence.
    """

    frames: int = 8
    size: int = 64
    window: float = 2.0
    stride: float = 1.0
    cones: tuple[tuple[float, float, float], ...] = (
        (1.0, 0.0, 0.0),
        (1.0, 1.0, 0.0),
        (0.0, 1.0, 0.0),
        (0.0, 1.0, 1.0),
        (0.0, 0.0, 1.0),
        (1.0, 0.0, 1.0),
    )
    channels: tuple[int, int, int] = (48, 80, 128)
    scene: int = 64
    width: int = 128
    text_layers: int = 1
    heads: int = 4
    dim: int = 512
    max_words: int = 40

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "cones", tuple(tuple(map(float, rgb)) for rgb in self.cones))
        if self.size % 16 or self.size < 16:
            raise ConfigurationError(f"TinyConfig.size: a multiple of 16, found {self.size}")
        if self.frames < 1 or self.max_words < 1:
            raise ConfigurationError("TinyConfig: a window has frames and a sentence has words")
        if not (self.window > 0 and self.stride > 0):
            raise ConfigurationError("TinyConfig: window and stride are positive, in seconds")
        if len(self.channels) != 3 or self.channels[0] < 2 or self.width % self.heads:
            raise ConfigurationError(
                f"TinyConfig: three channels, the first at least 2, and a width shared by "
                f"{self.heads} heads, found {self.channels} and {self.width}"
            )
        if not self.cones or any(len(rgb) != 3 or len(set(rgb)) == 1 for rgb in self.cones):
            raise ConfigurationError(f"TinyConfig.cones: RGB that is not grey, found {self.cones}")


def split_words(sentence: str) -> list[str]:
    """Lower-case words without punctuation."""
    return _WORD.findall(sentence.lower())


def _changes(frames: int) -> Tensor:
    """(F, F) what stays and what changes: the cosine basis over the frames of a window, slow first.

    Its rows are orthonormal (DCT-II), so nothing is lost; but each is scaled by itself afterwards,
    and a small change weighs as much as the picture that it changes.
    """
    at = (torch.arange(frames) + 0.5) / frames
    rows = torch.cos(math.pi * torch.arange(frames)[:, None] * at)
    return F.normalize(rows, dim=1)


def _shaded(maps: Tensor, pixels: Tensor) -> Tensor:
    """Maps (N, K, F, h, w) of pixels (N, F, 3, h, w): marks on a shape are darker than it."""
    return maps * (pixels.amax(2)[:, None] + 1) / 2


def _convolved(channels: int, out: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    """A convolution from `channels` to `out` channels, normalised and cut off at zero."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    # Channels last: a third faster with so few of them (measured on AVX2).
    convolution = convolution.to(memory_format=torch.channels_last)
    return convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)


class TinyFrames(nn.Module):
    """The window encoder; a `tvg_lib.encoders.protocols.VideoEncoder`."""

    BATCH = 32  # windows at a time in `encode`: what is between layers then stays in the cache
    resize = "fit"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.channels
        K = len(config.cones)
        self.cones = nn.Linear(9, K + 1)  # the last is for what is no figure
        hue = torch.tensor(config.cones)
        hue = F.normalize(hue - hue.mean(1, keepdim=True), dim=1)
        with torch.no_grad():
            self.cones.weight.zero_()
            self.cones.weight[:K, :6] = _SHARPNESS * torch.cat([hue, hue], dim=1)
            self.cones.bias.zero_()
            self.cones.bias[K] = 0.9 * _SHARPNESS  # faint hues are none
        self.register_buffer("changes", _changes(config.frames), persistent=False)
        # Outlines are read in two frames; nearly always, one of them shows who blinks.
        self.looks = sorted({config.frames // 8, config.frames * 6 // 8})
        self.motion = nn.Sequential(
            nn.BatchNorm2d(2 * config.frames, affine=False),
            *_convolved(2 * config.frames, first, 5, stride=2),
            *_convolved(first, second, 3, stride=2),
            *_convolved(second, third, 3, stride=1),
        )
        self.outline = nn.Sequential(
            nn.BatchNorm2d(1, affine=False),
            *_convolved(1, first // 2, 5, stride=2),
            *_convolved(first // 2, first, 3, stride=2),
            *_convolved(first, second, 3, stride=2),
        )
        self.joined = nn.Conv2d(second + third, 2 * third, 1)
        self.scene = nn.Linear(config.size * 3, config.scene)
        self.output = nn.Linear(len(config.cones) * 2 * third + config.scene, config.dim)
        self.spread = nn.BatchNorm1d(config.dim, affine=False)

    @property
    def name(self) -> str:
        """Names the weights."""
        return weights_name("tiny-frames", self, self.config)

    @property
    def dim(self) -> int:
        """Width D of the common space."""
        return self.config.dim

    @property
    def frames(self) -> int:
        """Frames F of a window."""
        return self.config.frames

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return self.config.size, self.config.size

    @property
    def window(self) -> float:
        """Seconds of a window."""
        return self.config.window

    @property
    def stride(self) -> float:
        """Seconds between the starts of neighbouring windows."""
        return self.config.stride

    def forward(self, windows: Tensor) -> Tensor:
        """Args: windows (N, F, H, W, 3) uint8. Returns (N, D) of length 1."""
        planes = windows.permute(0, 1, 4, 2, 3).to(self.cones.weight.dtype)
        pixels = F.avg_pool2d(planes.flatten(0, 1), 2).unflatten(0, windows.shape[:2]) / 127.5 - 1
        rows = pixels.mean((1, 4), keepdim=True)  # (N, 1, 3, H / 2, 1): sky and ground
        maps = self._won(pixels, rows)
        variation = (pixels - rows).abs().mean((1, 4))
        scene = torch.cat([rows.flatten(1), variation.flatten(1)], dim=1)
        # Most hues are nowhere to be seen; their maps need no looking at. Near the edge of notice
        # what is found fades in, so that a vector is continuous in the pixels.
        area = maps.sum((3, 4)).amax(2).float()  # (N, K) pixels
        there = ((area - _SPECK) / _SPECK).clamp(0, 1)
        others = maps.sum(1, keepdim=True) - maps
        both = torch.stack([_shaded(maps, pixels), others], dim=2)[there > 0]
        changes = self.changes @ both.flatten(3)  # (M, 2, F, H / 2 * W / 2)
        motion = self.motion(changes.unflatten(3, both.shape[3:]).flatten(1, 2))
        sharp = planes[:, self.looks] / 127.5 - 1
        fine = _shaded(self._won(sharp, rows.repeat_interleave(2, dim=3)), sharp)[there > 0]
        outline = self.outline(fine.flatten(0, 1)[:, None]).unflatten(0, fine.shape[:2]).amax(1)
        found = self.joined(torch.cat([motion, outline], dim=1))
        found = F.relu(found.amax((2, 3)).float()) * there[there > 0][:, None]
        seen = found.new_zeros(*there.shape, found.shape[1])
        seen[there > 0] = found
        known = torch.cat([seen.flatten(1), F.relu(self.scene(scene))], dim=1)
        return F.normalize(self.spread(self.output(known)).float(), dim=-1)

    def _won(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """(N, K, F, h, w) what each cone wins of pixels (N, F, 3, h, w) and their rows' means."""
        pixels, figures = pixels.transpose(1, 2), (pixels - rows).transpose(1, 2)
        light = torch.cat([pixels, figures, figures.abs()], dim=1)
        logits = self.cones.weight @ light.flatten(2) + self.cones.bias[:, None]
        return logits.softmax(1)[:, :-1].unflatten(2, light.shape[2:])

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
        device = self.cones.weight.device
        rows = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(windows), self.BATCH):
            part = torch.from_numpy(np.array(windows[start : start + self.BATCH]))
            rows.append(self(part.to(device)).cpu().numpy())
        return np.concatenate(rows)


class TinyWords(nn.Module):
    """The sentence encoder; a `tvg_lib.encoders.sentence.SentenceEncoder`.

    Args:
        vocabulary: every word it will ever know, in a fixed order.
    """

    BATCH = 512  # sentences at a time in `encode`

    def __init__(self, config: TinyConfig, vocabulary: Sequence[str]) -> None:
        super().__init__()
        unfit = [word for word in vocabulary if split_words(word) != [word]]
        if unfit or len(set(vocabulary)) != len(vocabulary) or not vocabulary:
            raise ConfigurationError(
                f"a vocabulary holds different single lower-case words, found {unfit[:5]} among "
                f"{len(vocabulary)} words ({len(set(vocabulary))} different)"
            )
        self.config = config
        self.vocabulary = tuple(vocabulary)
        self._number = {word: number for number, word in enumerate(vocabulary)}
        self.embedding = nn.Embedding(len(vocabulary), config.width)
        self.place = nn.Parameter(0.3 * torch.randn(config.max_words, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer = nn.TransformerEncoder(
            layer, config.text_layers, enable_nested_tensor=False
        )
        self.output = nn.Linear(config.width, config.dim, bias=False)
        self.spread = nn.BatchNorm1d(config.dim, affine=False)

    @property
    def name(self) -> str:
        """Names the weights."""
        return weights_name("tiny-words", self, self.config, self.vocabulary)

    @property
    def dim(self) -> int:
        """Width D of the common space."""
        return self.config.dim

    def tokens(self, sentence: str) -> list[str]:
        """The words that the rows of `encode_tokens` stand for.

        Raises:
            DataError: no word, too many, or one that the vocabulary lacks.
        """
        words = split_words(sentence)
        if not 1 <= len(words) <= self.config.max_words:
            raise DataError(
                f"a sentence has 1 to {self.config.max_words} words, found {len(words)} in "
                f"{sentence!r}"
            )
        for word in words:
            if word not in self._number:
                near = difflib.get_close_matches(word, self.vocabulary, n=3) or self.vocabulary[:8]
                raise DataError(
                    f"{sentence!r}: this encoder knows {len(self.vocabulary)} words, and not "
                    f"{word!r}; it does know {', '.join(near)} (all are in `.vocabulary`)"
                )
        return words

    def forward(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns unit vectors (N, D), word vectors (N, K, D) and their mask (N, K)."""
        numbers = [[self._number[word] for word in self.tokens(text)] for text in sentences]
        longest = max(map(len, numbers))
        device = self.place.device
        mask = torch.zeros(len(numbers), longest, dtype=torch.bool)
        index = torch.zeros(len(numbers), longest, dtype=torch.long)
        for row, known in enumerate(numbers):
            mask[row, : len(known)] = True
            index[row, : len(known)] = torch.tensor(known)
        mask, index = mask.to(device), index.to(device)
        x = self.embedding(index) + self.place[:longest]
        x = self.output(self.transformer(x, src_key_padding_mask=~mask)).float()
        words = x.masked_fill(~mask[..., None], 0.0)
        mean = words.sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.spread(mean), dim=-1), words, mask

    @torch.inference_mode()
    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, D) float32 unit vectors.

        Raises:
            DataError: as of `tokens`.
        """
        rows = [np.empty((0, self.dim), np.float32)]
        for start in range(0, len(sentences), self.BATCH):
            rows.append(self(sentences[start : start + self.BATCH])[0].cpu().numpy())
        return np.concatenate(rows)

    @torch.inference_mode()
    def encode_tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """N arrays (K, D) float32, one row a word, in context.

        Raises:
            DataError: as of `tokens`.
        """
        rows: list[np.ndarray] = []
        for start in range(0, len(sentences), self.BATCH):
            _, words, mask = self(sentences[start : start + self.BATCH])
            rows += [x[real].cpu().numpy() for x, real in zip(words, mask, strict=True)]
        return rows


@dataclass(frozen=True)
class PairBatch:
    """Windows, the sentence drawn with each, and which sentences are true of which windows.

    Attributes:
        windows: (N, F, H, W, 3) uint8.
        sentences: N S, those drawn with the first window first.
        matches: (N, N S) boolean, [i, j] True where sentence j is true of window i.
    """

    windows: Tensor
    sentences: tuple[str, ...]
    matches: Tensor

    @property
    def video_ids(self) -> tuple[str, ...]:
        """What a message can say of the windows."""
        return tuple(f"window {i}" for i in range(len(self.windows)))

    @property
    def query_ids(self) -> tuple[str, ...]:
        """What a message can say of the sentences."""
        return self.sentences

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PairBatch":
        """The batch on a device; pixels stay bytes."""
        return replace(self, windows=self.windows.to(device), matches=self.matches.to(device))


@dataclass(frozen=True)
class PairEmbeddings:
    """Unit vectors (N, D) of the windows and sentences of a batch."""

    video: Tensor
    text: Tensor


class TinyDualEncoder(nn.Module):
    """Both encoders: `video` for windows of frames, `text` for sentences, in one space of `dim`.

    Args:
        config: architecture.
        vocabulary: the words it will know; kept with the weights.
    """

    def __init__(self, config: TinyConfig, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.video = TinyFrames(config)
        self.text = TinyWords(config, vocabulary)

    def forward(self, batch: PairBatch) -> PairEmbeddings:
        """Embed a batch; a sentence that occurs several times is encoded once."""
        different = list(dict.fromkeys(batch.sentences))
        row = {sentence: number for number, sentence in enumerate(different)}
        text = self.text(different)[0]
        return PairEmbeddings(
            self.video(batch.windows), text[[row[sentence] for sentence in batch.sentences]]
        )

    def save(self, path: Path | str, recipe: Mapping[str, Any] | None = None) -> None:
        """Write weights, configuration, vocabulary and how they were made, whole or not at all.

        Args:
            path: ends in .safetensors.
            recipe: JSON-serialisable; seeds, steps, data: read it back with `read_recipe`.
        """
        state = {
            "format": FORMAT,
            "config": asdict(self.config),
            "vocabulary": list(self.text.vocabulary),
            "recipe": dict(recipe or {}),
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state(path, self.state_dict(), state)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote, in evaluation mode, on the CPU.

        Raises:
            DataError: the file is missing, damaged, or holds something else.
        """
        tensors, state = _read(Path(path))
        try:
            model = cls(TinyConfig(**state["config"]), state["vocabulary"])
            model.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError, ConfigurationError) as error:
            raise DataError(f"{path}: weights and configuration do not fit: {error}") from error
        return model.eval()


def read_recipe(path: Path | str) -> dict[str, Any]:
    """How saved weights were made.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    return _read(Path(path))[1]["recipe"]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, state = read_state(path)
    if state.get("format") != FORMAT:
        raise DataError(
            f"{path}: expected a tiny dual encoder ({FORMAT}), found {state.get('format')!r}"
        )
    return tensors, state


def info_nce(logits: Tensor, matches: Tensor) -> Tensor:
    """Cross-entropy of each row against its positives, which share the target equally.

    Args:
        logits: (N, M).
        matches: (N, M) boolean, at least one True a row.

    Returns:
        (N,)
    """
    chances = logits.log_softmax(dim=1)
    return -(chances.masked_fill(~matches, 0.0).sum(1) / matches.sum(1))


class ContrastiveObjective(nn.Module):
    """Symmetric InfoNCE over the pairs of a batch; the temperature is learnt.

    In several processes each contrasts the pairs of its own share of the batch.

    Args:
        temperature: at the start; CLIP's 0.07.
        lowest: never below it; CLIP's 0.01.
    """

    def __init__(self, temperature: float = 0.07, lowest: float = 0.01) -> None:
        super().__init__()
        if not 0 < lowest <= temperature:
            raise ConfigurationError(
                f"0 < lowest <= temperature, found lowest={lowest}, temperature={temperature}"
            )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.log_scale._no_weight_decay = True  # type: ignore[attr-defined]
        self.highest = -math.log(lowest)

    def forward(self, output: PairEmbeddings, batch: PairBatch) -> dict[str, Tensor]:
        """Returns "total" and its two halves."""
        scale = self.log_scale.clamp(max=self.highest).exp()
        logits = scale * output.video @ output.text.T
        to_text, to_video = (
            info_nce(scores, true).sum() / reduce_sum(scores.new_tensor(len(scores)))
            for scores, true in ((logits, batch.matches), (logits.T, batch.matches.T))
        )
        return {
            "total": (to_text + to_video) / 2,
            "video_to_text": to_text,
            "text_to_video": to_video,
        }


# Draws N windows (N, F, H, W, 3) uint8 with S sentences each, those of the first window first, and
# the (N, N S) matches or None where equal sentences are the only ones true of another window.
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, Sequence[str], np.ndarray | None]]


def pair_batch(
    windows: np.ndarray, sentences: Sequence[str], matches: np.ndarray | None = None
) -> PairBatch:
    """A batch of arrays; without `matches`, those whose sentences have equal words match.

    Raises:
        DataError: the numbers differ, or a window does not match its own sentences.
    """
    N, each = len(windows), len(sentences) // max(1, len(windows))
    own = np.arange(len(sentences)) // max(1, each)
    if matches is None:
        words = [tuple(split_words(sentence)) for sentence in sentences]
        equal = np.array([[a == b for b in words] for a in words], bool)
        equal = equal.reshape(len(words), len(words))
        matches = np.array([equal[own == i].any(0) for i in range(N)], bool)
    if (
        len(sentences) != N * each
        or (N > 0 and each < 1)
        or matches.shape != (N, N * each)
        or not matches[own, np.arange(len(own))].all()
    ):
        raise DataError(
            f"{N} windows, {len(sentences)} sentences and matches {matches.shape}: expected one "
            "sentence a window, or as many for each, true of it"
        )
    return PairBatch(
        torch.from_numpy(np.ascontiguousarray(windows)),
        tuple(sentences),
        torch.from_numpy(np.asarray(matches, bool)),
    )


@dataclass(frozen=True)
class PairSpec:
    """Which pairs one step sees."""

    epoch: int
    number: int
    samples: tuple[int, ...]

    def share(self, rank: int, world: int) -> "PairSpec":
        """The pairs of one of `world` processes."""
        return replace(self, samples=self.samples[rank::world])


@dataclass(frozen=True)
class PairPlan:
    """An endless supply of pairs as epochs, for `tvg_lib.training.train`.

    Each batch is drawn from a generator seeded by (seed, epoch, number), so it is the same whoever
    draws it, and a resumed run sees what it would have seen.

    Attributes:
        draw: see `Draw`; picklable where batches are drawn in processes of their own.
        batch_size: pairs a step.
        batches: steps an epoch.
        seed: of the draws.
    """

    draw: Draw = field(repr=False)
    batch_size: int = 128
    batches: int = 100
    seed: int = 0

    def epoch(self, epoch: int) -> list[PairSpec]:
        """The steps of an epoch."""
        everyone = tuple(range(self.batch_size))
        return [PairSpec(epoch, number, everyone) for number in range(self.batches)]

    def load(self, spec: PairSpec) -> PairBatch:
        """Draw the pairs of a step."""
        rng = np.random.default_rng([self.seed, spec.epoch, spec.number])
        windows, sentences, matches = self.draw(rng, self.batch_size)
        keep = list(spec.samples)
        each = len(sentences) // len(windows)
        said = [i * each + k for i in keep for k in range(each)]
        return pair_batch(
            windows[keep],
            [sentences[j] for j in said],
            None if matches is None else matches[np.ix_(keep, said)],
        )


@torch.inference_mode()
def pair_recall(model: TinyDualEncoder, batches: Sequence[PairBatch]) -> dict[str, float]:
    """In percent: first sentence true of a window ("text R1"), first window fit ("video R1").

    The candidates are those of the same batch, so the numbers depend on its size.
    """
    hits: dict[str, list[Tensor]] = {"text R1": [], "video R1": []}
    for batch in batches:
        output = model(batch)
        similarity = output.video @ output.text.T
        for name, scores, matches in (
            ("text R1", similarity, batch.matches),
            ("video R1", similarity.T, batch.matches.T),
        ):
            best = scores.argmax(1, keepdim=True)
            hits[name].append(matches.gather(1, best).squeeze(1).float())
    return {name: 100 * float(torch.cat(parts).mean()) for name, parts in hits.items()}
