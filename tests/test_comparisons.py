"""Differences of two systems: paired by query, seed by seed and on average, and recorded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tvg_lib.comparisons import compare, difference_name, over_most_seeds
from tvg_lib.errors import DataError
from tvg_lib.metrics import MetricReport
from tvg_lib.results import RunRecord, load_records, new_record, records_folder


@dataclass(frozen=True)
class OneTest:
    report: MetricReport
    record: RunRecord


def one_test(
    hits: list[float], seed: int = 0, method: str = "mscl", variant: str = "main"
) -> OneTest:
    values = np.array(hits)
    report = MetricReport(
        tuple(range(len(hits))),
        {"R1@0.5": float(values.mean())},
        {"R1@0.5": values},
        groups=tuple(f"video {n // 2}" for n in range(len(hits))),
    )
    record = new_record(
        method,
        "planted/test",
        "cpu",
        seed,
        variant=variant,
        parameters={},
        metrics=report.estimates(),
        seconds=2.0,
        modules=[],
    )
    return OneTest(report, record)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("TVG_ROOT", str(tmp_path))


def saved() -> dict[tuple[str, str, int], RunRecord]:
    records = load_records(records_folder("cpu", fresh=True))
    return {(r.method, r.variant, r.seed): r for r in records}


def test_each_seed_and_the_mean_of_all_are_compared_and_recorded() -> None:
    mine = [one_test([100, 100, 0, 100], seed=3), one_test([100, 0, 0, 100], seed=4)]
    base = [one_test([0, 100, 0, 0], 3, "snag"), one_test([100, 0, 0, 0], 4, "snag")]
    found = compare(mine, base, modules=["tvg_lib.metrics.report"])
    assert {label: e["R1@0.5"].value for label, e in found.items()} == {
        "seed 3": 50.0,  # two of four queries more
        "seed 4": 25.0,
        "mean of 2": 37.5,
    }
    records = saved()
    name = "mscl-minus-snag"
    assert set(records) == {(name, "main", 3), (name, "main", 4), (name, "mean-of-2", 3)}
    mean = records[name, "mean-of-2", 3]
    assert mean.metrics["R1@0.5"].value == 37.5
    # Two recordings with mean differences of 25 and 50: no draw of them leaves that range.
    assert 25 <= mean.metrics["R1@0.5"].low <= mean.metrics["R1@0.5"].high <= 50
    assert (mean.seconds, mean.parameters["seeds"]) == (4.0, [3, 4])
    alone = records[name, "main", 4]
    assert (alone.seconds, alone.parameters["seeds"]) == (2.0, [4])
    assert over_most_seeds(records.values(), name, "planted/test") == "mean-of-2"
    assert over_most_seeds([], name, "planted/test") == "mean-of-3"


def test_one_seed_has_no_mean() -> None:
    found = compare([one_test([100, 0], 1)], [one_test([0, 0], 1, "snag")], modules=[])
    assert list(found) == ["seed 1"]
    records = saved()
    assert set(records) == {("mscl-minus-snag", "main", 1)}
    assert over_most_seeds(records.values(), "mscl-minus-snag", "planted/test") == "main"


def test_a_rule_stands_against_every_seed() -> None:
    mine = [one_test([100, 0], 0), one_test([0, 0], 1)]
    found = compare(mine, [one_test([0, 0], 0, "zero-shot")], modules=[], name="against the rule")
    assert [e["R1@0.5"].value for e in found.values()] == [50.0, 0.0, 25.0]
    assert {method for method, *_ in saved()} == {"against the rule"}


def test_variants_are_named() -> None:
    ablation = one_test([0], variant="without-cross").record
    assert difference_name(ablation, one_test([0]).record) == "mscl-without-cross-minus-mscl"


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(DataError, match="one seed or 3, found 2"):
        compare([one_test([0])] * 3, [one_test([0])] * 2, modules=[])
    with pytest.raises(DataError, match="one seed or 0"):
        compare([], [], modules=[])
    other = one_test([0])
    other = OneTest(
        other.report,
        new_record("m", "d", "cpu", 0, parameters={}, metrics={}, seconds=0, modules=[]),
    )
    with pytest.raises(DataError, match="one test set"):
        compare([one_test([0])], [other], modules=[])
    with pytest.raises(DataError, match="the same queries"):
        compare([one_test([0])], [one_test([0, 0])], modules=[])
