"""Which data a notebook runs on, by its scale: one place decides, so that all notebooks agree.

smoke           planted features, embedded in the package; nothing on the machine is looked at
cpu, full, gpu  QVH-captions where this machine has it (`TVG_DATA` or the download cache),
                planted features where it has not
"""

from collections.abc import Mapping, Sequence

from tvg_lib.data import planted, qvh_captions
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.encoders.sentence import MiniLM, SentenceEncoder

HELD_OUT = 0.15  # of the videos of QVH-captions' val, for model selection
SPLIT_SEED = 0


def has_real_data(scale: str) -> bool:
    """Whether notebooks of a scale run on QVH-captions here; never at the smoke scale."""
    return scale != "smoke" and all(map(qvh_captions.available, qvh_captions.SPLITS))


def benchmark(scale: str) -> dict[str, GroundingDataset]:
    """The data of a scale: "train", "val" (for model selection) and "test".

    Of QVH-captions the published val split is divided, by video, into train and val; the first call
    on a machine embeds all captions, which takes some minutes.
    """
    if not has_real_data(scale):
        return {split: planted.planted(split) for split in planted.SPLITS}
    train, val = qvh_captions.load("val").split(HELD_OUT, SPLIT_SEED)
    return {"train": train, "val": val, "test": qvh_captions.load("test")}


def captions(scale: str, split: planted.Split = "test") -> Mapping[str, Sequence[str]]:
    """What happens in every clip of every video of a split, in words, by video id."""
    if has_real_data(scale):
        return qvh_captions.captions("test" if split == "test" else "val")
    return planted.captions(split)


def text_encoder(scale: str) -> SentenceEncoder:
    """What turns a question of one's own into features in the space of the clips."""
    return MiniLM() if has_real_data(scale) else planted.PlantedWords()
