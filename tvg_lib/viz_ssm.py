"""Benchmark records of the state-space layers, as a table and as a figure.

    read_records      what `benchmarks/ssm.py` wrote
    comparison        who takes how long, one row a contender
    draw_benchmark    other implementations beside ours; time and memory against length

How it is measured stands in `benchmarks/ssm.py`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, NullLocator

from tvg_lib.errors import DataError
from tvg_lib.viz import COLOURS, INK, PALE, QUIET, WIDTH

if TYPE_CHECKING:
    import pandas

MODES = ("forward", "forward + backward")
GOAL = 2.0  # times ours: what the best of the others should take at least
_MARKERS = "osD^vP"


def read_records(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Records in the order of the files.

    Raises:
        DataError: a file is no record of `benchmarks/ssm.py`; names it.
    """
    records = []
    for path in files:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["what"] not in ("scans", "layers", "scaling"):
                raise ValueError(f"'what' is {record['what']!r}")
            if not {"cases", "machine"} <= record.keys():
                raise ValueError(f"it holds only {sorted(record)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no record of the state-space benchmark: {error!r}") from error
        records.append(record)
    return records


def comparison(records: Sequence[Mapping[str, Any]]) -> "pandas.DataFrame":
    """Ours and the others in every case of the records of scans and layers.

    Columns: "case", "mode", "implementation", "ms" (median), "times ours", and "difference" (the
    largest from our output, relative to its largest value; missing for ours). `Hydra` does twice
    the work of the Mamba-2 layer that it stands beside.
    """
    import pandas

    rows = []
    for record in records:
        if record["what"] == "scaling":
            continue
        for case, found in record["cases"].items():
            for mode in MODES:
                for name, row in found[mode].items():
                    rows.append(
                        {
                            "case": case,
                            "mode": mode,
                            "implementation": name,
                            "ms": 1e3 * row["seconds"],
                            "times ours": row["times_ours"],
                            "difference": found["difference_from_ours"].get(name),
                        }
                    )
    return pandas.DataFrame(rows)


def draw_benchmark(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Others' time in multiples of ours, and how time and memory grow with length.

    Args:
        records: as from `read_records`; those of scans and layers fill the upper part, those of
            scaling the lower one.

    Raises:
        DataError: there is no record of one of the two kinds.
    """
    table = comparison(records)
    scaling = [record for record in records if record["what"] == "scaling"]
    if table.empty or not scaling:
        raise DataError("the figure needs records of scans or layers, and of scaling")
    upper = 0.24 * len(table[["case", "mode"]].drop_duplicates()) + 1.2
    lower = 3.6
    figure = plt.figure(figsize=(WIDTH, upper + lower), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(upper, lower))
    _draw_comparison(top, table)
    lines = [line for record in scaling for line in record["cases"].items()]
    _draw_growth(bottom, lines)
    return figure


def _draw_growth(figure: SubFigure, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Time and memory against length, each line with the powers that were fitted to it."""
    time, memory = figure.subplots(1, 2)
    for number, (name, row) in enumerate(lines):
        style = {
            "color": COLOURS[("SSD", "S6", "attention").index(name.split(",")[0])],
            "linestyle": "--" if "backward" in name else "-",
            "marker": _MARKERS[number % len(_MARKERS)],
            "ms": 3.5,
        }
        powers = [f"time ~ T^{row['exponent_seconds']:.2f}"]
        if "exponent_peak_bytes" in row:
            powers.append(f"memory ~ T^{row['exponent_peak_bytes']:.2f}")
        time.plot(row["lengths"], row["seconds"], label=f"{name}: {', '.join(powers)}", **style)
        memory.plot(row["lengths"], [peak / 2**20 for peak in row["peak_bytes"]], **style)
    time.set(ylabel="seconds", title="Time against length")
    memory.set(ylabel="MiB above the inputs", title="Peak memory against length")
    for axes in (time, memory):
        axes.set(xscale="log", yscale="log", xlabel="steps")
    figure.legend(fontsize=7.5, ncols=2, loc="outside lower center")


def _draw_comparison(figure: SubFigure, table: "pandas.DataFrame") -> None:
    """One line a case and mode, one mark an implementation, on a logarithmic axis."""
    axes = figure.subplots()
    others = [
        name
        for name in table["implementation"].drop_duplicates()
        if name not in ("ours", "ours, Hydra")
    ]
    labels = []
    for number, ((case, mode), rows) in enumerate(table.groupby(["case", "mode"], sort=False)):
        ours = rows.loc[rows["implementation"] == "ours", "ms"].item()
        labels.append(f"{case}, {mode}: ours {ours:,.0f} ms")
        axes.axhline(number, color=PALE, linewidth=0.8, zorder=1)
    place = {case: number for number, case in enumerate(dict.fromkeys(_keys(table)))}
    for number, name in enumerate(others):
        rows = table[table["implementation"] == name]
        axes.plot(
            rows["times ours"],
            [place[key] for key in _keys(rows)],
            _MARKERS[number % len(_MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            ms=5,
            label=name,
        )
    axes.axvline(1, color=INK, linewidth=1)
    axes.axvline(GOAL, color=QUIET, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time in multiples of ours (dotted: twice)")
    axes.set_title("Other implementations beside ours")
    figure.legend(fontsize=7.5, ncols=len(others), loc="outside lower center")


def _keys(table: "pandas.DataFrame") -> list[tuple[str, str]]:
    """(case, mode) of every row."""
    return list(zip(table["case"], table["mode"], strict=True))
