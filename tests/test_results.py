"""Run records and tables: what is written comes back, faults are named, nothing is made up."""

import csv
import json
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvg_lib import paths
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.metrics import Estimate
from tvg_lib.results import (
    Metric,
    RunRecord,
    environment,
    fresh_records,
    load_records,
    new_record,
    over_seeds,
    records_folder,
    save,
)
from tvg_lib.tables import Run, beside_paper, of_runs, paper_table

TABLES = sorted(p.stem for p in (paths.results() / "paper_tables").glob("*.csv"))


def record(seed: int = 0, **changes: object) -> RunRecord:
    made = RunRecord(
        method="snag",
        dataset="qvh-captions/test",
        scale="full",
        seed=seed,
        variant="main",
        parameters={"lr": 1e-3},
        metrics={"R1@0.5": Metric(50.0 + seed, 48.0, 53.0, 1542)},
        environment={"cpu": "a processor", "gpu": None},
        seconds=12.5,
        commit="0123456789",
        dirty=False,
        code_hash="c",
        data_hash=None,
        created="2026-01-01T00:00:00+00:00",
    )
    return replace(made, **changes)


@dataclass(frozen=True)
class Configuration:
    lr: float
    folder: Path
    windows: tuple[int, ...]


# --- records


@given(
    method=st.text(min_size=1, max_size=20),
    value=st.floats(allow_nan=False, allow_infinity=False),
    parameters=st.dictionaries(st.text(max_size=5), st.integers() | st.booleans() | st.none()),
)
def test_a_record_comes_back_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory, method: str, value: float, parameters: dict
) -> None:
    folder = tmp_path_factory.mktemp("records")
    before = record(method=method, metrics={"m": Metric(value)}, parameters=parameters)
    path = save(before, folder)
    assert path.parent == folder
    assert load_records(folder) == [before]


def test_a_new_record_names_versions_and_code_but_no_user_or_path() -> None:
    configuration = Configuration(1e-3, Path("/somewhere/else/features"), (5, 9))
    made = new_record(
        "snag",
        "planted/val",
        "cpu",
        3,
        parameters=configuration,
        metrics={
            "R1@0.5": Estimate(51.0, 49.0, 53.0, 100),
            "parameters (M)": np.float32(11.25),
            "loss": torch.tensor(0.5),
            "short mAP": Estimate(float("nan"), float("nan"), float("nan"), 0),
        },
        seconds=1.234567,
        modules=["tvg_lib.moments"],
        artifacts=[paths.runs("cpu") / "models" / "snag.safetensors"],
    )
    assert made.parameters == {"lr": 1e-3, "folder": "features", "windows": [5, 9]}
    assert made.metrics["R1@0.5"] == Metric(51.0, 49.0, 53.0, 100)
    assert made.metrics["parameters (M)"] == Metric(11.25)
    assert "short mAP" not in made.metrics  # no query counts for it: undefined, not zero
    assert made.environment["packages"]["torch"] == torch.__version__
    assert made.artifacts == ("runs/cpu/models/snag.safetensors",)
    assert len(made.code_hash) == 64
    text = json.dumps(made.__dict__, default=str)
    assert str(paths.root()) not in text
    assert str(Path.home()) + "/" not in text
    assert "somewhere" not in text


def test_the_commit_is_the_checkout_s() -> None:
    head = ["git", "-C", str(paths.root()), "rev-parse", "HEAD"]
    found = subprocess.run(head, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    made = new_record("m", "d", "cpu", 0, parameters={}, metrics={}, seconds=0, modules=[])
    assert made.commit == found.stdout.strip()


def test_outside_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("TVG_ROOT", str(tmp_path))
    made = new_record("m", "d", "cpu", 0, parameters={}, metrics={}, seconds=0, modules=[])
    assert (made.commit, made.dirty) == (None, None)


def test_the_environment_can_be_written_as_json() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high", None, [1.0]])
def test_a_metric_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"R1@0\.5"):
        new_record(
            "m", "d", "cpu", 0, parameters={}, metrics={"R1@0.5": value}, seconds=0, modules=[]
        )


def test_a_parameter_that_json_cannot_hold_is_named() -> None:
    with pytest.raises(DataError, match=r"parameters\.model\.layer"):
        new_record(
            "m",
            "d",
            "cpu",
            0,
            parameters={"model": {"layer": object()}},
            metrics={},
            seconds=0,
            modules=[],
        )


def test_the_same_run_replaces_its_record(tmp_path: Path) -> None:
    save(record(), tmp_path)
    save(record(seconds=99.0), tmp_path)
    save(record(variant="no voting"), tmp_path)
    assert [r.seconds for r in load_records(tmp_path)] == [99.0, 12.5]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "snag__qvh-captions-test__main__seed0.json",
        "snag__qvh-captions-test__no-voting__seed0.json",
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"seed": 0,', ""),
        lambda text: text.replace('"seed"', '"sead"'),
        lambda text: text.replace("50.0", '"fifty"'),
        lambda text: text.replace("50.0", "NaN"),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: "\x00\xff",
    ],
)
def test_a_corrupt_record_is_named(tmp_path: Path, damage: object) -> None:
    path = save(record(), tmp_path)
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(DataError, match=re.escape(path.name)):
        load_records(tmp_path)


def test_a_folder_that_does_not_exist_has_no_records(tmp_path: Path) -> None:
    assert load_records(tmp_path / "nothing") == []


def test_the_smoke_scale_gives_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("TVG_ROOT", str(tmp_path))
    for scale in ("smoke", "cpu"):
        save(record(scale=scale), records_folder(scale, fresh=True))
    assert fresh_records("smoke") == []
    assert [r.scale for r in fresh_records("cpu")] == ["cpu"]


def test_mean_and_deviation_over_seeds_by_hand() -> None:
    records = [record(0), record(1), record(5), record(0, variant="other")]
    summary = over_seeds(records, "snag", "qvh-captions/test", "R1@0.5")
    # 50, 51, 55: mean 52, squared deviations 4 + 1 + 9 = 14, sd = sqrt(14 / 2)
    assert (summary.mean, summary.seeds) == (52.0, 3)
    assert summary.sd == pytest.approx(7**0.5)
    assert str(summary) == "52.00 ± 2.65"
    assert str(over_seeds(records[:1], "snag", "qvh-captions/test", "R1@0.5")) == "50.00"
    assert over_seeds(records, "snag", "qvh-captions/test", "mAP") is None
    assert over_seeds(records, "mscl", "qvh-captions/test", "R1@0.5") is None


@pytest.mark.parametrize("second", [record(0, seconds=1.0), record(1, scale="cpu")])
def test_a_mean_over_what_does_not_belong_together_is_refused(second: RunRecord) -> None:
    with pytest.raises(DataError, match="one scale with different seeds"):
        over_seeds([record(0), second], "snag", "qvh-captions/test", "R1@0.5")


def test_committed_records_are_readable_and_stand_in_their_scale() -> None:
    for folder in (paths.results() / "records").glob("*"):
        for found in load_records(folder):
            assert found.scale == folder.name


def test_a_record_shows_its_interval_and_escapes_its_names() -> None:
    shown = record(method="<b>")._repr_html_()
    assert "[48.00, 53.00]" in shown
    assert "<b>" not in shown
    assert repr(record()) == (
        "RunRecord(snag on qvh-captions/test, main, seed 0, full: R1@0.5=50.00)"
    )


# --- the papers' tables


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_a_paper_is_well_formed(name: str) -> None:
    table = paper_table(name)
    assert table.title
    for number in table.numbers:
        assert number.value is None or np.isfinite(number.value)
        # Percentages stay below 100; SumR is a sum of four.
        if number.metric.startswith(("R@", "R1", "R5", "mAP")) and number.value is not None:
            assert 0 < number.value < 100
        if number.value is None:
            assert not number.source or number.printed == ""


def _by_row(name: str, condition: str) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for number in paper_table(name).at(condition).numbers:
        if number.value is not None:
            rows.setdefault(number.row, {})[number.metric] = number.value
    return rows


@pytest.mark.parametrize("condition", ["TVR", "ActivityNet Captions", "Charades-STA"])
def test_sums_of_recalls_agree_with_their_parts(condition: str) -> None:
    """An independent check of the transcription: each number is rounded to one decimal."""
    for row, values in _by_row("mamfusion_main", condition).items():
        total = sum(values[f"R@{k}"] for k in (1, 5, 10, 100))
        assert values["SumR"] == pytest.approx(total, abs=0.21), row


@pytest.mark.parametrize(
    ("name", "condition"),
    [("hieramamba_ego4d", "EgoVLP"), ("hieramamba_tacos", "TACoS"), ("hieramamba_mad", "MAD")],
)
def test_averages_agree_with_their_parts(name: str, condition: str) -> None:
    for row, values in _by_row(name, condition).items():
        recalls = [v for metric, v in values.items() if metric.startswith(("R1@", "R5@"))]
        if "avg" in values and row != "DeCafNet":  # two of its six are unknown
            assert values["avg"] == pytest.approx(np.mean(recalls), abs=0.011), row


def test_the_known_errors_of_mscl_table_1_are_kept_and_noted() -> None:
    for number in paper_table("mscl_table1").numbers:
        if number.metric.endswith("avg"):
            rows = _by_row("mscl_table1", number.condition)[number.row]
            k = number.metric[:2]
            right = (rows[f"{k}@0.3"] + rows[f"{k}@0.5"]) / 2
            if number.note:
                assert number.value != pytest.approx(right, abs=0.02)
                assert f"{right:.2f}" in number.note
            else:
                assert number.value == pytest.approx(right, abs=0.011)


def test_an_unknown_table_names_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match="mscl_table1"):
        paper_table("mscl_table7")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("T,row,c,m,abc,[P],", "line 3: 'abc' is not a number"),
        ("T,row,c,m,1.0,,", "line 3: a number without the tag"),
        ("T,row,c,m,1.0", "line 3: expected 7 columns, found 5"),
        ("T,other,c,m,2.0,[P],", "line 3: a second number"),
    ],
)
def test_a_malformed_table_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    head = "table,row,condition,metric,value,source,note\nT,other,c,m,1.0,[P],\n"
    (tmp_path / "bad.csv").write_text(head + line + "\n")
    with pytest.raises(DataError, match=f"bad.csv, {re.escape(message)}"):
        paper_table("bad", tmp_path)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("method,value\nsnag,1\n")
    with pytest.raises(DataError, match=r"bad\.csv: expected the columns"):
        paper_table("bad", tmp_path)


# --- our tables


def make_table(committed: list[RunRecord], fresh: list[RunRecord]) -> object:
    table = paper_table("mscl_table5")
    run = Run("snag", "qvh-captions/test")
    return beside_paper(table, {"MSCL": run}, committed=committed, fresh=fresh)


def test_without_records_a_row_of_ours_says_not_run_and_others_stay_empty() -> None:
    table = make_table([], [])
    assert str(table).splitlines()[1].split() == [
        *("R1@0.3", "R1@0.5", "R5@0.3", "R5@0.5"),
        *("ours", "this", "machine", "source"),
    ]
    assert str(table).count("not run") == 2
    assert table.provenance == ()


def test_records_fill_their_own_columns() -> None:
    committed = [record(s, metrics={"R1@0.5": Metric(40.0 + s)}) for s in range(3)]
    fresh = [record(0, scale="cpu", metrics={"R1@0.5": Metric(39.5)})]
    table = make_table(committed, fresh)
    cell = next(row for row in table.rows if row.label == "MSCL").cells["R1@0.5"]
    assert (cell.paper.printed, str(cell.ours), str(cell.here)) == (
        "47.04",
        "41.00 ± 1.00",
        "39.50",
    )
    text = str(table)
    assert "41.00 ± 1.00" in text
    assert "ours: qvh-captions/test, scale full, seeds 0, 1, 2, commit 0123456" in text
    assert "this machine: qvh-captions/test, scale cpu, seed 0," in text
    assert text.count("not run") == 6  # three metrics, two columns
    for shown in (table._repr_html_(), table.markdown()):
        assert "41.00 ± 1.00" in shown
        assert "39.50" in shown
        assert "the paper has no row with neither loss" in shown


def test_rows_from_one_source_share_a_line() -> None:
    records = [
        replace(record(0, method=method), seconds=seconds)
        for method, seconds in (("snag", 20.0), ("mscl", 40.4), ("hieramamba", 30.0))
    ]
    runs = {r.method: Run(r.method, r.dataset) for r in records}
    elsewhere = replace(record(1, method="late"), seconds=5.0)
    runs["late"] = Run("late", elsewhere.dataset)
    table = of_runs("t", runs, ["R1@0.5"], committed=[*records, elsewhere], fresh=[])
    first, second = table.provenance
    assert first.startswith("ours: qvh-captions/test, scale full, seed 0, commit")
    assert first.endswith(", 20 to 40 s a run: snag; mscl; hieramamba")
    assert second.endswith(", 5 s a run: late")


def test_every_line_of_a_table_has_as_many_columns_as_its_head() -> None:
    table = make_table([record()], [])
    rows = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    html = table._repr_html_()
    assert html.count("<td>") == (len(rows) - 2) * html.count("<th>")


def test_a_table_is_written_as_markdown_and_csv(tmp_path: Path) -> None:
    make_table([record(0), record(2)], []).save(tmp_path, "t")
    lines = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    ours = next(x for x in lines if x["row"] == "MSCL" and x["metric"] == "R1@0.5")
    assert (ours["paper"], ours["ours_mean"], ours["ours_seeds"]) == ("47.04", "51.0000", "2")
    assert (ours["here_mean"], ours["source"]) == ("not run", "[P] MSCL Table 5")
    theirs = next(x for x in lines if x["row"] == "w/o cross-scale")
    assert theirs["ours_mean"] == theirs["here_mean"] == ""
    assert (tmp_path / "t.md").read_text().startswith("**MSCL Table 5")


def test_a_row_that_the_paper_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"no row \['SNAG'\]"):
        beside_paper(paper_table("mscl_table5"), {"SNAG": Run("a", "b")}, committed=[], fresh=[])


def test_conditions_become_part_of_the_label() -> None:
    table = beside_paper(paper_table("mscl_table1"), {}, committed=[], fresh=[])
    assert "SnAG (EgoVLP)" in [row.label for row in table.rows]
    with pytest.raises(ConfigurationError, match="SF\\+BERT, EgoVLP"):
        paper_table("mscl_table1").at("C3D")


def test_a_table_of_our_own_runs_shows_its_metrics_even_when_nothing_ran() -> None:
    runs = {"SnAG": Run("snag", "qvh-captions/test"), "prior": Run("prior", "qvh-captions/test")}
    empty = of_runs("QVH-captions", runs, ["R1@0.5", "mAP"], committed=[], fresh=[])
    assert str(empty).count("not run") == 6
    assert "R1@0.5" in str(empty)
    filled = of_runs("QVH-captions", runs, ["R1@0.5"], committed=[record()], fresh=[])
    assert "source" not in str(filled)
    assert [line.split()[1:2] for line in str(filled).splitlines()[3:5]] == [["50.00"], ["not"]]


def test_text_is_escaped_in_html() -> None:
    table = of_runs("<i>", {"a & b": Run("m", "d")}, ["x<y"], committed=[], fresh=[])
    html = table._repr_html_()
    assert "<i>" not in html
    assert "a &amp; b" in html
    assert "x&lt;y" in html


def test_intervals_stand_in_place_of_the_deviation_over_seeds(tmp_path: Path) -> None:
    runs = {"MSCL - SnAG": Run("mscl-minus-snag", "qvh-captions/test", "mean-of-2")}
    committed = [
        record(seed, method="mscl-minus-snag", variant="mean-of-2") for seed in (0, 1)
    ]  # 50 and 51, both [48, 53]
    table = of_runs("t", runs, ["R1@0.5"], committed=committed, fresh=[], intervals=True)
    assert "50.50 [48.00, 53.00]" in str(table)
    assert "±" not in str(table)
    (mean,) = (replace(one, parameters={"seeds": [0, 1, 2]}) for one in committed[:1])
    named = of_runs("t", runs, ["R1@0.5"], committed=[mean], fresh=[], intervals=True)
    assert "seeds 0, 1, 2" in str(named)  # a mean is one record of several seeds
    table.save(tmp_path, "t")
    (line,) = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert (line["ours_mean"], line["ours_low"], line["ours_high"]) == (
        "50.5000",
        "48.0000",
        "53.0000",
    )
    assert (line["ours_seeds"], line["here_mean"], line["here_low"]) == ("2", "not run", "")
    without = [record(0, metrics={"R1@0.5": Metric(50.0)}), record(1)]
    assert over_seeds(without, "snag", "qvh-captions/test", "R1@0.5").with_interval == "50.50"
