"""Retrieval without training: what the given space of clips and sentences can do by itself."""

from collections.abc import Sequence

import numpy as np

from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.errors import DataError
from tvg_lib.retrieval.data import unit_rows
from tvg_lib.retrieval.evaluation import report_of_scores

WIDTHS = (1, 3, 5, 7, 9, 11)


def _sentences(dataset: GroundingDataset) -> np.ndarray:
    if dataset.sentence_features is None:
        raise DataError(
            f"{dataset.name} has no sentence vectors in the space of its clips; "
            "a rule without training has nothing to compare"
        )
    vectors = [dataset.sentence_features[query.id] for query in dataset.queries]
    return unit_rows(np.concatenate(vectors))


def mean_pooled_scores(dataset: GroundingDataset) -> np.ndarray:
    """(Q, V) dot product of the sentence with the mean of each video's clips, both of length 1."""
    means = [unit_rows(dataset.clips(video_id)).mean(0) for video_id in dataset.videos]
    return _sentences(dataset) @ unit_rows(np.stack(means)).T


def best_clip_scores(dataset: GroundingDataset, width: int = 1) -> np.ndarray:
    """(Q, V) maximum over clips of the cosine of the sentence with the clip.

    Args:
        dataset: with sentence vectors.
        width: neighbouring clips whose vectors are averaged first (an odd number).
    """
    if width < 1 or width % 2 == 0:
        raise DataError(f"width is an odd number of clips, found {width}")
    sentences = _sentences(dataset)
    scores = np.empty((len(sentences), len(dataset.videos)), np.float32)
    for column, video_id in enumerate(dataset.videos):
        clips = unit_rows(_windowed(dataset.clips(video_id), width))
        scores[:, column] = (sentences @ clips.T).max(1)
    return scores


def _windowed(clips: np.ndarray, width: int) -> np.ndarray:
    """(T, C) means over a window round each clip, shorter at the two ends."""
    steps = np.arange(len(clips))
    first, last = np.maximum(steps - width // 2, 0), np.minimum(steps + width // 2 + 1, len(clips))
    totals = np.cumsum(np.vstack([np.zeros_like(clips[:1]), clips]), axis=0, dtype=np.float64)
    return ((totals[last] - totals[first]) / (last - first)[:, None]).astype(np.float32)


def fitted_width(dataset: GroundingDataset, widths: Sequence[int] = WIDTHS) -> int:
    """The width of `best_clip_scores` with the highest SumR on a data set."""
    values = {
        width: report_of_scores(best_clip_scores(dataset, width), dataset).values["SumR"]
        for width in widths
    }
    return max(values, key=lambda width: values[width])
