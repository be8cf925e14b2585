"""What of the papers' data is here, what is missing, where to get it, and whether it fits.

    python -m tvg_lib.data.doctor [ROOT] [--sample N] [--md5]

ROOT is `TVG_DATA` by default; the download cache is searched after it. Of each data set of the
catalogue the annotations are read whole, and of the features every id is looked for and a sample is
read and checked: width, finite values, and the time grid against the annotated duration.

The exit status is 0 whatever is found or missing, for a machine without any data is not an error;
it is 2 if ROOT is given but is no folder that can be read.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from tvg_lib import paths
from tvg_lib.data.catalogue import DATASETS, Case, DatasetSpec, Part
from tvg_lib.errors import DataError

State = Literal["found", "missing", "problem"]
_MARKS: dict[State, str] = {"found": "ok", "missing": "--", "problem": "!!"}


@dataclass(frozen=True)
class Finding:
    """One part, as it was found.

    Attributes:
        title, expected: of the part.
        state: "found", "missing", or "problem" when it is there but unusable.
        detail: what is there, what is wrong, or where it belongs.
        optional: the data set is complete without it.
    """

    title: str
    expected: str
    state: State
    detail: str
    optional: bool

    def __str__(self) -> str:
        mark = "  " if self.state == "missing" and self.optional else _MARKS[self.state]
        return f"  {mark} {self.title}: {self.detail}"


@dataclass(frozen=True)
class Diagnosis:
    """All parts of one data set."""

    spec: DatasetSpec
    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        """Whether every part that is not optional was found sound."""
        return all(
            f.state == "found" or (f.optional and f.state == "missing") for f in self.findings
        )

    def __str__(self) -> str:
        state = "ready" if self.ready else "not complete"
        lines = [f"{self.spec.name} ({self.spec.methods}): {state}", *map(str, self.findings)]
        if not self.ready:
            lines.append(f"     get it: {self.spec.source}")
            lines += [f"             {name}, md5 {md5}" for name, md5 in self.spec.archives]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What the doctor found, one diagnosis a data set."""

    root: Path | None
    diagnoses: tuple[Diagnosis, ...]

    def __getitem__(self, name: str) -> Diagnosis:
        """The diagnosis of the first data set whose name starts with `name`."""
        for diagnosis in self.diagnoses:
            if diagnosis.spec.name.startswith(name):
                return diagnosis
        raise DataError(
            f"no data set is called {name!r}, only {[d.spec.name for d in self.diagnoses]}"
        )

    def __repr__(self) -> str:
        where = "no data folder (TVG_DATA is not set)" if self.root is None else str(self.root)
        ready = sum(diagnosis.ready for diagnosis in self.diagnoses)
        head = f"{where}: {ready} of {len(self.diagnoses)} data sets ready"
        return "\n\n".join([head, *map(str, self.diagnoses)])

    def _repr_html_(self) -> str:
        rows = []
        for diagnosis in self.diagnoses:
            title = f"<b>{escape(diagnosis.spec.name)}</b><br>{escape(diagnosis.spec.methods)}"
            if not diagnosis.ready:
                title += f"<br><small>{escape(diagnosis.spec.source)}</small>"
            span = len(diagnosis.findings)
            for number, finding in enumerate(diagnosis.findings):
                first = f'<td rowspan="{span}">{title}</td>' if number == 0 else ""
                cells = (finding.state, finding.title, finding.expected, finding.detail)
                rows.append(
                    f"<tr>{first}" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
                )
        head = "".join(
            f"<th>{name}</th>" for name in ("data set", "state", "part", "expected", "detail")
        )
        return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def examine(
    root: str | os.PathLike[str] | None = None, *, sample: int = 4, md5: bool = False
) -> Report:
    """Look for every data set of the papers.

    Args:
        root: folder of data; `TVG_DATA` by default, nothing but the download cache where that is
            not set either.
        sample: features read of each store, evenly spread; 0 reads all.
        md5: also hash the published archives that lie in `root` (minutes for large ones).

    Raises:
        DataError: `root` is not a folder that can be read.
    """
    if sample < 0:
        raise DataError(f"a sample holds 0 (all) or more features, found {sample}")
    folder = paths.data() if root is None else Path(root)
    if folder is not None and not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        raise DataError(f"{folder}: not a folder that can be read")
    roots = [place for place in (folder, paths.cache()) if place is not None]
    return Report(folder, tuple(_diagnose(spec, roots, sample, md5) for spec in DATASETS))


def _diagnose(spec: DatasetSpec, roots: Sequence[Path], sample: int, md5: bool) -> Diagnosis:
    case = Case(sample)
    findings = [_find(part, roots, case) for part in spec.parts]
    if md5:
        findings += [
            _check_archive(archive, expected)
            for name, expected in spec.archives
            for archive in (root / name for root in roots)
            if archive.is_file()
        ]
    return Diagnosis(spec, tuple(findings))


def _find(part: Part, roots: Sequence[Path], case: Case) -> Finding:
    def finding(state: State, detail: str) -> Finding:
        return Finding(part.title, part.expected, state, detail, part.optional)

    for root in roots:
        for place in part.places:
            if (root / place).exists():
                try:
                    return finding("found", f"{place}: {part.inspect(root / place, case)}")
                except (DataError, OSError) as error:
                    return finding("problem", str(error))
    return finding("missing", f"not at {' or '.join(part.places)}; expected {part.expected}")


def _check_archive(archive: Path, expected: str) -> Finding:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found == expected:
        return Finding(archive.name, f"md5 {expected}", "found", "md5 as published", True)
    detail = f"{archive}: expected md5 {expected}, found {found}"
    return Finding(archive.name, f"md5 {expected}", "problem", detail, True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 0 unless the root cannot be read (2)."""
    parser = argparse.ArgumentParser(
        prog="python -m tvg_lib.data.doctor", description="Which of the papers' data are here?"
    )
    parser.add_argument("root", nargs="?", help="folder of data (default: TVG_DATA)")
    parser.add_argument(
        "--sample", type=int, default=4, metavar="N", help="features read of each store, 0: all"
    )
    parser.add_argument("--md5", action="store_true", help="hash the archives found in the root")
    options = parser.parse_args(arguments)
    try:
        report = examine(options.root, sample=options.sample, md5=options.md5)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
