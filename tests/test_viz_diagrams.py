"""Framework drawings: every part that they name is there, and no box lies on another."""

import matplotlib
import pytest
from matplotlib.patches import FancyBboxPatch

from tvg_lib.viz_diagrams import draw_a2fa_f2sgd, draw_hieramamba, draw_mamfusion

matplotlib.use("Agg")


@pytest.mark.parametrize(
    ("draw", "parts"),
    [
        (draw_hieramamba, ["late fusion", "early fusion", "Hydra", "window of 5", "ACC", "SPC"]),
        (draw_a2fa_f2sgd, ["(1, 2)", "(3-6)", "(7-10)", "(11, 12)", "(13)", "(14)", "(15)"]),
        (draw_mamfusion, ["clip branch", "frame branch", "Mamba", "0.7", "fusion over time"]),
    ],
)
def test_the_parts_are_drawn(draw, parts):
    figure = draw()
    (axes,) = figure.axes
    text = "\n".join(t.get_text() for t in axes.texts)
    for part in parts:
        assert part in text, part
    figure.draw_without_rendering()
    boxes = [p.get_window_extent() for p in axes.patches if isinstance(p, FancyBboxPatch)]
    assert len(boxes) >= 7
    for number, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:number])
