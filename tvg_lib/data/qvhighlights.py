"""QVHighlights with CLIP features, which A2FA + F2SGD's own tables were measured on.

Features and annotations are those of Moment-DETR (Lei et al. 2021), which hosts them; they are
never fetched or shipped. Placed by the user below `$TVG_DATA/qvhighlights`, unpacked as published:

    highlight_{train,val}_release.jsonl   7,218 and 1,550 queries
    clip_features/<video>.npz             "features": (75, 512), a vector for every two seconds
    clip_text_features/qid<query>.npz     "last_hidden_state": (K, 512) words, and
                                          "pooler_output": (512,) the sentence

SlowFast, which lies beside them, is left out: the paper uses CLIP alone.
"""

from pathlib import Path
from typing import Literal, get_args

from tvg_lib import paths
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.data.features import FolderStore
from tvg_lib.data.readers import join, read_qvhighlights
from tvg_lib.errors import DataError
from tvg_lib.moments import QVHIGHLIGHTS_2S

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
DIM = 512


def load(split: Split, root: Path | None = None) -> GroundingDataset:
    """A split with its annotations, CLIP clips, words and sentences; features are read when used.

    Args:
        split: "train" or "val".
        root: folder of the files; by default `$TVG_DATA/qvhighlights`.

    Raises:
        DataError: `TVG_DATA` is not set, or files are missing or malformed.
    """
    if split not in SPLITS:
        raise DataError(f"QVHighlights has features of {', '.join(SPLITS)}, found {split!r}")
    if root is None:
        placed = paths.data()
        if placed is None:
            raise DataError(
                "QVHighlights' CLIP features are placed by you: set TVG_DATA to the folder that "
                "holds qvhighlights/ (`python -m tvg_lib.data.doctor` says what and from where)"
            )
        root = placed / "qvhighlights"
    annotations = read_qvhighlights(
        root / f"highlight_{split}_release.jsonl", name=f"qvhighlights-clip/{split}", strict=True
    )
    words = root / "clip_text_features"
    return join(
        annotations,
        QVHIGHLIGHTS_2S,
        FolderStore(root / "clip_features", dim=DIM, array="features"),
        FolderStore(words, dim=DIM, prefix="qid", array="last_hidden_state"),
        FolderStore(words, dim=DIM, prefix="qid", array="pooler_output", vectors=True),
    )
