"""Annotation readers: known counts of the real files, small files by hand, and broken ones."""

import json
import logging
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvg_lib.data.features import ArrayStore
from tvg_lib.data.readers import (
    Tally,
    durations_from_features,
    join,
    read_activitynet,
    read_charades,
    read_qvhighlights,
    read_snag,
    read_tacos,
)
from tvg_lib.errors import DataError, GridMismatchError
from tvg_lib.moments import QVHIGHLIGHTS_2S, TimeGrid

in_one_folder = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path, content):
    if not isinstance(content, str):
        content = json.dumps(content)
    path.write_text(content, encoding="utf-8")
    return path


def write_lines(path, entries):
    return write(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def listed(annotations):
    """Queries in plain Python, for comparisons."""
    return [(q.id, q.video_id, q.text, q.moments.tolist()) for q in annotations.queries]


# Real files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "videos", "queries", "clipped", "overrun"),
    [("train", 75, 9790, 43, 15 / 29.4), ("val", 27, 4436, 0, 0), ("test", 25, 4001, 5, 7 / 29.4)],
)
def test_tacos_in_both_forms(split, videos, queries, clipped, overrun, tvg_data):
    videox = read_tacos(tvg_data / f"annotations/tacos_{split}.json")
    assert (len(videox.videos), len(videox.queries)) == (videos, queries)
    assert videox.tally == Tally(moments=queries, clipped=clipped, overrun=pytest.approx(overrun))
    assert set(videox.fps.values()) == {29.4}
    # lighthouse published the same annotations in seconds, already clipped: an independent reading.
    lighthouse = read_qvhighlights(tvg_data / f"annotations/tacos_{split}.jsonl")
    assert lighthouse.tally == Tally(moments=queries)
    assert videox.videos == pytest.approx(lighthouse.videos)
    for ours, theirs in zip(videox.queries, lighthouse.queries, strict=True):
        assert (ours.video_id, ours.text) == (theirs.video_id, theirs.text.strip())
        np.testing.assert_allclose(ours.moments, theirs.moments, atol=1e-6)


@pytest.mark.parametrize(
    ("split", "lines", "videos", "tally"),
    [
        (
            "train",
            12408,
            5336,
            Tally(
                moments=12404,
                clipped=1802,
                overrun=pytest.approx(1.54),
                reversed=1,
                queries_without_moment=1,
                queries_without_video=3,
            ),
        ),
        ("test", 3720, 1334, Tally(moments=3720, clipped=562, overrun=pytest.approx(1.5))),
    ],
)
def test_charades_in_both_forms(split, lines, videos, tally, tvg_data):
    lighthouse = read_qvhighlights(tvg_data / f"annotations/charades_sta_{split}.jsonl")
    txt = read_charades(tvg_data / f"annotations/charades_sta_{split}.txt", lighthouse.videos)
    assert txt.tally == tally
    assert (len(txt.videos), len(txt.queries)) == (videos, tally.moments)
    assert len(txt.queries) + tally.queries_without_moment + tally.queries_without_video == lines
    assert txt.videos == lighthouse.videos
    # lighthouse clipped the same moments and left out the same lines.
    for ours, theirs in zip(txt.queries, lighthouse.queries, strict=True):
        assert (ours.video_id, ours.text) == (theirs.video_id, theirs.text.strip())
        np.testing.assert_allclose(ours.moments, theirs.moments, atol=1e-9)


def test_activitynet(tvg_data):
    annotations = read_activitynet(tvg_data / "annotations/activitynet_val1.json")
    assert (len(annotations.videos), len(annotations.queries)) == (4917, 17505)
    assert annotations.tally == Tally(moments=17505, clipped=134, overrun=pytest.approx(0.01))
    first = annotations.queries[0]
    assert (first.video_id, first.text) == ("v_uqiMw7tQ1Cc", "A weight lifting tutorial is given.")
    assert first.moments.tolist() == [[0.28, 55.15]]


@pytest.mark.parametrize(
    ("split", "videos", "queries", "moments"),
    [("val", 1519, 1550, 2803), ("test", 1529, 1542, 2761)],
)
def test_qvhighlights(split, videos, queries, moments, tvg_data):
    annotations = read_qvhighlights(tvg_data / f"qvhighlights/{split}.jsonl", strict=True)
    assert (len(annotations.videos), len(annotations.queries)) == (videos, queries)
    assert annotations.tally == Tally(moments=moments)
    for query in annotations.queries:
        saliency = query.saliency
        assert saliency.scores.shape == (len(saliency.clips), 3)
        assert saliency.scores.max() <= 4
        # The clips with saliency are exactly those of the moments, two seconds each.
        inside = [np.arange(start // 2, end // 2) for start, end in query.moments]
        np.testing.assert_array_equal(np.sort(np.concatenate(inside)), saliency.clips)


def test_strict_reading_names_the_first_fault_of_a_real_file(tvg_data):
    with pytest.raises(DataError, match=r"tacos_train\.json: video '.*', sentence \d+"):
        read_tacos(tvg_data / "annotations/tacos_train.json", strict=True)


def test_a_real_file_becomes_a_data_set_on_its_own_grid(tvg_data):
    annotations = read_tacos(tvg_data / "annotations/tacos_test.json")
    grids = annotations.grids(clip_size=16, stride=16)
    assert set(grids.values()) == {TimeGrid(16, 16, 29.4)}
    clips = {key: int(grids[key].to_index(s)) for key, s in annotations.videos.items()}
    video = ArrayStore.of({key: np.ones((n, 2), np.float32) for key, n in clips.items()})
    text = ArrayStore.of({q.id: np.ones((4, 5), np.float32) for q in annotations.queries})
    join(annotations, grids, video, text).check()
    wrong = join(annotations, TimeGrid(16, 4, 29.4), video, text)  # as if they were not thinned
    with pytest.raises(GridMismatchError, match="says the video lasts"):
        wrong.check()


# SnAG ----------------------------------------------------------------------------------------

SNAG_VIDEO = {
    "subset": "train",
    "duration": 20.0,
    "fps": 30.0,
    "num_frames": 600,
    "annotations": [
        {"segment": [1.5, 4], "sentence": " She opens the door. ", "sentence_id": "a"},
        {"segment": [18, 25.5], "sentence": "She leaves."},
    ],
}


def test_snag_json_by_hand(tmp_path):
    path = write(
        tmp_path / "tacos.json",
        {
            "version": "1.0",
            "database": {
                "v1": SNAG_VIDEO,
                "v2": SNAG_VIDEO | {"subset": "test", "annotations": []},
                "v3": SNAG_VIDEO
                | {"subset": "test", "annotations": [{"segment": [0, 1], "sentence": "x"}]},
            },
        },
    )
    train = read_snag(path, "train")
    assert (train.name, train.videos, train.fps) == ("tacos/train", {"v1": 20.0}, {"v1": 30.0})
    assert listed(train) == [
        ("a", "v1", "She opens the door.", [[1.5, 4]]),
        ("v1_0001", "v1", "She leaves.", [[18, 20]]),
    ]
    assert train.tally == Tally(moments=2, clipped=1, overrun=5.5)
    test = read_snag(path, "test", name="held out")
    assert (test.name, list(test.videos)) == ("held out", ["v3"])
    assert test.tally == Tally(moments=1, videos_without_query=1)
    both = read_snag(path)
    assert listed(both) == listed(train) + listed(test)
    assert listed(read_snag(path, ["test", "train"])) == listed(test) + listed(train)
    with pytest.raises(DataError, match=r"no split 'val', only \['test', 'train'\]"):
        read_snag(path, "val")


def test_snag_json_by_split_as_the_released_loaders_have_it(tmp_path):
    """HieraMamba's files lack num_frames, SnAG's may lack durations and sentences."""
    bare = {key: SNAG_VIDEO[key] for key in ("fps", "annotations")}
    path = write(
        tmp_path / "mad.json",
        {
            "train": {"v1": bare | {"duration": 20.0}},
            "val": {
                "v2": bare
                | {"num_frames": 630, "annotations": [{"segment": [0, 1], "sentence": "x"}]},
                "v3": {"fps": 5, "duration": 3},
            },
        },
    )
    annotations = read_snag(path)
    assert annotations.videos == {"v1": 20.0, "v2": 21.0}
    assert [query.id for query in annotations.queries] == ["a", "v1_0001", "v2_0000"]
    assert annotations.tally.videos_without_query == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"fps": 0}, "'fps': expected a positive number"),
        ({"fps": "30"}, "'fps': expected a number, found str '30'"),
        ({"fps": True}, "expected a number, found bool"),
        ({"duration": float("nan")}, "finite"),
        ({"duration": -1}, "positive"),
        ({"subset": 3}, "'subset': expected text"),
        ({"annotations": {}}, "expected a list, found dict"),
        ({"annotations": [3]}, "annotation 0: expected an object"),
        ({"annotations": [{"sentence": "x"}]}, "expected the field 'segment', found"),
        ({"annotations": [{"segment": [0, 1]}]}, "expected the field 'sentence'"),
        ({"annotations": [{"segment": [0], "sentence": "x"}]}, r"a moment is \[start, end\]"),
        ({"annotations": [{"segment": [0, "1"], "sentence": "x"}]}, "end: expected a number"),
        ({"annotations": [{"segment": "01", "sentence": "x"}]}, "expected a list"),
        ({"annotations": [{"segment": [0, 10**400], "sentence": "x"}]}, "finite"),
        ({"annotations": [{"segment": [0, 1], "sentence": 5}]}, "expected text, found int"),
        ({"annotations": [{"segment": [0, 1], "sentence": "x", "sentence_id": "../x"}]}, "plain"),
        ({"annotations": [{"segment": [0, 1], "sentence": "x", "sentence_id": 5}]}, "a string"),
        (
            {"annotations": [{"segment": [0, 1], "sentence": "x", "sentence_id": "a"}] * 2},
            "the query id 'a' occurs twice",
        ),
    ],
)
def test_broken_snag_json_is_named(change, complaint, tmp_path):
    path = write(tmp_path / "snag.json", {"database": {"v1": SNAG_VIDEO | change}})
    with pytest.raises(DataError, match=complaint) as caught:
        read_snag(path)
    assert str(path) in str(caught.value)
    assert "v1" in str(caught.value) or "'a'" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "3",
        '{"database": []}',
        '{"database": {}}',
        '{"train": {"v": 3}}',
        "[" * 100_000,
        '{"a": NaN}',
    ],
)
@pytest.mark.parametrize("read", [read_snag, read_tacos, read_activitynet])
def test_what_is_no_annotation_file_is_named(read, content, tmp_path):
    path = write(tmp_path / "file.json", content)
    with pytest.raises(DataError, match=r"file\.json"):
        read(path)


def test_a_repeated_video_is_refused(tmp_path):
    video = json.dumps(SNAG_VIDEO)
    path = write(tmp_path / "snag.json", f'{{"database": {{"v1": {video}, "v1": {video}}}}}')
    with pytest.raises(DataError, match="the key 'v1' occurs twice"):
        read_snag(path)
    path = write(tmp_path / "split.json", {"train": {"v1": SNAG_VIDEO}, "test": {"v1": SNAG_VIDEO}})
    with pytest.raises(DataError, match="the video id 'v1' occurs twice"):
        read_snag(path)


# The policy ----------------------------------------------------------------------------------


def one_video(tmp_path, windows, **more):
    """ActivityNet json of one video of ten seconds."""
    entry = {"duration": 10, "timestamps": windows, "sentences": ["x"] * len(windows)} | more
    return write(tmp_path / "anet.json", {"v": entry})


@pytest.mark.parametrize(
    ("window", "kept", "counter"),
    [
        ([2, 5], [2, 5], None),
        ([0, 10], [0, 10], None),
        ([-1, 5], [0, 5], "clipped"),
        ([8, 11.5], [8, 10], "clipped"),
        ([-3, 30], [0, 10], "clipped"),
        ([10, 12], None, "outside"),
        ([12, 15], None, "outside"),
        ([-5, -1], None, "outside"),
        ([-5, 0], None, "outside"),
        ([4, 4], None, "empty"),
        ([11, 11], None, "empty"),
        ([5, 2], None, "reversed"),
    ],
)
def test_moments_outside_their_video_are_clipped_or_dropped_and_counted(
    window, kept, counter, tmp_path, caplog
):
    path = one_video(tmp_path, [window, [1, 2]])
    with caplog.at_level(logging.INFO, "tvg_lib.data.readers"):
        annotations = read_activitynet(path)
    expected = Tally(moments=1 + (kept is not None))
    if counter:
        setattr(expected, counter, 1)
        expected.queries_without_moment = int(kept is None)
        if kept is not None:
            expected.overrun = max(kept[0] - window[0], window[1] - kept[1])
        assert str(annotations.tally) in caplog.text
        with pytest.raises(DataError, match=r"anet\.json: video 'v', sentence 0"):
            read_activitynet(path, strict=True)
    else:
        assert caplog.text == ""
        assert listed(read_activitynet(path, strict=True)) == listed(annotations)
    assert annotations.tally == expected
    assert listed(annotations)[-1][-1] == [[1, 2]]
    assert (listed(annotations)[0][-1] == [kept]) == (kept is not None)
    # Ids come from the place in the file, whatever was dropped before.
    assert annotations.queries[-1].id == "v_0001"


def test_the_tally_speaks():
    assert str(Tally(moments=5)) == "5 moments"
    tally = Tally(moments=4, clipped=2, overrun=1.25, reversed=1, queries_without_moment=1)
    assert str(tally) == (
        "4 moments, 2 clipped to their video (at most 1.25 s), 1 reversed dropped, "
        "1 queries without moment left out"
    )


def test_blank_sentences_are_left_out_and_counted(tmp_path):
    path = one_video(tmp_path, [[1, 2], [3, 4]], sentences=["  ", "x"])
    assert read_activitynet(path).tally == Tally(moments=1, queries_without_text=1)
    with pytest.raises(DataError, match="sentence 0: the sentence is blank"):
        read_activitynet(path, strict=True)


def test_a_file_without_a_usable_query_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no query was found .*1 reversed dropped"):
        read_activitynet(one_video(tmp_path, [[5, 2]]))


@in_one_folder
@given(windows=st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=8))
def test_whatever_the_file_says_moments_lie_in_their_video(windows, tmp_path):
    path = one_video(tmp_path, [[0, 1], *windows])
    annotations = read_activitynet(path)
    tally = annotations.tally
    assert tally.moments + tally.outside + tally.empty + tally.reversed == len(windows) + 1
    for query in annotations.queries:
        ((start, end),) = query.moments
        assert 0 <= start < end <= 10
    untouched = sum(0 <= s < e <= 10 for s, e in windows) + 1
    assert tally.moments - tally.clipped == untouched


# QVHighlights --------------------------------------------------------------------------------

QVH = {
    "qid": 8737,
    "query": "A family plays basketball.",
    "duration": 126,
    "vid": "bP5KfdFJzC4_660.0_810.0",
    "relevant_windows": [[0, 4], [6, 8]],
    "relevant_clip_ids": [0, 1, 3],
    "saliency_scores": [[4, 1, 1], [4, 3, 2], [0, 0, 1]],
}


def test_qvhighlights_by_hand(tmp_path):
    bare = {key: QVH[key] for key in ("query", "duration", "vid")}
    path = write_lines(tmp_path / "val.jsonl", [QVH, bare | {"qid": "s30-d52_0"}])
    annotations = read_qvhighlights(path)
    assert listed(annotations)[0] == ("8737", QVH["vid"], QVH["query"], [[0, 4], [6, 8]])
    np.testing.assert_array_equal(annotations.queries[0].saliency.clips, [0, 1, 3])
    np.testing.assert_array_equal(annotations.queries[0].saliency.scores, QVH["saliency_scores"])
    # The official test file hides windows and saliency.
    assert annotations.queries[1].moments.shape == (0, 2)
    assert annotations.queries[1].saliency is None
    assert annotations.videos == {QVH["vid"]: 126.0}


def test_one_of_several_windows_may_be_dropped(tmp_path):
    entry = QVH | {"relevant_windows": [[0, 4], [130, 150], [120, 150]]}
    annotations = read_qvhighlights(write_lines(tmp_path / "val.jsonl", [entry]))
    assert annotations.queries[0].moments.tolist() == [[0, 4], [120, 126]]
    assert annotations.tally == Tally(moments=2, clipped=1, overrun=24, outside=1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"qid": None}, "an id is a string"),
        ({"qid": True}, "an id is a string"),
        ({"qid": 1.5}, "an id is a string"),
        ({"qid": "../../x"}, "not a plain name"),
        ({"vid": "/etc/passwd"}, "not a plain name"),
        ({"vid": "a\0b"}, "not a plain name"),
        ({"vid": ["v"]}, "an id is a string"),
        ({"duration": 0}, "positive"),
        ({"duration": None}, "expected a number"),
        ({"query": ["x"]}, "expected text"),
        ({"relevant_windows": {}}, "expected a list"),
        ({"relevant_windows": [[1, 2, 3]]}, r"\[start, end\]"),
        ({"relevant_windows": [[1, None]]}, "expected a number"),
        ({"relevant_clip_ids": [0, 1]}, "2 relevant_clip_ids but 3 saliency_scores"),
        ({"relevant_clip_ids": [0, 1, 1]}, "occurs twice"),
        ({"relevant_clip_ids": [0, 1, 63]}, "clip 63 lies outside the video of 126"),
        ({"relevant_clip_ids": [0, 1, -1]}, "integers >= 0, found -1"),
        ({"relevant_clip_ids": [0, 1, 2.5]}, "integers >= 0, found 2.5"),
        ({"saliency_scores": [[4, 1, 1], [4, 3], [0, 0, 1]]}, "different numbers of annotators"),
        ({"saliency_scores": [[4, 1, 1], 4, [0, 0, 1]]}, "expected a list"),
    ],
)
def test_broken_qvhighlights_lines_are_named(change, complaint, tmp_path):
    path = write_lines(tmp_path / "val.jsonl", [QVH | {"qid": 1}, QVH | change])
    with pytest.raises(DataError, match=complaint) as caught:
        read_qvhighlights(path)
    assert f"{path}, line 2" in str(caught.value)


@pytest.mark.parametrize("field", ["qid", "query", "vid", "duration"])
def test_missing_fields_are_named(field, tmp_path):
    entry = {key: value for key, value in QVH.items() if key != field}
    with pytest.raises(
        DataError, match=rf"val\.jsonl, line 1: expected the field '{field}', found"
    ):
        read_qvhighlights(write_lines(tmp_path / "val.jsonl", [entry]))


def test_lines_that_disagree_are_named(tmp_path):
    lines = [QVH, QVH | {"qid": 2, "duration": 130}]
    with pytest.raises(DataError, match=r"val\.jsonl, line 2: .* lasts 130.0 s here, but 126.0 s"):
        read_qvhighlights(write_lines(tmp_path / "val.jsonl", lines))
    with pytest.raises(DataError, match=r"val\.jsonl, line 2: the query id '8737' occurs twice"):
        read_qvhighlights(write_lines(tmp_path / "val.jsonl", [QVH, QVH]))


@pytest.mark.parametrize("line", ["{", "[]", '{"qid": 1} {"qid": 2}', '{"qid": 1, "qid": 2}'])
def test_lines_that_are_no_objects_are_named(line, tmp_path):
    path = write(tmp_path / "val.jsonl", json.dumps(QVH) + "\n\n" + line)
    with pytest.raises(DataError, match=r"val\.jsonl, line 3: "):
        read_qvhighlights(path)


plain_names = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/\\"), min_size=1
).filter(lambda name: name.strip() and name not in (".", ".."))
sentences = st.text(st.characters(exclude_categories=("Cs",))).filter(lambda s: s.strip())


@in_one_folder
@given(
    entries=st.lists(
        st.tuples(
            plain_names, sentences, st.lists(st.tuples(st.integers(0, 70), st.integers(1, 5)))
        ),
        min_size=1,
        max_size=5,
    ),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_any_jsonl_comes_back(entries, ascii_only, end, tmp_path):
    rows = [
        {
            "qid": number,
            "vid": video,
            "query": text,
            "duration": 75,
            "relevant_windows": [[start, start + length] for start, length in windows] or None,
        }
        for number, (video, text, windows) in enumerate(entries)
    ]
    text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path = tmp_path / "any.jsonl"
    path.write_bytes(text.encode())
    annotations = read_qvhighlights(path)
    assert listed(annotations) == [
        (str(row["qid"]), row["vid"], row["query"].strip(), row["relevant_windows"] or [])
        for row in rows
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@in_one_folder
@given(field=st.sampled_from(sorted(QVH)), value=json_values)
def test_any_value_in_any_field_is_read_or_named(field, value, tmp_path):
    path = write_lines(tmp_path / "any.jsonl", [QVH | {field: value}])
    message, annotations = outcome(read_qvhighlights, path)
    if annotations is None:
        assert str(path) in message
    else:
        (query,) = annotations.queries
        duration = annotations.videos[query.video_id]
        assert ((query.moments >= 0) & (query.moments <= duration)).all()


@pytest.mark.parametrize(("frames", "fps"), [(500, 5e-324), (5e-324, 500)])
def test_a_duration_beyond_all_numbers_is_named(frames, fps, tmp_path):
    counted = {"num_frames": frames, "fps": fps}
    snag = {"subset": "train", "annotations": [{"segment": [0, 1], "sentence": "x"}]} | counted
    tacos = {"timestamps": [[0, 0]], "sentences": ["x"]} | counted
    for read, content in ((read_snag, {"database": {"v1": snag}}), (read_tacos, {"v1": tacos})):
        with pytest.raises(DataError, match=r"video 'v1': 'num_frames' / 'fps': expected"):
            read(write(tmp_path / "file.json", content))


PAIRED = {"timestamps": [[0, 50], [60, 75]], "sentences": ["one", "two"]}
DOCUMENTS = {
    read_snag: {
        "version": "1",
        "database": {
            "v1": {
                "subset": "train",
                "duration": 20.0,
                "fps": 25,
                "num_frames": 500,
                "annotations": [{"segment": [2, 5], "sentence": "one", "sentence_id": "q1"}],
            },
            "v2": {
                "subset": "test",
                "fps": 25,
                "num_frames": 500,
                "annotations": [{"segment": [2, 5.5], "sentence": "two"}],
            },
        },
    },
    read_tacos: {"v1.avi": PAIRED | {"fps": 25, "num_frames": 100}},
    read_activitynet: {"v1": PAIRED | {"duration": 80}},
}


def places(value, path=()):
    """Where in a JSON value something stands."""
    yield path
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*path, key))


def put(value, path, other):
    """The JSON value with another one at a place."""
    if not path:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], other)
    return copy


@pytest.mark.parametrize("read", list(DOCUMENTS), ids=lambda read: read.__name__)
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_at_any_place_is_read_or_named(read, data, tmp_path):
    document = DOCUMENTS[read]
    place = data.draw(st.sampled_from(list(places(document))))
    path = write(tmp_path / "any.json", put(document, place, data.draw(json_values)))
    message, annotations = outcome(read, path)
    if annotations is None:
        assert str(path) in message
        return
    for query in annotations.queries:
        duration = annotations.videos[query.video_id]
        assert math.isfinite(duration)
        assert ((query.moments >= 0) & (query.moments <= duration)).all()


def outcome(read, *arguments):
    """The message of the error, or what was read."""
    try:
        return "", read(*arguments)
    except DataError as error:
        return str(error), None


# TACoS and ActivityNet -----------------------------------------------------------------------


def test_tacos_json_by_hand(tmp_path):
    entry = {
        "timestamps": [[0, 50], [90, 120]],
        "sentences": [" He cuts. ", "He eats."],
        "fps": 25,
        "num_frames": 100,
    }
    annotations = read_tacos(write(tmp_path / "tacos.json", {"s1-d2.avi": entry}))
    assert (annotations.videos, annotations.fps) == ({"s1-d2": 4.0}, {"s1-d2": 25.0})
    assert listed(annotations) == [
        ("s1-d2_0000", "s1-d2", "He cuts.", [[0, 2]]),
        ("s1-d2_0001", "s1-d2", "He eats.", [[3.6, 4]]),
    ]
    assert annotations.tally == Tally(moments=2, clipped=1, overrun=pytest.approx(0.8))
    twice = write(tmp_path / "twice.json", {"s1-d2.avi": entry, "s1-d2": entry})
    with pytest.raises(DataError, match="'s1-d2' occurs twice"):
        read_tacos(twice)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sentences": ["one"]}, "2 timestamps but 1 sentences"),
        ({"timestamps": [[0, 1], [1]]}, r"a moment is \[start, end\]"),
        ({"timestamps": [[0, 1], [1, "2"]]}, "sentence 1: expected a number"),
        ({"timestamps": [[0, 1], 5]}, "expected a list"),
        ({"timestamps": None}, "expected a list, found NoneType"),
        ({"sentences": ["one", None]}, "expected text"),
        ({"fps": None, "duration": None}, "expected a number"),
    ],
)
@pytest.mark.parametrize("read", [read_tacos, read_activitynet])
def test_broken_paired_lists_are_named(read, change, complaint, tmp_path):
    entry = {"timestamps": [[0, 1], [1, 2]], "sentences": ["one", "two"]}
    entry |= {"fps": 25, "num_frames": 100, "duration": 4}
    path = write(tmp_path / "file.json", {"v7": entry | change})
    with pytest.raises(DataError, match=complaint) as caught:
        read(path)
    assert f"{path}: video 'v7'" in str(caught.value)


# Charades-STA --------------------------------------------------------------------------------


def test_charades_txt_by_hand(tmp_path):
    path = write(
        tmp_path / "sta.txt",
        "3MSZA 24.3 30.4##person turn a light on.\n\n3MSZA 40 50##gone\n"
        "3MSZA 29 33##they laugh ## loudly\nAMT7R 4 5##a\nNONE 0 1##b\n",
    )
    annotations = read_charades(path, {"3MSZA": 30.96, "AMT7R": 30, "UNUSED": 5})
    assert listed(annotations) == [
        ("3MSZA_0000", "3MSZA", "person turn a light on.", [[24.3, 30.4]]),
        ("3MSZA_0002", "3MSZA", "they laugh ## loudly", [[29, 30.96]]),
        ("AMT7R_0000", "AMT7R", "a", [[4, 5]]),
    ]
    assert annotations.videos == {"3MSZA": 30.96, "AMT7R": 30.0}
    assert annotations.tally == Tally(
        moments=3,
        clipped=1,
        overrun=pytest.approx(2.04),
        outside=1,
        queries_without_moment=1,
        queries_without_video=1,
    )
    with pytest.raises(DataError, match=r"sta\.txt, line 6: video 'NONE' has no known duration"):
        read_charades(path, {"3MSZA": 60, "AMT7R": 30}, strict=True)


@pytest.mark.parametrize(
    "line",
    [
        "3MSZA 24.3 30.4 person",
        "3MSZA 24.3##person",
        "3MSZA 1 2 3##person",
        "##person",
        "3MSZA one 2##person",
        "3MSZA nan 2##person",
        "3MSZA 0 inf##person",
        "3MSZA 0 1e999##person",
        "../x 0 1##person",
        "{}",
    ],
)
def test_broken_charades_lines_are_named(line, tmp_path):
    path = write(tmp_path / "sta.txt", f"3MSZA 24.3 30.4##fine\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_charades(path, {"3MSZA": 60.0})
    assert f"{path}, line 2" in str(caught.value)


@pytest.mark.parametrize("duration", [0, -1, float("nan"), "30", None])
def test_impossible_durations_are_named(duration, tmp_path):
    path = write(tmp_path / "sta.txt", "3MSZA 24.3 30.4##fine\n")
    with pytest.raises(DataError, match="the duration of '3MSZA'"):
        read_charades(path, {"3MSZA": duration})


times = st.floats(0, 99).map(lambda x: round(x, 2))


@in_one_folder
@given(
    lines=st.lists(
        st.tuples(
            st.text("ABCXYZ0123456789", min_size=5, max_size=5),
            times,
            times.map(lambda x: x + 0.5),
            st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))).filter(str.strip),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_charades_lines_come_back(lines, tmp_path):
    path = write(tmp_path / "any.txt", "\n".join(f"{v} {s} {s + w}##{t}" for v, s, w, t in lines))
    annotations = read_charades(path, {video: 500.0 for video, *_ in lines})
    assert [(v, t, m) for _, v, t, m in listed(annotations)] == [
        (v, t.strip(), [[s, s + w]]) for v, s, w, t in lines
    ]
    assert len({query.id for query in annotations.queries}) == len(lines)


@in_one_folder
@given(content=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_is_read_or_named(content, tmp_path):
    path = write(tmp_path / "any.txt", content)
    message, annotations = outcome(read_charades, path, {})
    assert annotations is None
    assert str(path) in message


def test_durations_come_from_features_where_no_file_has_them(tmp_path):
    store = ArrayStore.of({"A": np.ones((10, 2)), "B": np.ones((3, 2))})
    durations = durations_from_features(store, TimeGrid(16, 4, 24), ["A", "B", "A", "none"])
    assert durations == {"A": (9 * 4 + 16) / 24, "B": (2 * 4 + 16) / 24}
    path = write(tmp_path / "sta.txt", "A 0.5 9##x\n")
    assert listed(read_charades(path, durations))[0][-1] == [[0.5, pytest.approx(52 / 24)]]


# Any file ------------------------------------------------------------------------------------


def read_charades_of_v(path):
    return read_charades(path, {"v": 10})


@pytest.mark.parametrize(
    "read", [read_snag, read_qvhighlights, read_tacos, read_activitynet, read_charades_of_v]
)
def test_unreadable_files_are_named(read, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"v 0 1##caf\xe9")
    for name in ("missing", "folder", "latin.txt"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"empty|JSON|no query"):
        read(write(tmp_path / "empty", ""))


def test_a_byte_order_mark_is_no_matter(tmp_path):
    (tmp_path / "sta.txt").write_bytes(b"\xef\xbb\xbfv 0 1##x")
    assert listed(read_charades(tmp_path / "sta.txt", {"v": 2})) == [("v_0000", "v", "x", [[0, 1]])]


# Joining -------------------------------------------------------------------------------------


@pytest.fixture
def annotations(tmp_path):
    lines = [QVH, QVH | {"qid": 2, "vid": "w", "duration": 30, "relevant_clip_ids": [0, 1, 2]}]
    return read_qvhighlights(write_lines(tmp_path / "val.jsonl", lines))


def stores(annotations, **lengths):
    video = {
        key: np.ones((lengths.get(key, math.ceil(seconds / 2)), 4))
        for key, seconds in annotations.videos.items()
    }
    text = {query.id: np.ones((3, 5)) for query in annotations.queries}
    return ArrayStore.of(video, "clips"), ArrayStore.of(text, "words")


def test_annotations_and_features_join(annotations):
    video, text = stores(annotations)
    dataset = join(annotations, QVHIGHLIGHTS_2S, video, text, sentence_features=text)
    assert (dataset.name, len(dataset), len(dataset.videos)) == ("val", 2, 2)
    assert dataset.videos["w"].duration == 30
    assert dataset.clips("w").shape == (15, 4)
    dataset.check()
    assert repr(annotations).startswith("Annotations(val: 2 videos, 0.0 h, 2 queries; 4 moments")


def test_a_grid_may_be_given_for_every_video(annotations):
    video, text = stores(annotations, w=30)
    grids = {QVH["vid"]: QVHIGHLIGHTS_2S, "w": TimeGrid(1, 1, 1)}
    join(annotations, grids, video, text).check()
    with pytest.raises(GridMismatchError, match=r"val: video 'w': 30 clips .* 60.00 s, .* 30.00 s"):
        join(annotations, QVHIGHLIGHTS_2S, video, text).check()


def test_missing_features_are_named_and_may_be_left_out(annotations):
    video, text = stores(annotations)
    short = ArrayStore.of({"w": video["w"]}, "clips")
    with pytest.raises(DataError, match=r"val: 1 of its videos are missing from .*clips.*bP5KfdFJ"):
        join(annotations, QVHIGHLIGHTS_2S, short, text)
    with pytest.raises(DataError, match=r"1 of its queries are missing from .*words.*'8737'"):
        join(annotations, QVHIGHLIGHTS_2S, video, ArrayStore.of({"2": text["2"]}, "words"))
    with pytest.raises(DataError, match="1 of its queries are missing"):
        join(annotations, QVHIGHLIGHTS_2S, video, text, ArrayStore.of({"2": text["2"]}))
    with pytest.raises(DataError, match="1 of its videos are missing from the grids"):
        join(annotations, {"w": QVHIGHLIGHTS_2S}, video, text)
    dataset = join(annotations.restrict(short), QVHIGHLIGHTS_2S, short, text)
    assert [query.id for query in dataset.queries] == ["2"]


def test_grids_need_frame_rates(annotations, tmp_path):
    with pytest.raises(DataError, match="2 videos have no frame rate in the annotations"):
        annotations.grids(16, 4)
    snag = read_snag(write(tmp_path / "s.json", {"database": {"v1": SNAG_VIDEO}}))
    assert snag.grids(16, 4) == {"v1": TimeGrid(16, 4, 30)}
    assert snag.restrict([]).fps == {}


def test_videos_of_one_recording_are_known(tmp_path):
    path = tmp_path / "val.jsonl"
    names = ["-aB_c_60.0_210.0", "-aB_c_210.0_360.0", "film_01", "NUsG9BgSes0_210_360"]
    path.write_text(
        "".join(
            json.dumps(
                {
                    "qid": number,
                    "query": "a dog",
                    "vid": name,
                    "duration": 150,
                    "relevant_windows": [[0, 2]],
                }
            )
            + "\n"
            for number, name in enumerate(names)
        )
    )
    found = read_qvhighlights(path)
    assert found.recordings == {
        names[0]: "-aB_c",
        names[1]: "-aB_c",
        names[3]: "NUsG9BgSes0",
    }
    assert found.restrict(names[2:]).recordings == {names[3]: "NUsG9BgSes0"}
