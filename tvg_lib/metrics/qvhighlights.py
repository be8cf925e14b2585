"""The metrics of QVHighlights, as the official evaluator defines them.

Source: Lei, Berg, Bansal, QVHighlights (NeurIPS 2021), and the definitions in the official code
(jayleicn/moment_detr, standalone_eval, commit 2fa9e32), which differ from a textbook's in ways that
move the numbers. Written anew; the figures agree to the two decimals that are printed.

Moments (`MR-...`), for the length ranges full, short (0, 10] s, middle (10, 30] and long (30, 150]:
  * A range keeps the ground-truth moments whose length lies in it, and the queries that still have
    one. Predictions are never filtered by length. `full` keeps everything.
  * `R1@t`: the first *listed* prediction (whatever its score) reaches IoU >= t with the
    ground-truth moment it overlaps most.
  * `mAP@t`: of the first 10 *listed* predictions, in order of falling score (equal scores keep
    their order), each takes the free ground-truth moment it overlaps most, if that reaches t; the
    AP of a query is the area under its interpolated precision-recall curve; mAP is the mean over
    queries. `mAP` alone is the mean over t = 0.50, 0.55, ..., 0.95.
Highlights (`HL-min-Fair`, `-Good`, `-VeryGood`: a clip is positive for an annotator who rated it at
least 2, 3, 4), on clips of 2 s:
  * `Hit1`: the best-scored clip (the first of equals) is positive for any of the three annotators.
  * `mAP`: mean over annotators and queries of the AP of the clips' scores: the mean, over the score
    levels at which new positives appear, of the interpolated precision. It is 0 for an annotator
    without positive clips, and that still counts.
  * Scores beyond the video's last clip are cut off for `mAP` (not for `Hit1`); missing ones are 0.

Where the official code stops with a bare exception, this one is defined: a query with an empty list
of predicted moments is a miss, and a range without any query gives NaN. One thing is not
reproducible there: when a prediction has *equal* IoU with several free moments, numpy's unstable
sort decides, so the result depends on the processor; here the moment listed last is taken (what
numpy's plain insertion sort gives). It needs a tie at IoU >= 0.5 with two different moments, which
disjoint moments allow only when they touch, are equally long and are covered exactly.
"""

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from tvg_lib.errors import DataError
from tvg_lib.json_fields import json_lines, read_text
from tvg_lib.metrics.recall import pad_windows
from tvg_lib.metrics.report import MetricReport, percent
from tvg_lib.moments import interval_iou

IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LENGTH_RANGES = {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": None}
SALIENCY_LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}
CLIP_SECONDS = 2
MAX_WINDOWS = 10
NUM_ANNOTATORS = 3
TASK_KEYS = ("pred_relevant_windows", "pred_saliency_scores")


@dataclass(frozen=True, eq=False, repr=False)
class QVHighlightsReport(MetricReport):
    """QVHighlights metrics; `values` and `contributions` hold the official brief names.

    Attributes:
        official: the official evaluator's whole output: `brief`, then every threshold of every
            range (`short`, `middle`, `long`, `full`) and every saliency level, rounded to 2
            decimals; NaN where a range has no query.
    """

    official: dict[str, dict]


def evaluate(
    predictions: Sequence[Mapping[str, Any]],
    ground_truth: Sequence[Mapping[str, Any]],
    *,
    allow_missing: bool = False,
    strict: bool = False,
) -> QVHighlightsReport:
    """QVHighlights metrics of predictions held in memory.

    Args:
        predictions: official submission entries: `qid`, and either or both of
            `pred_relevant_windows` (list of [start s, end s, score]) and `pred_saliency_scores`
            (one score per 2-second clip), the same of them in every entry. `query` and `vid` are
            not used.
        ground_truth: official annotations: `qid`, `relevant_windows` (list of [start s, end s]),
            and for highlights `duration` (s), `relevant_clip_ids` (n) and `saliency_scores`
            (n, 3).
        allow_missing: evaluate the queries that both sides have, instead of refusing a mismatch.
        strict: refuse saliency scores whose number is not the video's number of clips, instead of
            warning and cutting or filling with zeros as the official evaluator does.

    Raises:
        DataError: names the entry, what was expected and what was found.
    """
    return _evaluate(
        [_Entry(f"prediction {i}", dict(entry)) for i, entry in enumerate(predictions)],
        [_Entry(f"ground truth {i}", dict(entry)) for i, entry in enumerate(ground_truth)],
        ("predictions", "ground truth"),
        allow_missing,
        strict,
    )


def evaluate_files(
    predictions: str | PathLike,
    ground_truth: str | PathLike,
    *,
    allow_missing: bool = False,
    strict: bool = False,
) -> QVHighlightsReport:
    """`evaluate` on two JSON-lines files.

    Raises:
        DataError: names the file and line, what was expected and what was found.
    """
    return _evaluate(
        _read_jsonl(Path(predictions)),
        _read_jsonl(Path(ground_truth)),
        (str(predictions), str(ground_truth)),
        allow_missing,
        strict,
    )


def detection_average_precision(
    windows: np.ndarray,
    windows_mask: np.ndarray,
    moments: np.ndarray,
    moments_mask: np.ndarray,
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> np.ndarray:
    """ActivityNet's detection AP, one query at a time, for all queries together.

    Args:
        windows: (Q, N, 2) predictions in order of falling score.
        windows_mask: (Q, N) True where a prediction is valid (valid ones first).
        moments: (Q, M, 2) ground truth.
        moments_mask: (Q, M) True where a moment counts.
        thresholds: T thresholds on IoU, all above 0.

    Returns:
        (Q, T) average precision in [0, 1]; 0 for a query without predictions or moments.
    """
    t = np.asarray(thresholds)
    Q, N = windows_mask.shape
    rows = np.arange(Q)[:, None]
    pairs = windows_mask[:, :, None] & moments_mask[:, None, :]
    iou = np.where(pairs, interval_iou(windows, moments), -1.0)
    # Every prediction's moments from most to least overlapped; of equals the last listed first.
    order = iou.argsort(axis=2, kind="stable")[:, :, ::-1]
    iou = np.take_along_axis(iou, order, axis=2)

    free = np.ones((Q, len(t), moments_mask.shape[1]), dtype=bool)
    found = np.zeros((Q, len(t), N))
    for n in range(N):
        candidates = order[:, n]  # (Q, M)
        open_ = np.take_along_axis(free, candidates[:, None, :], axis=2)
        reached = open_ & (iou[:, n, None, :] >= t[:, None])  # (Q, T, M)
        hit = reached.any(axis=2)
        taken = candidates[rows, reached.argmax(axis=2)]  # (Q, T)
        free[rows, np.arange(len(t)), taken] &= ~hit
        found[:, :, n] = hit

    found = found.cumsum(axis=2)
    precision = found / np.arange(1, N + 1)
    interpolated = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
    recall = found / np.maximum(moments_mask.sum(axis=1), 1)[:, None, None]
    # A running sum adds from left to right, as one would by hand; `sum` groups its terms, and the
    # last bit can decide which way a figure is rounded.
    return (interpolated * np.diff(recall, axis=2, prepend=0)).cumsum(axis=2)[:, :, -1]


def saliency_average_precision(
    scores: np.ndarray, positive: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """The official AP of clip scores: mean interpolated precision where new positives appear.

    Clips of equal score enter together. Unlike the usual AP, the steps are not weighted by how
    many positives they bring.

    Args:
        scores: (Q, L) clip scores.
        positive: (Q, L, C) True where a clip is positive, for C labellings.
        mask: (Q, L) True where a clip is valid.

    Returns:
        (Q, C) average precision in [0, 1]; 0 where a labelling has no positive clip.
    """
    Q, L = scores.shape
    keys = np.where(mask, -scores, np.inf)
    order = keys.argsort(axis=1, kind="stable")
    keys = np.take_along_axis(keys, order, axis=1)
    # The last clip of each group of equal scores; padding sorts last and never ends a valid group.
    ends = np.append(keys[:, 1:] != keys[:, :-1], np.ones((Q, 1), dtype=bool), axis=1)
    ends = (ends & np.isfinite(keys))[:, :, None]

    labels = np.take_along_axis(positive & mask[:, :, None], order[:, :, None], axis=1)
    found = labels.cumsum(axis=1)  # (Q, L, C)
    precision = np.where(ends, found / np.arange(1, L + 1)[:, None], 0.0)
    interpolated = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    at_ends = np.maximum.accumulate(np.where(ends, found, 0), axis=1)
    step = ends & (np.diff(at_ends, axis=1, prepend=0) > 0)
    return (interpolated * step).sum(axis=1) / np.maximum(step.sum(axis=1), 1)


# ------------------------------------------------------------------------------------------------
# From checked entries to numbers


@dataclass(frozen=True)
class _Entry:
    """One JSON object and where it stands, for messages."""

    where: str
    data: dict[str, Any]

    def fail(self, problem: str) -> NoReturn:
        raise DataError(f"{self.where}: {problem}")


def _evaluate(
    predictions: list[_Entry],
    ground_truth: list[_Entry],
    names: tuple[str, str],
    allow_missing: bool,
    strict: bool,
) -> QVHighlightsReport:
    pred_by_id = _by_id(predictions, names[0])
    true_by_id = _by_id(ground_truth, names[1])
    shared = _matched_ids(pred_by_id, true_by_id, names, allow_missing)
    pred = [pred_by_id[qid] for qid in shared]
    true = [true_by_id[qid] for qid in shared]

    tasks = [key for key in TASK_KEYS if key in pred[0].data]
    if not tasks:
        pred[0].fail(
            "expected 'pred_relevant_windows' or 'pred_saliency_scores' or both, found only "
            f"{_shown(sorted(pred[0].data))}"
        )
    for entry in pred:
        for key in TASK_KEYS:
            if (key in entry.data) != (key in tasks):
                have, lack = ("lacks", "has") if key in tasks else ("has", "lacks")
                entry.fail(f"{have} {key!r}, which {pred[0].where} {lack}; expected all alike")

    values: dict[str, float] = {}
    contributions: dict[str, np.ndarray] = {}
    tables: dict[str, dict] = {}
    if "pred_relevant_windows" in tasks:
        _moment_metrics(pred, true, values, contributions, tables)
    if "pred_saliency_scores" in tasks:
        _highlight_metrics(pred, true, strict, values, contributions, tables)
    brief = {name: _rounded(value) for name, value in values.items()}
    official = {"brief": brief, **{name: tables[name] for name in sorted(tables)}}
    return QVHighlightsReport(tuple(shared), values, contributions, official)


def _moment_metrics(
    pred: list[_Entry],
    true: list[_Entry],
    values: dict[str, float],
    contributions: dict[str, np.ndarray],
    tables: dict[str, dict],
) -> None:
    """Adds the `MR-` metrics of Q matched entries."""
    listed, listed_mask = pad_windows(
        [_windows(e, "pred_relevant_windows", 3, may_be_empty=True)[:MAX_WINDOWS] for e in pred]
    )
    moments, moments_mask = pad_windows(
        [_windows(e, "relevant_windows", 2, may_be_empty=False) for e in true]
    )
    lengths = moments[:, :, 1] - moments[:, :, 0]
    first, has_first = listed[:, :1, :2], listed_mask[:, 0]
    order = np.where(listed_mask, -listed[:, :, 2], np.inf).argsort(axis=1, kind="stable")
    ranked = np.take_along_axis(listed[:, :, :2], order[:, :, None], axis=1)

    mr_values, mr_contributions = {}, {}
    for name, limits in LENGTH_RANGES.items():
        kept = moments_mask
        if limits is not None:
            kept = kept & (limits[0] < lengths) & (lengths <= limits[1])
        counts = kept.any(axis=1)

        ap = detection_average_precision(ranked, listed_mask, moments, kept)
        top1 = np.where(has_first, _iou_of_first(first, moments, kept), 0.0)
        if counts.any():
            # Averaged in the official order (queries, then thresholds): a last bit can decide
            # which way a figure is rounded.
            by_threshold = ap[counts].mean(axis=0)
            mean_ap = {str(t): 100 * v for t, v in zip(IOU_THRESHOLDS, by_threshold, strict=True)}
            mean_ap["average"] = 100 * by_threshold.mean()
            r1 = {str(t): (top1[counts] >= t).mean() * 100 for t in IOU_THRESHOLDS}
        else:
            mean_ap = dict.fromkeys([*map(str, IOU_THRESHOLDS), "average"], math.nan)
            r1 = dict.fromkeys(map(str, IOU_THRESHOLDS), math.nan)
        tables[name] = {
            "MR-mAP": {key: _rounded(v) for key, v in mean_ap.items()},
            "MR-R1": {key: _rounded(v) for key, v in r1.items()},
        }

        per_query = {"mAP": (mean_ap["average"], ap.mean(axis=1))}
        if name == "full":
            for t in (0.5, 0.75):
                per_query[f"mAP@{t}"] = mean_ap[str(t)], ap[:, IOU_THRESHOLDS.index(t)]
            for t in (0.5, 0.7):
                per_query[f"R1@{t}"] = r1[str(t)], top1 >= t
        for key, (value, query_values) in per_query.items():
            mr_values[f"MR-{name}-{key}"] = float(value)
            mr_contributions[f"MR-{name}-{key}"] = np.where(counts, percent(query_values), np.nan)
    for key in sorted(mr_values):
        values[key], contributions[key] = mr_values[key], mr_contributions[key]


def _iou_of_first(first: np.ndarray, moments: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(Q,) IoU of each query's first window with the kept moment it overlaps most.

    The value is overlap over common hull, as in the official R1: the same number, but for a last
    bit that matters at a threshold.
    """
    iou = np.where(kept, interval_iou(first, moments)[:, 0], -1.0)
    best = moments[np.arange(len(moments)), iou.argmax(axis=1)]
    start, end = first[:, 0, 0], first[:, 0, 1]
    overlap = np.maximum(np.minimum(end, best[:, 1]) - np.maximum(start, best[:, 0]), 0.0)
    hull = np.maximum(end, best[:, 1]) - np.minimum(start, best[:, 0])
    return np.divide(overlap, hull, out=np.zeros_like(overlap), where=hull > 0)


def _highlight_metrics(
    pred: list[_Entry],
    true: list[_Entry],
    strict: bool,
    values: dict[str, float],
    contributions: dict[str, np.ndarray],
    tables: dict[str, dict],
) -> None:
    """Adds the `HL-` metrics of Q matched entries."""
    ratings = [_ratings(e) for e in true]
    listed = [_saliency_scores(e) for e in pred]
    wrong = [q for q in range(len(pred)) if len(listed[q]) != len(ratings[q])]
    if wrong:
        q = wrong[0]
        problem = (
            f"expected {len(ratings[q])} 'pred_saliency_scores', one per {CLIP_SECONDS}-second "
            f"clip ({true[q].where}), found {len(listed[q])}"
        )
        if strict:
            pred[q].fail(problem)
        warnings.warn(
            f"{pred[q].where}: {problem}; {len(wrong)} of {len(pred)} queries differ so. Surplus "
            "scores are ignored and missing ones set to 0, as the official evaluator does",
            stacklevel=4,
        )

    Q, L = len(pred), max(len(r) for r in ratings)
    mask = np.zeros((Q, L), dtype=bool)
    rating = np.full((Q, L, NUM_ANNOTATORS), -1.0)
    scores = np.zeros((Q, L))
    top = np.full(Q, -1)
    for q in range(Q):
        clips, given = len(ratings[q]), listed[q][: len(ratings[q])]
        mask[q, :clips] = True
        rating[q, :clips] = ratings[q]
        scores[q, : len(given)] = given
        best = int(listed[q].argmax())
        top[q] = best if best < clips else -1

    for name, least in SALIENCY_LEVELS.items():
        positive = rating >= least  # (Q, L, 3)
        ap = saliency_average_precision(scores, positive, mask)
        hit = positive[np.arange(Q), top].any(axis=1) & (top >= 0)
        key = f"HL-min-{name}"
        per_query = {"mAP": (ap.mean(), ap.mean(axis=1)), "Hit1": (hit.mean(), hit)}
        for metric, (value, query_values) in per_query.items():
            values[f"{key}-{metric}"] = float(100 * value)
            contributions[f"{key}-{metric}"] = percent(query_values)
        tables[key] = {f"HL-{m}": _rounded(values[f"{key}-{m}"]) for m in per_query}


def _rounded(value: float) -> float:
    return float(f"{value:.2f}")


# ------------------------------------------------------------------------------------------------
# Reading and checking


def _read_jsonl(path: Path) -> list[_Entry]:
    return [_Entry(where, data) for where, data in json_lines(read_text(path), str(path))]


def _by_id(entries: list[_Entry], name: str) -> dict[Hashable, _Entry]:
    if not entries:
        raise DataError(f"{name}: expected at least one entry, found none")
    by_id: dict[Hashable, _Entry] = {}
    for entry in entries:
        qid = entry.data.get("qid")
        if isinstance(qid, bool) or not isinstance(qid, int | str):
            found = _shown(qid) if "qid" in entry.data else f"keys {_shown(sorted(entry.data))}"
            entry.fail(f"expected a 'qid' (integer or string), found {found}")
        if qid in by_id:
            entry.fail(f"expected each qid once, found {qid!r} again (first: {by_id[qid].where})")
        by_id[qid] = entry
    return by_id


def _matched_ids(
    pred: dict[Hashable, _Entry],
    true: dict[Hashable, _Entry],
    names: tuple[str, str],
    allow_missing: bool,
) -> list[Hashable]:
    """The ids to evaluate, in the order of the predictions."""
    shared = [qid for qid in pred if qid in true]
    if len(shared) == len(pred) == len(true) or (allow_missing and shared):
        return shared
    problems = []
    for ids, others, have, lack in ((true, pred, *names[::-1]), (pred, true, *names)):
        only = [qid for qid in ids if qid not in others]
        if only:
            problems.append(f"{len(only)} only in {have}, not in {lack}: {_shown(only[:5], 200)}")
    raise DataError(
        f"expected the same qids in predictions and ground truth, found {len(shared)} in both; "
        + "; ".join(problems)
    )


def _windows(entry: _Entry, key: str, width: int, *, may_be_empty: bool) -> np.ndarray:
    """(N, width) windows under `key`, checked."""
    form = "[start, end, score]" if width == 3 else "[start, end]"
    windows = _list(entry, key, f"a list of {form}")
    if not windows and not may_be_empty:
        entry.fail(f"expected at least one {form} in {key!r}, found none")
    for i, window in enumerate(windows):
        place = f"{key}[{i}]"
        window = _list_value(window)
        if window is None or len(window) != width or not all(map(_is_number, window)):
            entry.fail(f"expected {place} to be {form} of finite numbers, found {_shown(window)}")
        if window[0] > window[1]:
            entry.fail(f"expected start <= end in {place}, found {_shown(window)}")
    return np.array([_list_value(w) for w in windows], dtype=np.float64).reshape(-1, width)


def _saliency_scores(entry: _Entry) -> np.ndarray:
    """(n,) clip scores of a prediction, checked; n >= 1."""
    key = "pred_saliency_scores"
    scores = _list(entry, key, "a list of one score per clip")
    if not scores:
        entry.fail(f"expected one score per clip in {key!r}, found an empty list")
    for i, score in enumerate(scores):
        if not _is_number(score):
            entry.fail(f"expected {key}[{i}] to be a finite number, found {_shown(score)}")
    return np.array(scores, dtype=np.float64)


def _ratings(entry: _Entry) -> np.ndarray:
    """(L, 3) ratings of every clip of a ground-truth video, 0 where a clip is not relevant."""
    duration = entry.data.get("duration")
    if not _is_number(duration) or duration < CLIP_SECONDS:
        entry.fail(
            f"expected a 'duration' of at least {CLIP_SECONDS} seconds, found {_shown(duration)}"
        )
    L = int(duration / CLIP_SECONDS)
    clips = _list(entry, "relevant_clip_ids", "a list of clip indices")
    for clip in clips:
        if isinstance(clip, bool) or not isinstance(clip, int) or not 0 <= clip < L:
            entry.fail(
                f"expected 'relevant_clip_ids' in [0, {L}) for {duration} s, found {_shown(clip)}"
            )
    rows = _list(entry, "saliency_scores", f"{NUM_ANNOTATORS} ratings per relevant clip")
    if len(rows) != len(clips):
        entry.fail(
            f"expected {len(clips)} 'saliency_scores', one per relevant clip, found {len(rows)}"
        )
    for i, row in enumerate(rows):
        row = _list_value(row)
        if row is None or len(row) != NUM_ANNOTATORS or not all(map(_is_number, row)):
            entry.fail(
                f"expected saliency_scores[{i}] to be {NUM_ANNOTATORS} ratings, found {_shown(row)}"
            )
    ratings = np.zeros((L, NUM_ANNOTATORS))
    if clips:
        ratings[clips] = rows
    return ratings


def _list(entry: _Entry, key: str, expected: str) -> Sequence:
    if key not in entry.data:
        entry.fail(f"expected {key!r}, {expected}; found keys {_shown(sorted(entry.data))}")
    value = _list_value(entry.data[key])
    if value is None:
        entry.fail(f"expected {key!r} to be {expected}, found {_shown(entry.data[key])}")
    return value


def _list_value(value: Any) -> Sequence | None:
    """A list, tuple or array as a plain sequence; None for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return value if isinstance(value, list | tuple) else None


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _shown(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
