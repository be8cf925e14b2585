"""QVHighlights metrics: against numbers of the official evaluator, a slow reference, properties."""

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvg_lib.errors import DataError
from tvg_lib.metrics import evaluate, evaluate_files
from tvg_lib.metrics.qvhighlights import (
    IOU_THRESHOLDS,
    detection_average_precision,
    saliency_average_precision,
)

MOMENT_KEYS = [
    "MR-full-R1@0.5",
    "MR-full-R1@0.7",
    "MR-full-mAP",
    "MR-full-mAP@0.5",
    "MR-full-mAP@0.75",
    "MR-long-mAP",
    "MR-middle-mAP",
    "MR-short-mAP",
]
HIGHLIGHT_KEYS = [
    f"HL-min-{level}-{m}" for level in ("Fair", "Good", "VeryGood") for m in ("mAP", "Hit1")
]

# ------------------------------------------------------------------------------------------------
# Numbers printed by the official evaluator (jayleicn/moment_detr, standalone_eval/eval.py at
# 2fa9e32) for the inputs that `annotations` and `submission` make. Only `random.Random.random`
# is drawn from, whose stream Python keeps the same for a seed.


def annotations(seed: int, num_queries: int) -> list[dict]:
    """Ground truth with disjoint moments of all lengths, odd durations and random ratings."""
    draw = random.Random(seed).random
    entries = []
    for qid in range(num_queries):
        duration = 150 if draw() < 0.7 else 60 + int(draw() * 90)
        windows, start = [], int(draw() * 20)
        while start < duration - 4 and len(windows) < 6:
            end = min(start + 2 + int(draw() ** 3 * 90), duration)
            windows.append([start, end])
            start = end + 1 + int(draw() * 40)
        clips = [c for c in range(duration // 2) if any(s <= 2 * c < e for s, e in windows)]
        ratings = [[int(draw() * 5) for _ in range(3)] for _ in clips]
        entries.append(
            {
                "qid": qid,
                "query": f"query {qid}",
                "vid": f"video{qid}",
                "duration": duration,
                "relevant_windows": windows,
                "relevant_clip_ids": clips,
                "saliency_scores": ratings,
            }
        )
    return entries


def submission(truth: list[dict], seed: int, *, noise: float, step: float) -> list[dict]:
    """Predictions around the truth; times and scores are multiples of `step` (many ties).

    Unsorted, from 1 to 14 windows, some of them twice; some score lists too short or too long.
    """
    draw = random.Random(seed).random
    entries = []
    for entry in truth:
        windows = []
        for _ in range(1 + int(draw() * 12)):
            start, end = entry["relevant_windows"][int(draw() * len(entry["relevant_windows"]))]
            start = max(0.0, start + noise * (draw() - 0.5))
            end = max(start, end + noise * (draw() - 0.5))
            windows.append([round(x / step) * step for x in (start, end + step, 8 * draw() * step)])
        windows += windows[:2] if draw() < 0.3 else []
        length = entry["duration"] // 2 + (int(draw() * 9) - 4 if draw() < 0.2 else 0)
        scores = [round((draw() - 0.5) * 4 / step) * step for _ in range(length)]
        for clip, rating in zip(entry["relevant_clip_ids"], entry["saliency_scores"], strict=True):
            if clip < length:
                scores[clip] += sum(rating) / 6
        entries.append(
            {
                "qid": entry["qid"],
                "query": entry["query"],
                "vid": entry["vid"],
                "pred_relevant_windows": windows,
                "pred_saliency_scores": scores,
            }
        )
    return entries


# (queries, seed, noise in seconds, step): MOMENT_KEYS + HIGHLIGHT_KEYS.
# fmt: off
OFFICIAL_SYNTHETIC = {
    (8, 1, 10, 0.5): [87.5, 87.5, 48.82, 72.96, 44.58, 61.86, 26.46, 17.24,
        61.15, 100.0, 46.21, 100.0, 33.16, 100.0],
    (40, 2, 30, 0.25): [42.5, 20.0, 16.02, 32.9, 13.52, 32.83, 4.55, 0.88,
        56.73, 97.5, 45.95, 97.5, 32.53, 87.5],
    (40, 3, 60, 2.0): [22.5, 5.0, 7.94, 17.48, 5.47, 16.65, 0.79, 1.43,
        55.74, 97.5, 44.18, 97.5, 29.95, 87.5],
    (16, 4, 4, 1.0): [100.0, 68.75, 48.6, 69.61, 49.24, 46.52, 54.7, 13.14,
        60.55, 100.0, 47.68, 100.0, 28.46, 81.25],
}
# fmt: on

# (seed, noise in seconds, step) of submissions on the real test split: likewise.
# fmt: off
OFFICIAL_REAL = {
    (7, 16, 2.0): [84.18, 56.94, 51.99, 80.33, 53.43, 74.45, 42.95, 7.44,
        55.34, 96.82, 47.5, 95.65, 30.32, 84.5],
    (8, 40, 0.1): [47.67, 22.18, 26.86, 51.95, 22.98, 50.79, 15.52, 1.41,
        63.87, 98.7, 55.53, 97.28, 35.03, 82.36],
}
# fmt: on


@pytest.mark.filterwarnings("ignore:.*pred_saliency_scores")
@pytest.mark.parametrize("case", OFFICIAL_SYNTHETIC)
def test_agrees_with_official_evaluator_on_synthetic_data(case):
    num_queries, seed, noise, step = case
    truth = annotations(seed, num_queries)
    report = evaluate(submission(truth, seed + 1, noise=noise, step=step), truth)
    expected = dict(zip(MOMENT_KEYS + HIGHLIGHT_KEYS, OFFICIAL_SYNTHETIC[case], strict=True))
    assert report.brief() == expected
    assert list(report.brief()) == list(expected)
    assert report.official["brief"] == expected


@pytest.mark.filterwarnings("ignore:.*pred_saliency_scores")
@pytest.mark.parametrize("case", OFFICIAL_REAL)
def test_agrees_with_official_evaluator_on_real_data(case, tvg_data):
    seed, noise, step = case
    truth = read_jsonl(tvg_data / "qvhighlights" / "test.jsonl")
    report = evaluate(submission(truth, seed, noise=noise, step=step), truth)
    expected = dict(zip(MOMENT_KEYS + HIGHLIGHT_KEYS, OFFICIAL_REAL[case], strict=True))
    assert report.brief() == expected


def test_ground_truth_as_prediction_saturates_on_real_data(tvg_data):
    path = tvg_data / "qvhighlights" / "test.jsonl"
    truth = read_jsonl(path)
    report = evaluate([perfect(entry) for entry in truth], truth)
    assert len(report.query_ids) == 1542
    brief = report.brief()
    assert brief["MR-full-R1@0.5"] == brief["MR-full-R1@0.7"] == 100
    # A query with n > 10 moments can have only 10 of them found.
    counts = np.array([len(entry["relevant_windows"]) for entry in truth])
    reachable = float(f"{100 * np.minimum(1, 10 / counts).mean():.2f}")
    assert reachable < 100
    assert brief["MR-full-mAP"] == brief["MR-full-mAP@0.75"] == reachable
    # Without any clip rated so high by any annotator there is nothing to hit.
    for level, least in {"Fair": 2, "Good": 3, "VeryGood": 4}.items():
        some = [max(max(r) for r in entry["saliency_scores"]) >= least for entry in truth]
        assert brief[f"HL-min-{level}-Hit1"] <= float(f"{100 * np.mean(some):.2f}")
    assert brief["HL-min-Fair-Hit1"] > 99


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def perfect(entry: dict) -> dict:
    """The ground truth as a prediction; a clip scores the sum of its ratings."""
    scores = [0.0] * int(entry["duration"] / 2)
    for clip, ratings in zip(entry["relevant_clip_ids"], entry["saliency_scores"], strict=True):
        scores[clip] = float(sum(ratings))
    return {
        "qid": entry["qid"],
        "pred_relevant_windows": [[s, e, 1.0] for s, e in entry["relevant_windows"]],
        "pred_saliency_scores": scores,
    }


# ------------------------------------------------------------------------------------------------
# Hand-computed


def truth_entry(qid=1, windows=((10, 20),), duration=40, clips=None, ratings=None) -> dict:
    clips = [5, 6, 7, 8, 9] if clips is None else clips
    return {
        "qid": qid,
        "duration": duration,
        "relevant_windows": [list(w) for w in windows],
        "relevant_clip_ids": clips,
        "saliency_scores": [[4, 4, 4]] * len(clips) if ratings is None else ratings,
    }


def test_moment_ap_by_hand():
    # Two moments; the predictions in order of score: found, false, found.
    # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: AP = 1/2 * 1 + 1/2 * 2/3 = 5/6.
    truth = [truth_entry(windows=[(0, 10), (20, 40)])]
    windows = [[30, 40, 0.5], [20, 40, 0.2], [0, 10, 0.9]]
    brief = evaluate([{"qid": 1, "pred_relevant_windows": windows}], truth).brief()
    # The first listed window overlaps [20, 40] by one half, though it does not score highest.
    assert brief["MR-full-R1@0.5"] == 100
    assert brief["MR-full-R1@0.7"] == 0
    # At IoU 0.5 the second prediction takes [20, 40], so the third finds nothing new: AP 1.
    assert brief["MR-full-mAP@0.5"] == 100
    assert brief["MR-full-mAP@0.75"] == 83.33
    assert brief["MR-full-mAP"] == 85.0  # (1 + 9 * 5/6) / 10
    # Range short keeps [0, 10], middle [20, 40]. Predictions are not filtered by length, so the
    # latter is found at rank 2 at IoU 0.5, at rank 3 above: (1/2 + 9 * 1/3) / 10.
    assert brief["MR-short-mAP"] == 100
    assert brief["MR-middle-mAP"] == 35.0
    assert math.isnan(brief["MR-long-mAP"])


def test_highlight_ap_by_hand():
    # Four clips, ranked 0, 1, 2, 3. Annotator A likes 0 and 2: precision 1 and 2/3, AP 5/6.
    # B likes 3: AP 1/4. C likes none: 0. The mean counts all three annotators.
    truth = [truth_entry(windows=[(0, 8)], duration=8, clips=[0, 2, 3],
                         ratings=[[2, 0, 1], [3, 0, 0], [0, 2, 0]])]  # fmt: skip
    entry = {"qid": 1, "pred_saliency_scores": [0.9, 0.8, 0.7, 0.6]}
    brief = evaluate([entry], truth).brief()
    assert list(brief) == HIGHLIGHT_KEYS
    assert brief["HL-min-Fair-mAP"] == float(f"{100 * (5 / 6 + 1 / 4) / 3:.2f}")
    assert brief["HL-min-Fair-Hit1"] == 100
    assert brief["HL-min-Good-mAP"] == float(f"{100 * (1 / 3) / 3:.2f}")
    assert brief["HL-min-Good-Hit1"] == 0
    assert brief["HL-min-VeryGood-mAP"] == 0


def test_equal_clip_scores_enter_together_and_steps_are_not_weighted():
    # Scores 1 1 1 0: at the first step 2 of 3 are positive, at the second 3 of 4. The interpolated
    # precision is 3/4 at both steps; weighting by positives would not differ here, order would.
    ap = saliency_average_precision(
        np.array([[1.0, 1.0, 1.0, 0.0]]),
        np.array([[[True], [False], [True], [True]]]),
        np.ones((1, 4), dtype=bool),
    )
    assert ap[0, 0] == pytest.approx(3 / 4)
    # Scores 3 2 2 1: steps of 1 positive (precision 1), of 1 (2/3), none: mean 5/6 of two steps.
    # Swapping the tied clips changes nothing.
    for labels in ([True, True, False, False], [True, False, True, False]):
        ap = saliency_average_precision(
            np.array([[3.0, 2.0, 2.0, 1.0]]),
            np.array(labels)[None, :, None],
            np.ones((1, 4), dtype=bool),
        )
        assert ap[0, 0] == pytest.approx(5 / 6)
    # Scores 2 1 1 1 0: a step of 1 positive at precision 1, a step of 2 at 3/4: (1 + 3/4) / 2,
    # where the usual AP would weight the second step twice.
    ap = saliency_average_precision(
        np.array([[2.0, 1.0, 1.0, 1.0, 0.0]]),
        np.array([[[True], [True], [True], [False], [False]]]),
        np.ones((1, 5), dtype=bool),
    )
    assert ap[0, 0] == pytest.approx(7 / 8)


def test_range_borders_belong_to_the_shorter_range():
    lengths = {"short": (1, 10), "middle": (11, 30), "long": (31, 150)}
    for name, ends in lengths.items():
        for length in ends:
            truth = [truth_entry(windows=[(0, length)], duration=200)]
            brief = evaluate([{"qid": 1, "pred_relevant_windows": [[0, length, 1]]}], truth).brief()
            for other in lengths:
                value = brief[f"MR-{other}-mAP"]
                assert value == 100 if other == name else math.isnan(value)
    # Longer than every range: in `full` only.
    truth = [truth_entry(windows=[(0, 151)], duration=200)]
    brief = evaluate([{"qid": 1, "pred_relevant_windows": [[0, 151, 1]]}], truth).brief()
    assert brief["MR-full-mAP"] == 100
    assert all(math.isnan(brief[f"MR-{name}-mAP"]) for name in lengths)


def test_only_the_first_ten_listed_windows_count_whatever_their_score():
    truth = [truth_entry()]
    windows = [[30, 31, 0.1]] * 10 + [[10, 20, 0.9]]
    assert (
        evaluate([{"qid": 1, "pred_relevant_windows": windows}], truth).brief()["MR-full-mAP"] == 0
    )
    brief = evaluate([{"qid": 1, "pred_relevant_windows": windows[1:]}], truth).brief()
    assert brief["MR-full-mAP"] == 100
    assert brief["MR-full-R1@0.5"] == 0


def test_a_moment_is_found_once_only():
    truth = [truth_entry(windows=[(0, 10), (20, 30)])]
    windows = [[0, 10, 0.9], [0, 10, 0.8], [20, 30, 0.7]]
    brief = evaluate([{"qid": 1, "pred_relevant_windows": windows}], truth).brief()
    assert brief["MR-full-mAP"] == 83.33


def test_a_prediction_falls_back_on_the_next_best_free_moment():
    # Overlapping moments: the second prediction's best one is taken, the other reaches 0.5 too.
    truth = [truth_entry(windows=[(0, 10), (2, 10)])]
    windows = [[0, 10, 0.9], [0, 10, 0.8]]
    official = evaluate([{"qid": 1, "pred_relevant_windows": windows}], truth).official
    assert official["full"]["MR-mAP"]["0.8"] == 100
    assert official["full"]["MR-mAP"]["0.85"] == 50


def test_of_equal_overlaps_the_moment_listed_last_is_taken():
    # [0, 20] covers both moments by one half; taking the second leaves the first to [0, 10].
    windows = [[0, 20, 0.9], [0, 10, 0.8]]
    for moments, ap in (([(0, 10), (10, 20)], 100), ([(10, 20), (0, 10)], 50)):
        truth = [truth_entry(windows=moments)]
        brief = evaluate([{"qid": 1, "pred_relevant_windows": windows}], truth).brief()
        assert brief["MR-full-mAP@0.5"] == ap


def test_a_query_without_predicted_windows_is_a_miss_that_counts():
    truth = [truth_entry(1), truth_entry(2)]
    entries = [
        {"qid": 1, "pred_relevant_windows": [[10, 20, 1.0]]},
        {"qid": 2, "pred_relevant_windows": []},
    ]
    brief = evaluate(entries, truth).brief()
    assert brief["MR-full-R1@0.5"] == brief["MR-full-mAP"] == brief["MR-short-mAP"] == 50


def test_length_of_saliency_scores():
    truth = [truth_entry(clips=[0, 19], duration=40)]  # 20 clips, the first and last are good

    def brief(scores, **options):
        entries = [{"qid": 1, "pred_saliency_scores": scores}]
        return evaluate(entries, truth, **options).brief()

    exact = brief([1.0] + [-1.0] * 19)
    assert exact["HL-min-Fair-Hit1"] == 100
    with pytest.warns(UserWarning, match=r"expected 20 .* found 22; 1 of 1"):
        longer = brief([1.0] + [-1.0] * 19 + [9.0, 9.0])
    assert longer["HL-min-Fair-mAP"] == exact["HL-min-Fair-mAP"]
    assert longer["HL-min-Fair-Hit1"] == 0  # the best clip lies behind the video's end
    with pytest.warns(UserWarning, match="found 19"):
        shorter = brief([1.0] + [-1.0] * 18)
    # The missing score counts as 0, which beats -1: both good clips lead.
    assert shorter["HL-min-Fair-mAP"] == 100
    with pytest.raises(DataError, match=r"prediction 0: expected 20 .* found 19"):
        brief([1.0] + [-1.0] * 18, strict=True)


# ------------------------------------------------------------------------------------------------
# A slow reference, one step of the definition at a time


def slow_iou(a, b):
    overlap = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - overlap
    return overlap / union if union > 0 else 0


def slow_detection_ap(windows, moments, threshold):
    free = dict(enumerate(moments))
    curve = []
    for rank, window in enumerate(windows, start=1):
        reachable = [i for i, moment in free.items() if slow_iou(window, moment) >= threshold]
        if reachable:
            del free[max(reachable, key=lambda i: (slow_iou(window, moments[i]), i))]
        found = len(moments) - len(free)
        curve.append((found / len(moments), found / rank))
    area, reached = 0.0, 0.0
    for i, (recall, _) in enumerate(curve):
        area += (recall - reached) * max(precision for _, precision in curve[i:])
        reached = recall
    return area


def slow_saliency_ap(scores, positive):
    levels = sorted(set(scores), reverse=True)
    at_level = []
    for level in levels:
        chosen = [p for s, p in zip(scores, positive, strict=True) if s >= level]
        at_level.append((sum(chosen), sum(chosen) / len(chosen)))
    steps, before = [], 0
    for i, (found, _) in enumerate(at_level):
        if found > before:
            steps.append(max(precision for _, precision in at_level[i:]))
        before = found
    return sum(steps) / len(steps) if steps else 0.0


grid_windows = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(grid_windows, max_size=6), st.lists(grid_windows, min_size=1, max_size=5)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_detection_ap_matches_slow_reference(queries):
    Q = len(queries)
    N, M = (max(len(q[i]) for q in queries) for i in (0, 1))
    # Padding holds windows that would match if it were looked at.
    P, P_mask = np.tile([0.0, 12.0], (Q, max(N, 1), 1)), np.zeros((Q, max(N, 1)), dtype=bool)
    G, G_mask = np.tile([0.0, 12.0], (Q, M, 1)), np.zeros((Q, M), dtype=bool)
    for q, (windows, moments) in enumerate(queries):
        P[q, : len(windows)] = np.reshape(windows, (-1, 2))
        G[q, : len(moments)] = moments
        P_mask[q, : len(windows)] = G_mask[q, : len(moments)] = True
    ap = detection_average_precision(P, P_mask, G, G_mask)
    for q, (windows, moments) in enumerate(queries):
        expected = [slow_detection_ap(windows, moments, t) for t in IOU_THRESHOLDS]
        np.testing.assert_allclose(ap[q], expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=9),
        min_size=1,
        max_size=4,
    )
)
def test_saliency_ap_matches_slow_reference(queries):
    L = max(map(len, queries))
    scores, positive = np.full((len(queries), L), 9.0), np.ones((len(queries), L, 1), dtype=bool)
    mask = np.zeros((len(queries), L), dtype=bool)
    for q, clips in enumerate(queries):
        scores[q, : len(clips)], positive[q, : len(clips), 0] = np.array(clips).T
        mask[q, : len(clips)] = True
    ap = saliency_average_precision(scores, positive, mask)
    for q, clips in enumerate(queries):
        assert ap[q, 0] == pytest.approx(slow_saliency_ap(*zip(*clips, strict=True)))


# ------------------------------------------------------------------------------------------------
# Properties


@pytest.fixture(scope="module")
def small_case() -> tuple[list[dict], list[dict]]:
    truth = annotations(5, 24)
    entries = submission(truth, 6, noise=20, step=0.5)
    for entry, true in zip(entries, truth, strict=True):
        clips = true["duration"] // 2
        entry["pred_saliency_scores"] = (entry["pred_saliency_scores"] + [0.0] * clips)[:clips]
    return entries, truth


def test_contributions_average_to_the_values(small_case):
    report = evaluate(*small_case)
    assert list(report.contributions) == list(report.values) == MOMENT_KEYS + HIGHLIGHT_KEYS
    for name, value in report.values.items():
        assert np.nanmean(report.contributions[name]) == pytest.approx(value)
    assert np.isnan(report.contributions["MR-long-mAP"]).any()
    assert not np.isnan(report.contributions["MR-full-mAP"]).any()


def test_order_of_entries_does_not_matter(small_case):
    entries, truth = small_case
    report = evaluate(entries, truth)
    shuffled = evaluate(entries[::-1], random.Random(0).sample(truth, len(truth)))
    assert shuffled.query_ids == report.query_ids[::-1]
    for name, value in report.values.items():
        assert shuffled.values[name] == pytest.approx(value)
        np.testing.assert_array_equal(
            shuffled.contributions[name][::-1], report.contributions[name]
        )


def test_shifting_all_times_does_not_matter(small_case):
    entries, truth = copy.deepcopy(small_case)
    report = evaluate(entries, truth)
    for entry in entries:
        entry["pred_relevant_windows"] = [
            [s + 64, e + 64, score] for s, e, score in entry["pred_relevant_windows"]
        ]
    for entry in truth:
        entry["relevant_windows"] = [[s + 64, e + 64] for s, e in entry["relevant_windows"]]
    assert evaluate(entries, truth).values == report.values


def test_figures_fall_with_the_threshold(small_case):
    official = evaluate(*small_case).official
    for name in ("short", "middle", "long", "full"):
        for table in official[name].values():
            by_threshold = [table[str(t)] for t in IOU_THRESHOLDS]
            assert by_threshold == sorted(by_threshold, reverse=True)
            assert by_threshold[0] > by_threshold[-1]


def test_each_task_alone_gives_the_same_figures(small_case):
    entries, truth = small_case
    both = evaluate(entries, truth).brief()
    for key, names in (
        ("pred_relevant_windows", MOMENT_KEYS),
        ("pred_saliency_scores", HIGHLIGHT_KEYS),
    ):
        alone = evaluate([{"qid": e["qid"], key: e[key]} for e in entries], truth).brief()
        assert alone == {name: both[name] for name in names}


def test_arrays_are_taken_like_lists(small_case):
    entries, truth = small_case
    as_arrays = [
        {
            "qid": e["qid"],
            "pred_relevant_windows": np.array(e["pred_relevant_windows"]),
            "pred_saliency_scores": np.array(e["pred_saliency_scores"]),
        }
        for e in entries
    ]
    assert evaluate(as_arrays, truth).values == evaluate(entries, truth).values


def test_allow_missing_evaluates_the_queries_of_both(small_case):
    entries, truth = small_case
    with pytest.raises(
        DataError, match=r"found 20 in both; 4 only in ground truth.*\[0, 1, 2, 3\]"
    ):
        evaluate(entries[4:], truth)
    with pytest.raises(DataError, match=r"4 only in predictions.*\[20, 21, 22, 23\]"):
        evaluate(entries, truth[:20])
    report = evaluate(entries[4:], truth[:20], allow_missing=True)
    assert report.query_ids == tuple(range(4, 20))
    assert report.values == evaluate(entries[4:20], truth[4:20]).values
    with pytest.raises(DataError, match="found 0 in both"):
        evaluate(entries[:2], truth[2:4], allow_missing=True)


def test_official_tables_hold_every_range_and_level(small_case):
    official = evaluate(*small_case).official
    levels = ["HL-min-Fair", "HL-min-Good", "HL-min-VeryGood"]
    assert list(official) == ["brief", *levels, "full", "long", "middle", "short"]
    assert list(official["HL-min-Fair"]) == ["HL-mAP", "HL-Hit1"]
    assert official["full"]["MR-R1"]["0.5"] == official["brief"]["MR-full-R1@0.5"]
    assert official["long"]["MR-mAP"]["average"] == official["brief"]["MR-long-mAP"]


def test_reprs_show_the_figures(small_case):
    report = evaluate(*small_case)
    figure = f"{report.values['MR-full-mAP']:.2f}"
    assert "24 queries" in repr(report)
    assert figure in repr(report)
    assert figure in report._repr_html_()


# ------------------------------------------------------------------------------------------------
# Bad input

GOOD_PREDICTION = {
    "qid": 1,
    "query": "q",
    "vid": "v",
    "pred_relevant_windows": [[10, 20, 0.5]],
    "pred_saliency_scores": [0.5] * 20,
}

BAD_PREDICTIONS = {
    "no qid": ({"query": "q"}, "expected a 'qid'"),
    "boolean qid": ({**GOOD_PREDICTION, "qid": True}, "expected a 'qid'.*found True"),
    "list qid": ({**GOOD_PREDICTION, "qid": [1]}, r"expected a 'qid'.*found \[1\]"),
    "nothing predicted": ({"qid": 1}, "expected 'pred_relevant_windows' or"),
    "windows not a list": (
        {**GOOD_PREDICTION, "pred_relevant_windows": {"start": 1}},
        r"'pred_relevant_windows' to be a list of \[start, end, score\], found \{'start': 1\}",
    ),
    "window without score": (
        {**GOOD_PREDICTION, "pred_relevant_windows": [[10, 20, 0.5], [10, 20]]},
        r"pred_relevant_windows\[1\] to be \[start, end, score\].*found \[10, 20\]",
    ),
    "window is a number": (
        {**GOOD_PREDICTION, "pred_relevant_windows": [7]},
        r"pred_relevant_windows\[0\]",
    ),
    "text in a window": (
        {**GOOD_PREDICTION, "pred_relevant_windows": [["10", 20, 0.5]]},
        r"pred_relevant_windows\[0\].*found \['10', 20, 0.5\]",
    ),
    "NaN time": (
        {**GOOD_PREDICTION, "pred_relevant_windows": [[math.nan, 20, 0.5]]},
        r"finite numbers, found \[nan, 20, 0.5\]",
    ),
    "infinite score": (
        {**GOOD_PREDICTION, "pred_relevant_windows": [[10, 20, math.inf]]},
        "finite numbers, found",
    ),
    "integer beyond floats": (
        {**GOOD_PREDICTION, "pred_relevant_windows": [[10, 10**400, 0.5]]},
        "finite numbers, found",
    ),
    "start after end": (
        {**GOOD_PREDICTION, "pred_relevant_windows": [[20, 10, 0.5]]},
        r"start <= end in pred_relevant_windows\[0\], found \[20, 10, 0.5\]",
    ),
    "scores not a list": (
        {**GOOD_PREDICTION, "pred_saliency_scores": 0.5},
        "'pred_saliency_scores' to be a list of one score per clip, found 0.5",
    ),
    "no scores": ({**GOOD_PREDICTION, "pred_saliency_scores": []}, "found an empty list"),
    "NaN score": (
        {**GOOD_PREDICTION, "pred_saliency_scores": [0.5] * 19 + [math.nan]},
        r"pred_saliency_scores\[19\] to be a finite number, found nan",
    ),
    "null score": (
        {**GOOD_PREDICTION, "pred_saliency_scores": [None] * 20},
        r"pred_saliency_scores\[0\] to be a finite number, found None",
    ),
}

BAD_TRUTHS = {
    "no windows key": ({"qid": 1, "duration": 40}, "expected 'relevant_windows'.*found keys"),
    "no windows": (
        {**truth_entry(), "relevant_windows": []},
        r"at least one \[start, end\] in 'relevant_windows', found none",
    ),
    "window ends first": (truth_entry(windows=[(20, 10)]), "start <= end"),
    "no duration": (
        {k: v for k, v in truth_entry().items() if k != "duration"},
        "expected a 'duration' of at least 2 seconds, found None",
    ),
    "short duration": ({**truth_entry(clips=[]), "duration": 1.5}, "found 1.5"),
    "clip outside": (truth_entry(clips=[20]), r"in \[0, 20\) for 40 s, found 20"),
    "negative clip": (truth_entry(clips=[-1]), "found -1"),
    "fractional clip": (truth_entry(clips=[1.5]), "found 1.5"),
    "fewer ratings than clips": (
        truth_entry(ratings=[[1, 2, 3]]),
        "expected 5 'saliency_scores', one per relevant clip, found 1",
    ),
    "two annotators": (
        truth_entry(clips=[1], ratings=[[1, 2]]),
        r"saliency_scores\[0\] to be 3 ratings, found \[1, 2\]",
    ),
}


def write_jsonl(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BAD_PREDICTIONS)
def test_bad_predictions_are_named(name, tmp_path):
    bad, message = BAD_PREDICTIONS[name]
    with pytest.raises(DataError, match=f"prediction 0: .*{message}"):
        evaluate([bad], [truth_entry()])
    predictions = write_jsonl(tmp_path / "p.jsonl", [{**GOOD_PREDICTION, "qid": 2}, bad])
    truth = write_jsonl(tmp_path / "t.jsonl", [truth_entry(2), truth_entry(1)])
    with pytest.raises(DataError) as error:
        evaluate_files(predictions, truth)
    assert f"{predictions}, line 2: " in str(error.value)


@pytest.mark.parametrize("name", BAD_TRUTHS)
def test_bad_ground_truth_is_named(name, tmp_path):
    bad, message = BAD_TRUTHS[name]
    with pytest.raises(DataError, match=f"ground truth 0: .*{message}"):
        evaluate([GOOD_PREDICTION], [bad])
    predictions = write_jsonl(
        tmp_path / "p.jsonl", [{**GOOD_PREDICTION, "qid": 2}, GOOD_PREDICTION]
    )
    truth = write_jsonl(tmp_path / "t.jsonl", [truth_entry(2), bad])
    with pytest.raises(DataError) as error:
        evaluate_files(predictions, truth)
    assert f"{truth}, line 2: " in str(error.value)


def test_entries_must_predict_the_same_tasks():
    entries = [GOOD_PREDICTION, {"qid": 2, "pred_relevant_windows": [[0, 1, 1]]}]
    with pytest.raises(
        DataError, match="prediction 1: lacks 'pred_saliency_scores', which prediction 0 has"
    ):
        evaluate(entries, [truth_entry(1), truth_entry(2)])
    with pytest.raises(DataError, match=r"prediction 1: has 'pred_saliency_scores', .* lacks"):
        evaluate(entries[::-1], [truth_entry(1), truth_entry(2)])


def test_duplicate_and_empty():
    with pytest.raises(DataError, match=r"prediction 1: expected each qid once, found 1 again"):
        evaluate([GOOD_PREDICTION, GOOD_PREDICTION], [truth_entry()])
    with pytest.raises(DataError, match=r"ground truth 1: expected each qid once"):
        evaluate([GOOD_PREDICTION], [truth_entry(), truth_entry()])
    with pytest.raises(DataError, match="predictions: expected at least one entry"):
        evaluate([], [truth_entry()])
    with pytest.raises(DataError, match="ground truth: expected at least one entry"):
        evaluate([GOOD_PREDICTION], [])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(GOOD_PREDICTION)), json_values)
def test_any_json_value_gives_figures_or_a_clear_error(key, value):
    try:
        report = evaluate([{**GOOD_PREDICTION, key: value}], [truth_entry()], strict=True)
    except DataError:
        return
    assert len(report.query_ids) == 1
    assert all(0 <= value <= 100 or math.isnan(value) for value in report.values.values())


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(truth_entry())), json_values)
def test_any_json_value_in_the_truth_gives_figures_or_a_clear_error(key, value):
    try:
        report = evaluate([GOOD_PREDICTION], [{**truth_entry(), key: value}], strict=True)
    except DataError:
        return
    assert len(report.query_ids) == 1
    assert all(0 <= value <= 100 or math.isnan(value) for value in report.values.values())
