"""Drawings of whole methods, as the papers' framework figures show them: boxes and arrows.

draw_hieramamba   HieraMamba, Figure 2: the pipeline, one block, the two losses
draw_a2fa_f2sgd   A2FA + F2SGD, Figure 3: alignment, then a point of a map
draw_mamfusion    MamFusion: two branches, two scores, fusion over time

MSCL's Figure 3 is in `tvg_lib.viz_mscl`, which shares `box` and `arrow`.
"""

from itertools import pairwise

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from tvg_lib.viz import COLOURS, INK, PALE, QUIET, WIDTH

Point = tuple[float, float]


def box(
    axes: Axes, x: float, y: float, wide: float, text: str, face: str = "white", edge: str = QUIET
) -> tuple[Point, Point, Point, Point]:
    """A rounded box round some lines, its lower left corner at (x, y).

    Returns:
        The middles of its left, right, lower and upper side, for arrows.
    """
    style = "round,pad=0.02,rounding_size=0.06"
    tall = 0.3 + 0.26 * text.count("\n")
    axes.add_patch(
        FancyBboxPatch((x, y), wide, tall, boxstyle=style, facecolor=face, edgecolor=edge)
    )
    axes.text(x + wide / 2, y + tall / 2, text, ha="center", va="center", fontsize=8)
    middle, centre = y + tall / 2, x + wide / 2
    return (x, middle), (x + wide, middle), (centre, y), (centre, y + tall)


def arrow(
    axes: Axes,
    start: Point,
    end: Point,
    colour: str = INK,
    curve: float = 0.0,
    dashed: bool = False,
) -> None:
    """An arrow from one point to another."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            connectionstyle=f"arc3,rad={curve}",
            color=colour,
            linewidth=1.1,
            linestyle="--" if dashed else "-",
        )
    )


def _canvas(wide: float, low: float, high: float, inches: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(WIDTH, inches), layout="constrained")
    axes.set_axis_off()
    axes.set_xlim(-0.1, wide)
    axes.set_ylim(low, high)
    return figure, axes


def _row(axes: Axes, parts: list[tuple[float, float, str]], y: float) -> list[tuple[Point, ...]]:
    """Boxes (x, width, text) with their middles at height y, each with an arrow to the next."""
    sides = [
        box(axes, x, y - 0.15 - 0.13 * text.count("\n"), wide, text) for x, wide, text in parts
    ]
    for (_, right, *_), (left, *_) in pairwise(sides):
        arrow(axes, right, left)
    return sides


def draw_hieramamba() -> Figure:
    """The pipeline, the inside of one block, and what the two contrastive losses compare."""
    figure, axes = _canvas(12.2, -4.6, 2.15, 6.0)
    axes.text(0, 1.85, "(a) pipeline", fontsize=9, weight="bold")
    _, embed, _, fusion, _ = _row(
        axes,
        [
            (0.0, 1.3, "clip\nfeatures"),
            (1.8, 1.6, "projection,\nconvolutions"),
            (3.9, 2.4, "blocks 0 ... L - 1,\neach half as long"),
            (6.8, 2.3, "late fusion with\nevery level"),
            (9.6, 2.3, "score, distances,\nSoft-NMS"),
        ],
        1.18,
    )
    words = box(axes, 3.9, 0.1, 2.4, "words, text encoder")
    arrow(axes, words[1], fusion[2], curve=0.2)
    arrow(axes, words[0], embed[2], QUIET, curve=-0.2, dashed=True)
    axes.text(1.9, 0.2, "early fusion\n(3 of 4 presets)", fontsize=7, color=QUIET)

    axes.text(0, -0.4, "(b) one block", fontsize=9, weight="bold")
    for step, kind in enumerate("attattatt"):
        colour = COLOURS[1] if kind == "a" else COLOURS[0]
        axes.add_patch(Rectangle((0.27 * step, -1.2), 0.22, 0.42, color=colour, linewidth=0))
    axes.text(
        0,
        -1.5,
        "anchors (orange) before\ntheir two tokens (blue)",
        fontsize=7,
        color=QUIET,
        va="top",
    )
    parts = _row(
        axes,
        [
            (2.9, 1.7, "Hydra over all,\ngate"),
            (5.0, 2.1, "attention in a\nwindow of 5, gate"),
            (7.5, 1.5, "feed-\nforward"),
        ],
        -0.99,
    )
    arrow(axes, (2.5, -0.99), parts[0][0])
    tokens = box(axes, 9.6, -0.78, 2.3, "tokens: this level")
    anchors = box(axes, 9.6, -1.45, 2.3, "anchors: next level")
    for target in (tokens, anchors):
        arrow(axes, parts[-1][1], target[0])

    axes.text(0, -2.35, "(c) losses beside detection, per level", fontsize=9, weight="bold")
    _draw_acc(axes, 0.0, -3.2)
    _draw_spc(axes, 6.4, -3.2)
    return figure


def _draw_acc(axes: Axes, x: float, y: float) -> None:
    """One anchor, its two tokens and the far anchors that it is told apart from."""
    own, gap, step = 4, 2, 0.6
    for n in range(9):
        near = 0 < abs(n - own) <= gap
        face = PALE if near else COLOURS[1]
        axes.add_patch(Rectangle((x + step * n, y), 0.26, 0.34, color=face, linewidth=0))
        if abs(n - own) > gap:
            start, end = (x + step * own + 0.13, y + 0.36), (x + step * n + 0.13, y + 0.36)
            arrow(axes, start, end, QUIET, curve=0.25 if n < own else -0.25, dashed=True)
    for side in (-0.18, 0.18):
        token = x + step * own + 0.13 + side
        axes.add_patch(Rectangle((token - 0.13, y - 0.75), 0.26, 0.34, color=COLOURS[0]))
        arrow(axes, (x + step * own + 0.13, y - 0.02), (token, y - 0.4), COLOURS[0])
    text = "ACC: like its two tokens (blue), unlike far anchors; near ones (pale) do not count"
    axes.text(x, y - 1.1, text, fontsize=7, color=QUIET, va="top")


def _draw_spc(axes: Axes, x: float, y: float) -> None:
    """The points of one level: those of the moment and their mean, those outside of it."""
    step, inside = 0.6, range(3, 6)
    axes.add_patch(Rectangle((x + step * 3 - 0.12, y - 0.87), step * 3 - 0.1, 0.58, color=PALE))
    mean = x + step * 4 + 0.13, y + 0.2
    axes.plot(*mean, marker="*", markersize=12, color=COLOURS[0])
    for n in range(9):
        point = x + step * n + 0.13
        axes.plot(point, y - 0.58, "o", markersize=7, color=COLOURS[0] if n in inside else QUIET)
        start, end = (mean[0], mean[1] - 0.1), (point, y - 0.42)
        arrow(axes, start, end, COLOURS[0] if n in inside else QUIET, dashed=n not in inside)
    text = "SPC: the moment's positive points like their mean (star), points outside of it unlike"
    axes.text(x, y - 1.1, text, fontsize=7, color=QUIET, va="top")


def draw_a2fa_f2sgd() -> Figure:
    """From frames and a query to one point of a similarity map; numbers are the equations'."""
    figure, axes = _canvas(12.2, -2.1, 2.2, 3.5)
    axes.text(0, 1.95, "A²FA", fontsize=9, weight="bold")
    frames, _, mask, weighted, aligned = _row(
        axes,
        [
            (0.0, 1.4, "frames V,\nquery q"),
            (1.9, 2.1, "V with q in it,\nanchor frame (1, 2)"),
            (4.5, 2.2, "transition points,\nmask m (3-6)"),
            (7.2, 2.1, "aggregate g,\nre-weight (7-10)"),
            (9.8, 2.1, "align with q\n(11, 12)"),
        ],
        1.28,
    )
    arrow(axes, mask[3], aligned[3], QUIET, curve=-0.25, dashed=True)
    arrow(axes, frames[2], weighted[2], QUIET, curve=0.2, dashed=True)

    axes.text(0, -0.35, "F²SGD", fontsize=9, weight="bold")
    size, corner, count = 1.9, (9.9, -1.95), 10
    cell = size / count
    first, last = 3, 6  # the moment of the drawn map
    for i in range(count):
        for j in range(count):
            bright = first <= i <= last and first <= j <= last
            face = COLOURS[0] if bright or i == j else PALE
            place = (corner[0] + j * cell, corner[1] + (count - 1 - i) * cell)
            axes.add_patch(Rectangle(place, 0.92 * cell, 0.92 * cell, color=face, linewidth=0))
    end = (corner[0] + (last + 0.5) * cell, corner[1] + (count - 0.5 - first) * cell)
    axes.plot(*end, "o", mfc="none", mec=COLOURS[1], ms=9, mew=2)
    arrow(axes, aligned[2], (corner[0] + size / 2, corner[1] + size))
    axes.text(corner[0] - 0.12, -0.25, "cosines\n$S^a$", fontsize=8, ha="right", va="top")
    network = box(axes, 5.9, -1.3, 2.4, "2 convolutions C x C,\nMLP at every cell (13)")
    points = box(axes, 2.7, -1.3, 2.5, "P: is this cell the\ncorner of a block?")
    moment = box(axes, 0.0, -1.3, 2.0, "best cells: start,\nend (15)")
    arrow(axes, (corner[0], network[1][1]), network[1])
    arrow(axes, network[0], points[1])
    arrow(axes, points[0], moment[1])
    axes.text(
        5.9,
        -1.95,
        "circle: the corner (start, end),\nwhich training marks (14)",
        fontsize=7,
        color=QUIET,
    )
    return figure


def draw_mamfusion() -> Figure:
    """Query encoder, clip and frame branch, both scores; fusion over time re-ranks the best."""
    figure, axes = _canvas(12.2, -1.85, 1.8, 4.1)
    branch = "Gaussian mixture\n+ residual Mamba, twice"
    _, _, vector = _row(
        axes,
        [
            (0.0, 1.5, "frames"),
            (2.1, 2.9, f"frame branch:\n{branch}"),
            (5.6, 2.1, "pooled: video f"),
        ],
        1.25,
    )
    _, encoder, query = _row(
        axes, [(0.0, 1.5, "words"), (2.1, 2.9, "attention"), (5.6, 2.1, "pooled: query q")], 0.3
    )
    _, clip_branch, segments = _row(
        axes,
        [
            (0.0, 1.5, "32\nsegments"),
            (2.1, 2.9, f"clip branch:\n{branch}"),
            (5.6, 2.1, "segments c"),
        ],
        -0.8,
    )
    first = box(axes, 8.6, 0.6, 3.2, "0.7 max cos(c, q)\n+ 0.3 cos(f, q)", edge=COLOURS[0])
    for source, curve in ((vector, 0.0), (query, 0.0), (segments, 0.15)):
        arrow(axes, source[1], first[0], curve=curve)
    axes.text(8.7, 1.35, "all videos, from an index", fontsize=7, color=QUIET)
    fused = box(
        axes,
        8.6,
        -1.1,
        3.2,
        "fusion over time:\nwords ↔ segments,\nthe same score again",
        edge=COLOURS[1],
    )
    arrow(axes, first[2], fused[3], COLOURS[1])
    axes.text(10.35, 0.1, "the best candidates", fontsize=7, color=QUIET)
    arrow(axes, encoder[2], fused[0], QUIET, curve=-0.03, dashed=True)
    arrow(axes, clip_branch[2], fused[2], QUIET, curve=0.2, dashed=True)
    return figure
