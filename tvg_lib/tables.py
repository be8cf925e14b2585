"""Tables that set the papers' printed numbers beside ours.

Each table shows, per metric, what the paper prints, the mean of our committed records, and what
this machine measured. A number without a record shows as "not run"; a number that no public text
gives is empty. Below the table stand the notes on the paper's numbers and where each of our rows
comes from.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from tvg_lib import paths
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.results import RunRecord, Summary, over_seeds, selected

NOT_RUN = "not run"
_COLUMNS = ["table", "row", "condition", "metric", "value", "source", "note"]


@dataclass(frozen=True)
class PaperNumber:
    """One printed number: `printed` as it stands there, empty where it is unknown."""

    row: str
    condition: str
    metric: str
    printed: str
    source: str
    note: str

    @property
    def value(self) -> float | None:
        """The number; None where it is unknown."""
        return float(self.printed) if self.printed else None


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper, in printed order."""

    title: str
    numbers: tuple[PaperNumber, ...]

    @property
    def conditions(self) -> tuple[str, ...]:
        """Data sets or features that the table tells apart, in order."""
        return tuple(dict.fromkeys(number.condition for number in self.numbers))

    def at(self, condition: str) -> "PaperTable":
        """The part of the table that belongs to one condition.

        Raises:
            ConfigurationError: if the table has no such condition.
        """
        if condition not in self.conditions:
            raise ConfigurationError(
                f"{self.title} has no condition {condition!r}; it has {', '.join(self.conditions)}"
            )
        chosen = tuple(n for n in self.numbers if n.condition == condition)
        title = f"{self.title}, {condition}" if len(self.conditions) > 1 else self.title
        return PaperTable(title, chosen)


def paper_table(name: str, folder: Path | None = None) -> PaperTable:
    """A table of `results/paper_tables/`, such as "mscl_table1".

    Raises:
        ConfigurationError: if there is no such table; names those there are.
        DataError: if the file is not of the declared form; names file and line.
    """
    folder = paths.results() / "paper_tables" if folder is None else folder
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.csv")))
        raise ConfigurationError(f"no table {name!r} of a paper; there are {known}")
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    if not rows or rows[0] != _COLUMNS:
        raise DataError(f"{path.name}: expected the columns {_COLUMNS}, found {rows[:1]}")
    numbers: dict[tuple[str, str, str], PaperNumber] = {}
    for line, row in enumerate(rows[1:], start=2):
        where = f"{path.name}, line {line}"
        if len(row) != len(_COLUMNS):
            raise DataError(f"{where}: expected {len(_COLUMNS)} columns, found {len(row)}")
        number = PaperNumber(*row[1:])
        try:
            has_value = number.value is not None
        except ValueError:
            raise DataError(f"{where}: {number.printed!r} is not a number") from None
        if has_value and not number.source.startswith("["):
            raise DataError(f"{where}: a number without the tag of its source")
        key = (number.row, number.condition, number.metric)
        if key in numbers:
            raise DataError(f"{where}: a second number for {key}")
        numbers[key] = number
    if not numbers:
        raise DataError(f"{path.name}: no numbers")
    return PaperTable(rows[1][0], tuple(numbers.values()))


@dataclass(frozen=True)
class Run:
    """Which records fill a row: one method on one data set, in one variant, over its seeds."""

    method: str
    dataset: str
    variant: str = "main"


@dataclass(frozen=True)
class Cell:
    """One metric of one row; None where the row is none of ours, or nothing ran."""

    paper: PaperNumber | None
    ours: Summary | None
    here: Summary | None


@dataclass(frozen=True)
class Row:
    """One method. `run` is None where only the paper's numbers exist."""

    label: str
    run: Run | None
    cells: dict[str, Cell]


@dataclass(frozen=True, repr=False)
class ResultTable:
    """A table ready to be shown: text, HTML, Markdown and CSV.

    Attributes:
        title: shown above.
        metrics: columns, in order.
        rows: in order.
        provenance: where our numbers come from; rows that come from the same share a line.
        intervals: show our means with their intervals over queries, not with the deviation over
            seeds.
    """

    title: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    provenance: tuple[str, ...]
    intervals: bool = False

    @property
    def _cells(self) -> list[Cell]:
        return [cell for row in self.rows for cell in row.cells.values()]

    @property
    def _views(self) -> tuple[str, ...]:
        """What is shown of each metric: only what the table has a number of; else "ours"."""
        there = {
            "paper": any(cell.paper for cell in self._cells),
            "ours": any(cell.ours for cell in self._cells),
            "this machine": any(cell.here for cell in self._cells),
        }
        return tuple(view for view, shown in there.items() if shown) or ("ours",)

    @property
    def _empty_views(self) -> tuple[str, ...]:
        """Views without any number: one column that says so, instead of one a metric."""
        mine = any(row.run for row in self.rows)
        return tuple(v for v in ("ours", "this machine") if mine and v not in self._views)

    @property
    def _notes(self) -> list[str]:
        notes = (cell.paper.note for cell in self._cells if cell.paper)
        return list(dict.fromkeys(filter(None, notes)))

    @property
    def footnotes(self) -> tuple[str, ...]:
        """Numbered notes on the paper's numbers, then where ours come from."""
        numbered = [f"({i}) {note}" for i, note in enumerate(self._notes, start=1)]
        return (*numbered, *self.provenance)

    def _show(self, row: Row, metric: str, view: str) -> str:
        cell = row.cells.get(metric)
        if view == "paper":
            if cell is None or cell.paper is None:
                return ""
            note = cell.paper.note
            mark = f"({self._notes.index(note) + 1})" if note else ""
            return f"{cell.paper.printed} {mark}".strip()
        if row.run is None or cell is None:
            return ""
        summary = cell.ours if view == "ours" else cell.here
        if summary is None:
            return NOT_RUN
        return summary.with_interval if self.intervals else str(summary)

    @staticmethod
    def _source(row: Row) -> str:
        sources = (c.paper.source for c in row.cells.values() if c.paper and c.paper.source)
        return "; ".join(dict.fromkeys(sources))

    def _body(self) -> list[list[str]]:
        return [
            [
                row.label,
                *(self._show(row, m, v) for m in self.metrics for v in self._views),
                *(NOT_RUN if row.run else "" for _ in self._empty_views),
                *([self._source(row)] if "paper" in self._views else []),
            ]
            for row in self.rows
        ]

    def _header(self) -> list[tuple[str, str]]:
        """Column heads, each a metric and a view of it; one of the two may be empty."""
        several = len(self._views) > 1
        return [
            ("", ""),
            *((m, v if several else "") for m in self.metrics for v in self._views),
            *((view, "") for view in self._empty_views),
            *([("source", "")] if "paper" in self._views else []),
        ]

    def __repr__(self) -> str:
        # Notebooks keep it beside the HTML: the whole text would double their size.
        return f"{self.title}: {len(self._body())} rows"

    def __str__(self) -> str:
        tops, views = (list(part) for part in zip(*self._header(), strict=True))
        heads = [tops, views] if any(views) else [tops]
        body = self._body()
        widths = [max(map(len, column)) for column in zip(*heads, *body, strict=True)]
        rows = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in [*heads, ["-" * w for w in widths], *body]
        ]
        return "\n".join([self.title, *rows, *self.footnotes])

    def _repr_html_(self) -> str:
        def row(kind: str, cells: Iterable[str]) -> str:
            return "<tr>" + "".join(f"<{kind}>{escape(c)}</{kind}>" for c in cells) + "</tr>"

        head = row("th", (" ".join(filter(None, pair)) for pair in self._header()))
        body = "".join(row("td", cells) for cells in self._body())
        notes = "".join(f"<div><small>{escape(note)}</small></div>" for note in self.footnotes)
        return (
            f"<table><caption>{escape(self.title)}</caption><thead>{head}</thead>"
            f"<tbody>{body}</tbody></table>{notes}"
        )

    def markdown(self) -> str:
        """GitHub Markdown, title and footnotes included."""
        header = [" ".join(filter(None, pair)) for pair in self._header()]
        rows = [header, ["---"] * len(header), *self._body()]
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"- {n}" for n in self.footnotes)])

    def csv(self) -> str:
        """One line a metric of a row: paper, ours and this machine with seeds, source and note."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        parts = ("mean", "low", "high", "seeds") if self.intervals else ("mean", "sd", "seeds")
        views = [f"{view}_{part}" for view in ("ours", "here") for part in parts]
        writer.writerow(["row", "metric", "paper", *views, "source", "note"])
        for row in self.rows:
            for metric, cell in row.cells.items():
                numbers: list[str | int] = []
                for summary in (cell.ours, cell.here):
                    if summary is None:
                        numbers += [NOT_RUN if row.run else "", *[""] * (len(parts) - 1)]
                        continue
                    values = [getattr(summary, part) for part in parts[:-1]]
                    numbers += ["" if v is None else f"{v:.4f}" for v in values]
                    numbers.append(summary.seeds)
                paper = cell.paper or PaperNumber("", "", "", "", "", "")
                writer.writerow(
                    [row.label, metric, paper.printed, *numbers, paper.source, paper.note]
                )
        return out.getvalue()

    def save(self, folder: Path, name: str) -> None:
        """Write `name.md` and `name.csv` into a folder."""
        paths.write_text(folder / f"{name}.md", self.markdown() + "\n")
        paths.write_text(folder / f"{name}.csv", self.csv())


def beside_paper(
    table: PaperTable,
    runs: Mapping[str, Run],
    *,
    committed: Sequence[RunRecord],
    fresh: Sequence[RunRecord],
) -> ResultTable:
    """A paper's table with our runs beside it.

    Args:
        table: of the paper; a table of several conditions gets rows such as "SnAG (EgoVLP)".
        runs: which of its rows are ours to fill, by the row's label.
        committed: records of one scale, for the column "ours".
        fresh: records of one scale, for the column "this machine".

    Raises:
        ConfigurationError: if `runs` names a row that the table does not have.
    """
    several = len(table.conditions) > 1
    numbers: dict[str, dict[str, PaperNumber]] = {}
    for number in table.numbers:
        label = f"{number.row} ({number.condition})" if several else number.row
        numbers.setdefault(label, {})[number.metric] = number
    unknown = set(runs) - set(numbers)
    if unknown:
        raise ConfigurationError(
            f"{table.title} has no row {sorted(unknown)}; it has {', '.join(numbers)}"
        )
    metrics = tuple(dict.fromkeys(number.metric for number in table.numbers))
    return _assemble(table.title, metrics, numbers, runs, committed, fresh)


def of_runs(
    title: str,
    runs: Mapping[str, Run],
    metrics: Sequence[str],
    *,
    committed: Sequence[RunRecord],
    fresh: Sequence[RunRecord],
    intervals: bool = False,
) -> ResultTable:
    """A table of our own runs, for experiments that no paper has.

    Args:
        title: shown above.
        runs: row label -> records that fill it.
        metrics: columns, by their names in the records.
        committed: records of one scale, for the column "ours".
        fresh: records of one scale, for the column "this machine".
        intervals: as of `ResultTable`; for differences, whose interval is what counts.
    """
    numbers: dict[str, dict[str, PaperNumber]] = {label: {} for label in runs}
    table = _assemble(title, tuple(metrics), numbers, runs, committed, fresh)
    return replace(table, intervals=intervals)


def _assemble(
    title: str,
    metrics: tuple[str, ...],
    numbers: Mapping[str, Mapping[str, PaperNumber]],
    runs: Mapping[str, Run],
    committed: Sequence[RunRecord],
    fresh: Sequence[RunRecord],
) -> ResultTable:
    rows: list[Row] = []
    sources: dict[tuple[str, str], dict[str, float]] = {}  # seconds of rows by view and origin
    for label, printed in numbers.items():
        run = runs.get(label)
        cells = {}
        for metric in metrics:
            ours, here = (
                None
                if run is None
                else over_seeds(part, run.method, run.dataset, metric, run.variant)
                for part in (committed, fresh)
            )
            if run is not None or metric in printed:
                cells[metric] = Cell(printed.get(metric), ours, here)
        rows.append(Row(label, run, cells))
        if run is not None:
            for view, part in (("ours", committed), ("this machine", fresh)):
                records = selected(part, run.method, run.dataset, run.variant)
                if records:
                    seconds = sum(r.seconds for r in records) / len(records)
                    sources.setdefault((view, _origin(records)), {})[label] = seconds
    provenance = []
    for (view, origin), seconds_of in sources.items():
        ends = dict.fromkeys(f"{end(seconds_of.values()):.0f}" for end in (min, max))
        labels = "; ".join(seconds_of)
        provenance.append(f"{view}: {origin}, {' to '.join(ends)} s a run: {labels}")
    return ResultTable(title, metrics, tuple(rows), tuple(provenance))


def _origin(records: Sequence[RunRecord]) -> str:
    """Scale, seeds, data, commit and hardware of a row's records, in one line."""

    def joined(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    # A mean over seeds is one record, which names them.
    means = [r.parameters.get("seeds", ()) for r in records if r.variant.startswith("mean-of-")]
    seen = sorted({r.seed for r in records}.union(*means))
    seeds = ", ".join(str(seed) for seed in seen)
    commits = joined((r.commit or "no commit")[:7] + ("+" if r.dirty else "") for r in records)
    hardware = joined(r.environment.get("gpu") or r.environment.get("cpu", "") for r in records)
    plural = "s" if len(seen) > 1 else ""
    return (
        f"{records[0].dataset}, scale {records[0].scale}, seed{plural} {seeds}, commit {commits}, "
        f"{hardware}"
    )
