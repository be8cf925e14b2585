"""The doctor: what it says of data that are there, wrong, or missing."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tvg_lib.data import doctor, qvhighlights
from tvg_lib.data.catalogue import DATASETS, DatasetSpec
from tvg_lib.data.doctor import Report, examine
from tvg_lib.errors import DataError

FPS = 29.4


@pytest.fixture(autouse=True)
def nothing_elsewhere(tmp_path_factory, monkeypatch):
    """No data folder and an empty download cache, whatever this machine has."""
    monkeypatch.delenv("TVG_DATA", raising=False)
    monkeypatch.setenv("TVG_CACHE", str(tmp_path_factory.mktemp("cache")))


def snag_json(path: Path, videos: dict[str, float], fps: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "database": {
                    key: {
                        "subset": "train",
                        "duration": duration,
                        "fps": fps,
                        "annotations": [
                            {"segment": [0, 5], "sentence": "x", "sentence_id": f"{key}-q"}
                        ],
                    }
                    for key, duration in videos.items()
                }
            }
        )
    )


def features(folder: Path, lengths: dict[str, int], dim: int, fill: float = 1.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, length in lengths.items():
        np.save(folder / f"{key}.npy", np.full((length, dim), fill, np.float32))


def clips(duration: float, size: int, stride: int, fps: float) -> int:
    return int((duration * fps - size) // stride) + 1


TACOS = {"s1": 60.0, "s2": 90.0}


@pytest.fixture
def tacos(tmp_path) -> Path:
    """A complete little TACoS, and nothing else."""
    snag_json(tmp_path / "tacos/annotations/tacos.json", TACOS, FPS)
    lengths = {key: clips(s, 16, 4, FPS) for key, s in TACOS.items()}
    features(tmp_path / "tacos/c3d_features", lengths, 4096)
    (tmp_path / "glove.6B.300d.txt").write_text("the" + " 0.1" * 300 + "\nof" + " 0.2" * 300 + "\n")
    return tmp_path


def only(report: Report, name: str, title: str):
    (finding,) = [f for f in report[name].findings if f.title == title]
    return finding


def test_without_any_data_everything_is_missing_and_has_an_address():
    report = examine()
    assert report.root is None
    assert len(report.diagnoses) == len(DATASETS)
    for diagnosis in report.diagnoses:
        assert not diagnosis.ready
        assert {f.state for f in diagnosis.findings} == {"missing"}
        assert "get it: " in str(diagnosis)
        assert diagnosis.spec.source in repr(report)
    assert repr(report).startswith("no data folder (TVG_DATA is not set): 0 of ")


@pytest.mark.parametrize(
    "name",
    ["TACoS", "Ego4D-NLQ, SlowFast", "Ego4D-NLQ, EgoVLP", "MAD, CLIP", "MAD-v2, CLIP",
     "Charades-STA, C3D", "Charades-STA, I3D", "ActivityNet Captions, C3D",
     "QVHighlights, SlowFast + CLIP", "QVH-captions", "TVR, I3D + ResNet, RoBERTa"],
)  # fmt: skip
def test_every_data_set_of_the_papers_is_known(name):
    assert examine()[name].findings


def test_published_shapes_and_checksums_are_printed():
    text = repr(examine())
    for fact in (
        "(T, 4096) a video, clips of 16 every 4 frames, frame rate in the annotations, 1 in 4 used",
        "(T, 2304) a video, clips of 32 every 16 frames, 30 fps",
        "(T, 256) a video, clips of 32 every 8 frames, 30 fps, 1 in 2 used",
        "(T, 512) a video, clips of 1 every 1 frames, 5 fps",
        "(T, 500) a video, clips of 16 every 8 frames",
        "tacos.tar.gz, md5 a96537114a930038ab8ddb64a17df6e0",
        "anet_1.3.tar.gz, md5 4da7bbd46ebf43906cb44e696a4a1852",
    ):
        assert fact in text


def test_a_complete_data_set_is_ready(tacos):
    report = examine(tacos)
    diagnosis = report["TACoS"]
    assert diagnosis.ready
    assert "get it" not in str(diagnosis)
    assert only(report, "TACoS", "annotations").detail.endswith("2 videos, 2 queries, 2 moments")
    c3d = only(report, "TACoS", "C3D clips")
    assert "2 videos; 2 read: width 4096, 2 fit their grid" in c3d.detail
    assert "2 lines" in only(report, "TACoS", "GloVe vectors").detail
    assert not report["Ego4D"].ready


def test_features_thinned_already_do_not_fit_and_both_numbers_are_named(tacos):
    lengths = {key: clips(s, 16, 16, FPS) for key, s in TACOS.items()}
    features(tacos / "tacos/c3d_features", lengths, 4096)
    finding = only(examine(tacos), "TACoS", "C3D clips")
    assert finding.state == "problem"
    assert "video 's1': 110 clips" in finding.detail
    assert "60.00 s" in finding.detail


@pytest.mark.parametrize(
    ("harm", "title", "complaint"),
    [
        (lambda r: (r / "tacos/c3d_features/s2.npy").unlink(), "C3D clips", "1 of 2 annotated"),
        (lambda r: features(r / "tacos/c3d_features", {"s1": 441}, 500), "C3D clips", "4096"),
        (
            lambda r: features(r / "tacos/c3d_features", {"s1": 438}, 4096, np.nan),
            "C3D clips",
            "NaN or infinite",
        ),
        (
            lambda r: (r / "tacos/c3d_features/s1.npy").write_bytes(b"\x93NUMPY"),
            "C3D clips",
            "cannot be read",
        ),
        (
            lambda r: (r / "tacos/annotations/tacos.json").write_text("{"),
            "annotations",
            "not valid JSON",
        ),
        (
            lambda r: (r / "glove.6B.300d.txt").write_text("the 0.1 0.2\n"),
            "GloVe vectors",
            "300 numbers",
        ),
    ],
)
def test_what_is_wrong_is_found_and_named(harm, title, complaint, tacos):
    harm(tacos)
    report = examine(tacos)
    finding = only(report, "TACoS", title)
    assert (finding.state, report["TACoS"].ready) == ("problem", False)
    assert complaint in finding.detail
    assert str(tacos) in finding.detail or "FolderStore" in finding.detail
    assert f"!! {title}" in str(report["TACoS"])


def test_a_sample_reads_few_and_zero_reads_all(tmp_path):
    videos = {f"v{i:02d}": 40.0 for i in range(12)}
    snag_json(tmp_path / "ego4d/annotations/ego4d_slowfast.json", videos, 30)
    lengths = dict.fromkeys(videos, clips(40, 32, 16, 30))
    features(tmp_path / "ego4d/slowfast_features", lengths, 2304)
    features(tmp_path / "ego4d/bert_features", {f"{key}-q": 7 for key in videos}, 768)
    report = examine(tmp_path, sample=3)
    assert report["Ego4D-NLQ, SlowFast"].ready
    assert "3 read" in only(report, "Ego4D-NLQ, SlowFast", "SlowFast clips").detail
    assert "12 queries; 3 read" in only(report, "Ego4D-NLQ, SlowFast", "BERT words").detail
    # A fault among the unread ones shows when all are read.
    features(tmp_path / "ego4d/bert_features", {"v07-q": 7}, 768, np.inf)
    assert examine(tmp_path, sample=2)["Ego4D-NLQ, SlowFast"].ready
    found = only(examine(tmp_path, sample=0), "Ego4D-NLQ, SlowFast", "BERT words")
    assert (found.state, "v07-q" in found.detail) == ("problem", True)


def test_other_releases_count_only_where_the_main_annotations_are_absent(tacos):
    """VideoX' lists differ from SnAG's: a video of theirs without features is no fault."""
    (tacos / "annotations").mkdir()
    entry = {"timestamps": [[0, 9]], "sentences": ["x"], "fps": FPS, "num_frames": 900}
    (tacos / "annotations/tacos_test.json").write_text(json.dumps({"s9.avi": entry}))
    report = examine(tacos)
    assert only(report, "TACoS", "test annotations (VideoX)").state == "found"
    assert report["TACoS"].ready
    (tacos / "tacos/annotations/tacos.json").unlink()
    finding = only(examine(tacos), "TACoS", "C3D clips")
    assert (finding.state, "'s9'" in finding.detail) == ("problem", True)


def test_charades_takes_durations_from_the_file_beside_it(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/charades_sta_test.txt").write_text("ABCDE 0.0 4.0##x\n")
    title = "test annotations (VideoX)"
    finding = only(examine(tmp_path), "Charades-STA, I3D", title)
    assert (finding.state, "charades_sta_test.jsonl" in finding.detail) == ("problem", True)
    row = {"qid": 0, "query": "x", "vid": "ABCDE", "duration": 3.5, "relevant_windows": [[0, 3.5]]}
    (tmp_path / "annotations/charades_sta_test.jsonl").write_text(json.dumps(row))
    finding = only(examine(tmp_path), "Charades-STA, I3D", title)
    assert (finding.state, "1 clipped" in finding.detail) == ("found", True)


def test_qvhighlights_features_are_chosen_by_their_published_names(tmp_path):
    root = tmp_path / "qvhighlights"
    root.mkdir()
    for split, qid in (("train", 1), ("val", 2)):
        row = {"qid": qid, "query": "x", "vid": f"v{qid}", "duration": 150}
        (root / f"highlight_{split}_release.jsonl").write_text(json.dumps(row))
    for name, dim in (("slowfast_features", 2304), ("clip_features", 512)):
        (root / name).mkdir()
        for vid in ("v1", "v2"):
            np.savez(root / name / f"{vid}.npz", features=np.ones((75, dim), np.float16))
    (root / "clip_text_features").mkdir()
    for qid in (1, 2):
        np.savez(
            root / "clip_text_features" / f"qid{qid}.npz",
            last_hidden_state=np.ones((9, 512)),
            pooler_output=np.ones(512),
        )
    report = examine(tmp_path)
    assert report["QVHighlights, SlowFast"].ready, str(report["QVHighlights, SlowFast"])
    assert not report["QVH-captions"].ready
    loaded = qvhighlights.load("val", tmp_path)  # what the doctor calls ready can be read
    assert (loaded.name, len(loaded.queries)) == ("qvhighlights-clip/val", 1)
    assert loaded.clips("v2").shape == (75, 512)
    assert loaded.text_features["2"].shape == (9, 512)
    assert loaded.sentence_features["2"].shape == (1, 512)
    (root / "features").mkdir()
    (root / "clip_features").rename(root / "features/clip_features")
    assert examine(tmp_path)["QVHighlights, SlowFast"].ready
    assert qvhighlights.load("val", tmp_path).clips("v2").shape == (75, 512)
    (root / "features").rename(root / "elsewhere")
    with pytest.raises(DataError, match="expected qvhighlights/clip_features or"):
        qvhighlights.load("val", tmp_path)


@pytest.fixture
def tvr(tmp_path) -> Path:
    """TVR in MS-SL's layout, with four frames."""
    frames = tmp_path / "tvr/FeatureData/i3d_resnet"
    frames.mkdir(parents=True)
    (frames / "shape.txt").write_text("4 3072\n")
    (frames / "id.txt").write_text("a_0 a_1 b_0 b_1")
    (frames / "video2frames.txt").write_text("{'a': ['a_0', 'a_1'], 'b': ['b_0', 'b_1']}")
    np.ones((4, 3072), np.float32).tofile(frames / "feature.bin")
    text = tmp_path / "tvr/TextData"
    text.mkdir()
    for split in ("train", "val", "test"):
        (text / f"tvr{split}.caption.txt").write_text("a#enc#0 Someone leaves.\n" * 2)
    with h5py.File(text / "roberta_tvr_query_feat.hdf5", "w") as file:
        file["a#enc#0"] = np.ones((6, 768), np.float32)
    return tmp_path


def test_retrieval_data_in_its_own_layout(tvr):
    report = examine(tvr)
    assert report["TVR"].ready, str(report["TVR"])
    assert "4 frames of width 3072" in only(report, "TVR", "i3d_resnet frames").detail
    assert "2 lines" in only(report, "TVR", "val captions").detail


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("FeatureData/i3d_resnet/shape.txt", b"4 1024", "expected features of width 3072"),
        ("FeatureData/i3d_resnet/shape.txt", b"four 3072", "expected two numbers"),
        ("FeatureData/i3d_resnet/feature.bin", bytes(16), "49152 bytes, found 16"),
        ("FeatureData/i3d_resnet/id.txt", None, "id.txt missing"),
        ("TextData/roberta_tvr_query_feat.hdf5", b"nothing", "cannot be read as HDF5"),
        ("TextData/tvrval.caption.txt", b"a sentence without an id\n", "'video#enc#number"),
    ],
)
def test_broken_retrieval_data_are_named(name, content, complaint, tvr):
    path = tvr / "tvr" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    problems = [f.detail for f in examine(tvr)["TVR"].findings if f.state == "problem"]
    assert len(problems) == 1
    assert complaint in problems[0]


def test_archives_are_hashed_when_asked(tacos, monkeypatch):
    (tacos / "tacos.tar.gz").write_bytes(b"not the archive")
    assert examine(tacos)["TACoS"].ready
    finding = only(examine(tacos, md5=True), "TACoS", "tacos.tar.gz")
    found = hashlib.md5(b"not the archive").hexdigest()
    assert finding.state == "problem"
    assert f"expected md5 a96537114a930038ab8ddb64a17df6e0, found {found}" in finding.detail
    good = DatasetSpec("TACoS", "", (), "", (("tacos.tar.gz", found),))
    monkeypatch.setattr(doctor, "DATASETS", (good,))
    assert only(examine(tacos, md5=True), "TACoS", "tacos.tar.gz").state == "found"


def test_the_report_shows_itself(tacos):
    report = examine(tacos)
    assert repr(report).startswith(f"{tacos}: 1 of {len(DATASETS)} data sets ready")
    html = report._repr_html_()
    assert html.count("<tr>") == 1 + sum(len(d.findings) for d in report.diagnoses)
    assert "C3D clips" in html
    with pytest.raises(DataError, match="no data set is called 'Kinetics'"):
        report["Kinetics"]


def test_html_is_escaped(tacos):
    (tacos / "glove.6B.300d.txt").write_text("<script>\n")
    html = examine(tacos)._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_the_download_cache_is_searched_too(tacos, monkeypatch):
    monkeypatch.setenv("TVG_CACHE", str(tacos))
    assert examine()["TACoS"].ready


@pytest.mark.parametrize("arguments", [[], ["."], ["--md5", "--sample", "0"]])
def test_the_exit_status_is_0_whatever_is_found(arguments, tacos, monkeypatch, capsys):
    monkeypatch.chdir(tacos)
    assert doctor.main(arguments) == 0
    assert "data sets ready" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "nowhere: not a folder that can be read"),
        (["glove.6B.300d.txt"], "not a folder"),
        ([".", "--sample", "-1"], "a sample holds"),
    ],
)
def test_the_exit_status_is_2_where_nothing_can_be_examined(
    arguments, complaint, tacos, monkeypatch, capsys
):
    monkeypatch.chdir(tacos)
    assert doctor.main(arguments) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("module", ["tvg_lib.data.doctor", "tvg_lib.data"])
def test_it_runs_as_a_module(module, tacos):
    done = subprocess.run(
        [sys.executable, "-m", module, str(tacos)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(doctor.__file__).parents[2])},
        cwd=tacos,
    )
    assert f"1 of {len(DATASETS)} data sets ready" in done.stdout
    assert "TACoS, C3D + GloVe (SnAG, MSCL, HieraMamba): ready" in done.stdout


def test_real_annotations_and_captions(tvg_data):
    report = examine(tvg_data)
    assert report["QVH-captions"].ready
    assert "1529 fit their grid" in only(report, "QVH-captions", "captions, test").detail
    found = [f for d in report.diagnoses for f in d.findings if f.state == "found"]
    assert (
        "17505 queries" in only(report, "ActivityNet Captions", "val_1 annotations (VideoX)").detail
    )
    assert len(found) >= 10
    assert not [f for d in report.diagnoses for f in d.findings if f.state == "problem"]
