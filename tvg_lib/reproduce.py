"""Run the numbered notebooks, in order, at one scale: `python -m tvg_lib.reproduce --scale cpu`.

Each notebook is executed by papermill into `runs/<scale>/notebooks/` with the parameters of
`params/<scale>/NN_name.yaml` (the smoke scale takes the notebooks' own defaults and embedded data
only). A notebook may have further runs at a scale, on other data: `NN_name@label.yaml` is one more,
kept as `NN_name@label.ipynb`. A notebook that finished leaves a stamp; it is skipped as long as its
code, its parameters, the library code it imports and the data at hand are the same. Notebooks from
90 on report what the others recorded, and depend on the records too. A notebook that fails is kept
as far as it came, the others go on, and the exit status is 1.

    --only 05,90      these notebooks only, with all of their runs; 05_snag@short is one run
    --jobs 2          notebooks side by side, each with its share of the cores
    --force           run even what is unchanged
    --list            show what would run, and why
    --publish         maintainers: copy this scale's fresh records to `results/records/<scale>/`
                      and make the committed tables and figures from the committed records
    --commit 05       maintainers: execute notebooks in place at the smoke scale, scrub, check
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import nbformat
import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from tvg_lib import notebooks, paths
from tvg_lib.data import qvh_captions
from tvg_lib.errors import ConfigurationError
from tvg_lib.fingerprint import code_fingerprint, files_fingerprint, value_fingerprint
from tvg_lib.results import load_records, records_folder, save

SCALES = ("smoke", "cpu", "full", "gpu")
REPORTS = range(90, 93)
PUBLISH = "PUBLISH"
# Figures that need models or data: the report notebooks cannot make them from records.
OF_RUNS = ("mscl_figure1_*.png", "a2fa_figure[12457]_*.png")
# Kernels run beside this process; their warning about unencrypted local traffic is no news.
KERNEL: dict[str, Any] = {"kernel_name": "python3", "extra_arguments": ["--log-level=ERROR"]}
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def smoke_environment() -> dict[str, str]:
    """Environment variables of a notebook at the smoke scale.

    `TVG_DATA` names a folder that cannot exist, so a notebook that reaches for real data fails
    instead of giving outputs that depend on the machine. One thread: sums do not depend on the
    number of cores, and notebooks run side by side.
    """
    return {
        "TVG_DATA": str(Path(os.devnull) / "the-smoke-scale-uses-embedded-data-only"),
        "TVG_CACHE": str(paths.runs("smoke") / "cache"),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
    }


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; kernels started meanwhile inherit them."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Stamp:
    """What a finished notebook leaves: the key of all it depended on, and what it wrote.

    With what others wrote meanwhile: a file too many makes a notebook run once too often at worst.
    """

    key: str
    seconds: float
    finished: str
    artifacts: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One run of one notebook at one scale.

    Attributes:
        source: the notebook.
        scale: of the run.
        label: of a further run with parameters of its own; empty for the notebook's own run.
        overrides: parameters on top of those of the file.
    """

    source: Path
    scale: str
    label: str = ""
    overrides: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def all_of(cls, source: Path, scale: str) -> list["Task"]:
        """The run of a notebook, and the further ones that parameter files ask for.

        Raises:
            ConfigurationError: a file at the smoke scale, which has none, or without a label.
        """
        runs = [cls(source, scale)]
        for file in sorted((paths.params() / scale).glob(f"{source.stem}@*.yaml")):
            label = file.stem.partition("@")[2]
            if scale == "smoke" or not label:
                raise ConfigurationError(
                    f"params/{scale}/{file.name}: expected NN_name@label.yaml, not at the smoke "
                    "scale"
                )
            runs.append(cls(source, scale, label))
        return runs

    @property
    def name(self) -> str:
        """File name of the executed notebook without suffix: `05_snag`, or `05_snag@short`."""
        return f"{self.source.stem}@{self.label}" if self.label else self.source.stem

    @property
    def is_report(self) -> bool:
        """Whether the notebook shows what others recorded (numbers 90 to 92)."""
        return int(self.name[:2]) in REPORTS

    @property
    def output(self) -> Path:
        """The executed notebook."""
        return paths.runs(self.scale) / "notebooks" / f"{self.name}.ipynb"

    @property
    def stamp_file(self) -> Path:
        """The stamp beside the executed notebook."""
        return self.output.with_suffix(".stamp.json")

    def parameters(self) -> dict[str, Any]:
        """The values passed to the notebook, checked against its parameters cell.

        Raises:
            ConfigurationError: no parameter file, an unknown parameter or a wrong type.
        """
        values = dict(self.overrides)
        if self.scale != "smoke":
            values = read_parameters(paths.params() / self.scale / f"{self.name}.yaml") | values
        notebooks.check_parameters(values, notebooks.load(self.source), self.source.name)
        return values

    def key(self) -> str:
        """Fingerprint of all that the outcome depends on."""
        notebook = notebooks.load(self.source)
        modules = sorted(notebooks.used_modules(notebook))
        code = [cell.source for cell in notebooks.code_cells(notebook)]
        asks_shipped = any("paths.results()" in source for source in code)
        return value_fingerprint(
            {
                "code": code,
                "parameters": self.parameters(),
                "library": code_fingerprint(*modules),
                "data": None if self.scale == "smoke" else _data_fingerprint(),
                "records": _records_fingerprint(self.scale) if self.is_report else None,
                "grounders": _grounders_fingerprint() if asks_shipped else None,
            }
        )

    def stamp(self) -> Stamp | None:
        """The stamp of the last finished run; None if there is none or what it made is gone."""
        try:
            fields = json.loads(self.stamp_file.read_text(encoding="utf-8"))
            stamp = Stamp(**(fields | {"artifacts": tuple(fields["artifacts"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        folder = paths.runs(self.scale)
        there = self.output.is_file() and all((folder / a).is_file() for a in stamp.artifacts)
        return stamp if there else None

    def run(self, on_cell: Callable[[], None]) -> float:
        """Execute the notebook and leave a stamp; returns the seconds it took.

        Args:
            on_cell: called without arguments after each code cell.

        Raises:
            papermill.PapermillExecutionError: a cell failed; the notebook is kept up to there.
        """
        import papermill

        values, key = self.parameters(), self.key()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.stamp_file.unlink(missing_ok=True)
        before = _artifacts(self.scale)
        started = time.perf_counter()
        with environment(smoke_environment() if self.scale == "smoke" else {}):
            papermill.execute_notebook(
                str(self.source),
                str(self.output),
                parameters=values,
                cwd=str(self.source.parent),
                progress_bar=False,
                language="python",
                **KERNEL,
                on_cell_start=_take_signals_back,
                on_cell_executed=lambda **_: on_cell(),
            )
        seconds = time.perf_counter() - started
        after = _artifacts(self.scale)
        written = sorted(name for name, mark in after.items() if before.get(name) != mark)
        if self.is_report:
            key = self.key()  # it may have written records of its own
        stamp = Stamp(key, round(seconds, 1), datetime.now(UTC).isoformat(), tuple(written))
        paths.write_text(self.stamp_file, json.dumps(asdict(stamp), indent=1))
        return seconds


def read_parameters(path: Path) -> dict[str, Any]:
    """A parameter file as a dictionary.

    Raises:
        ConfigurationError: if it is missing or is not a YAML mapping with string keys.
    """
    name = f"params/{path.parent.name}/{path.name}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{name} is missing: each notebook needs one a scale") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name} is not readable YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError(f"{name} must hold `NAME: value` lines, found {values!r}")
    return values


def numbered(*folders: Path) -> list[Path]:
    """The numbered notebooks of some folders, in order."""
    files = [p for folder in folders for p in folder.glob("*.ipynb")]
    return sorted((p for p in files if notebooks.FILE_NAME.fullmatch(p.stem)), key=lambda p: p.stem)


def select(only: str | None, names: Sequence[str]) -> list[str]:
    """The names that `only` asks for, in order; all of them where it is empty.

    Args:
        only: comma-separated numbers or names, such as "05,90_tables". A number means all runs of a
            notebook, "05_snag@short" one of its further runs.
        names: to choose from, `NN_name` or `NN_name@label`.

    Raises:
        ConfigurationError: if a part of `only` matches no name.
    """
    if not only:
        return list(names)
    chosen: set[str] = set()
    for wanted in filter(None, (part.strip() for part in only.split(","))):
        number = f"{int(wanted):02d}" if wanted.isdecimal() else None
        matching = [n for n in names if n == wanted.removesuffix(".ipynb") or n[:2] == number]
        if not matching:
            known = ", ".join(dict.fromkeys(names)) or "none"
            raise ConfigurationError(f"no notebook {wanted!r}; there are {known}")
        chosen.update(matching)
    return [name for name in names if name in chosen]


def reproduce(tasks: Sequence[Task], *, force: bool = False, jobs: int = 1) -> dict[str, str]:
    """Run notebooks with one progress display; returns what became of each, by name.

    They start in order, up to `jobs` at a time; reports start when all others have ended. Every
    parameter file is checked before the first notebook starts.

    Raises:
        ConfigurationError: a parameter is wrong, or another run of this scale is going on.
        KeyboardInterrupt: stopped by the user; finished notebooks keep their stamps.
    """
    for task in tasks:
        task.parameters()
    sizes = {t.name: len(notebooks.code_cells(notebooks.load(t.source))) for t in tasks}
    outcome: dict[str, str] = {}
    with _locked(tasks[0].scale), _progress(sum(sizes.values())) as bar:
        for reports in (False, True):
            changed = []
            for task in tasks:
                if task.is_report != reports:
                    continue
                stamp = None if force else task.stamp()
                if stamp is not None and stamp.key == task.key():
                    outcome[task.name] = f"unchanged (took {stamp.seconds:.0f} s)"
                    bar.total -= sizes[task.name]
                    bar.write(f"{task.name}: {outcome[task.name]}", file=sys.stdout)
                else:
                    changed.append(task)
            _side_by_side(changed, jobs, sizes, bar, outcome)
    return {task.name: outcome[task.name] for task in tasks}


@dataclass
class _Running:
    """A notebook under way: its process, and how many of its cells have run."""

    task: Task
    process: SpawnProcess
    cells: int = 0


def _side_by_side(
    tasks: Sequence[Task],
    jobs: int,
    sizes: Mapping[str, int],
    bar: tqdm,
    outcome: dict[str, str],
) -> None:
    """Run notebooks in processes of their own, `jobs` at a time; fills `outcome`."""
    context = get_context("spawn")  # a fork of a process with threads may hang
    waiting, running = deque(tasks), dict[Connection, _Running]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_attempt, args=(task, sender))
                with environment(_share_of_cores(jobs)):
                    process.start()
                sender.close()  # the child's end is the only one, so its death is seen
                running[receiver] = _Running(task, process)
            bar.set_description(", ".join(one.task.name for one in running.values()))
            for receiver in wait(list(running)):
                one = running[receiver]
                try:
                    end = receiver.recv()
                except EOFError:
                    one.process.join()
                    end = f"FAILED (its process ended with status {one.process.exitcode})"
                if end is None:
                    one.cells += 1
                    bar.update()
                    continue
                name = one.task.name
                one.process.join()
                del running[receiver]
                bar.update(sizes[name] - one.cells)
                outcome[name] = end.splitlines()[-1]
                bar.write(
                    "\n".join([*end.splitlines()[:-1], f"{name}: {outcome[name]}"]), sys.stdout
                )
    finally:
        for one in running.values():
            one.process.terminate()
        for one in running.values():
            one.process.join()


def _share_of_cores(jobs: int) -> dict[str, str]:
    """Threads of each notebook when several run: with all cores each, they wait for one another."""
    if jobs == 1:
        return {}
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share} | dict(os.environ)


def _attempt(task: Task, sender: Connection) -> None:
    """Run a notebook in this process; sends None after each cell, at last what became of it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):
        sender.send(_run(task, lambda: sender.send(None)))


def _end_with_parent() -> None:
    """Stop this process, and the kernel with it, when the runner is killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _run(task: Task, on_cell: Callable[[], None]) -> str:
    """What became of a notebook, in the last line; before it, why it failed."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    text = ""
    try:
        return f"done in {task.run(on_cell):.0f} s"
    except PapermillExecutionError as error:
        lines = _ANSI.sub("", "\n".join(error.traceback)).splitlines()
        text = "\n".join(["...", *lines[-30:]] if len(lines) > 30 else lines)
        text = f"\n{task.name}, cell [{error.exec_count}]:\n{text}\n\n"
        reason = f"{error.ename}: {error.evalue}".splitlines()[0]
    except DeadKernelError:
        reason = "the kernel died (out of memory?)"
    return f"{text}FAILED ({reason}); kept as runs/{task.scale}/notebooks/{task.name}.ipynb"


@contextmanager
def _locked(scale: str) -> Iterator[None]:
    folder = paths.runs(scale)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigurationError(f"another run at scale {scale} is going on") from None


@contextmanager
def _progress(total: int) -> Iterator[tqdm]:
    """One bar over all cells. A long cell does not freeze it: its clock ticks on a terminal."""
    live = sys.stderr.isatty()
    stop = threading.Event()
    with tqdm(total=total, unit="cell", mininterval=0.1 if live else 60, smoothing=0) as bar:

        def tick() -> None:
            while not stop.wait(1.0):
                bar.refresh()

        ticker = threading.Thread(target=tick, daemon=True)
        if live:
            ticker.start()
        try:
            yield bar
        finally:
            stop.set()
            if live:
                ticker.join()


def _take_signals_back(**_: Any) -> None:
    """Let Ctrl-C and SIGTERM raise here.

    nbclient answers both by shutting the kernel down, which looks like a crash of the notebook: the
    runner would go on with the next one.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.default_int_handler)


def _artifacts(scale: str) -> dict[str, int]:
    """What notebooks of a scale keep, by name below its folder, with the times of change."""
    folder = paths.runs(scale)
    files = [f for part in ("records", "figures", "grounders") for f in (folder / part).rglob("*")]
    return {f.relative_to(folder).as_posix(): f.stat().st_mtime_ns for f in files if f.is_file()}


def _data_fingerprint() -> dict[str, str]:
    """Of the data the user placed and of what was downloaded, by size and time of change."""
    placed, downloaded = paths.data(), qvh_captions.folder()
    folders = {"placed": placed, "downloaded": downloaded}
    return {
        name: files_fingerprint(
            (f for f in folder.rglob("*") if f.is_file()), folder, contents=False
        )
        for name, folder in folders.items()
        if folder is not None and folder.is_dir()
    }


def _records_fingerprint(scale: str) -> str:
    benchmarks = paths.root() / "benchmarks" / "results"
    folders = [paths.results(), benchmarks, records_folder(scale, fresh=True)]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in (".json", ".csv")]
    return files_fingerprint(files, paths.root())


def _grounders_fingerprint() -> str:
    folder = paths.results() / "grounders"
    return files_fingerprint((f for f in folder.rglob("*") if f.is_file()), folder)


def publish(scale: str) -> list[Task]:
    """Copy the fresh records of a scale to the committed ones, and figures that need models.

    Returns:
        The report notebooks, which make all other figures and the tables, to be run.

    Raises:
        ConfigurationError: if the scale is one whose records are not committed.
        tvg_lib.errors.DataError: if a fresh record is corrupt.
    """
    if scale == "smoke":
        raise ConfigurationError("records of the smoke scale are never committed")
    for record in load_records(records_folder(scale, fresh=True)):
        print(f"published {save(record, records_folder(scale)).name}")
    made = paths.runs(scale) / "figures"
    for figure in sorted(path for pattern in OF_RUNS for path in made.glob(pattern)):
        with paths.replacing(paths.figures() / figure.name) as temporary:
            shutil.copyfile(figure, temporary)
        print(f"published {figure.name}")
    return [
        task
        for source in numbered(paths.notebooks())
        if (task := Task(source, scale, overrides=((PUBLISH, True),))).is_report
    ]


def execute_for_commit(path: Path) -> list[str]:
    """Execute a notebook in place at the smoke scale, scrub it and return the rules it breaks.

    The file is only replaced when every cell ran.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    notebook = notebooks.load(path)
    folder = str(path.parent)
    with environment(smoke_environment()):
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, **KERNEL).execute()
    paths.write_text(path, nbformat.writes(notebooks.scrub(notebook)) + "\n")
    return notebooks.problems(path, solution=path.parent.name == "solutions")


def _commit(only: str) -> int:
    from nbclient.exceptions import CellExecutionError

    folder = paths.notebooks()
    status = 0
    every = numbered(folder, folder / "solutions")
    chosen = select(only, [path.stem for path in every])
    for path in (path for path in every if path.stem in chosen):
        name = path.relative_to(folder).as_posix()
        started = time.perf_counter()
        try:
            found = execute_for_commit(path)
        except CellExecutionError as error:
            print(f"{name}: not changed, a cell failed\n{_ANSI.sub('', str(error))}")
            status = 1
            continue
        seconds, size = time.perf_counter() - started, path.stat().st_size / 1000
        print(f"{name}: executed in {seconds:.0f} s, {size:.0f} KB")
        for problem in found:
            print(f"  {problem}")
            status = 1
    return status


def _show(tasks: Iterable[Task]) -> None:
    for task in tasks:
        stamp = task.stamp()
        if stamp is None:
            state = "to run"
        elif stamp.key != task.key():
            state = f"to run: changed since {stamp.finished[:16]} (took {stamp.seconds:.0f} s)"
        else:
            state = f"unchanged since {stamp.finished[:16]} (took {stamp.seconds:.0f} s)"
        print(f"{task.name}: {state}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tvg_lib.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--only", metavar="05,90")
    parser.add_argument("--jobs", type=int, default=1, metavar="2")
    parser.add_argument("--force", action="store_true")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true")
    action.add_argument("--publish", action="store_true")
    action.add_argument("--commit", metavar="05", dest="commit")
    options = parser.parse_args(arguments)
    try:
        if options.commit:
            return _commit(options.commit)
        if options.publish:
            tasks = publish(options.scale)
        else:
            sources = numbered(paths.notebooks())
            every = [task for path in sources for task in Task.all_of(path, options.scale)]
            chosen = select(options.only, [task.name for task in every])
            tasks = [task for task in every if task.name in chosen]
        if not tasks:
            raise ConfigurationError("there are no numbered notebooks")
        if options.list:
            _show(tasks)
            return 0
        if options.jobs < 1:
            raise ConfigurationError(f"--jobs must be at least 1, found {options.jobs}")
        outcome = reproduce(tasks, force=options.force, jobs=options.jobs)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on from here", file=sys.stderr)
        return 130
    failed = [name for name, text in outcome.items() if text.startswith("FAILED")]
    print(f"\n{len(outcome) - len(failed)} of {len(outcome)} notebooks at scale {options.scale}:")
    for name, text in outcome.items():
        print(f"  {name:<32} {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
