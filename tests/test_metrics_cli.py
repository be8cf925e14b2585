"""`python -m tvg_lib.metrics`: output, options, and messages for bad files."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tvg_lib.metrics import evaluate_files
from tvg_lib.metrics.__main__ import main

TRUTH = [
    {
        "qid": qid,
        "query": "q",
        "vid": f"v{qid}",
        "duration": 60,
        "relevant_windows": [[10, 20 + 4 * qid]],
        "relevant_clip_ids": [5, 6],
        "saliency_scores": [[4, 3, 2], [2, 2, 2]],
    }
    for qid in range(6)
]
PREDICTIONS = [
    {
        "qid": entry["qid"],
        "query": "q",
        "vid": entry["vid"],
        "pred_relevant_windows": [[10, 28, 0.9], [10, 20 + 4 * entry["qid"], 0.8]],
        "pred_saliency_scores": [float(clip == 5) for clip in range(30)],
    }
    for entry in TRUTH
]


@pytest.fixture
def files(tmp_path):
    def write(predictions=PREDICTIONS, truth=TRUTH):
        paths = []
        for name, content in (("predictions", predictions), ("truth", truth)):
            path = tmp_path / f"{name}.jsonl"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text("\n".join(map(json.dumps, content)) + "\n", encoding="utf-8")
            paths.append(str(path))
        return paths

    return write


def run(capsys, *arguments):
    status = main(["qvhighlights", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_figures_under_the_official_names(files, capsys):
    status, out, err = run(capsys, *files())
    assert (status, err) == (0, "")
    output = json.loads(out)
    # Predicted [10, 28] against [10, 20 + 4 qid]: IoU 10/18, 14/18, 1, 18/22, 18/26, 18/30.
    assert output["MR-full-R1@0.5"] == 100
    assert output["MR-full-R1@0.7"] == 50
    assert output["HL-min-VeryGood-Hit1"] == 100
    assert output["MR-long-mAP"] is None  # no moment is longer than 30 s
    assert list(output)[:8] == sorted(list(output)[:8])
    assert len(output) == 14


def test_as_a_module(files):
    paths = files(predictions=PREDICTIONS[:5])
    command = [sys.executable, "-m", "tvg_lib.metrics", "qvhighlights", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: expected the same qids")
    assert "[5]" in done.stderr


def test_bootstrap(files, capsys):
    paths = files()
    status, out, _ = run(capsys, *paths, "--bootstrap", "200", "--seed", "3")
    output = json.loads(out)
    assert status == 0
    settings = output.pop("bootstrap")
    intervals = settings.pop("intervals")
    assert settings == {"resamples": 200, "seed": 3, "confidence": 0.95}
    assert list(intervals) == list(output)
    interval = intervals["MR-full-R1@0.7"]
    assert interval["low"] < output["MR-full-R1@0.7"] < interval["high"]
    assert interval["queries"] == 6
    assert intervals["MR-long-mAP"] == {"low": None, "high": None, "queries": 0}
    estimate = evaluate_files(*paths).estimates(resamples=200, seed=3)["MR-full-mAP"]
    assert intervals["MR-full-mAP"]["low"] == round(estimate.low, 2)
    assert run(capsys, *paths, "--bootstrap", "200", "--seed", "3")[1] == out
    assert run(capsys, *paths, "--bootstrap", "200", "--seed", "4")[1] != out


def test_full_output(files, capsys):
    status, out, _ = run(capsys, *files(), "--full")
    output = json.loads(out)
    assert status == 0
    assert output["brief"]["MR-full-mAP"] == output["full"]["MR-mAP"]["average"]
    assert output["long"]["MR-R1"]["0.5"] is None


def test_allow_missing(files, capsys):
    status, out, err = run(capsys, *files(predictions=PREDICTIONS[:5]), "--allow-missing")
    assert status == 0
    assert json.loads(out)["MR-full-R1@0.7"] == 60
    assert "evaluated the 5 queries in both files" in err


def test_length_of_saliency_scores(files, capsys):
    short = [*PREDICTIONS[:3], {**PREDICTIONS[3], "pred_saliency_scores": [1.0] * 29}]
    paths = files(predictions=short, truth=TRUTH[:4])
    status, out, err = run(capsys, *paths)
    assert status == 0
    assert json.loads(out)["MR-full-R1@0.5"] == 100
    assert "warning: " in err
    assert f"{paths[0]}, line 4: expected 30 'pred_saliency_scores'" in err
    status, out, err = run(capsys, *paths, "--strict")
    assert (status, out) == (2, "")
    assert f"error: {paths[0]}, line 4: expected 30 'pred_saliency_scores'" in err
    assert "found 29" in err


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_matter(files, capsys):
    plain = run(capsys, *files())[1]
    content = "\r\n\r\n".join(map(json.dumps, PREDICTIONS)).encode("utf-8-sig")
    assert run(capsys, *files(predictions=content))[:2] == (0, plain)


GOOD_LINE = json.dumps(PREDICTIONS[0]).encode()
BAD_FILES = {
    "empty": (b"", "expected at least one entry, found none"),
    "blank": (b"\n \n", "expected at least one entry, found none"),
    "not JSON": (GOOD_LINE + b"\n{'qid': 1}\n", "line 2: not valid JSON"),
    "cut off": (GOOD_LINE + b"\n" + GOOD_LINE[:-9], "line 2: not valid JSON"),
    "a list": (b"[1, 2]", "line 1: expected an object, found list [1, 2]"),
    "one JSON array over lines": (b"[\n" + GOOD_LINE + b"\n]", "line 1: not valid JSON"),
    "nested too deeply": (b"[" * 200_000, "line 1: not valid JSON"),
    "an endless number": (b'{"qid": ' + b"1" * 9999 + b"}", "line 1: not valid JSON"),
    "not text": (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
    "NaN": (
        GOOD_LINE.replace(b"0.9]", b"NaN]"),
        "line 1: expected pred_relevant_windows[0] to be [start, end, score] of finite numbers, "
        "found [10, 28, nan]",
    ),
    "infinite": (GOOD_LINE.replace(b"[10, 28", b"[-Infinity, 28"), "found [-inf, 28, 0.9]"),
    "reversed": (GOOD_LINE.replace(b"[10, 28", b"[30, 28"), "start <= end"),
    "missing keys": (b'{"qid": 0, "query": "q"}', "line 1: expected 'pred_relevant_windows' or"),
    "no qid": (b'{"query": "q"}', "line 1: expected a 'qid' (integer or string), found keys"),
    "twice": (GOOD_LINE + b"\n" + GOOD_LINE, "line 2: expected each qid once, found 0 again"),
    "text for a number": (GOOD_LINE.replace(b'"qid": 0', b'"qid": "0"'), "same qids"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_prediction_files(name, files, capsys):
    content, message = BAD_FILES[name]
    paths = files(predictions=content, truth=TRUTH[:1])
    status, out, err = run(capsys, *paths)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert paths[0] in err


def test_missing_files_and_folders(files, capsys, tmp_path):
    paths = files()
    absent = str(tmp_path / "absent.jsonl")
    for arguments in ([absent, paths[1]], [paths[0], absent], [str(tmp_path), paths[1]]):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert "cannot be read" in err


@pytest.mark.parametrize(
    "options",
    [["--bootstrap", "0"], ["--bootstrap", "9", "--seed", "-1"],
     ["--bootstrap", "9", "--confidence", "95"]],
)  # fmt: skip
def test_bad_options(options, files, capsys):
    status, out, err = run(capsys, *files(), *options)
    assert (status, out) == (2, "")
    assert "must" in err


def test_usage_errors_leave_with_status_2(capsys):
    for arguments in ([], ["qvhighlights"], ["qvhighlights", "a", "b", "--bootstrap", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


def test_real_files(tvg_data, tmp_path, capsys):
    truth = tvg_data / "qvhighlights" / "val.jsonl"
    rng = np.random.default_rng(0)
    predictions = tmp_path / "predictions.jsonl"
    with predictions.open("w", encoding="utf-8") as file:
        for line in truth.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            windows = [[*window, 1.0] for window in entry["relevant_windows"]]
            scores = rng.random(int(entry["duration"] / 2)).tolist()
            record = {key: entry[key] for key in ("qid", "query", "vid")}
            record |= {"pred_relevant_windows": windows, "pred_saliency_scores": scores}
            file.write(json.dumps(record) + "\n")
    status, out, err = run(capsys, str(predictions), str(truth), "--bootstrap", "100")
    output = json.loads(out)
    assert (status, err) == (0, "")
    assert output["MR-full-R1@0.7"] == 100
    assert 15 < output["HL-min-VeryGood-Hit1"] < 30
    assert output["bootstrap"]["intervals"]["HL-min-Fair-mAP"]["queries"] == 1550
