"""Which data a notebook runs on, by its scale: one place decides, so that all notebooks agree.

smoke           planted features, embedded in the package; nothing on the machine is looked at
cpu, full, gpu  QVH-captions where this machine has it (`TVG_DATA` or the download cache),
                planted features where it has not

A notebook that wants one data set whatever the machine has asks for it by name; see `NAMES`.
ShapeStories is generated, in a size that the scale decides, and needs nothing but this package;
"qvhighlights-clip" needs features that the user places (`tvg_lib.data.qvhighlights`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tvg_lib.augmentation import joined, with_caption_queries, with_paraphrases
from tvg_lib.data import planted, qvh_captions, qvhighlights
from tvg_lib.data.dataset import GroundingDataset, Query
from tvg_lib.data.features import ArrayStore
from tvg_lib.encoders.sentence import MiniLM, SentenceEncoder
from tvg_lib.errors import ConfigurationError
from tvg_lib.shapestories import dataset as shapestories

# Of the videos of QVH-captions' val, for model selection: whole recordings, of which several videos
# may be cut. The test split shares no recording with val.
HELD_OUT = 0.15
SPLIT_SEED = 0

SHAPESTORIES: dict[str, shapestories.Length] = {
    f"shapestories-{length}": length for length in shapestories.LENGTHS
}
NAMES = ("qvh-captions", "qvhighlights-clip", *SHAPESTORIES, "planted")


def has_real_data(scale: str) -> bool:
    """Whether notebooks of a scale run on QVH-captions here; never at the smoke scale."""
    return scale != "smoke" and all(map(qvh_captions.available, qvh_captions.SPLITS))


def benchmark(scale: str, name: str | None = None) -> dict[str, GroundingDataset]:
    """The data of a scale: "train", "val" (for model selection) and "test".

    Of QVH-captions the published val split is divided, by recording, into train and val; the first
    call on a machine embeds all captions, which takes some minutes. So does the first call for a
    length of ShapeStories, but at the smoke scale. Of QVHighlights the training split is divided in
    the same way, and the published val split is the test, as in the tables of its val.

    Args:
        scale: smoke, cpu, full or gpu.
        name: one of `NAMES`; by default QVH-captions where it may be used, planted features where
            not.

    Raises:
        ConfigurationError: there is no such data set.
        DataError: real data are asked for by name and not on this machine.
    """
    name = _named(scale, name)
    if name == "qvhighlights-clip":
        train, val = qvhighlights.load("train").split(HELD_OUT, SPLIT_SEED)
        return {"train": train, "val": val, "test": qvhighlights.load("val")}
    if name == "planted":
        return {split: planted.planted(split) for split in planted.SPLITS}
    if name in SHAPESTORIES:
        return shapestories.benchmark(SHAPESTORIES[name], scale)
    train, val = qvh_captions.load("val").split(HELD_OUT, SPLIT_SEED)
    return {"train": train, "val": val, "test": qvh_captions.load("test")}


def enlarged(
    train_set: GroundingDataset,
    scale: str,
    name: str | None = None,
    *,
    paraphrases: bool = False,
    caption_queries: int = 0,
    shorter_films: bool = False,
) -> GroundingDataset:
    """A training split with more to train on; what does not apply to its data set adds nothing.

    Args:
        train_set: the "train" of `benchmark`, or a part of it.
        scale, name: of the data, as in `benchmark`.
        paraphrases: QVH-captions: ask every query in other words, too.
        caption_queries: QVH-captions: captions of each video asked as queries.
        shorter_films: ShapeStories: add the training films of the shorter lengths.

    Raises:
        ConfigurationError: there is no such data set.
    """
    name = _named(scale, name)
    if name == "qvh-captions" and paraphrases:
        train_set = with_paraphrases(train_set, qvh_captions.paraphrases("val"))
    if name == "qvh-captions" and caption_queries:
        train_set = with_caption_queries(train_set, qvh_captions.captions("val"), caption_queries)
    if name in SHAPESTORIES and shorter_films:
        for shorter in list(SHAPESTORIES)[: list(SHAPESTORIES).index(name)]:
            train_set = joined(train_set, split_of(scale, shorter, "train"))
    return train_set


def split_of(scale: str, name: str, split: planted.Split) -> GroundingDataset:
    """One split of ShapeStories, without making films for the others.

    Raises:
        ConfigurationError: `name` is no length of ShapeStories.
    """
    if name not in SHAPESTORIES:
        raise ConfigurationError(f"expected one of {', '.join(SHAPESTORIES)}, found {name!r}")
    return shapestories.load(*_films(scale, name, split))


def _films(
    scale: str, name: str, split: planted.Split
) -> tuple[shapestories.StoryConfig, planted.Split, int]:
    """A split of ShapeStories as its modules ask for it: which films, and how many."""
    length = SHAPESTORIES[name]
    count = shapestories.FILMS[scale][length][planted.SPLITS.index(split)]
    return shapestories.LENGTHS[length], split, count


def _named(scale: str, name: str | None) -> str:
    """The data set that is asked for, or the usual one of the scale."""
    if name is None:
        return "qvh-captions" if has_real_data(scale) else "planted"
    if name not in NAMES:
        raise ConfigurationError(f"the data sets are {', '.join(NAMES)}, found {name!r}")
    return name


def glimpse(scale: str, videos: int = 12) -> GroundingDataset:
    """The first few test videos: what can be shown within seconds, even on a fresh machine."""
    if has_real_data(scale):
        return qvh_captions.load("test", first=videos)
    data = planted.planted("test")
    return data.subset(sorted(data.videos)[:videos], f"{data.name}-first{videos}")


def captions(
    scale: str, split: planted.Split = "test", name: str | None = None
) -> Mapping[str, Sequence[str]]:
    """What happens in every clip of every video of a split, by video id; {} where nobody says.

    Args:
        scale, name: of the data, as in `benchmark`.
        split: train, val or test.

    Raises:
        ConfigurationError: there is no such data set.
    """
    name = _named(scale, name)
    if name in SHAPESTORIES:
        return shapestories.captions(*_films(scale, name, split))
    if name == "qvh-captions":
        return qvh_captions.captions("test" if split == "test" else "val")
    return planted.captions(split) if name == "planted" else {}


def text_encoder(scale: str) -> SentenceEncoder:
    """What turns a question of one's own into features in the space of the clips."""
    return MiniLM() if has_real_data(scale) else planted.PlantedWords()


def questions_about(
    dataset: GroundingDataset, video_id: str, texts: Sequence[str], encoder: SentenceEncoder
) -> GroundingDataset:
    """One video of a data set with questions of one's own, whose moments nobody has annotated.

    Args:
        dataset: holds the video.
        video_id: the video.
        texts: the questions.
        encoder: puts them into the space of the clips; that of `text_encoder`.

    Raises:
        DataError: there is no such video, or the encoder refuses a text.
    """
    video = dataset.subset([video_id], f"questions about {video_id}")
    ids = [f"question-{number}" for number in range(1, len(texts) + 1)]
    nowhere = np.zeros((0, 2))
    return replace(
        video,
        queries=tuple(
            Query(key, video_id, text, nowhere) for key, text in zip(ids, texts, strict=True)
        ),
        text_features=ArrayStore.of(dict(zip(ids, encoder.encode_tokens(texts), strict=True))),
        sentence_features=ArrayStore.of(
            {key: vector[None] for key, vector in zip(ids, encoder.encode(texts), strict=True)}
        ),
    )
