"""Figures show what they are given, inside the figure and without overlap; HTML drawings too."""

import itertools
import re

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from tvg_lib import inline, paths, viz
from tvg_lib.baselines import ZeroShotWindow
from tvg_lib.data import planted, sources
from tvg_lib.data.planted import PlantedConfig, PlantedWords
from tvg_lib.decoding import Prediction
from tvg_lib.errors import DataError
from tvg_lib.exercises import exercise
from tvg_lib.metrics import Estimate, recall_at_k
from tvg_lib.moments import QVHIGHLIGHTS_2S, Moment
from tvg_lib.nn.points import PointGrid

SMALL = PlantedConfig(train=2, val=2, test=3)


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.rc_context():
        viz.use_house_style()
        yield
    plt.close("all")


def texts(figure: Figure) -> list[Text]:
    """All drawn, non-empty texts of a figure, after layout."""
    figure.canvas.draw()
    hidden = set()  # ticks beyond the limits of their axis exist, but are not drawn
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.majorTicks, *axis.minorTicks):
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {tick.label1, tick.label2}
    found = (t for t in figure.findobj(Text) if t not in hidden)
    return [t for t in found if t.get_visible() and t.get_text().strip()]


def assert_legible(figure: Figure) -> None:
    """No text is tiny, cut off at the edge, or drawn over another text."""
    shown = texts(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown]
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= figure.bbox.height + 1, text
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        wide = min(first.x1, second.x1) - max(first.x0, second.x0)
        tall = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert not (wide > 1 and tall > 3), f"{a!r} and {b!r} overlap"
    assert min(t.get_fontsize() for t in shown) >= 8


def bars(figure: Figure, colour: str) -> list[tuple[float, float]]:
    """(start, end) of the full-height opaque bars of a colour in the first axes, top to bottom."""
    patches = [
        p
        for p in figure.axes[0].patches
        if to_hex(p.get_facecolor()) == colour.lower() and p.get_height() == pytest.approx(0.74)
    ]
    patches.sort(key=lambda p: p.get_y())
    return [(p.get_x(), p.get_x() + p.get_width()) for p in patches]


def test_timeline_draws_truth_and_ranked_answers_with_score_and_iou():
    truth = [[10.0, 20.0], [50.0, 60.0]]
    answers = {"ours": [[12.0, 20.0, 0.9], [52.0, 70.0, 0.5], [0.0, 5.0, 0.1], [1.0, 2.0, 0.05]]}
    figure = viz.timeline("a dog runs", 100, truth=truth, answers=answers, top=3)
    assert bars(figure, viz.TRUTH) == [(10, 20), (50, 60)]
    assert bars(figure, viz.COLOURS[0]) == [(12, 20), (52, 70), (0, 5)]
    shown = [t.get_text() for t in texts(figure)]
    for word in ("“a dog runs”", "ours", "truth", "0.90", "0.50", "0.10", "0.80", "0.40", "0.00"):
        assert word in shown  # IoU by hand: 8/10, 8/20, 0
    assert "0.05" not in shown
    assert_legible(figure)


def test_timeline_of_planted_video_with_captions_relevance_and_two_systems():
    data, scripts = planted.planted("test", SMALL), planted.captions("test", SMALL)
    query = data.queries[0]
    first, second = ZeroShotWindow().predict(data)[0], ZeroShotWindow(1, 0.7).predict(data)[0]
    figure = viz.timeline_of(
        data, {"wide": first, "narrow": second}, captions=scripts[query.video_id]
    )
    shown = [t.get_text() for t in texts(figure)]
    middle = query.moments[0].mean()
    nearest = int(
        np.abs(data.videos[query.video_id].grid.to_seconds(np.arange(48)) - middle).argmin()
    )
    assert scripts[query.video_id][nearest] in shown
    assert "wide" in shown
    assert "narrow" in shown
    assert "relevance" in shown
    assert_legible(figure)


@pytest.mark.parametrize("duration", [60.0, 150.0, 1000.0, 5400.0, 20000.0])
def test_timeline_is_legible_at_every_length(duration):
    rng = np.random.default_rng(0)
    starts = np.sort(rng.uniform(0, 0.9 * duration, 4))
    clips = [(i * duration / 75, (i + 1) * duration / 75, "words " * 40) for i in range(75)]
    figure = viz.timeline(
        "A long question about a man in a red coat who walks his dog along the beach " * 2,
        duration,
        truth=np.stack([starts, starts + 0.05 * duration], axis=1),
        answers={
            "a system": np.stack([starts, starts + 9, rng.random(4)], axis=1),
            "silent": np.zeros((0, 3)),
        },
        relevance={"a system": (np.linspace(0, duration, 75), rng.random(75))},
        captions=clips,
        subtitle="a-video-id_60.0_210.0",
    )
    assert_legible(figure)


def test_timeline_window_and_bad_input():
    figure = viz.timeline("q", 5400, answers={"a": [[1890, 1970, 0.9]]}, window=(1800, 2100))
    assert figure.axes[0].get_xlim() == (1800, 2100)
    assert_legible(figure)
    with pytest.raises(DataError, match="window"):
        viz.timeline("q", 100, window=(50, 50))
    with pytest.raises(DataError, match=r"a: expected moments \(N, 3\)"):
        viz.timeline("q", 100, answers={"a": [[1, 2]]})
    data = planted.planted("test", SMALL)
    answers = ZeroShotWindow().predict(data)
    with pytest.raises(DataError, match="one query"):
        viz.timeline_of(data, {"a": answers[0], "b": answers[1]})


@pytest.mark.parametrize(
    ("moment", "length", "levels"), [((9.3, 30.6), 80, 5), ((2, 4), 32, 4), ((3, 60), 64, 7)]
)
def test_pyramid_diagram_marks_exactly_the_positive_points(moment, length, levels):
    figure = viz.pyramid_diagram(moment, length, levels, max_length=length - 8, step=2.0)
    positives = next(
        c for c in figure.axes[0].collections if c.get_label().startswith("positive")
    ).get_offsets()
    grid = PointGrid()
    expected = []  # by the rules, one point after the other
    for level, (low, high) in enumerate(grid.ranges(levels)):
        stride = 2**level
        for position in range(0, length, stride):
            left, right = position - moment[0], moment[1] - position
            central = abs(position - sum(moment) / 2) < 1.5 * stride
            if min(left, right) > 0 and central and low <= max(left, right) < high:
                expected.append((position, level))
    assert sorted(map(tuple, positives.tolist())) == sorted(expected)
    assert_legible(figure)


def test_pyramid_diagram_refuses_a_moment_outside():
    with pytest.raises(DataError, match="inside the video of 10 clips"):
        viz.pyramid_diagram((3, 12), 10, 3)


def test_learning_curves_smooth_terms_and_mark_the_kept_epoch():
    steps = {
        "epoch": [1, 1, 2, 2],
        "step": [1, 2, 3, 4],
        "learning_rate": [1e-3] * 4,
        "gradient_norm": [1.0] * 4,
        "total": [4.0, 3.0, 2.0, 1.0],
        "classification": [3.0, 2.0, 1.0, 0.5],
    }
    rows = [{"epoch": e, "step": 2 * e, "R1@0.5": 20.0 * e} for e in (1, 2)]
    figure = viz.learning_curves(steps, rows, selected=rows[1])
    left, right = figure.axes
    assert {line.get_label() for line in left.lines} >= {"total", "classification"}
    assert not any("rate" in str(line.get_label()) for line in left.lines)
    assert list(right.lines[0].get_ydata()) == [20, 40]
    assert any(list(line.get_xdata()) == [2, 2] for line in right.lines)
    assert_legible(figure)
    assert len(viz.learning_curves(steps).axes) == 1


def test_running_mean_equals_a_loop():
    y = np.random.default_rng(0).random(20)
    expected = [y[max(0, i - 4) : i + 1].mean() for i in range(20)]
    np.testing.assert_allclose(viz._running_mean(y, 5), expected)


def test_recall_by_length_counts_hits_in_each_bin():
    lengths = [5, 8, 20, 25, 100]
    iou = {"a": [0.9, 0.1, 0.5, 0.6, 0.7], "b": [0.0] * 5}
    figure = viz.recall_by_length(lengths, iou, threshold=0.5)
    heights = figure.axes[0].containers[0].lines[0].get_ydata()
    assert list(heights) == [50, 100, 100]  # the bin (30, 60] is empty and left out
    assert "2 queries" in figure.axes[0].get_xticklabels()[0].get_text()
    assert_legible(figure)
    with pytest.raises(DataError, match="one IoU per length"):
        viz.recall_by_length(lengths, {"a": [1.0]})
    with pytest.raises(DataError, match="no moment"):
        viz.recall_by_length([500.0], {"a": [1.0]})


def test_metric_bars_show_values_and_gaps():
    report = recall_at_k([[[0, 10, 1.0]], [[0, 1, 1.0]]], [[[0, 9]], [[5, 6]]], ks=(1,))
    other = {"R1@0.5": Estimate(30.0, 20.0, 40.0, 2)}
    figure = viz.metric_bars({"ours": report.estimates(), "theirs": other}, title="Recall")
    shown = [t.get_text() for t in texts(figure)]
    assert "50.0" in shown
    assert shown.count("30.0") == 1
    assert_legible(figure)
    with pytest.raises(DataError, match="nothing to draw"):
        viz.metric_bars({})


# --- HTML -----------------------------------------------------------------------------------------


def spans(html: str, colour: str) -> list[tuple[float, float]]:
    """Left edge and width in percent of the bars of a colour."""
    pattern = rf"left:([\d.]+)%;width:([\d.]+)%;height:100%;background:{colour}"
    return [(float(left), float(width)) for left, width in re.findall(pattern, html)]


def test_prediction_draws_itself_against_the_truth():
    prediction = Prediction(
        "q1",
        "v<1>",
        "a <b> dog",
        np.array([[10.0, 30.0, 0.9], [50.0, 60.0, 0.2]]),
        truth=np.array([[20.0, 40.0]]),
        duration=100.0,
    )
    html = prediction._repr_html_()
    assert spans(html, inline.TRUTH) == [(20, 20)]
    assert spans(html, inline.ANSWER) == [(10, 20), (50, 10)]
    assert "IoU 0.33" in html  # 10 of 30 s, by hand
    assert "a &lt;b&gt; dog" in html
    assert "<b> dog" not in html
    assert "v<1>" not in html


def test_prediction_without_truth_or_answers_still_draws():
    html = Prediction("q", "v", "text", np.zeros((0, 3)))._repr_html_()
    assert "text" in html
    alone = Prediction("q", "v", "text", np.array([[5.0, 10.0, 0.5]]))._repr_html_()
    assert spans(alone, inline.ANSWER) == [(50, 50)]
    assert "IoU" not in alone


def test_predictions_of_a_data_set_know_truth_and_duration():
    data = planted.planted("test", SMALL)
    for prediction in ZeroShotWindow().predict(data):
        assert prediction.truth is data.query(prediction.query_id).moments
        assert prediction.duration == data.videos[prediction.video_id].duration


def test_moment_draws_itself():
    html = Moment(30.0, 40.0, 0.123)._repr_html_()
    assert spans(html, inline.ANSWER) == [(75, 25)]
    assert "30.0–40.0 s · score 0.123" in html
    assert spans(Moment(0.0, 0.0)._repr_html_(), inline.ANSWER) == [(0, 0.3)]


@given(st.floats(0, 1e5), st.floats(0, 1))
def test_clock_reads_back(duration, share):
    seconds = share * duration
    text = inline.clock(seconds, duration)
    if text.endswith(" s"):
        assert float(text[:-2]) == pytest.approx(seconds, abs=0.05001)
    else:
        parts = [int(part) for part in text.split(":")]
        assert all(part < 60 for part in parts[1:])
        read = sum(part * 60**power for power, part in enumerate(reversed(parts)))
        assert read == pytest.approx(seconds, abs=0.5001)


# --- what notebooks draw --------------------------------------------------------------------------


def test_sources_at_smoke_scale_are_planted_whatever_the_machine_has(monkeypatch):
    monkeypatch.setenv("TVG_DATA", "/nowhere")  # looking there would raise
    data = sources.benchmark("smoke")
    assert [dataset.name for dataset in data.values()] == [
        "planted/train",
        "planted/val",
        "planted/test",
    ]
    scripts = sources.captions("smoke")
    assert scripts.keys() == data["test"].videos.keys()
    encoder = sources.text_encoder("smoke")
    assert encoder.encode(["the red square jumps"]).shape == (1, data["test"].video_features.dim)


def test_sources_without_real_data_fall_back_to_planted(monkeypatch, tmp_path):
    monkeypatch.delenv("TVG_DATA", raising=False)
    monkeypatch.setenv("TVG_CACHE", str(tmp_path))
    assert not sources.has_real_data("full")
    assert set(sources.captions("full", "val")) == set(planted.captions("val"))


def test_planted_captions_name_the_queried_event_inside_its_moments():
    data, scripts = planted.planted("test", SMALL), planted.captions("test", SMALL)
    checked = 0
    for query in data.queries:
        if not query.text.startswith("the "):
            continue
        script = scripts[query.video_id]
        for clip, caption in enumerate(script):
            start, end = QVHIGHLIGHTS_2S.clip_span(clip)
            covered = sum(
                max(0.0, min(end, last) - max(start, first)) for first, last in query.moments
            )
            if covered > 1.01 or covered < 0.49:  # away from the half that decides
                assert (query.text in caption) == (covered > 1)
                checked += 1
    assert checked > 50


def test_planted_words_read_like_the_data_and_refuse_the_unknown():
    data, words = planted.planted("test", SMALL), PlantedWords(SMALL)
    for query in data.queries[:5]:
        assert float((words.encode([query.text]) @ data.sentence_features[query.id].T)[0, 0]) > 0.98
        (tokens,) = words.encode_tokens([query.text])
        assert tokens.shape == data.text_features[query.id].shape
    with pytest.raises(DataError, match="the word 'dog'"):
        words.encode(["the red dog"])
    with pytest.raises(DataError, match="no word with a meaning"):
        words.encode_tokens(["the something"])


def test_questions_of_ones_own_are_answered_like_annotated_ones():
    data = planted.planted("test", SMALL)
    query = data.queries[0]
    own = sources.questions_about(data, query.video_id, [query.text], PlantedWords(SMALL))
    own.check()
    (mine,), theirs = ZeroShotWindow().predict(own), ZeroShotWindow().predict(data)[0]
    assert mine.best.iou(theirs.best) > 0.8  # the words of the data carry a little noise
    assert "truth" not in mine._repr_html_()
    assert_legible(viz.timeline_of(own, mine))
    with pytest.raises(DataError, match="no video"):
        sources.questions_about(data, "nowhere", ["a star"], PlantedWords(SMALL))


def test_a_glimpse_holds_the_first_videos_only():
    assert sorted(sources.glimpse("smoke", 3).videos) == sorted(planted.captions("test"))[:3]


def test_exercise_reports_unsolved_and_solved_and_fails_on_wrong(capsys):
    def unsolved():
        raise NotImplementedError

    with exercise("1"):
        unsolved()
    with exercise("2"):
        assert True
    with pytest.raises(AssertionError), exercise("3"):
        assert 1 == 2
    assert capsys.readouterr().out == ("exercise 1: still yours to solve\nexercise 2: solved\n")


def test_default_clip_helpers_place_curves_and_captions():
    times, values = viz.clip_curve(QVHIGHLIGHTS_2S, [1, 2, 3])
    assert times.tolist() == [1, 3, 5]
    assert values.tolist() == [1, 2, 3]
    assert viz.clip_captions(QVHIGHLIGHTS_2S, ["a", "b"]) == [(0, 2, "a"), (2, 4, "b")]


def test_a_kept_figure_is_named_after_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    figure, _ = plt.subplots()
    path = viz.keep_figure(figure, "cpu", "mscl_figure1", "qvh-captions/test")
    assert path == tmp_path / "runs/cpu/figures/mscl_figure1_qvh-captions_test.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
