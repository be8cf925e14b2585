"""Run records: every reported number with all that is needed to make it again.

One run of one method on one data set with one seed is one JSON file. Records of a run on this
machine go to `runs/<scale>/records/`, committed ones to `results/records/<scale>/`.
A record names no user and no absolute path.
"""

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePath
from statistics import mean, stdev
from types import ModuleType
from typing import Any

from tvg_lib import paths
from tvg_lib.errors import DataError
from tvg_lib.fingerprint import code_fingerprint
from tvg_lib.metrics import Estimate

PACKAGES = (
    "torch",
    "numpy",
    "accelerate",
    "transformers",
    "sentence-transformers",
    "mamba-ssm",
)


@dataclass(frozen=True)
class Metric:
    """One measured number, in the unit of the papers' tables (percent for recalls).

    Attributes:
        value: the number itself.
        low: lower end of its confidence interval, if one was computed.
        high: upper end.
        n: number of queries (or videos) it was measured on.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """What one run did, with what, and what came out.

    Attributes:
        method: such as "snag".
        dataset: data set and split, such as "qvh-captions/test".
        scale: smoke, cpu, full or gpu.
        seed: of this run.
        variant: "main", or the name of an ablation; runs that differ in more than the seed differ
            in method, data set or variant.
        parameters: resolved, all of them.
        metrics: by name, such as "R1@0.5".
        environment: Python, packages, platform, processor, GPU.
        seconds: wall time of the run.
        commit: of the checkout; None outside git.
        dirty: whether tracked files differed from the commit.
        code_hash: `code_fingerprint` of the modules that made the numbers.
        data_hash: fingerprint of the data; None where it is part of the code.
        created: UTC, ISO 8601.
        artifacts: files of this run, relative to the checkout.
    """

    method: str
    dataset: str
    scale: str
    seed: int
    variant: str
    parameters: dict[str, Any]
    metrics: dict[str, Metric]
    environment: dict[str, Any]
    seconds: float
    commit: str | None
    dirty: bool | None
    code_hash: str
    data_hash: str | None
    created: str
    artifacts: tuple[str, ...] = field(default=())

    @property
    def file_name(self) -> str:
        """Stable: the same run again replaces its record."""
        parts = (self.method, self.dataset, self.variant, f"seed{self.seed}")
        return "__".join(re.sub(r"[^a-z0-9.+=-]+", "-", part.lower()) for part in parts) + ".json"

    def __repr__(self) -> str:
        values = ", ".join(f"{k}={m.value:.2f}" for k, m in self.metrics.items())
        return (
            f"RunRecord({self.method} on {self.dataset}, {self.variant}, seed {self.seed}, "
            f"{self.scale}: {values})"
        )

    def _repr_html_(self) -> str:
        from html import escape

        head = f"{self.method} on {self.dataset} ({self.variant}, seed {self.seed}, {self.scale})"
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{m.value:.2f}</td><td>{_interval(m)}</td></tr>"
            for name, m in self.metrics.items()
        )
        return (
            f"<table><caption>{escape(head)}</caption><thead><tr><th>metric</th><th>value</th>"
            f"<th>95 % interval</th></tr></thead><tbody>{rows}</tbody></table>"
        )


def records_folder(scale: str, *, fresh: bool = False) -> Path:
    """Folder of the committed records of a scale, or of this machine's (`fresh`)."""
    return paths.runs(scale) / "records" if fresh else paths.results() / "records" / scale


def new_record(
    method: str,
    dataset: str,
    scale: str,
    seed: int,
    *,
    parameters: Any,
    metrics: Mapping[str, Metric | Estimate | float],
    seconds: float,
    modules: Sequence[ModuleType | str],
    variant: str = "main",
    data_hash: str | None = None,
    artifacts: Iterable[Path | str] = (),
) -> RunRecord:
    """A record of a run that has just ended; environment, commit and time are looked up here.

    Args:
        method: such as "snag".
        dataset: data set and split, such as "qvh-captions/test".
        scale: smoke, cpu, full or gpu.
        seed: of this run.
        parameters: resolved; a mapping or a dataclass. Paths below the checkout become relative, of
            other absolute paths only the last part is kept.
        metrics: numbers by name, each an estimate with its interval or a plain number. Estimates
            that no query counts for are undefined and left out.
        seconds: wall time.
        modules: library modules that made the numbers, for the code hash.
        variant: "main", or the name of an ablation.
        data_hash: fingerprint of the data, if not embedded.
        artifacts: files of this run.

    Raises:
        DataError: if a metric is not a number, or a parameter cannot be written as JSON.
    """
    commit, dirty = _git_state()
    return RunRecord(
        method=method,
        dataset=dataset,
        scale=scale,
        seed=seed,
        variant=variant,
        parameters=_portable(parameters, "parameters"),
        metrics={
            name: _metric(value, name)
            for name, value in metrics.items()
            if not (isinstance(value, Estimate) and value.n == 0)
        },
        environment=environment(),
        seconds=round(float(seconds), 2),
        commit=commit,
        dirty=dirty,
        code_hash=code_fingerprint(*modules),
        data_hash=data_hash,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artifacts=tuple(_portable(Path(a), "artifacts") for a in artifacts),
    )


def save(record: RunRecord, folder: Path) -> Path:
    """Write a record atomically; the same run's older record is replaced. Returns the file."""
    path = folder / record.file_name
    paths.write_text(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    return path


def load_records(folder: Path) -> list[RunRecord]:
    """All records of a folder, by file name; none if the folder does not exist.

    Raises:
        DataError: if a file is not a record; names the file.
    """
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def fresh_records(scale: str) -> list[RunRecord]:
    """What this machine measured at a scale.

    The smoke scale gives none: its runs are too short to stand beside the papers' numbers, and what
    a notebook shows there must not depend on what ran before.
    """
    return [] if scale == "smoke" else load_records(records_folder(scale, fresh=True))


@dataclass(frozen=True)
class Summary:
    """A metric over seeds.

    Attributes:
        mean: over the seeds.
        sd: sample standard deviation; None for one seed.
        seeds: how many there are.
        low, high: means of the ends of the seeds' intervals over queries; None where a run has
            none.
    """

    mean: float
    sd: float | None
    seeds: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.sd is None else f"{self.mean:.2f} ± {self.sd:.2f}"

    @property
    def with_interval(self) -> str:
        """The mean and its interval over queries, such as "50.12 [48.01, 52.30]"."""
        if self.low is None or self.high is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def selected(
    records: Iterable[RunRecord], method: str, dataset: str, variant: str = "main"
) -> list[RunRecord]:
    """The runs of one method on one data set in one variant."""
    wanted = (method, dataset, variant)
    return [r for r in records if (r.method, r.dataset, r.variant) == wanted]


def over_seeds(
    records: Iterable[RunRecord], method: str, dataset: str, metric: str, variant: str = "main"
) -> Summary | None:
    """Summary of a metric over the seeds of one method, data set and variant; None without a run.

    Raises:
        DataError: if the records belong to several scales, or one seed occurs twice.
    """
    chosen = [r for r in selected(records, method, dataset, variant) if metric in r.metrics]
    if not chosen:
        return None
    scales, seeds = {r.scale for r in chosen}, [r.seed for r in chosen]
    if len(scales) > 1 or len(set(seeds)) < len(seeds):
        raise DataError(
            f"{method} on {dataset} ({variant}): a mean needs runs of one scale with different "
            f"seeds, found scales {sorted(scales)} and seeds {seeds}"
        )
    found = [r.metrics[metric] for r in chosen]
    values = [m.value for m in found]
    low, high = (
        None if None in ends else mean(ends)
        for ends in ([m.low for m in found], [m.high for m in found])
    )
    sd = stdev(values) if len(values) > 1 else None
    return Summary(mean(values), sd, len(values), low, high)


def environment() -> dict[str, Any]:
    """What the numbers were made with: versions and hardware, nothing about the user."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
        found["cuda"] = torch.version.cuda
    elif torch.backends.mps.is_available():
        found["gpu"] = "Apple MPS"
    return found


def _interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return f"[{metric.low:.2f}, {metric.high:.2f}]"


def _metric(value: Any, name: str) -> Metric:
    try:
        if not isinstance(value, Metric | Estimate):
            value = Metric(value)
        # Plain numbers: NumPy and PyTorch scalars do not go into JSON.
        low, high = (None if end is None else float(end) for end in (value.low, value.high))
        metric = Metric(float(value.value), low, high, None if value.n is None else int(value.n))
    except (TypeError, ValueError) as error:
        raise DataError(f"metric {name!r}: expected a number, found {value!r}") from error
    numbers = (metric.value, metric.low, metric.high)
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise DataError(f"metric {name!r} is not finite: {metric}")
    return metric


def _portable(value: Any, where: str) -> Any:
    """A value as plain JSON, with no path of this machine in it."""
    if is_dataclass(value) and not isinstance(value, type):
        return _portable({f.name: getattr(value, f.name) for f in fields(value)}, where)
    if isinstance(value, Mapping):
        return {str(key): _portable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_portable(item, where) for item in items]
    if isinstance(value, PurePath) or (isinstance(value, str) and PurePath(value).is_absolute()):
        path = PurePath(value)
        if path.is_relative_to(paths.root()):
            return path.relative_to(paths.root()).as_posix()
        return path.name if path.is_absolute() else path.as_posix()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return value
    if hasattr(value, "item"):
        return _portable(value.item(), where)
    raise DataError(f"{where}: a {type(value).__name__} cannot be written into a record: {value!r}")


def _read(path: Path) -> RunRecord:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["metrics"] = {
            name: _metric(Metric(**value), name) for name, value in content["metrics"].items()
        }
        content["artifacts"] = tuple(content["artifacts"])
        record = RunRecord(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path.name}: not a run record ({path.parent.name}/): {error}") from error
    if record.file_name != path.name:
        raise DataError(f"{path.name}: the record inside belongs to the file {record.file_name!r}")
    return record


def _git_state() -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(paths.root()), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Name of the processor; /proc/cpuinfo on Linux, where `platform` does not know it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if named:
            return named[1]
    return platform.processor() or platform.machine()
