"""ShapeStories as data sets: films of three lengths, seen and read by the tiny dual encoder.

    benchmark("short", "cpu")              {"train": ..., "val": ..., "test": ...}
    load(MEDIUM, "test", films=24)         any number of films of a split
    load(replace(LONG, name="epic", duration=(7200, 10800)), "test", films=2)      or of any length

A clip is a window of two seconds, one a second. Every film is made once: its script, its questions
and all features go into one file of the cache, whose name is a hash of the world, the pictures and
the weights, so that a change of them never meets old features (how clips are cut and encoded is in
it as the versions of two formats). Films are made side by side in processes.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from tvg_lib import paths
from tvg_lib.checkpoints import read_state, write_state
from tvg_lib.data.dataset import GroundingDataset, Query, Video
from tvg_lib.data.features import ArrayStore
from tvg_lib.encoders import tiny
from tvg_lib.encoders.tiny import TinyConfig, TinyDualEncoder
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.fingerprint import code_fingerprint, value_fingerprint
from tvg_lib.moments import TimeGrid
from tvg_lib.shapestories import generator, language, questions, render, world
from tvg_lib.shapestories.encoder import EncoderRecipe, tiny_dual_encoder
from tvg_lib.shapestories.generator import LONG, MEDIUM, SHORT, SPLITS, Split, StoryConfig
from tvg_lib.shapestories.pairs import View, tell
from tvg_lib.shapestories.questions import LEVELS, Question, ask
from tvg_lib.shapestories.render import RenderConfig
from tvg_lib.shapestories.world import Script

Length = Literal["short", "medium", "long"]
LENGTHS: dict[Length, StoryConfig] = {"short": SHORT, "medium": MEDIUM, "long": LONG}

# Films of train, val and test.
FILMS: dict[str, dict[Length, tuple[int, int, int]]] = {
    "smoke": {"short": (16, 4, 6), "medium": (2, 1, 1), "long": (1, 1, 1)},
    "cpu": {"short": (400, 60, 120), "medium": (60, 12, 24), "long": (12, 4, 6)},
    "full": {"short": (1600, 100, 240), "medium": (160, 20, 40), "long": (32, 4, 10)},
}
FILMS["gpu"] = FILMS["full"]

_FORMAT = "tvg-companion/shapestories-film/1"
_WINDOWS_AT_ONCE = 128
_WORTH_A_POOL = 12  # short films; starting processes costs more than a handful of films


@dataclass(frozen=True)
class Film:
    """One film as a data set sees it.

    Attributes:
        video: its length and grid.
        queries: about it.
        clips: (T, D) features of its windows.
        words: by query id, (K, D).
        sentences: by query id, (1, D).
    """

    video: Video
    queries: tuple[Query, ...]
    clips: np.ndarray
    words: dict[str, np.ndarray]
    sentences: dict[str, np.ndarray]


def benchmark(length: Length, scale: str) -> dict[str, GroundingDataset]:
    """A length of ShapeStories at a scale: "train", "val" (for model selection) and "test".

    Raises:
        ConfigurationError: there is no such length or scale.
    """
    if length not in LENGTHS or scale not in FILMS:
        raise ConfigurationError(
            f"ShapeStories has the lengths {', '.join(LENGTHS)} at the scales {', '.join(FILMS)}, "
            f"found {length!r} at {scale!r}"
        )
    counts = FILMS[scale][length]
    return {
        split: load(LENGTHS[length], split, count)
        for split, count in zip(get_args(Split), counts, strict=True)
    }


def load(
    config: StoryConfig,
    split: Split,
    films: int,
    *,
    seed: int = 0,
    look: RenderConfig | None = None,
    encoder: TinyDualEncoder | None = None,
    workers: int | None = None,
) -> GroundingDataset:
    """The first films of a split; those that the cache lacks are made.

    Query ids are `<film>-<level>-<number>`, see `level_of`. Scripts and questions are the same on
    every machine, features up to rounding; so a data hash tells films of two machines apart, too.

    Args:
        config: the length of the films and how much happens.
        split: "train", "val" or "test".
        films: how many; a film does not depend on how many there are.
        seed: of the world.
        look: of the pictures.
        encoder: of pictures and words; the shipped one by default.
        workers: processes that make films; by default as many as PyTorch has threads.

    Raises:
        ConfigurationError: there is no such split, or no film is asked for.
    """
    if films < 1 or split not in SPLITS:
        raise ConfigurationError(
            f"expected films of {', '.join(SPLITS)}, found {films} films of {split!r}"
        )
    encoder = tiny_dual_encoder() if encoder is None else encoder
    look = RenderConfig() if look is None else look
    folder = paths.cache() / "shapestories"
    names = encoder.video.name, encoder.text.name
    wanted = [
        _Order(
            config,
            split,
            number,
            seed,
            look,
            folder / f"{_key(config, split, number, seed, look, names)}.safetensors",
        )
        for number in range(films)
    ]
    missing = [order for order in wanted if not order.path.exists()]
    _make(wanted, missing, encoder, workers)
    made = [
        _read(order.path, f"{config.name}-{split}-{order.number:04d}", encoder) for order in wanted
    ]
    name = f"shapestories-{config.name}/{split}"
    return GroundingDataset(
        name=name,
        videos={film.video.id: film.video for film in made},
        queries=tuple(query for film in made for query in film.queries),
        video_features=ArrayStore.of({film.video.id: film.clips for film in made}, name),
        text_features=ArrayStore.of({k: v for film in made for k, v in film.words.items()}, name),
        sentence_features=ArrayStore.of(
            {k: v for film in made for k, v in film.sentences.items()}, name
        ),
    )


def annotations(config: StoryConfig, split: Split, films: int, seed: int = 0) -> GroundingDataset:
    """The same videos and queries as `load`, without pictures: quick, for audits and oracles."""
    videos: dict[str, Video] = {}
    queries: list[Query] = []
    grid = grid_of(EncoderRecipe().model)
    for script in scripts(config, split, films, seed).values():
        videos[script.id] = Video(script.id, script.duration, grid)
        queries += [
            Query(
                _query_id(script.id, question.level, number),
                script.id,
                question.text,
                question.moments,
            )
            for number, question in enumerate(ask(script, config))
        ]
    nothing = _NotDrawn()
    name = f"shapestories-{config.name}/{split}"
    return GroundingDataset(name, videos, tuple(queries), nothing, nothing)


class _NotDrawn:
    """A feature store of films that nobody has drawn."""

    dim = 0

    def __getitem__(self, key: str) -> np.ndarray:
        raise DataError(f"{key!r} has annotations only; `load` gives its features too")

    def __contains__(self, key: object) -> bool:
        return False

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _query_id(film: str, level: str, number: int) -> str:
    return f"{film}-{level}-{number:02d}"


def scripts(config: StoryConfig, split: Split, films: int, seed: int = 0) -> dict[str, Script]:
    """The scripts that the films of `load` follow, by video id."""
    made = (generator.write_script(config, split, number, seed) for number in range(films))
    return {script.id: script for script in made}


def captions(config: StoryConfig, split: Split, films: int, seed: int = 0) -> dict[str, list[str]]:
    """What happens in every clip of the films of `load`, from the scripts, by video id."""
    model = EncoderRecipe().model
    grid = grid_of(model)
    return {
        key: [
            tell(View.of(script, *grid.clip_span(clip)))
            for clip in range(_clips_of(script.duration, model))
        ]
        for key, script in scripts(config, split, films, seed).items()
    }


def level_of(query: Query) -> str:
    """What a query asks about: one of `questions.LEVELS`.

    Raises:
        ConfigurationError: it is no query of ShapeStories.
    """
    for part in query.id.split("-"):
        if part in LEVELS:
            return part
    raise ConfigurationError(f"{query.id!r} is no query of ShapeStories")


def _clips_of(duration: float, config: TinyConfig) -> int:
    """How many windows lie wholly inside a film of so many seconds."""
    return int((duration - config.window) / config.stride) + 1


def grid_of(config: TinyConfig) -> TimeGrid:
    """The grid of an encoder's windows."""
    return TimeGrid(clip_size=config.window, stride=config.stride, fps=1)


# --- making films ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """A film that is to be made, and where it goes."""

    config: StoryConfig
    split: Split
    number: int
    seed: int
    look: RenderConfig
    path: Path


@lru_cache(maxsize=1)
def _code() -> str:
    return code_fingerprint(generator, language, questions, render, world)


def _key(
    config: StoryConfig,
    split: str,
    number: int,
    seed: int,
    look: RenderConfig,
    names: tuple[str, str],
) -> str:
    world_seen = [asdict(config), split, number, seed, asdict(look), _code()]
    decides = [_FORMAT, tiny.FORMAT, names, world_seen]
    return value_fingerprint(decides)[:32]


def _make(
    wanted: Sequence[_Order],
    orders: Sequence[_Order],
    encoder: TinyDualEncoder,
    workers: int | None,
) -> None:
    """Make the films that are missing of those wanted, here or side by side."""
    from tqdm.auto import tqdm

    cores = torch.get_num_threads() if workers is None else workers
    work = sum(order.config.duration[1] for order in orders) / SHORT.duration[1]
    # Shown when the cache holds everything, too: a notebook looks the same the second time.
    with tqdm(total=len(wanted), desc=f"ShapeStories {wanted[0].config.name}", unit="film") as bar:
        bar.update(len(wanted) - len(orders))
        if cores < 2 or work < _WORTH_A_POOL:
            for order in orders:
                _make_one(order, encoder)
                bar.update()
            return
        # Started afresh: a fork of a process with threads may hang.
        with ProcessPoolExecutor(
            min(cores, len(orders)), get_context("spawn"), _one_thread, (encoder,)
        ) as pool:
            for _ in pool.map(_make_in_worker, orders, chunksize=1):
                bar.update()


_worker_encoder: TinyDualEncoder | None = None


def _one_thread(encoder: TinyDualEncoder) -> None:
    """Start of a worker: the cores are shared by the processes."""
    global _worker_encoder
    torch.set_num_threads(1)
    _worker_encoder = encoder


def _make_in_worker(order: _Order) -> None:
    assert _worker_encoder is not None, "the pool starts every worker with _one_thread"
    _make_one(order, _worker_encoder)


def _make_one(order: _Order, encoder: TinyDualEncoder) -> None:
    script = generator.write_script(order.config, order.split, order.number, order.seed)
    asked = ask(script, order.config)
    texts = [question.text for question in asked]
    words = encoder.text.encode_tokens(texts)
    tensors = {
        "clips": encode_film(script, encoder, order.look),
        "words": np.concatenate(words),
        "sentences": encoder.text.encode(texts),
    }
    order.path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "duration": script.duration,
        "words": [len(rows) for rows in words],
        "questions": [_plain(question) for question in asked],
    }
    half = {key: torch.from_numpy(rows.astype(np.float16)) for key, rows in tensors.items()}
    write_state(order.path, half, state)


def _plain(question: Question) -> list:
    return [question.text, question.level, question.moments.tolist()]


def encode_film(
    script: Script, encoder: TinyDualEncoder, look: RenderConfig | None = None
) -> np.ndarray:
    """(T, D) float32 features of a film's windows, drawn and encoded a stretch at a time.

    Windows overlap and share frames; each frame is drawn once. T is the number of windows that lie
    wholly inside the film.

    Raises:
        ConfigurationError: neighbouring windows of the encoder do not share frames.
    """
    video = encoder.video
    step = video.frames * video.stride / video.window  # frames from one window to the next
    if step != round(step) or step < 1:
        raise ConfigurationError(
            f"windows of {video.frames} frames in {video.window} s, every {video.stride} s, do not "
            "share frames"
        )
    step = round(step)
    count = _clips_of(script.duration, encoder.config)
    rate = video.frames / video.window
    rows = []
    for first in range(0, count, _WINDOWS_AT_ONCE):
        here = min(_WINDOWS_AT_ONCE, count - first)
        times = (first * step + np.arange((here - 1) * step + video.frames) + 0.5) / rate
        frames = render.render(script, times, look)
        windows = np.lib.stride_tricks.sliding_window_view(frames, video.frames, axis=0)[::step]
        rows.append(video.encode(np.moveaxis(windows, -1, 1)))
    return np.concatenate(rows)


def _read(path: Path, film: str, encoder: TinyDualEncoder) -> Film:
    tensors, state = read_state(path)
    rows = {key: tensor.float().numpy() for key, tensor in tensors.items()}
    ends = np.cumsum(state["words"])
    queries, words, sentences = [], {}, {}
    for number, (text, level, moments) in enumerate(state["questions"]):
        key = _query_id(film, level, number)
        queries.append(Query(key, film, text, np.array(moments)))
        words[key] = rows["words"][ends[number] - state["words"][number] : ends[number]]
        sentences[key] = rows["sentences"][number][None]
    video = Video(film, state["duration"], grid_of(encoder.config))
    return Film(video, tuple(queries), rows["clips"], words, sentences)
