"""MSCL's figures: what is chosen, what is measured, and that every drawing holds its parts."""

import matplotlib
import numpy as np
import pytest
import torch
from grounding_data import make_dataset, small_snag

from tvg_lib.decoding import ground
from tvg_lib.errors import DataError
from tvg_lib.metrics.bootstrap import Estimate
from tvg_lib.metrics.report import MetricReport, mean_report
from tvg_lib.viz_mscl import (
    count_pairs,
    draw_by_length,
    draw_framework,
    draw_pair,
    iou_by_length,
    telling_pair,
)

matplotlib.use("Agg")


@pytest.fixture
def dataset():
    """Two videos; moments of 4, 20, 5 and 12 seconds."""
    return make_dataset(
        {"a": 40, "b": 40},
        [
            ("a", [[2.0, 6.0]]),
            ("a", [[10.0, 30.0]]),
            ("b", [[20.0, 25.0], [3.0, 4.0]]),
            ("b", [[20.0, 32.0]]),
        ],
    )


def report(*iou):
    values = np.array(iou, float)
    ids = tuple(f"q{n}" for n in range(len(iou)))
    return MetricReport(ids, {"mIoU": float(values.mean())}, {"mIoU": values}, groups=tuple("aabb"))


def test_iou_by_length_is_the_mean_of_each_bin(dataset):
    found = iou_by_length(report(80, 10, 60, 40), dataset, edges=(0, 5, 10, 15))
    # (0, 5] holds 4 s and 5 s (the longest of two); 12 s and 20 s join the last, open bin.
    assert {name: (e.value, e.n) for name, e in found.items()} == {
        "mIoU 0-5 s": (70, 2),
        "mIoU over 10 s": (25, 2),
    }


def test_the_telling_pair_follows_its_rule(dataset):
    base, method = report(80, 10, 60, 40), report(70, 90, 55, 60)
    pair = telling_pair(dataset, base, method)
    assert (pair.short.id, pair.long.id) == ("q0", "q1")
    assert count_pairs(dataset, base, method) == 2
    assert count_pairs(dataset, method, base) == 0
    # The difference decides: now b's pair is the clearer one.
    assert telling_pair(dataset, report(80, 40, 60, 0), method).long.id == "q3"
    # The shorter moment must be found by both.
    assert telling_pair(dataset, report(40, 10, 60, 55), method) is None
    # Lengths must differ: 12 s is not three times 5 s.
    assert count_pairs(dataset, base, method, ratio=3) == 1


def test_drawings_show_what_they_say(dataset):
    torch.manual_seed(0)
    models = {name: small_snag(seed).float() for seed, name in enumerate(("base", "method"))}
    predictions = {name: ground(model, dataset) for name, model in models.items()}
    pair = telling_pair(dataset, report(80, 10, 60, 40), report(70, 90, 55, 60))
    figure = draw_pair(dataset, pair, models, predictions)
    assert len(figure.axes) == 6
    boxes = sum((40 + 2**level - 1) // 2**level for level in range(4))
    for axes in figure.axes[2:]:
        filled = [p for p in axes.patches if p.get_fill() and p.get_alpha() != 0.15]
        assert len(filled) == boxes
        assert max(p.get_alpha() for p in filled) == pytest.approx(1)

    systems = {
        "base": {"mIoU 0-5 s": Estimate(40, 30, 50, 9), "mIoU over 5 s": Estimate(20, 10, 30, 9)},
        "method": {"mIoU 0-5 s": Estimate(45, 35, 55, 9), "R1@0.5": Estimate(1, 0, 2, 9)},
    }
    figure = draw_by_length(systems, "title")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0-5 s", "over 5 s"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["base", "method"]
    with pytest.raises(DataError, match="nothing to draw"):
        draw_by_length({"base": {"R1@0.5": Estimate(1, 0, 2, 9)}})

    texts = " ".join(t.get_text() for t in draw_framework(3).axes[0].texts)
    for part in ("eq. 11", "eq. 12", "$Z^0$", "$Z^3$", "(13)"):
        assert part in texts


def test_the_mean_of_reports(dataset):
    mean = mean_report([report(80, 10, 60, 40), report(70, 90, 55, 60)])
    assert mean.contributions["mIoU"].tolist() == [75, 50, 57.5, 50]
    assert mean.values["mIoU"] == pytest.approx(58.125)
    assert mean.groups == tuple("aabb")
    with pytest.raises(DataError, match="different queries"):
        mean_report([report(1, 2, 3, 4), report(1, 2, 3)])
    with pytest.raises(DataError, match="one report"):
        mean_report([])
