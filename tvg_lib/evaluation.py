"""From predictions and a data set to the metrics of the field."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tvg_lib.data.dataset import GroundingDataset, Query
from tvg_lib.decoding import Prediction
from tvg_lib.errors import DataError
from tvg_lib.metrics import QVHighlightsReport, RecallReport, evaluate, recall_at_k


def recall_report(
    predictions: Sequence[Prediction],
    dataset: GroundingDataset,
    ks: Sequence[int] = (1, 5),
    thresholds: Sequence[float] = (0.3, 0.5, 0.7),
) -> RecallReport:
    """Recall@K at IoU thresholds, over every query of the data set.

    Raises:
        DataError: predictions and queries do not correspond.
    """
    by_id = _matched(predictions, dataset)
    report = recall_at_k(
        [by_id[query.id].moments for query in dataset.queries],
        [query.moments for query in dataset.queries],
        ks=ks,
        thresholds=thresholds,
        query_ids=[query.id for query in dataset.queries],
    )
    return replace(report, groups=_recordings(dataset))


def qvhighlights_report(
    predictions: Sequence[Prediction], dataset: GroundingDataset
) -> QVHighlightsReport:
    """Every QVHighlights metric; highlights too where every query has annotated saliency
    and every answer predicts it.

    Raises:
        DataError: predictions and queries do not correspond.
    """
    by_id = _matched(predictions, dataset)
    if any(query.saliency is None for query in dataset.queries):
        by_id = {key: replace(found, saliency=None) for key, found in by_id.items()}
    report = evaluate(
        [submission_entry(by_id[query.id]) for query in dataset.queries],
        [_annotation(query, dataset.videos[query.video_id].duration) for query in dataset.queries],
    )
    return replace(report, groups=_recordings(dataset))


def _recordings(dataset: GroundingDataset) -> tuple[str, ...]:
    """What each query is about: queries of one recording are no independent evidence."""
    return tuple(dataset.recording_of(query) for query in dataset.queries)


def submission_entry(prediction: Prediction) -> dict[str, Any]:
    """One line of QVHighlights' official submission form."""
    entry: dict[str, Any] = {
        "qid": prediction.query_id,
        "query": prediction.text,
        "vid": prediction.video_id,
        "pred_relevant_windows": prediction.moments.tolist(),
    }
    if prediction.saliency is not None:
        entry["pred_saliency_scores"] = prediction.saliency.tolist()
    return entry


def _annotation(query: Query, duration: float) -> dict[str, Any]:
    """One line of QVHighlights' annotation form."""
    entry: dict[str, Any] = {
        "qid": query.id,
        "query": query.text,
        "vid": query.video_id,
        "duration": duration,
        "relevant_windows": query.moments.tolist(),
    }
    if query.saliency is not None:
        entry["relevant_clip_ids"] = query.saliency.clips.tolist()
        entry["saliency_scores"] = query.saliency.scores.tolist()
    return entry


def _matched(
    predictions: Sequence[Prediction], dataset: GroundingDataset
) -> Mapping[str, Prediction]:
    """Predictions by query id, one for every query of the data set."""
    by_id = {prediction.query_id: prediction for prediction in predictions}
    if len(by_id) != len(predictions):
        raise DataError(f"{dataset.name}: {len(predictions) - len(by_id)} queries answered twice")
    different = by_id.keys() ^ {query.id for query in dataset.queries}
    if different:
        raise DataError(
            f"{dataset.name}: {len(dataset)} queries and {len(predictions)} predictions; "
            f"{len(different)} ids on one side only, e.g. {sorted(different)[:3]}"
        )
    return by_id
