"""QVHighlights with CLIP features, which A2FA + F2SGD's own tables were measured on.

Features and annotations are those of Moment-DETR (Lei et al. 2021), which hosts them; they are
never fetched or shipped. They are placed by the user below `$TVG_DATA`, where the doctor looks for
them, too (`tvg_lib.data.doctor`):

    `ANNOTATIONS`   7,218 and 1,550 queries
    `CLIPS`         <video>.npz with "features": (75, 512), a vector for every two seconds
    `WORDS`         qid<query>.npz with "last_hidden_state": (K, 512) words, and "pooler_output":
                    (512,) the sentence

SlowFast, which lies beside them, is left out: the paper uses CLIP alone.
"""

from collections.abc import Sequence
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

# Below `$TVG_DATA`; the first that exists is taken.
ANNOTATIONS: dict[Split, tuple[str, ...]] = {
    split: (f"qvhighlights/highlight_{split}_release.jsonl", f"qvhighlights/{split}.jsonl")
    for split in SPLITS
}
CLIPS = ("qvhighlights/clip_features", "qvhighlights/features/clip_features")
WORDS = ("qvhighlights/clip_text_features", "qvhighlights/features/clip_text_features")


def load(split: Split, root: Path | None = None) -> GroundingDataset:
    """A split with its annotations, CLIP clips, words and sentences; features are read when used.

    Args:
        split: "train" or "val".
        root: folder that holds qvhighlights/; by default `$TVG_DATA`.

    Raises:
        DataError: `TVG_DATA` is not set, or files are missing or malformed.
    """
    if split not in SPLITS:
        raise DataError(f"QVHighlights has features of {', '.join(SPLITS)}, found {split!r}")
    root = paths.data() if root is None else root
    if root is None:
        raise DataError(
            "QVHighlights' CLIP features are placed by you: set TVG_DATA to the folder that holds "
            "qvhighlights/ (`python -m tvg_lib.data.doctor` says what and from where)"
        )
    annotations = read_qvhighlights(
        _placed(root, ANNOTATIONS[split]), name=f"qvhighlights-clip/{split}", strict=True
    )
    words = _placed(root, WORDS)
    return join(
        annotations,
        QVHIGHLIGHTS_2S,
        FolderStore(_placed(root, CLIPS), dim=DIM, array="features"),
        FolderStore(words, dim=DIM, prefix="qid", array="last_hidden_state"),
        FolderStore(words, dim=DIM, prefix="qid", array="pooler_output", vectors=True),
    )


def _placed(root: Path, places: Sequence[str]) -> Path:
    for place in places:
        if (root / place).exists():
            return root / place
    raise DataError(f"{root}: expected {' or '.join(places)}, found neither")
