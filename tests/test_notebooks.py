"""The committed notebooks keep the rules of `tvg_lib.notebooks`; each rule is shown to bite."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tvg_lib import notebooks, paths
from tvg_lib.errors import ConfigurationError
from tvg_lib.notebooks import Parameter
from tvg_lib.reproduce import SCALES, Task, numbered

NUMBERED = numbered(paths.notebooks())
SOLUTIONS = numbered(paths.notebooks() / "solutions")
PARAMETER_FILES = sorted(paths.params().glob("*/*.yaml"))


def name(path: Path) -> str:
    return path.relative_to(paths.root()).as_posix()


@pytest.mark.parametrize("path", NUMBERED, ids=name)
def test_a_committed_notebook_keeps_the_rules(path: Path) -> None:
    assert notebooks.problems(path) == []


@pytest.mark.parametrize("path", SOLUTIONS, ids=name)
def test_a_committed_solution_keeps_the_rules(path: Path) -> None:
    assert notebooks.problems(path, solution=True) == []


def test_every_notebook_file_has_a_number() -> None:
    every = {p for p in paths.notebooks().rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert every == {*NUMBERED, *SOLUTIONS}


@pytest.mark.parametrize("path", NUMBERED, ids=name)
@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale != "smoke"])
def test_every_notebook_has_sound_parameters_at_every_scale(path: Path, scale: str) -> None:
    for task in Task.all_of(path, scale):
        values = task.parameters()
        if "SCALE" in notebooks.parameters(notebooks.load(path), path.name):
            assert values.get("SCALE") == scale


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=name)
def test_every_parameter_file_belongs_to_a_notebook(path: Path) -> None:
    assert path.parent.name in SCALES
    assert path.stem.partition("@")[0] in {notebook.stem for notebook in NUMBERED}


def test_notebooks_pass_ruff() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", str(paths.notebooks())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- the rules themselves, on a handmade notebook


def good() -> nbformat.NotebookNode:
    """A notebook that breaks no rule."""
    title = "# Title\n\n**Goal.** To be good. **Prerequisites.** None. **Run time.** 1 s."
    cells = [
        new_markdown_cell(title),
        new_code_cell("import math", execution_count=1),
        new_code_cell(
            "# What the reader may change.\n"
            'SCALE: str = "smoke"  # smoke, cpu, full or gpu\n'
            "RATES: list[float] = [1e-3, 1]  # learning rates",
            execution_count=2,
            metadata={"tags": ["parameters"]},
        ),
        new_code_cell(
            "print(math.pi, SCALE)",
            execution_count=3,
            outputs=[new_output("stream", text="3.14 smoke\n")],
        ),
    ]
    return new_notebook(
        cells=cells,
        metadata={"kernelspec": notebooks.KERNELSPEC, "language_info": notebooks.LANGUAGE_INFO},
    )


def problems_of(notebook: nbformat.NotebookNode, folder: Path, file: str = "01_good.ipynb") -> list:
    path = folder / file
    # Not nbformat.write: it repairs some of what is broken on purpose here.
    path.write_text(nbformat.v4.nbjson.JSONWriter().writes(notebook), encoding="utf-8")
    return notebooks.problems(path)


def test_a_good_notebook_breaks_no_rule(tmp_path: Path) -> None:
    assert problems_of(good(), tmp_path) == []


def _set(**changes: object) -> Callable[[nbformat.NotebookNode], None]:
    """Change attributes of the last cell."""

    def change(notebook: nbformat.NotebookNode) -> None:
        notebook.cells[-1].update(changes)

    return change


def _metadata(key: str, value: object) -> Callable[[nbformat.NotebookNode], None]:
    return lambda notebook: notebook.cells[-1].metadata.update({key: value})


def _parameters(source: str) -> Callable[[nbformat.NotebookNode], None]:
    return lambda notebook: notebook.cells[2].update(source=source)


def _output(**changes: object) -> Callable[[nbformat.NotebookNode], None]:
    return lambda notebook: notebook.cells[-1].outputs[0].update(changes)


def _widget(notebook: nbformat.NotebookNode) -> None:
    data = {notebooks.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "bar"}
    notebook.cells[-1].outputs.append(new_output("display_data", data=data))


def _error(notebook: nbformat.NotebookNode) -> None:
    output = new_output("error", ename="E", evalue="", traceback=[])
    notebook.cells[-1].outputs.append(output)


BROKEN = {
    "4.4": ("nbformat 4.4, expected 4.5", lambda n: n.update(nbformat_minor=4)),
    "invalid id": ("not valid", lambda n: n.cells[0].update(id="no spaces allowed")),
    "same id": ("share one id", lambda n: n.cells[0].update(id=n.cells[1].id)),
    "large": ("at most 300 KB", _output(text="0" * 300_000)),
    "no title": ("must be a title", lambda n: n.cells[0].update(source="Title")),
    "no goal": (
        "does not state: goal",
        lambda n: n.cells[0].update(source="# T prerequisites run time"),
    ),
    "no kernel": ("kernelspec None", lambda n: n.metadata.pop("kernelspec")),
    "other kernel": ("kernelspec 'conda'", lambda n: n.metadata.kernelspec.update(name="conda")),
    "no parameters": ("second code cell", lambda n: n.cells[2].metadata.pop("tags")),
    "late parameters": ("second code cell", lambda n: n.cells.insert(2, new_code_cell("1"))),
    "injected": ("injected-parameters", _metadata("tags", ["injected-parameters"])),
    "untyped": ("parameters cell, line 1", _parameters("X = 1  # x")),
    "derived": ("not a literal", _parameters("X: int = 2 * 3  # x")),
    "uncommented": ("has no comment", _parameters("X: int = 1")),
    "mistyped": ("default 'a' is not a int", _parameters("X: int = 'a'  # x")),
    "odd type": ("not made of", _parameters("X: Path = 1  # x")),
    "two parameters": ("2 cells are tagged", _metadata("tags", ["parameters"])),
    "notebook noise": ("scrubbed: widgets", lambda n: n.metadata.update(widgets={"a": 1})),
    "version noise": ("scrubbed: version", lambda n: n.metadata.language_info.update(version="3")),
    "cell noise": ("scrubbed: cell execution", _metadata("execution", {"iopub.status": 1})),
    "papermill noise": ("scrubbed: cell papermill", _metadata("papermill", {"duration": 1})),
    "widget": ("widget views", _widget),
    "skipped": ("unknown cell tags ['nbval-skip']", _metadata("tags", ["nbval-skip"])),
    "not run": ("execution counts", _set(execution_count=None)),
    "run twice": ("execution counts", _set(execution_count=7)),
    "stripped": ("no outputs", _set(outputs=[])),
    "silent print": ("code cell 3 prints", _set(outputs=[])),
    "error": ("ended with an error", _error),
    "semicolon": ("semicolon", _set(source="print(1);")),
    "shell": ("shell command", _set(source="!pip install x")),
    "pip": ("shell command", _set(source="%pip install x")),
    "empty": ("is empty", _set(source="  ")),
    "comment": ("steers nbval", _set(source="# NBVAL_SKIP\nprint(1)")),
    "path": ("absolute path", _set(source='open("/home/me/data.json")')),
    "windows path": ("absolute path", _set(source='open("C:\\\\data")')),
    "printed path": ("printed a path", _output(text="saved to /tmp/x/model.pt\n")),
    "not python": ("code cell 3 is not Python", _set(source="print(")),
}


@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_rule_is_named(fault: str, tmp_path: Path) -> None:
    message, break_it = BROKEN[fault]
    notebook = good()
    break_it(notebook)
    found = problems_of(notebook, tmp_path)
    assert any(message in problem for problem in found), found
    assert len(found) <= 2, "one fault should not drown in others"
    assert all(problem.startswith("01_good.ipynb: ") for problem in found)


def test_a_notebook_without_a_number_is_named(tmp_path: Path) -> None:
    assert "must look like" in problems_of(good(), tmp_path, "good.ipynb")[0]


def test_an_unreadable_notebook_is_named(tmp_path: Path) -> None:
    path = tmp_path / "01_cut.ipynb"
    path.write_text('{"cells": [', encoding="utf-8")
    assert "not a readable notebook" in notebooks.problems(path)[0]


def test_a_relative_path_and_an_address_are_no_machine_paths(tmp_path: Path) -> None:
    notebook = good()
    notebook.cells[-1].source = "print('https://host.org/data/x', 'runs/tmp/x', 3 /data_size)"
    assert problems_of(notebook, tmp_path) == []


def test_scrubbing_keeps_outputs_and_removes_noise(tmp_path: Path) -> None:
    notebook = good()
    for fault in ("notebook noise", "version noise", "cell noise", "papermill noise", "widget"):
        BROKEN[fault][1](notebook)
    notebook.metadata.papermill = {"duration": 1}
    assert problems_of(notebooks.scrub(notebook), tmp_path) == []
    assert notebook.cells[-1].outputs[0].text == "3.14 smoke\n"
    assert notebook.cells[-1].outputs[1].data == {"text/plain": "bar"}
    assert notebook.cells[2].metadata == {"tags": ["parameters"]}


@pytest.mark.parametrize(
    ("annotation", "value", "accepted"),
    [
        ("int", 3, True),
        ("int", 3.0, False),
        ("int", True, False),
        ("float", 3, True),
        ("float", "1e-3", False),  # what YAML makes of 1e-3
        ("bool", False, True),
        ("bool", 0, False),
        ("str", "a", True),
        ("int | None", None, True),
        ("int | None", "None", False),
        ("list[int]", [1, 2], True),
        ("list[int]", [1, "2"], False),
        ("list[int]", 1, False),
        ("dict[str, float]", {"a": 1}, True),
        ("dict[str, float]", {1: 1.0}, False),
        ('Literal["a", "b"]', "b", True),
        ('Literal["a", "b"]', "c", False),
    ],
)
def test_types_of_parameters(annotation: str, value: object, accepted: bool) -> None:
    assert Parameter("X", annotation, None, "").accepts(value) is accepted


def test_an_unknown_parameter_names_notebook_and_known_ones() -> None:
    with pytest.raises(
        ConfigurationError, match=r"01\.ipynb has no parameter 'EPOCHS'.*RATES, SCALE"
    ):
        notebooks.check_parameters({"EPOCHS": 3}, good(), "01.ipynb")


def test_a_parameter_of_the_wrong_type_names_what_was_expected() -> None:
    with pytest.raises(ConfigurationError, match=r"'RATES' must be a list\[float\], found '0.1'"):
        notebooks.check_parameters({"RATES": "0.1"}, good(), "01.ipynb")


def test_the_modules_a_notebook_uses() -> None:
    notebook = good()
    notebook.cells[
        1
    ].source = "%matplotlib inline\nfrom tvg_lib import paths\nimport os, tvg_lib.moments"
    found = notebooks.used_modules(notebook)
    assert found == {"tvg_lib", "tvg_lib.paths", "tvg_lib.moments"}
