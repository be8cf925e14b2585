"""Planted moments: features made up by a rule, so that everything runs where no real data are.

No video stands behind these numbers; they exercise the code and show that a method learns, and say
nothing about how good a method is. What is planted:

  * A little world of words: colours, shapes and actions, a unit vector each. An *event* is one of
    each ("red", "square", "jumps") for some seconds; the length is log-uniform, as in real films.
  * A video is a few events over changing backgrounds. Events overlap, come again, and resemble one
    another: many share two of their three words with a neighbour, so one word decides.
  * A clip's feature is the sum of its events, each as strong as it is present in the clip, plus
    background, plus noise that drifts (neighbouring clips err alike); scaled to length 1. Now
    and then an event is hidden for a clip, as a caption misses what a camera sees.
  * A query names one to three words of an event ("the red square jumps", "something blue spins");
    its moments are all stretches where everything it names happens.
  * Words look a little different in text and in video (a *modality gap*, fixed for each word), so
    comparing the two without training is right often, not always. With the default settings the
    clip most similar to the query lies inside a moment for about three queries in four, as it does
    on QVH-captions; a small model learns to do better in some hundred steps.

Everything is drawn from seeds: a video depends on the seed, the split and its number alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Literal, get_args

import numpy as np

from tvg_lib.data.dataset import GroundingDataset, Query, Saliency, Video
from tvg_lib.data.features import ArrayStore
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.moments import QVHIGHLIGHTS_2S

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

COLOURS = ("red", "blue", "green")
SHAPES = ("square", "circle", "triangle")
ACTIONS = ("jumps", "spins", "grows")
FUNCTION_WORDS = ("the", "a", "something", "appears")
GRID = QVHIGHLIGHTS_2S
HARDLY = 0.1  # what is left of an event in a clip that hides it

Event = tuple[str, str, str]


@dataclass(frozen=True)
class PlantedConfig:
    """The size of the planted world and how hard it is.

    Attributes:
        train, val, test: videos of each split.
        clips: fewest and most clips (of 2 s) of a video, drawn log-uniformly.
        events: fewest and most events of a video.
        queries: most queries of a video.
        dim: width C of all features.
        noise: length of a clip's noise beside one fully present event of length 1.
        drift: correlation of the noise of neighbouring clips, in [0, 1).
        hidden: probability that an event can hardly be seen in a clip, in [0, 1].
        background: length of the background beside such an event.
        gap: length of the fixed difference between a word in text and in video, beside 1.
        likeness: probability that a new event differs from an earlier one in one word only.
        again: probability that an earlier event comes again.
        seed: of everything.
    """

    train: int = 400
    val: int = 60
    test: int = 80
    clips: tuple[int, int] = (32, 64)
    events: tuple[int, int] = (3, 5)
    queries: int = 4
    dim: int = 32
    noise: float = 0.6
    drift: float = 0.5
    hidden: float = 0.3
    background: float = 0.6
    gap: float = 1.6
    likeness: float = 0.3
    again: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "val", "test", "queries", "dim"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"PlantedConfig.{name} must be at least 1")
        for name, least in (("clips", 8), ("events", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ConfigurationError(
                    f"PlantedConfig.{name} must satisfy {least} <= low <= high, found {low}, {high}"
                )
        for name in ("noise", "background", "gap"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"PlantedConfig.{name} must not be negative")
        if not 0 <= self.hidden <= 1:
            raise ConfigurationError(f"PlantedConfig.hidden lies in [0, 1], found {self.hidden}")
        if not 0 <= self.drift < 1:
            raise ConfigurationError(f"PlantedConfig.drift lies in [0, 1), found {self.drift}")
        if not (self.likeness >= 0 and self.again >= 0 and self.likeness + self.again <= 1):
            raise ConfigurationError(
                "PlantedConfig.likeness and .again are probabilities of different outcomes, found "
                f"{self.likeness} and {self.again}"
            )


def planted(split: Split, config: PlantedConfig | None = None) -> GroundingDataset:
    """A split of the planted world. Splits share the words and nothing else.

    Clips of 2 s on the grid of QVHighlights, with highlight scores of three made-up annotators, so
    that every metric can be computed.

    Raises:
        DataError: there is no such split.
    """
    config = PlantedConfig() if config is None else config
    world = _World.made(config)
    videos: dict[str, Video] = {}
    queries: list[Query] = []
    clips: dict[str, np.ndarray] = {}
    words: dict[str, np.ndarray] = {}
    sentences: dict[str, np.ndarray] = {}
    for video, length, story, rng in _stories(split, config):
        videos[video.id] = video
        clips[video.id] = world.film(story, length, rng)
        for query in _ask(video, story, config.queries, rng):
            queries.append(query)
            words[query.id], sentences[query.id] = world.read(query.text, rng)
    return GroundingDataset(
        name=f"planted/{split}",
        videos=videos,
        queries=tuple(queries),
        video_features=ArrayStore.of(clips, "planted features"),
        text_features=ArrayStore.of(words, "planted features"),
        sentence_features=ArrayStore.of(sentences, "planted features"),
    )


def captions(split: Split, config: PlantedConfig | None = None) -> dict[str, list[str]]:
    """What is planted in every clip, in words, by video id: the script that the features follow.

    Clip i's caption names all events that fill at least half of the clip.

    Raises:
        DataError: there is no such split.
    """
    config = PlantedConfig() if config is None else config
    scripts = {}
    for video, length, story, _ in _stories(split, config):
        scenes = [
            (_sentence(scene.event, _NAMED[0]), scene.share(length) >= 0.5) for scene in story
        ]
        scripts[video.id] = [
            ", ".join(dict.fromkeys(text for text, there in scenes if there[clip]))
            or "only background"
            for clip in range(length)
        ]
    return scripts


class PlantedWords:
    """The text encoder of the planted world, for questions of one's own (a `SentenceEncoder`)."""

    def __init__(self, config: PlantedConfig | None = None) -> None:
        self._world = _World.made(PlantedConfig() if config is None else config)

    @property
    def name(self) -> str:
        """Names the vectors."""
        return f"planted-words-{self._world.config.seed}"

    @property
    def dim(self) -> int:
        """Width C of every vector."""
        return self._world.config.dim

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, C) float32 unit vectors, from the colours, shapes and actions named.

        Raises:
            DataError: a sentence holds a word that this world does not know, or nothing else.
        """
        return np.concatenate([self._world.read(text)[1] for text in sentences])

    def encode_tokens(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """N arrays (K, C) float32, one row a word; errors as in `encode`."""
        return [self._world.read(text)[0] for text in sentences]


@dataclass(frozen=True)
class _Scene:
    """An event and the seconds it lasts."""

    event: Event
    start: float
    end: float

    def share(self, length: int) -> np.ndarray:
        """(T,) how much of each clip the event fills, in [0, 1]."""
        first = np.arange(length) * GRID.step
        overlap = np.minimum(self.end, first + GRID.step) - np.maximum(self.start, first)
        return overlap.clip(min=0) / GRID.step

    def strength(self, length: int) -> np.ndarray:
        """(T,) how present the event is in each clip: its share of the clip, fading at both ends.

        The fade is what makes a highlight: an event is strongest in its middle.
        """
        first = np.arange(length) * GRID.step
        middle = (self.start + self.end) / 2
        away = np.abs(first + GRID.step / 2 - middle) / max((self.end - self.start) / 2, GRID.step)
        return self.share(length) * (1 - 0.4 * away.clip(max=1) ** 2)


@dataclass(frozen=True)
class _World:
    """Vectors of every word, as seen and as written, and of the backgrounds."""

    config: PlantedConfig
    seen: dict[str, np.ndarray]
    written: dict[str, np.ndarray]
    backgrounds: np.ndarray

    @classmethod
    def made(cls, config: PlantedConfig) -> "_World":
        rng = np.random.default_rng(config.seed)
        concepts = (*COLOURS, *SHAPES, *ACTIONS)
        seen = {word: _unit(rng.normal(size=config.dim)) for word in concepts}
        written = {
            word: _unit(vector + config.gap * _unit(rng.normal(size=config.dim)))
            for word, vector in seen.items()
        }
        written |= {word: _unit(rng.normal(size=config.dim)) for word in FUNCTION_WORDS}
        return cls(config, seen, written, _unit(rng.normal(size=(12, config.dim))))

    def film(self, story: Sequence[_Scene], length: int, rng: np.random.Generator) -> np.ndarray:
        """(T, C) float32 clip features of a story."""
        config = self.config
        film = config.background * self._background(length, rng)
        for scene in story:
            vector = _unit(sum(self.seen[word] for word in scene.event))
            visible = np.where(rng.uniform(size=length) < config.hidden, HARDLY, 1.0)
            film += (scene.strength(length) * visible)[:, None] * vector
        fresh = rng.normal(size=(length, config.dim)) * config.noise / config.dim**0.5
        noise = fresh[0]
        for step in range(length):
            if step:
                noise = config.drift * noise + (1 - config.drift**2) ** 0.5 * fresh[step]
            film[step] += noise
        return _unit(film).astype(np.float32)

    def _background(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(T, C): one to three shots, each before a background of its own."""
        shots = rng.integers(1, 4)
        cuts = np.sort(rng.integers(1, length, size=shots - 1))
        shot = np.searchsorted(cuts, np.arange(length), side="right")
        return self.backgrounds[rng.choice(len(self.backgrounds), size=shots, replace=False)][shot]

    def read(
        self, text: str, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Word features (K, C), a little noisy given a generator, and the sentence's (1, C).

        Raises:
            DataError: an unknown word, or no colour, shape or action among the words.
        """
        words = text.split()
        unknown = [word for word in words if word not in self.written]
        content = [i for i, word in enumerate(words) if word not in FUNCTION_WORDS]
        if unknown or not content:
            problem = f"the word {unknown[0]!r}" if unknown else "no word with a meaning"
            raise DataError(
                f"{text!r} holds {problem}; the planted world knows {', '.join(self.written)}"
            )
        vectors = np.stack([self.written[word] for word in words])
        if rng is not None:
            vectors = vectors + rng.normal(size=vectors.shape) * 0.1 / self.config.dim**0.5
        sentence = _unit(vectors[content].sum(0, keepdims=True))
        return vectors.astype(np.float32), sentence.astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _any_event(rng: np.random.Generator) -> Event:
    return str(rng.choice(COLOURS)), str(rng.choice(SHAPES)), str(rng.choice(ACTIONS))


def _next_event(story: Sequence[_Scene], config: PlantedConfig, rng: np.random.Generator) -> Event:
    """A new event: one seen before, one that differs in a single word, or any."""
    chance = rng.uniform()
    fresh = _any_event(rng)
    if not story or chance >= config.likeness + config.again:
        return fresh
    known = story[rng.integers(len(story))].event
    if chance < config.again:
        return known
    changed = rng.integers(3)
    return tuple(fresh[i] if i == changed else known[i] for i in range(3))  # type: ignore[return-value]


def _story(duration: float, config: PlantedConfig, rng: np.random.Generator) -> list[_Scene]:
    """Events with log-uniform lengths, from two clips to 40 % of the video, at any time."""
    story: list[_Scene] = []
    low, high = config.events
    for _ in range(rng.integers(low, high + 1)):
        event = _next_event(story, config, rng)
        length = exp(rng.uniform(log(2 * GRID.step), log(0.4 * duration)))
        start = rng.uniform(0, duration - length)
        story.append(_Scene(event, round(start, 1), round(start + length, 1)))
    return story


def _stories(
    split: Split, config: PlantedConfig
) -> Iterator[tuple[Video, int, list[_Scene], np.random.Generator]]:
    """Every video of a split with its number of clips, its events and its generator."""
    if split not in SPLITS:
        raise DataError(f"the planted data have the splits {', '.join(SPLITS)}, found {split!r}")
    for number in range(getattr(config, split)):
        rng = np.random.default_rng([config.seed, SPLITS.index(split), number])
        low, high = config.clips
        length = round(exp(rng.uniform(log(low), log(high))))
        video = Video(f"planted-{split}-{number:04d}", length * GRID.step, GRID)
        yield video, length, _story(video.duration, config, rng), rng


def _sentence(event: Event, named: frozenset[int]) -> str:
    """English for the named words of an event (0 colour, 1 shape, 2 action)."""
    colour, shape, action = event
    thing = f"{colour} {shape}" if {0, 1} <= named else shape if 1 in named else ""
    if thing:
        article = "the" if len(named) == 3 else "a"
        return f"{article} {thing} {action if 2 in named else 'appears'}"
    thing = f"something {colour}" if 0 in named else "something"
    return f"{thing} {action if 2 in named else 'appears'}"


# What a query may name. The whole event is asked for most often.
_NAMED = tuple(frozenset(named) for named in ((0, 1, 2), (0, 1), (1, 2), (0, 2), (2,)))
_NAMED_OFTEN = (0.6, 0.1, 0.1, 0.1, 0.1)
_MOST_COVERED = 0.6  # of the video: a query whose moments are nearly everywhere asks nothing


def _ask(
    video: Video, story: Sequence[_Scene], most: int, rng: np.random.Generator
) -> Iterator[Query]:
    """Different questions about a story, with all their moments."""
    length = round(video.duration / GRID.step)
    asked: set[str] = set()
    for index in rng.permutation(len(story)):
        event = story[index].event
        named = _NAMED[rng.choice(len(_NAMED), p=_NAMED_OFTEN)]
        answers = [s for s in story if all(s.event[i] == event[i] for i in named)]
        moments = _merged(answers)
        text = _sentence(event, named)
        covered = (moments[:, 1] - moments[:, 0]).sum() / video.duration
        if text in asked or covered > _MOST_COVERED:
            continue
        asked.add(text)
        strength = np.max([scene.strength(length) for scene in answers], axis=0)
        relevant = np.flatnonzero(strength > 0)
        opinion = 4 * strength[relevant, None] + rng.normal(scale=0.5, size=(len(relevant), 3))
        saliency = Saliency(relevant, opinion.round().clip(0, 4).astype(np.int64))
        yield Query(f"{video.id}-{len(asked)}", video.id, text, moments, saliency)
        if len(asked) == most:
            return


def _merged(scenes: Sequence[_Scene]) -> np.ndarray:
    """(M, 2) seconds of scenes in order, overlapping or touching ones joined."""
    moments: list[list[float]] = []
    for start, end in sorted((scene.start, scene.end) for scene in scenes):
        if moments and start <= moments[-1][1]:
            moments[-1][1] = max(moments[-1][1], end)
        else:
            moments.append([start, end])
    return np.array(moments)
