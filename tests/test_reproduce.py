"""The runner and its fingerprints, on tiny notebooks in a checkout of their own."""

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from packaging.requirements import Requirement

from tvg_lib import notebooks, paths, reproduce
from tvg_lib.errors import ConfigurationError
from tvg_lib.fingerprint import (
    code_fingerprint,
    files_fingerprint,
    imported_names,
    is_module,
    value_fingerprint,
)
from tvg_lib.notebooks import KERNELSPEC, LANGUAGE_INFO
from tvg_lib.reproduce import Task, main, numbered, select
from tvg_lib.results import load_records, new_record, records_folder, save

CHECKOUT = paths.root()
PARAMETERS = 'SCALE: str = "smoke"  # the scale\nEPOCHS: int = 1  # passes over the data'


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout that `tvg_lib.paths` points to."""
    for folder in ("notebooks/solutions", "params/cpu", "results/records/full"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("TVG_ROOT", str(tmp_path))
    monkeypatch.delenv("TVG_DATA", raising=False)
    return tmp_path


def add(checkout: Path, name: str, *code: str, cpu: dict | None = None) -> Path:
    """Write a notebook, and its parameters at the cpu scale."""
    title = "# A title\n\n**Goal.** A test. **Prerequisites.** None. **Run time.** 1 s."
    cells = [
        new_markdown_cell(title),
        new_code_cell("from pathlib import Path"),
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *(new_code_cell(source) for source in code),
    ]
    metadata = {"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO}
    path = checkout / "notebooks" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    (checkout / "params" / "cpu" / f"{name}.yaml").write_text(
        yaml.safe_dump(cpu or {"SCALE": "cpu"})
    )
    return path


def outputs(path: Path) -> str:
    """All that the cells of a notebook printed."""
    cells = notebooks.code_cells(notebooks.load(path))
    return "".join(o.get("text", "") for cell in cells for o in cell.outputs)


# --- running


def test_a_run_passes_parameters_keeps_its_outputs_and_is_skipped_until_something_changes(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = add(checkout, "05_first", "print('epochs', EPOCHS)", cpu={"SCALE": "cpu", "EPOCHS": 3})
    task = Task(source, "cpu")
    before = source.read_bytes()
    assert main(["--scale", "cpu"]) == 0
    assert outputs(task.output) == "epochs 3\n"
    assert source.read_bytes() == before
    executed = task.output.stat().st_mtime_ns

    assert main(["--scale", "cpu"]) == 0
    assert "05_first: unchanged" in capsys.readouterr().out
    assert task.output.stat().st_mtime_ns == executed

    (checkout / "params/cpu/05_first.yaml").write_text("SCALE: cpu\nEPOCHS: 4\n")
    assert main(["--list"]) == 0
    assert "05_first: to run: changed since" in capsys.readouterr().out
    assert main([]) == 0
    assert outputs(task.output) == "epochs 4\n"


def test_a_failing_notebook_is_kept_the_others_go_on_and_the_next_run_tries_it_again(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = checkout / "flag"
    fragile = f"print('before')\nassert Path({str(flag)!r}).exists(), 'no flag'"
    first = Task(add(checkout, "05_fragile", fragile), "smoke")
    second = Task(add(checkout, "06_sound", "print('sound')"), "smoke")
    assert main(["--scale", "smoke"]) == 1
    shown = capsys.readouterr().out
    assert "05_fragile: FAILED (AssertionError: no flag)" in shown
    assert "assert Path(" in shown  # the failing line
    assert "1 of 2 notebooks" in shown
    assert "before" in outputs(first.output)
    assert first.stamp() is None
    assert second.stamp() is not None

    flag.touch()
    assert main(["--scale", "smoke"]) == 0
    shown = capsys.readouterr().out
    assert "05_fragile: done" in shown
    assert "06_sound: unchanged" in shown


def test_notebooks_side_by_side_share_the_cores_and_reports_come_last(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two waits for the other, so one after the other they would never end."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    meet = (
        "import os, time\nhere = Path({here!r})\nhere.touch()\nend = time.monotonic() + 60\n"
        "while not Path({there!r}).exists():\n    assert time.monotonic() < end\n"
        "    time.sleep(0.05)\nprint(os.environ['OMP_NUM_THREADS'])"
    )
    first, second = str(checkout / "first"), str(checkout / "second")
    add(checkout, "05_a", meet.format(here=first, there=second))
    add(checkout, "06_b", meet.format(here=second, there=first))
    add(
        checkout,
        "90_tables",
        "stamps = Path('..', 'runs', 'cpu', 'notebooks').glob('*.stamp.json')\n"
        "print(sorted(stamp.stem for stamp in stamps))",
    )
    assert main(["--scale", "cpu", "--jobs", "2"]) == 0
    assert "3 of 3 notebooks" in capsys.readouterr().out
    assert outputs(Task(checkout / "notebooks/05_a.ipynb", "cpu").output) == "3\n"
    report = outputs(Task(checkout / "notebooks/90_tables.ipynb", "cpu").output)
    assert report == "['05_a.stamp', '06_b.stamp']\n"


def test_a_killed_notebook_is_named_and_the_others_go_on(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when memory runs out and the system ends the process that holds the notebook."""
    kill = "import os, signal, psutil\nos.kill(psutil.Process().ppid(), signal.SIGKILL)"
    add(checkout, "05_killed", kill + "\nimport time\ntime.sleep(60)")
    add(checkout, "06_sound", "print('sound')")
    assert main(["--scale", "smoke"]) == 1
    shown = capsys.readouterr().out
    assert "05_killed: FAILED (its process ended with status -9)" in shown
    assert "06_sound: done" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_with_the_notebook_it_was_in(checkout: Path, number: int) -> None:
    slow = checkout / "slow"
    add(checkout, "05_quick", "print('quick')")
    add(
        checkout,
        "06_slow",
        f"import time\nPath({str(checkout / 'started')!r}).touch()\n"
        f"while Path({str(slow)!r}).exists():\n    time.sleep(0.05)",
    )
    slow.touch()
    command = [sys.executable, "-m", "tvg_lib.reproduce", "--scale", "smoke"]
    # Where tests run in the background of a shell, SIGINT is ignored, and children inherit that.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 120
        while not (checkout / "started").exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert "run the same command again" in errors.decode()
    slow.unlink()
    quick = Task(checkout / "notebooks/05_quick.ipynb", "smoke").output
    executed = quick.stat().st_mtime_ns
    assert main(["--scale", "smoke"]) == 0
    assert quick.stat().st_mtime_ns == executed
    assert Task(checkout / "notebooks/06_slow.ipynb", "smoke").stamp() is not None


def test_the_smoke_scale_cannot_reach_real_data(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither through the runner nor under nbval, though this machine has data."""
    monkeypatch.setenv("TVG_DATA", str(tmp_path))
    code = (
        "from tvg_lib import paths\ntry:\n    print(paths.data())\n"
        "except ValueError as error:\n    print('refused', paths.cache().parent.name)"
    )
    source = add(checkout, "05_data", code)
    assert main(["--scale", "smoke"]) == 0
    assert outputs(Task(source, "smoke").output) == "refused smoke\n"
    assert os.environ["TVG_DATA"] == str(tmp_path)

    assert main(["--commit", "05"]) == 0
    shutil.copy(CHECKOUT / "notebooks" / "conftest.py", source.parent)
    check = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-q", str(source)]
    done = subprocess.run(check, capture_output=True, text=True, cwd=checkout)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout

    assert main(["--scale", "cpu"]) == 0
    assert outputs(Task(source, "cpu").output) == f"{tmp_path}\n"


def test_reports_run_again_when_a_record_or_a_benchmark_changes(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = Task(add(checkout, "05_train"), "cpu")
    report = Task(add(checkout, "90_tables"), "cpu")
    before = ordinary.key(), report.key()
    for folder in ("results/records/full", "runs/cpu/records", "benchmarks/results"):
        (checkout / folder).mkdir(parents=True, exist_ok=True)
        (checkout / folder / "a.json").write_text("{}")
        after = ordinary.key(), report.key()
        assert after[0] == before[0]
        assert after[1] != before[1]
        before = after


def test_a_shipped_grounder_counts_where_a_notebook_asks_it(checkout: Path) -> None:
    trains = Task(add(checkout, "05_train"), "cpu")
    asks = Task(add(checkout, "93_ask", "from tvg_lib import paths\npaths.results()"), "cpu")
    before = trains.key(), asks.key()
    folder = checkout / "results" / "grounders" / "snag"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    assert trains.key() == before[0]
    assert asks.key() != before[1]


def test_the_key_follows_data_code_and_parameters_but_not_prose(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVG_CACHE", str(tmp_path / "cache"))
    source = add(checkout, "05_train", "from tvg_lib import moments", cpu={"EPOCHS": 2})
    task = Task(source, "cpu")
    keys = [task.key()]

    notebook = notebooks.load(source)
    notebook.cells[0].source += " More prose."
    nbformat.write(notebook, source)
    assert task.key() == keys[-1]

    notebook.cells[-1].source += "\nprint(1)"
    nbformat.write(notebook, source)
    keys.append(task.key())
    (checkout / "params/cpu/05_train.yaml").write_text("EPOCHS: 3")
    keys.append(task.key())
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setenv("TVG_DATA", str(data))
    keys.append(task.key())
    (data / "features.bin").write_bytes(b"1")
    keys.append(task.key())
    (tmp_path / "cache" / "qvhighlights").mkdir(parents=True)
    (tmp_path / "cache" / "qvhighlights" / "val.jsonl").write_text("{}")
    keys.append(task.key())
    monkeypatch.setattr(reproduce, "code_fingerprint", lambda *modules: "other code")
    keys.append(task.key())
    assert len(set(keys)) == len(keys)


def test_a_stamp_counts_only_while_what_it_names_is_there(checkout: Path) -> None:
    code = (
        "from tvg_lib import paths\nfolder = paths.runs(SCALE) / 'records'\n"
        "folder.mkdir(parents=True)\n(folder / 'r.json').write_text('{}')"
    )
    task = Task(add(checkout, "05_train", code), "smoke")
    task.run(lambda: None)
    assert task.stamp().artifacts == ("records/r.json",)
    record = checkout / "runs/smoke/records/r.json"
    record.unlink()
    assert task.stamp() is None
    record.write_text("{}")
    assert task.stamp() is not None
    task.stamp_file.write_text('{"key": "cut')
    assert task.stamp() is None


# --- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("EPOCH: 3", "05_train.ipynb has no parameter 'EPOCH'; it knows EPOCHS, SCALE"),
        ("EPOCHS: many", "'EPOCHS' must be a int, found 'many' (str)"),
        ("- 3", "params/cpu/05_train.yaml must hold"),
        ("3: 3", "params/cpu/05_train.yaml must hold"),
        ("a: [", "params/cpu/05_train.yaml is not readable YAML"),
        (None, "params/cpu/05_train.yaml is missing"),
    ],
)
def test_wrong_parameters_stop_the_run_before_it_starts(
    checkout: Path, capsys: pytest.CaptureFixture[str], values: str | None, message: str
) -> None:
    first = Task(add(checkout, "01_sound"), "cpu")
    add(checkout, "05_train")
    file = checkout / "params/cpu/05_train.yaml"
    file.unlink() if values is None else file.write_text(values)
    assert main(["--scale", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not first.output.exists()


def test_a_parameter_file_with_a_label_is_a_further_run_of_its_notebook(checkout: Path) -> None:
    source = add(checkout, "05_train", "print(EPOCHS)")
    add(checkout, "06_other", "print(EPOCHS)")
    (checkout / "params/cpu/05_train@short.yaml").write_text("SCALE: cpu\nEPOCHS: 7\n")
    assert main(["--scale", "cpu"]) == 0
    own, further = Task.all_of(source, "cpu")
    assert (own.name, further.name) == ("05_train", "05_train@short")
    assert (outputs(own.output), outputs(further.output)) == ("1\n", "7\n")
    assert own.stamp_file != further.stamp_file
    assert [task.label for task in Task.all_of(source, "smoke")] == [""]
    (checkout / "params/cpu/05_train@.yaml").write_text("SCALE: cpu\n")
    with pytest.raises(ConfigurationError, match=r"05_train@\.yaml: expected NN_name@label"):
        Task.all_of(source, "cpu")


def test_two_runs_of_one_scale_do_not_meet(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(checkout, "05_train")
    with reproduce._locked("smoke"):
        assert main(["--scale", "smoke"]) == 2
    assert "another run at scale smoke" in capsys.readouterr().err


def test_only_selects_by_number_and_name_in_order(checkout: Path) -> None:
    for name in ("05_b", "01_a", "90_tables"):
        add(checkout, name)
    (checkout / "notebooks" / "scratch.ipynb").write_text("{}")
    every = [path.stem for path in numbered(checkout / "notebooks")]
    assert every == ["01_a", "05_b", "90_tables"]
    assert select("90, 5", every) == ["05_b", "90_tables"]
    assert select("05_b.ipynb", every) == ["05_b"]
    assert select("5", ["05_b", "05_b@short"]) == ["05_b", "05_b@short"]
    assert select("05_b@short", ["05_b", "05_b@short"]) == ["05_b@short"]
    assert select("05_b", ["05_b", "05_b@short"]) == ["05_b"]
    with pytest.raises(ConfigurationError, match="no notebook '06'; there are 01_a, 05_b, 90"):
        select("05,06", every)


def test_a_folder_without_notebooks_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVG_ROOT", str(tmp_path))
    with pytest.raises(ConfigurationError, match="not a checkout"):
        paths.root()


def test_data_that_is_no_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVG_DATA", str(Path(__file__)))
    with pytest.raises(ConfigurationError, match=r"TVG_DATA='.*test_reproduce.py' is not a folder"):
        paths.data()
    monkeypatch.setenv("TVG_DATA", "")
    assert paths.data() is None


# --- maintainers' commands


def test_committing_executes_scrubs_and_checks(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from tqdm.auto import tqdm\nfor _ in tqdm(range(2)):\n    pass\nprint(SCALE)"
    source = add(checkout, "05_first", code)
    solution = source.parent / "solutions" / source.name
    shutil.copy(source, solution)
    assert main(["--commit", "05"]) == 0
    assert capsys.readouterr().out.count("executed in") == 2
    assert notebooks.problems(source) == []
    assert outputs(source) == outputs(solution) == "smoke\n"
    assert source.read_text().endswith("}\n")


def test_committing_names_broken_rules_and_leaves_a_failing_notebook_alone(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(checkout, "05_first", "print('/tmp/model.pt')")
    failing = add(checkout, "06_second", "print(1 / 0)")
    before = failing.read_bytes()
    assert main(["--commit", "05,06"]) == 1
    shown = capsys.readouterr().out
    assert "printed a path of this machine" in shown
    assert "06_second.ipynb: not changed, a cell failed" in shown
    assert "ZeroDivisionError" in shown
    assert failing.read_bytes() == before


def test_publishing_copies_records_and_makes_the_reports(checkout: Path) -> None:
    record = new_record(
        "snag", "planted/val", "full", 0, parameters={}, metrics={}, seconds=1, modules=[]
    )
    save(record, records_folder("full", fresh=True))
    made = checkout / "runs/full/figures"
    made.mkdir(parents=True)
    for name in ("mscl_figure1_a.png", "a2fa_figure7_1_b.png", "qvh_captions.png"):
        (made / name).write_bytes(name.encode())
    (checkout / "params/full").mkdir()
    add(checkout, "05_train", "raise RuntimeError('a report only')")
    source = add(checkout, "91_figures", "print(PUBLISH)")
    notebook = notebooks.load(source)
    notebook.cells[2].source += "\nPUBLISH: bool = False  # write the committed figures"
    nbformat.write(notebook, source)
    (checkout / "params/full/91_figures.yaml").write_text("SCALE: full")
    assert main(["--scale", "full", "--publish"]) == 0
    assert load_records(checkout / "results/records/full") == [record]
    # Of the figures only those that need a run: the reports make the others.
    published = {path.name for path in (checkout / "figures").iterdir()}
    assert published == {"mscl_figure1_a.png", "a2fa_figure7_1_b.png"}
    assert outputs(Task(source, "full").output) == "True\n"
    assert main(["--scale", "smoke", "--publish"]) == 2


# --- fingerprints


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """a -> b (inside a function), a -> c.d (relative), e imported by nobody."""
    folder = tmp_path / "lib"
    (folder / "c").mkdir(parents=True)
    (folder / "__init__.py").write_text('__version__ = "1"\n')
    (folder / "a.py").write_text(
        '"""Module."""\nfrom .c import d\n\n\ndef f(x):\n    """Doc."""\n'
        "    import lib.b\n    return x + 1  # more\n"
    )
    (folder / "b.py").write_text("import json\nX = 1\n")
    (folder / "c" / "__init__.py").write_text("Y = 1\n")
    (folder / "c" / "d.py").write_text("Z = 1\n")
    (folder / "e.py").write_text("W = 1\n")
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("a.py", "Doc.", "Better prose.", False),
        ("a.py", '    """Doc."""\n', "", False),
        ("a.py", "# more", "# why", False),
        ("a.py", "x + 1", "(x +\n            1)", False),
        ("a.py", "x + 1", "x + 2", True),
        ("b.py", "X = 1", "X = 2", True),
        ("c/__init__.py", "Y = 1", "Y = 2", True),
        ("c/d.py", "Z = 1", "Z = 2", True),
        ("e.py", "W = 1", "W = 2", False),
        ("__init__.py", "1", "2", False),
    ],
)
def test_a_code_fingerprint_follows_what_the_code_does(
    package: Path, file: str, old: str, new: str, changes: bool
) -> None:
    before = code_fingerprint("lib.a", package=package)
    path = package / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert (code_fingerprint("lib.a", package=package) != before) is changes


def test_what_is_imported_from_the_package_itself_is_found(package: Path) -> None:
    (package / "__init__.py").write_text(
        "def __getattr__(name):\n    from lib.b import X\n    from lib.e import W\n"
    )
    (package / "a.py").write_text("from lib import X\n")
    before = code_fingerprint("lib.a", package=package)
    (package / "e.py").write_text("W = 2\n")
    assert code_fingerprint("lib.a", package=package) == before
    (package / "b.py").write_text("X = 2\n")
    assert code_fingerprint("lib.a", package=package) != before


def test_a_fingerprint_does_not_depend_on_order_and_takes_modules(package: Path) -> None:
    one = code_fingerprint("lib.b", "lib.e", package=package)
    assert one == code_fingerprint("lib.e", "lib.b", "lib.b", package=package)
    assert code_fingerprint(paths) == code_fingerprint("tvg_lib.paths")
    assert code_fingerprint(paths) != code_fingerprint("tvg_lib.moments")


def test_a_fingerprint_of_something_else_is_refused(package: Path) -> None:
    for name in ("lib.nothing", "json", "library"):
        with pytest.raises(ConfigurationError, match=name):
            code_fingerprint(name, package=package)


def test_imports_are_resolved() -> None:
    import ast

    tree = ast.parse("import a.b\nfrom ..x import y\nfrom . import z\nfrom m import n as o")
    assert imported_names(tree, "p.q.r") == {"a.b", "p.x", "p.x.y", "p.q", "p.q.z", "m", "m.n"}
    assert "p.q.r.z" in imported_names(tree, "p.q.r", is_package=True)
    assert is_module("tvg_lib.data")
    assert not is_module("tvg_lib.moments.Moment")


def test_values_and_files(tmp_path: Path) -> None:
    assert value_fingerprint({"a": 1, "b": 2}) == value_fingerprint({"b": 2, "a": 1})
    assert value_fingerprint({"a": 1}) != value_fingerprint({"a": 1.5})
    file = tmp_path / "f"
    file.write_text("1")
    by_content = files_fingerprint([file], tmp_path)
    by_time = files_fingerprint([file], tmp_path, contents=False)
    os.utime(file, ns=(1, 1))
    assert files_fingerprint([file], tmp_path) == by_content
    assert files_fingerprint([file], tmp_path, contents=False) != by_time
    file.write_text("2")
    assert files_fingerprint([file], tmp_path) != by_content


# --- packaging


def _packages(file: str) -> set[str]:
    """Requirements named in the pip section of a conda environment."""
    listed = yaml.safe_load((CHECKOUT / file).read_text())["dependencies"]
    pip = next(part["pip"] for part in listed if isinstance(part, dict))
    return {line.lower() for line in pip if not line.startswith("-")}


def _canonical(lines: list[str]) -> set[str]:
    return {Requirement(line).name.lower() for line in lines}


def test_conda_environments_constraints_and_project_name_the_same_packages() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    needed = _canonical(project["dependencies"])
    extras = project["optional-dependencies"]
    assert _packages("environment.yml") == needed
    assert _packages("environment-gpu.yml") == needed | _canonical(extras["mamba"])
    text = (CHECKOUT / "constraints.txt").read_text()
    pins = [Requirement(x) for x in text.splitlines() if x and not x.startswith("#")]
    pinned = {pin.name.lower(): next(iter(pin.specifier)).version for pin in pins}
    assert needed | _canonical(extras["test"]) <= set(pinned)
    for line in [*project["dependencies"], *extras["test"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pinned[wanted.name.lower()]), line


def test_what_the_library_imports_is_declared() -> None:
    """Every third-party import of the library is a dependency of its own, not a lucky guest."""
    import ast
    from importlib.metadata import packages_distributions

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = _canonical([*project["dependencies"], *extras["test"], *extras["mamba"]])
    owners = packages_distributions()
    for file in sorted((CHECKOUT / "tvg_lib").rglob("*.py")):
        for name in imported_names(ast.parse(file.read_text()), "tvg_lib"):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in ("tvg_lib", ""):
                continue
            names = {owner.lower() for owner in owners.get(top, [top.replace("_", "-")])}
            assert names & declared, f"{file.name} imports {top}, which pyproject.toml lacks"
