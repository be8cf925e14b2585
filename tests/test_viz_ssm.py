"""The table and the figure of the state-space benchmark, from the committed records."""

import json
from pathlib import Path

import matplotlib
import pytest

from tvg_lib import paths
from tvg_lib.errors import DataError
from tvg_lib.viz_ssm import GOAL, comparison, draw_benchmark, read_records

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    folder = paths.root() / "benchmarks" / "results"
    return read_records(sorted(folder.glob("ssm_*_cpu.json")))


def test_the_records_say_what_the_notebook_says_of_them(records: list[dict]) -> None:
    """Linear up to a million steps; the others compute the same in at least twice the time."""
    assert [record["what"] for record in records] == ["layers", "scaling", "scans"]
    for name, row in records[1]["cases"].items():
        if name.startswith("attention"):
            assert row["exponent_seconds"] > 1.5
            continue
        assert (row["lengths"][0], row["lengths"][-1]) == (1024, 1048576)
        assert row["exponent_seconds"] <= 1.05, name
        assert row["exponent_peak_bytes"] <= 1.05, name
    table = comparison(records)
    assert set(table["mode"]) == {"forward", "forward + backward"}
    others = table[~table["implementation"].str.startswith("ours")]
    assert {"transformers", "mambapy", "mamba-ssm reference"} <= set(others["implementation"])
    assert others["difference"].max() < 1e-5
    assert others["times ours"].min() >= GOAL


def test_one_row_a_contender(records: list[dict]) -> None:
    table = comparison(records)
    found = records[2]["cases"]["S6 scan, 64 x 256 x 768, state 16"]
    rows = table[(table["case"].str.startswith("S6 scan")) & (table["mode"] == "forward")]
    assert rows["implementation"].tolist() == ["ours", "mamba-ssm reference", "mambapy"]
    assert rows["ms"].tolist() == [
        1e3 * found["forward"][name]["seconds"] for name in rows["implementation"]
    ]
    assert rows["times ours"].iloc[0] == 1
    assert rows["difference"].isna().tolist() == [True, False, False]


def test_the_figure_shows_every_case_and_every_curve(records: list[dict]) -> None:
    figure = draw_benchmark(records)
    beside, time, memory = (axes for part in figure.subfigs for axes in part.axes)
    cases = comparison(records)[["case", "mode"]].drop_duplicates()
    labels = [label.get_text() for label in beside.get_yticklabels()]
    assert len(labels) == len(cases)
    assert labels[0].startswith(f"{cases['case'].iloc[0]}, forward: ours ")
    for axes in (time, memory):
        assert len(axes.lines) == len(records[1]["cases"])
    names = [text.get_text() for text in figure.subfigs[1].legends[0].get_texts()]
    assert any(name.startswith("S6, forward: time ~ T^") for name in names)


def test_other_files_and_missing_kinds_are_refused(records: list[dict], tmp_path: Path) -> None:
    for content in ("{", "[]", "{}", json.dumps({"what": "snag", "cases": {}, "machine": {}})):
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(DataError, match=r"odd\.json: no record"):
            read_records([tmp_path / "odd.json"])
    with pytest.raises(DataError, match=r"missing\.json"):
        read_records([tmp_path / "missing.json"])
    for part in (records[1:2], records[::2]):
        with pytest.raises(DataError, match="needs records"):
            draw_benchmark(part)
