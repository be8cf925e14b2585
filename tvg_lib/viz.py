"""Figures, all in one house style: legible at notebook width, safe for colour-blind readers.

    timeline, timeline_of       a question, the true moments, ranked answers, relevance, captions
    pyramid_diagram             levels, regression ranges, centre sampling and max length in one
    learning_curves             loss terms and validation metrics of a run
    recall_by_length            which moments a system finds
    metric_bars                 systems side by side, with their intervals

Every function returns the matplotlib Figure; end the cell with `plt.show()`. They take plain arrays
and records, so they draw what a file holds as well as what a run has just computed.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullLocator
from numpy.typing import ArrayLike

from tvg_lib import paths
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.decoding import Prediction
from tvg_lib.errors import DataError
from tvg_lib.inline import TRUTH, clock
from tvg_lib.metrics import bootstrap
from tvg_lib.moments import TimeGrid, interval_iou
from tvg_lib.nn.points import PointGrid

# Okabe and Ito's colours, which readers with any kind of colour vision tell apart. Green is kept
# for the truth.
COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#7F5BA6")
INK = "#2B2B2B"
QUIET = "#8C8C8C"
PALE = "#E4E4E4"
WIDTH = 9.0  # inches


def use_house_style() -> None:
    """Set matplotlib and seaborn to the house style for everything drawn afterwards."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=COLOURS,
        rc={
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.figsize": (WIDTH, 3.6),
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.labelsize": 10,
            "axes.edgecolor": QUIET,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
        },
    )


def keep_figure(figure: Figure, scale: str, name: str, dataset: str) -> Path:
    """Save a figure that needs a run's models or data, so that it can be published.

    Args:
        figure: to be saved.
        scale: whose folder below `runs/` takes it.
        name: such as "mscl_figure1".
        dataset: data set and split, which the file's name ends with.
    """
    path = paths.runs(scale) / "figures" / f"{name}_{dataset.replace('/', '_')}.png"
    with paths.replacing(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
    return path


class Interval(Protocol):
    """A number with its interval: `metrics.Estimate`, `results.Metric`."""

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float | None: ...

    @property
    def high(self) -> float | None: ...


# --- the signature picture ------------------------------------------------------------------------


def timeline(
    text: str,
    duration: float,
    *,
    truth: ArrayLike | None = None,
    answers: Mapping[str, ArrayLike] | None = None,
    relevance: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    captions: Sequence[tuple[float, float, str]] | None = None,
    pictures: Sequence[tuple[float, np.ndarray]] | None = None,
    top: int = 3,
    most_captions: int = 6,
    window: tuple[float, float] | None = None,
    subtitle: str = "",
) -> Figure:
    """A question on a time axis: true moments, ranked answers with scores, relevance, captions.

    Args:
        text: the question; becomes the title.
        duration: of the video, in seconds.
        truth: (M, 2) true moments in seconds.
        answers: by system, (N, 3) start, end, score, best first. The IoU with the closest true
            moment is printed where the truth is known.
        relevance: by system, the times (T,) of clips and their scores (T,); each is drawn from its
            own minimum to its own maximum.
        captions: start, end and text of clips. Some are chosen and printed below: those at true
            moments, at first answers and at peaks of relevance, then evenly spread ones.
        pictures: times and frames (H, W, 3) uint8 of the video, shown in a row above the bars.
        top: answers shown of each system.
        most_captions: captions shown.
        window: part of the video to show, in seconds.
        subtitle: printed small beside the duration, e.g. the video's name.

    Raises:
        DataError: an array has a wrong shape, or the window is empty.
    """
    true = _moments(truth, 2, "truth")
    ranked = {name: _moments(a, 3, name)[:top] for name, a in (answers or {}).items()}
    curves = {
        name: (np.asarray(x, float), np.asarray(y, float))
        for name, (x, y) in (relevance or {}).items()
    }
    low, high = window or (0.0, duration)
    if not low < high:
        raise DataError(f"a window ends after it starts, found {window}")
    chosen = _choose_captions(captions or (), true, ranked, curves, most_captions, (low, high))

    lines = wrap(f"“{text}”", 88)
    rows = (1 if len(true) else 0) + sum(max(1, len(a)) for a in ranked.values())
    bars_height = 0.27 * rows + 0.12 * len(ranked) + (0.3 if chosen else 0.0) + 0.1
    curve_height = 0.85 if curves else 0.0
    caption_lines = [
        (number, start, wrap(shorten(words, 190, placeholder=" …"), 98), inside)
        for number, (start, words, inside) in enumerate(chosen, start=1)
    ]
    caption_height = sum(_caption_inches(wrapped) for _, _, wrapped, _ in caption_lines)
    caption_height += 0.15 if chosen else 0.0
    strip = 1.3 if pictures else 0.0
    head, foot, gap = 0.27 * len(lines) + 0.42 + strip, 0.52, 0.12
    height = head + bars_height + (gap + curve_height if curves else 0) + foot + caption_height
    figure = plt.figure(figsize=(WIDTH, height))
    left, wide = 1.5 / WIDTH, (WIDTH - 1.5 - 1.35) / WIDTH

    def axes_at(top_inches: float, tall: float, share: Axes | None = None) -> Axes:
        box = (left, 1 - (top_inches + tall) / height, wide, tall / height)
        return figure.add_axes(box, sharex=share)

    for number, line in enumerate(lines):
        y = 1 - (0.08 + 0.25 * number) / height
        figure.text(0.012, y, line, fontsize=12, fontweight="bold", va="top")
    facts = f"{subtitle} · " if subtitle else ""
    figure.text(
        0.012,
        1 - (0.11 + 0.25 * len(lines)) / height,
        f"{facts}{_lasts(duration)}",
        fontsize=9,
        color=QUIET,
        va="top",
    )
    _draw_pictures(figure, pictures or (), duration, 1 - head / height, strip / height)
    bars = axes_at(head, bars_height)
    _draw_bars(bars, true, ranked, chosen)
    lowest = bars
    if curves:
        lowest = axes_at(head + bars_height + gap, curve_height, bars)
        _draw_curves(lowest, curves, true, list(ranked))
        plt.setp(bars.get_xticklabels(), visible=False)
        bars.tick_params(axis="x", length=0)
        bars.spines["bottom"].set_visible(False)
    lowest.set_xlim(low, high)
    lowest.xaxis.set_major_locator(MultipleLocator(_tick_step(high - low)))
    if duration <= 300:
        lowest.set_xlabel("seconds")
    else:
        lowest.xaxis.set_major_formatter(FuncFormatter(lambda x, _: clock(x, duration)))
        lowest.set_xlabel("time (h:mm:ss)" if duration > 3600 else "time (min:s)")
    _print_captions(figure, caption_lines, duration, caption_height / height, height)
    return figure


def timeline_of(
    dataset: GroundingDataset,
    answers: Prediction | Mapping[str, Prediction],
    *,
    captions: Sequence[str] | None = None,
    relevance: Mapping[str, ArrayLike] | None = None,
    **options: Any,
) -> Figure:
    """The `timeline` of predictions for one query of a data set, against its true moments.

    Args:
        dataset: holds the query, its moments and the video.
        answers: one prediction, or one of each system by its name; all of the same query.
        captions: the text of every clip of the video.
        relevance: by system, (T,) a score of every clip; that of the predictions where not given.
        options: `top`, `most_captions`, `window` of `timeline`.

    Raises:
        DataError: no answers, or answers to different queries.
    """
    named = {"answer": answers} if isinstance(answers, Prediction) else dict(answers)
    ids = {prediction.query_id for prediction in named.values()}
    if len(ids) != 1:
        raise DataError(f"a timeline shows one query, found answers to {sorted(ids)}")
    query = dataset.query(ids.pop())
    video = dataset.videos[query.video_id]
    if relevance is None:
        relevance = {k: p.saliency for k, p in named.items() if p.saliency is not None}
    return timeline(
        query.text,
        video.duration,
        truth=query.moments,
        answers={name: prediction.moments for name, prediction in named.items()},
        relevance={name: clip_curve(video.grid, y) for name, y in relevance.items()},
        captions=None if captions is None else clip_captions(video.grid, captions),
        subtitle=video.id,
        **options,
    )


def clip_curve(grid: TimeGrid, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Times (T,) of clip centres and the scores (T,): a curve for `timeline`."""
    values = np.asarray(scores, float)
    return np.asarray(grid.to_seconds(np.arange(len(values)))), values


def clip_captions(grid: TimeGrid, texts: Sequence[str]) -> list[tuple[float, float, str]]:
    """Start, end and text of every clip: captions for `timeline`."""
    return [(*grid.clip_span(i), text) for i, text in enumerate(texts)]


def _moments(moments: ArrayLike | None, width: int, name: str) -> np.ndarray:
    array = np.zeros((0, width)) if moments is None else np.asarray(moments, float)
    if array.size == 0:
        return np.zeros((0, width))
    if array.ndim != 2 or array.shape[1] != width:
        raise DataError(f"{name}: expected moments (N, {width}), found shape {array.shape}")
    return array


def _lasts(duration: float) -> str:
    return f"{duration:.0f} s" if duration <= 300 else f"{clock(duration, duration)} long"


def _tick_step(length: float) -> float:
    """Seconds between the ticks of an axis of some length: round on a clock, nine ticks at most."""
    steps = (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
    return next((step for step in steps if length / step <= 9), 86400)


def _draw_bars(
    axes: Axes,
    true: np.ndarray,
    ranked: Mapping[str, np.ndarray],
    chosen: Sequence[tuple[float, str, bool]],
) -> None:
    """Truth above, the answers of each system below, scores and IoU at the right."""
    y, ticks = 0.0, []
    edge = axes.get_yaxis_transform()
    shown_any = any(len(a) for a in ranked.values())
    if shown_any:
        axes.text(1.02, -0.78, "score", transform=edge, fontsize=8.5, color=QUIET, va="center")
    if shown_any and len(true):
        axes.text(1.115, -0.78, "IoU", transform=edge, fontsize=8.5, color=QUIET, va="center")
    if len(true):
        for start, end in true[:, :2]:
            axes.barh(y, end - start, left=start, height=0.74, color=TRUTH, linewidth=0)
            axes.axvspan(start, end, color=TRUTH, alpha=0.09, linewidth=0)
        ticks.append((y, "truth", TRUTH))
        y += 1
    for (name, answers), colour in zip(ranked.items(), _cycle(len(ranked)), strict=True):
        y += 0.45 if y else 0.0
        for rank, (start, end, score) in enumerate(answers):
            axes.barh(
                y,
                end - start,
                left=start,
                height=0.74,
                color=colour,
                alpha=1.0 if rank == 0 else 0.45,
                linewidth=0,
            )
            weight = "bold" if rank == 0 else "normal"
            style = {"transform": edge, "fontsize": 9, "va": "center", "fontweight": weight}
            axes.text(1.02, y, f"{score:.2f}", **style)
            if len(true):
                iou = interval_iou(np.array([[start, end]]), true[:, :2]).max()
                axes.text(1.115, y, f"{iou:.2f}", **style)
            ticks.append((y, name if rank == 0 else f"{rank + 1}", colour))
            y += 1
        if not len(answers):
            axes.text(0.01, y, "no answer", transform=edge, fontsize=9, color=QUIET, va="center")
            ticks.append((y, name, colour))
            y += 1
    bottom = y - 0.4
    if chosen:
        for number, (time, _, inside) in enumerate(chosen, start=1):
            axes.text(
                time,
                y + 0.1,
                f"{number}",
                fontsize=8,
                color="white",
                ha="center",
                va="center",
                fontweight="bold",
                bbox={
                    "boxstyle": "circle,pad=0.22",
                    "facecolor": TRUTH if inside else QUIET,
                    "linewidth": 0,
                },
            )
        bottom = y + 0.75
    axes.set_ylim(bottom, -0.5)
    axes.set_yticks([t[0] for t in ticks], [t[1] for t in ticks])
    for label, (_, text, colour) in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_color(colour)
        label.set_fontweight("normal" if text.isdigit() else "bold")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _draw_pictures(
    figure: Figure,
    pictures: Sequence[tuple[float, np.ndarray]],
    duration: float,
    bottom: float,
    tall: float,
) -> None:
    """Frames of the video side by side, each with its time; `bottom` and `tall` in figure units."""
    left, wide = 0.15 / WIDTH, 1 - 0.3 / WIDTH
    cell = wide / max(len(pictures), 1)
    for number, (time, pixels) in enumerate(pictures):
        box = (left + number * cell, bottom + 0.3 * tall, 0.97 * cell, 0.68 * tall)
        axes = figure.add_axes(box)
        axes.imshow(pixels, interpolation="antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(clock(time, duration), fontsize=8.5, color=COLOURS[0], labelpad=3)
        for spine in axes.spines.values():
            spine.set_visible(True)
            spine.set_color(COLOURS[0])


def _draw_curves(
    axes: Axes,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    true: np.ndarray,
    systems: Sequence[str],
) -> None:
    """Relevance of every clip, each curve scaled to [0, 1], in its system's colour."""
    for start, end in true[:, :2]:
        axes.axvspan(start, end, color=TRUTH, alpha=0.09, linewidth=0)
    palette = dict(zip(systems, _cycle(len(systems)), strict=True))
    spare = iter(c for c in COLOURS if c not in palette.values())
    for name, (times, scores) in curves.items():
        colour = palette.get(name) or next(spare, QUIET)
        scaled = (scores - scores.min()) / max(float(np.ptp(scores)), 1e-9)
        axes.plot(times, scaled, color=colour, linewidth=1.4)
        if len(curves) == 1:
            axes.fill_between(times, scaled, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0.5], ["relevance"])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _choose_captions(
    captions: Sequence[tuple[float, float, str]],
    true: np.ndarray,
    ranked: Mapping[str, np.ndarray],
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    most: int,
    window: tuple[float, float],
) -> list[tuple[float, str, bool]]:
    """Time, text and whether it lies in a true moment, for the captions worth reading."""
    low, high = window
    clips = [
        ((start + end) / 2, text) for start, end, text in captions if low <= start and end <= high
    ]
    if not clips or most < 1:
        return []
    centres = np.array([time for time, _ in clips])
    telling = [
        *true[:, :2].mean(axis=1),
        *(answers[0, :2].mean() for answers in ranked.values() if len(answers)),
        *(times[scores.argmax()] for times, scores in curves.values()),
    ]
    spread = np.linspace(low, high, 2 * most + 1)[1::2]
    room = (high - low) / 32  # numbered marks closer than this would cover one another
    picked: list[int] = []
    for number, time in enumerate([*telling, *spread]):
        index = int(np.abs(centres - time).argmin())
        near = any(abs(centres[other] - centres[index]) < room for other in picked)
        told = any(clips[other][1] == clips[index][1] for other in picked)
        if not near and not (told and number >= len(telling)) and len(picked) < most:
            picked.append(index)
    result = []
    for index in sorted(picked):
        time, text = clips[index]
        inside = bool(((true[:, 0] <= time) & (time <= true[:, 1])).any())
        result.append((time, text, inside))
    return result


def _print_captions(
    figure: Figure,
    lines: Sequence[tuple[int, float, list[str], bool]],
    duration: float,
    top: float,
    height: float,
) -> None:
    """The chosen captions as numbered lines at the foot of the figure."""
    y = top - 0.06 / height
    for number, time, wrapped, inside in lines:
        colour = TRUTH if inside else QUIET
        style = {"va": "top", "fontsize": 9}
        figure.text(0.03, y, f"{number}", color=colour, fontweight="bold", **style)
        figure.text(0.115, y, clock(time, duration), color=colour, ha="right", **style)
        figure.text(0.128, y, "\n".join(wrapped), linespacing=1.25, **style)
        y -= _caption_inches(wrapped) / height


def _caption_inches(lines: Sequence[str]) -> float:
    """Height of one printed caption."""
    return 0.21 + 0.165 * (len(lines) - 1)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


# --- the pyramid ----------------------------------------------------------------------------------


def pyramid_diagram(
    moment: tuple[float, float],
    length: int,
    levels: int,
    *,
    grid: PointGrid | None = None,
    max_length: int | None = None,
    step: float | None = None,
) -> Figure:
    """Levels, regression ranges, centre sampling and max length in one figure.

    Left: the points of every level along time, and what each is for one moment. Right: the
    regression range of every level, and the reach that this moment asks for.

    Args:
        moment: start and end in clips.
        length: clips of the video.
        levels: of the pyramid.
        grid: the rules; SnAG's by default.
        max_length: longest training sequence in clips; what lies beyond is hatched.
        step: seconds per clip, to print ranges in seconds too.

    Raises:
        DataError: the moment does not lie inside the video.
    """
    grid = grid or PointGrid()
    start, end = moment
    if not 0 <= start < end <= length:
        raise DataError(f"a moment lies inside the video of {length} clips, found {moment}")
    lengths = [ceil(length / 2**level) for level in range(levels)]
    points = grid.points(lengths)
    target = torch.tensor([[[start, end]]], dtype=torch.float32)
    near = grid.near_center(points, target)[0, 0].numpy()
    in_range = grid.in_range(points, target)[0, 0].numpy()
    position = points[:, 0].numpy()
    inside = (position > start) & (position < end)
    reach = np.maximum(position - start, end - position)
    level = np.repeat(np.arange(levels), lengths)

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 0.52 * levels + 2.3), width_ratios=(2.2, 1), layout="constrained"
    )
    left.axvspan(start, end, color=TRUTH, alpha=0.12, linewidth=0)
    left.barh(-0.95, end - start, left=start, height=0.36, color=TRUTH, linewidth=0)
    for number in range(levels):  # where centre sampling looks
        half = min(grid.center_radius * 2**number, (end - start) / 2)
        middle = (start + end) / 2
        left.barh(
            number, 2 * half, left=middle - half, height=0.62, color=TRUTH, alpha=0.22, linewidth=0
        )
    kinds = (
        (~inside & ~(near & in_range), "outside the moment", PALE, QUIET, 14),
        (inside & ~near, "inside, too far from its centre", "white", COLOURS[0], 26),
        (near & ~in_range, "near the centre, moment out of range", "white", COLOURS[1], 34),
        (near & in_range, "positive: near the centre and in range", COLOURS[0], COLOURS[0], 52),
    )
    for chosen, label, face, edge, size in kinds:
        left.scatter(
            position[chosen],
            level[chosen],
            s=np.where(level[chosen] == 0, 0.5, 1.0) * size,
            facecolors=face,
            edgecolors=edge,
            linewidths=1.3,
            label=label,
            zorder=3,
        )
    for x, y in zip(position[near & in_range], level[near & in_range], strict=True):
        left.plot([start, end], [y, y], color=COLOURS[0], linewidth=0.9, zorder=2)
        left.plot(x, y, "o", color=COLOURS[0], markersize=1, zorder=4)
    if max_length is not None and max_length < length:
        left.axvspan(
            max_length, length, facecolor="none", edgecolor=QUIET, hatch="///", linewidth=0
        )
        left.axvline(max_length, color=INK, linewidth=1.2)
        left.text(
            max_length,
            -1.32,
            " max length ",
            fontsize=8.5,
            va="center",
            backgroundcolor="white",
            ha="right" if max_length > 0.85 * length else "left",
        )
    left.text(start, -1.32, "the moment", fontsize=8.5, va="center", color=TRUTH)
    left.set_xlim(-1, length)
    left.set_ylim(levels - 0.4, -1.6)
    left.set_yticks(range(levels), [f"level {number}" for number in range(levels)])
    left.set_xlabel("clips")
    left.set_title("Which points answer for the moment")
    handles, labels = left.get_legend_handles_labels()
    handles.append(Patch(color=TRUTH, alpha=0.3))
    labels.append(f"centre sampling: ±{grid.center_radius:g} strides")
    figure.legend(handles, labels, loc="outside lower left", ncols=2, handletextpad=0.4)

    _draw_ranges(right, grid.ranges(levels), reach[near], step)
    right.set_ylim(left.get_ylim())
    return figure


def _draw_ranges(
    axes: Axes, ranges: Sequence[tuple[float, float]], reach: np.ndarray, step: float | None
) -> None:
    """Regression ranges on a logarithmic axis, and the reaches that central points need."""
    smallest, largest = ranges[0][1] / 8, ranges[-1][0] * 4
    axes.set_xscale("log", base=2)
    axes.set_xlim(smallest, largest)
    labels = []
    for number, (low, high) in enumerate(ranges):
        open_end = number == len(ranges) - 1 and len(ranges) > 1
        left_end, right_end = max(low, smallest), largest if open_end else high
        axes.barh(
            number,
            right_end - left_end,
            left=left_end,
            height=0.5,
            color=COLOURS[3],
            alpha=0.8,
            linewidth=0,
        )
        label = f"[{low:g}, {'∞' if open_end else f'{high:g}'})"
        if step is not None:
            # A point in the very middle reaches the ends of a moment twice as long as its range.
            label += "\nany longer" if open_end else f"\nup to {2 * high * step:g} s long"
        labels.append(label)
    if len(reach):
        axes.axvspan(
            reach.min(), max(reach.max(), reach.min() * 1.03), color=TRUTH, alpha=0.35, linewidth=0
        )
        middle = (reach.min() * reach.max()) ** 0.5
        axes.text(middle, -1.32, "this moment", fontsize=8.5, ha="center", va="center", color=TRUTH)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.tick_right()
    axes.set_yticks(range(len(ranges)), labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("larger distance to an end, in clips")
    axes.set_title("Regression ranges")


# --- runs and results -----------------------------------------------------------------------------

_NOT_TERMS = ("epoch", "step", "learning_rate", "gradient_norm")


def learning_curves(
    steps: Mapping[str, Sequence[float]],
    validations: Sequence[Mapping[str, float]] = (),
    *,
    metrics: Iterable[str] | None = None,
    selected: Mapping[str, float] | None = None,
) -> Figure:
    """Loss terms over steps and, where there are any, validation metrics over epochs.

    Args:
        steps: columns over optimiser steps (`TrainingResult.steps`): "step", and the loss terms.
        validations: rows (`TrainingResult.validations`): "epoch" and metrics in percent.
        metrics: which of them to draw; all by default.
        selected: the row whose weights were kept; marked.
    """
    panels = 2 if validations else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(WIDTH, 3.2), layout="constrained", squeeze=False
    )
    left = axes[0, 0]
    x = np.asarray(steps["step"], float)
    width = max(1, len(x) // 40)
    terms = [name for name in steps if name not in _NOT_TERMS]
    for name, colour in zip(terms, _cycle(len(terms)), strict=True):
        y = np.asarray(steps[name], float)
        left.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        left.plot(x, _running_mean(y, width), color=colour, label=name)
    left.set(xlabel="step", ylabel="loss", title="Training loss")
    left.set_ylim(bottom=0)
    left.legend()
    if validations:
        right = axes[0, 1]
        names = metrics or [k for k in validations[0] if k not in ("epoch", "step")]
        epochs = [row["epoch"] for row in validations]
        for name, colour in zip(names, _cycle(len(list(names))), strict=True):
            right.plot(epochs, [r[name] for r in validations], "o-", ms=4, color=colour, label=name)
        if selected is not None:
            right.axvline(selected["epoch"], color=QUIET, linewidth=1, linestyle="--")
            right.text(
                selected["epoch"],
                1.0,
                " kept",
                transform=right.get_xaxis_transform(),
                fontsize=8.5,
                color=QUIET,
                va="top",
            )
        right.set(xlabel="epoch", ylabel="percent", title="Validation")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.legend()
    return figure


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values; of all so far at the start."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    last = np.arange(1, len(y) + 1)
    first = np.maximum(last - width, 0)
    return (total[last] - total[first]) / (last - first)


def recall_by_length(
    lengths: ArrayLike,
    best_iou: Mapping[str, ArrayLike],
    *,
    threshold: float = 0.5,
    edges: Sequence[float] = (0, 10, 30, 60, 150),
    ylabel: str = "",
) -> Figure:
    """Share of queries found, by the length of their moment, with 95 % bootstrap intervals.

    Args:
        lengths: (Q,) seconds of each query's moment.
        best_iou: by system, (Q,) IoU of the best of the answers that count.
        threshold: on IoU, inclusive.
        edges: of the bins (low, high], in seconds; empty bins are left out.
        ylabel: what is counted; "R1@<threshold> (%)" by default.

    Raises:
        DataError: arrays of different lengths, or no moment in any bin.
    """
    seconds = np.asarray(lengths, float)
    members = {(low, high): (seconds > low) & (seconds <= high) for low, high in pairwise(edges)}
    members = {limits: chosen for limits, chosen in members.items() if chosen.any()}
    if not members:
        raise DataError(f"no moment has a length within {tuple(edges)} seconds")
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    middle = np.arange(len(members))
    for number, (name, iou) in enumerate(best_iou.items()):
        values = np.asarray(iou, float)
        if values.shape != seconds.shape:
            raise DataError(
                f"{name}: expected one IoU per length, found {values.shape} for {seconds.shape}"
            )
        hits = 100.0 * (values >= threshold)
        estimates = [bootstrap(hits[chosen]) for chosen in members.values()]
        x = middle + (number - (len(best_iou) - 1) / 2) * 0.12
        y = np.array([e.value for e in estimates])
        # A percentile interval of a handful of queries need not hold their mean.
        error = [
            [max(0.0, e.value - e.low) for e in estimates],
            [max(0.0, e.high - e.value) for e in estimates],
        ]
        axes.errorbar(
            x, y, error, fmt="o-", color=COLOURS[number % len(COLOURS)], capsize=3, label=name
        )
    labels = [f"{low:g} to {high:g} s\n{c.sum()} queries" for (low, high), c in members.items()]
    axes.set_xticks(middle, labels)
    axes.set_ylim(0, 100)
    axes.set_xlabel("length of the moment")
    axes.set_ylabel(ylabel or f"R1@{threshold:g} (%)")
    axes.legend()
    return figure


def metric_bars(
    systems: Mapping[str, Mapping[str, Interval]],
    *,
    metrics: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Systems side by side, metric by metric, with their intervals.

    Args:
        systems: by name, a number with interval (`metrics.Estimate`, `results.Metric`) by metric.
        metrics: which and in what order; those of the first system by default. A system without
            one of them shows a gap.
        title: of the figure.

    Raises:
        DataError: no system or no metric.
    """
    names = list(metrics or next(iter(systems.values()), {}))
    if not names:
        raise DataError("there is nothing to draw: no system, or no metric")
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    width = 0.8 / len(systems)
    small = len(names) * len(systems) > 18
    for number, ((system, values), colour) in enumerate(
        zip(systems.items(), _cycle(len(systems)), strict=True)
    ):
        x = np.arange(len(names)) + (number - (len(systems) - 1) / 2) * width
        shown = [values.get(name) for name in names]
        height = [np.nan if v is None else v.value for v in shown]
        axes.bar(x, height, 0.92 * width, color=colour, label=system, linewidth=0)
        for place, v in zip(x, shown, strict=True):
            if v is None:
                continue
            top = v.value
            if v.low is not None and v.high is not None:
                axes.plot([place, place], [v.low, v.high], color=INK, linewidth=1.1)
                top = max(top, v.high)
            axes.annotate(
                f"{v.value:.0f}" if small else f"{v.value:.1f}",
                (place, top),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("percent")
    axes.margins(x=0.02, y=0.12)
    if title:
        axes.set_title(title)
    figure.legend(loc="outside upper right", ncols=min(4, len(systems)))
    return figure
