"""The figures of MSCL (Nguyen et al., AAAI 2025), drawn from our own runs.

telling_pair, draw_pair   Figure 1: a pyramid, and two moments of a video of which the base
                          misses the longer one; the pair is chosen by a rule
iou_by_length, draw_by_length   Figure 2: IoU against the length of the moment
draw_framework            Figure 3: what the two losses connect
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tvg_lib.data.batching import BatchPlan
from tvg_lib.data.dataset import GroundingDataset, Query
from tvg_lib.decoding import Prediction
from tvg_lib.errors import DataError
from tvg_lib.inline import TRUTH
from tvg_lib.metrics import MetricReport
from tvg_lib.metrics.bootstrap import Estimate, bootstrap
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.moments import TimeGrid
from tvg_lib.probes import length_bins
from tvg_lib.viz import COLOURS, INK, PALE, QUIET, WIDTH, Interval
from tvg_lib.viz_diagrams import arrow, box

LENGTH_EDGES = (0.0, 10.0, 20.0, 40.0, 80.0, 150.0)  # seconds; what is longer joins the last


# --- Figure 2 -------------------------------------------------------------------------------------


def iou_by_length(
    report: MetricReport, dataset: GroundingDataset, edges: Sequence[float] = LENGTH_EDGES
) -> dict[str, Estimate]:
    """Mean IoU of the first answer by the length of the longest true moment.

    Args:
        report: has "mIoU" of every query of `dataset`.
        edges: seconds of the bins (low, high]; the last bin is open.

    Returns:
        By name, such as "mIoU 10-20 s", with 95 % intervals over recordings; bins without queries
        are left out. Names and numbers fit into a run record.
    """
    iou = dict(zip(report.query_ids, report.contributions["mIoU"], strict=True))
    lengths = np.array([_length(query) for query in dataset.queries])
    values = np.array([iou[query.id] for query in dataset.queries])
    recordings = np.array([dataset.recording_of(query) for query in dataset.queries])
    return {
        f"mIoU {name}": bootstrap(values[chosen], groups=recordings[chosen].tolist())
        for name, chosen in length_bins(lengths, edges[:-1]).items()
    }


def draw_by_length(systems: Mapping[str, Mapping[str, Interval]], title: str = "") -> Figure:
    """IoU against the length of the moment, from `iou_by_length` or the metrics of records.

    Args:
        systems: by name, numbers with intervals by the names of bins; other metrics are left out.
        title: of the figure.

    Raises:
        DataError: there is no bin.
    """
    bins = list(
        dict.fromkeys(
            name
            for values in systems.values()
            for name in values
            if name.startswith("mIoU ") and name.endswith(" s")
        )
    )
    if not bins:
        raise DataError("there is nothing to draw: no metric such as 'mIoU 10-20 s'")
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    for number, (system, values) in enumerate(systems.items()):
        shown = [values.get(name) for name in bins]
        x = np.arange(len(bins)) + (number - (len(systems) - 1) / 2) * 0.1
        y = np.array([np.nan if v is None else v.value for v in shown])
        ends = np.array(
            [
                (0.0, 0.0) if v is None or v.low is None else (v.value - v.low, v.high - v.value)
                for v in shown
            ]
        )
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            x, y, ends.T.clip(min=0), fmt="o-", color=colour, capsize=3, ms=4, label=system
        )
    axes.set_xticks(range(len(bins)), [name.removeprefix("mIoU ") for name in bins])
    axes.set_xlabel("length of the moment")
    axes.set_ylabel("mean IoU of the first answer (%)")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.legend()
    return figure


# --- Figure 1 -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TellingPair:
    """Two queries about one video: both systems find the short one, only the method the long."""

    short: Query
    long: Query


def telling_pair(
    dataset: GroundingDataset,
    base: MetricReport,
    method: MetricReport,
    threshold: float = 50.0,
    ratio: float = 2.0,
) -> TellingPair | None:
    """The pair that Figure 1 of the paper shows, by a rule and not by hand.

    Among all pairs of queries about one video whose moments' lengths differ by `ratio` or more,
    where both systems have an IoU of at least `threshold` percent on the shorter moment, and on the
    longer one the method has it and the base has not: the pair whose IoUs on the longer moment
    differ most, then the first by query ids. None where there is no such pair.
    """
    found = _pairs(dataset, base, method, threshold, ratio)
    return min(found, key=lambda item: item[:3])[3] if found else None


def count_pairs(
    dataset: GroundingDataset,
    base: MetricReport,
    method: MetricReport,
    threshold: float = 50.0,
    ratio: float = 2.0,
) -> int:
    """How many pairs `telling_pair` chooses from; swap the reports to count the opposite case."""
    return len(_pairs(dataset, base, method, threshold, ratio))


def _pairs(
    dataset: GroundingDataset,
    base: MetricReport,
    method: MetricReport,
    threshold: float,
    ratio: float,
) -> list[tuple[float, str, str, TellingPair]]:
    """What the base's IoU lacks on the longer moment (negative), the ids, and the pair."""
    ours, theirs = (
        dict(zip(report.query_ids, report.contributions["mIoU"], strict=True))
        for report in (method, base)
    )
    found = []
    for video_id in dataset.videos:
        queries = dataset.queries_of(video_id)
        easy = [q for q in queries if min(ours[q.id], theirs[q.id]) >= threshold]
        won = [q for q in queries if ours[q.id] >= threshold > theirs[q.id]]
        found += [
            (theirs[long.id] - ours[long.id], long.id, short.id, TellingPair(short, long))
            for long in won
            for short in easy
            if _length(long) >= ratio * _length(short)
        ]
    return found


@torch.inference_mode()
def draw_pair(
    dataset: GroundingDataset,
    pair: TellingPair,
    models: Mapping[str, PointGrounder],
    predictions: Mapping[str, Sequence[Prediction]],
) -> Figure:
    """For both queries: the truth, the first answer of each system, and its pyramid of scores.

    Args:
        dataset: holds the pair.
        models: by system, in evaluation mode, for the scores of their points.
        predictions: by system, of all queries of the data set.
    """
    queries = (pair.short, pair.long)
    video = dataset.videos[pair.long.video_id]
    figure, axes = plt.subplots(
        1 + len(models),
        2,
        figsize=(WIDTH, 1.5 + 1.75 * len(models)),
        height_ratios=[0.8] + [1.3] * len(models),
        sharex=True,
        layout="constrained",
    )
    for column, query in enumerate(queries):
        top = axes[0, column]
        for start, end in query.moments:
            top.barh(0, end - start, left=start, height=0.7, color=TRUTH, linewidth=0)
        labels = ["truth"]
        for row, name in enumerate(models):
            answers = {p.query_id: p for p in predictions[name]}
            best = answers[query.id].best
            colour = COLOURS[row]
            top.barh(row + 1, best.length, left=best.start, height=0.7, color=colour, linewidth=0)
            labels.append(name)
            _draw_scores(axes[row + 1, column], dataset, query, models[name], colour, video.grid)
        top.set_yticks(range(len(labels)), labels)
        top.invert_yaxis()
        kind = "short" if column == 0 else "long"
        top.set_title(f"{kind}: “{_shortened(query.text)}”", fontsize=9)
        axes[-1, column].set_xlabel("seconds")
    for row, name in enumerate(models):
        axes[row + 1, 0].set_ylabel(f"{name}\nlevel")
    top.set_xlim(0, video.duration)
    return figure


def _draw_scores(
    axes: Axes,
    dataset: GroundingDataset,
    query: Query,
    model: PointGrounder,
    colour: str,
    grid: TimeGrid,
) -> None:
    """The pyramid as rows of boxes, as dark as the points score."""
    one = dataset.subset([query.video_id], "one video")
    plan = BatchPlan(one, 1, len(one))
    batch = plan.load(plan.epoch(0)[0]).to(next(model.parameters()).device)
    output = model(batch)
    row = batch.query_ids.index(query.id)
    scores = output.per_level(output.logits.sigmoid())
    masks = output.per_level(output.mask)
    stride = output.pyramid.clips_per_step * grid.step
    highest = max(float(s[row].max()) for s in scores)
    for level, (score, mask) in enumerate(zip(scores, masks, strict=True)):
        wide = stride * 2**level
        for step in range(int(mask[row].sum())):
            at = grid.to_seconds(float(step * 2**level * output.pyramid.clips_per_step))
            axes.add_patch(
                Rectangle(
                    (at - wide / 2, level - 0.42),
                    wide,
                    0.84,
                    facecolor=colour,
                    alpha=float(score[row, step]) / highest,
                    edgecolor="none",
                )
            )
            axes.add_patch(
                Rectangle(
                    (at - wide / 2, level - 0.42),
                    wide,
                    0.84,
                    fill=False,
                    edgecolor=PALE,
                    linewidth=0.5,
                )
            )
    for start, end in query.moments:
        axes.axvspan(start, end, color=TRUTH, alpha=0.15, linewidth=0)
    axes.set_ylim(-0.6, len(scores) - 0.4)
    axes.set_yticks(range(len(scores)))


# --- Figure 3 -------------------------------------------------------------------------------------


def draw_framework(levels: int = 4) -> Figure:
    """The method: a video encoder whose levels are contrasted, beside grounding as in SnAG.

    Args:
        levels: of the drawn pyramid, above Z^0.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    axes.set_axis_off()
    steps, left, wide = 16, 1.7, 0.29
    moment, elsewhere = (4, 9), 12.5  # in steps of Z^0
    colour = {"target": COLOURS[0], "negative": COLOURS[1]}
    centres: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for level in range(levels + 1):
        stride = 2 ** max(level - 1, 0)
        y = 0.72 * level
        at_level = range(0, steps, stride)
        middle = sum(moment) / 2
        targets = [
            at for at in at_level if abs(at - middle) < 1.5 * stride and moment[0] < at < moment[1]
        ]
        outside = [at for at in at_level if not moment[0] < at < moment[1]]
        # As many negatives as targets; they are drawn at random, here they lie together.
        negatives = sorted(outside, key=lambda at: abs(at - elsewhere))[: len(targets)]
        for at in at_level:
            kind = "target" if at in targets else "negative" if at in negatives else ""
            x = left + at * wide
            face = colour.get(kind, PALE)
            place = (x, y), wide * stride * 0.86, 0.42
            axes.add_patch(Rectangle(*place, facecolor=face, alpha=0.85, linewidth=0))
            centres.setdefault((level, kind), []).append((x + place[1] / 2, y + 0.21))
        name = r"$Z^0$" if level == 0 else rf"$Z^{level}$"
        axes.text(left - 0.12, y + 0.21, name, ha="right", va="center")
    band = (left + moment[0] * wide, -0.16)
    axes.add_patch(Rectangle(band, (moment[1] - moment[0]) * wide, 0.09, color=TRUTH, linewidth=0))
    axes.text(band[0] + 5.2 * wide, -0.13, "moment", fontsize=8, color=TRUTH, va="center")
    box(axes, 0.0, -0.95, 1.35, "clip features\nof the video")
    arrow(axes, (1.35, -0.72), (left + 0.6, -0.05), INK)
    axes.text(left + 0.5, -0.5, "convolutions (eq. 1)", fontsize=8, color=QUIET, va="center")
    axes.text(
        0.0,
        1.6,
        "transformer\nblocks; all but\nthe first halve\nthe length (2-4)",
        fontsize=8,
        color=QUIET,
    )
    (first, *_) = centres[(0, "target")]
    for level in range(1, levels + 1):
        for end in centres.get((level, "target"), [])[:1]:
            arrow(axes, first, end, colour["target"], curve=0.25)
        for end in centres.get((level, "negative"), [])[:1]:
            arrow(axes, first, end, colour["negative"], curve=-0.2, dashed=True)
    row = centres[(1, "target")]
    arrow(axes, row[0], row[-1], INK, curve=-0.5)
    right = left + steps * wide + 0.35
    box(
        axes,
        right,
        3.0,
        3.6,
        "cross-scale (eq. 12): targets of $Z^0$ towards\ntargets above, away from negatives",
    )
    box(
        axes,
        right,
        2.15,
        3.6,
        "within-scale (eq. 11): targets of a level\ntowards each other (one pair is shown)",
    )
    box(
        axes,
        right,
        1.0,
        3.6,
        "late fusion with the words of the query (5-7),\nheads: score and distances (8, 9)",
    )
    box(
        axes,
        right,
        0.15,
        3.6,
        r"$L = L_{cls} + \rho L_{reg} + \rho L_{within} + \rho L_{cross}$  (13)",
    )
    arrow(axes, (left + steps * wide, 0.93), (right, 1.2), INK)
    arrow(axes, (right + 1.8, 0.98), (right + 1.8, 0.62), INK)
    for number, (kind, text) in enumerate(
        (("target", "targets of the query"), ("negative", "negatives: outside its moments"))
    ):
        y = -0.62 - 0.32 * number
        axes.add_patch(Rectangle((right, y - 0.1), 0.2, 0.2, facecolor=colour[kind], linewidth=0))
        axes.text(right + 0.3, y, text, fontsize=8, va="center")
    axes.set_xlim(-0.1, right + 3.7)
    axes.set_ylim(-1.15, 0.72 * levels + 0.75)
    return figure


def _length(query: Query) -> float:
    """Seconds of the longest moment."""
    return float(np.ptp(query.moments, axis=1).max())


def _shortened(text: str, most: int = 46) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
