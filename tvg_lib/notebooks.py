"""The form of a notebook: its parameters, what is scrubbed before a commit, and the rules it keeps.

Rules a committed notebook keeps (`problems` checks them; CONTRIBUTING.md says why):

- its name is `NN_name.ipynb`; nbformat 4.5 with valid ids; kernelspec `python3`; below 300 KB;
- the first cell is a title that states goal, prerequisites and run time;
- the second code cell is tagged `parameters`: literals only, each with a type and a comment, the
  values of the smoke scale;
- it was executed top to bottom (counts 1..n), its outputs are kept, none of them is an error;
- no shell commands, no absolute path in code or output, no code cell that ends with a semicolon;
- no metadata but kernelspec, language and tags; only the tags in `TAGS`.
"""

import ast
import base64
import io
import json
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import nbformat
from nbformat import NotebookNode

from tvg_lib.errors import ConfigurationError
from tvg_lib.fingerprint import imported_names, is_module

FILE_NAME = re.compile(r"\d\d_[a-z0-9_]+")
TAGS = frozenset({"parameters", "nbval-ignore-output"})
MAX_BYTES = 300_000
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE_INFO = {"name": "python"}
HEADINGS = ("goal", "prerequisites", "run time")

_MACHINE_PATH = re.compile(
    r"(?<![\w.:/~+=-])/(?:home|Users|root|tmp|var|opt|usr|mnt|media|data|work|srv|private)/\w"
    r"|\b[A-Za-z]:\\{1,2}\w"
    r"|site-packages/"
)
_DISPLAYING = {"print", "display", "show"}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: annotation = default  # comment`."""

    name: str
    annotation: str
    default: Any
    comment: str

    def accepts(self, value: Any) -> bool:
        """Whether a value has the declared type; an int is taken as a float, a bool as no number.

        Raises:
            ConfigurationError: if the annotation is not made of plain types.
        """
        names = {t.__name__: t for t in (bool, int, float, str, list, dict)}
        try:
            kind = eval(self.annotation, {"__builtins__": {}, "Literal": Literal, **names})
        except Exception as error:
            raise ConfigurationError(
                f"parameter {self.name!r}: the type {self.annotation!r} is not made of "
                f"{', '.join(names)}, Literal and None"
            ) from error
        return _is_a(value, kind)


def _is_a(value: Any, kind: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_a(value, choice) for choice in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_a(key, args[0]) and _is_a(item, args[1]) for key, item in value.items()
        )
    if kind in (None, NoneType):
        return value is None
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def load(path: Path) -> NotebookNode:
    """Read a notebook.

    Raises:
        ConfigurationError: if the file is not a notebook; names the file.
    """
    try:
        return nbformat.read(path, as_version=nbformat.NO_CONVERT)
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{path.name}: not a readable notebook: {error}") from error


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook: NotebookNode, name: str) -> dict[str, Parameter]:
    """What the `parameters` cell of a notebook declares; empty if there is no such cell.

    Args:
        notebook: the notebook.
        name: its name, for messages.

    Raises:
        ConfigurationError: if the cell holds anything but `name: type = literal  # comment` lines.
    """
    tagged = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])]
    if not tagged:
        return {}
    if len(tagged) > 1:
        raise ConfigurationError(f"{name}: {len(tagged)} cells are tagged `parameters`, expected 1")
    source = tagged[0].source
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    declared: dict[str, Parameter] = {}
    for node in ast.parse(source).body:
        line = f"{name}: parameters cell, line {node.lineno}"
        if not (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
        ):
            raise ConfigurationError(
                f"{line}: expected `NAME: type = literal  # comment`, found {ast.unparse(node)!r}"
            )
        try:
            default = ast.literal_eval(node.value)
        except ValueError as error:
            raise ConfigurationError(
                f"{line}: {ast.unparse(node.value)!r} is not a literal; derived values go into the "
                "next cell"
            ) from error
        comment = comments.get(node.end_lineno or node.lineno, "")
        if not comment:
            raise ConfigurationError(f"{line}: {node.target.id!r} has no comment on its line")
        declared[node.target.id] = Parameter(
            node.target.id, ast.unparse(node.annotation), default, comment
        )
        if not declared[node.target.id].accepts(default):
            raise ConfigurationError(
                f"{line}: the default {default!r} is not a {ast.unparse(node.annotation)}"
            )
    return declared


def check_parameters(values: Mapping[str, Any], notebook: NotebookNode, name: str) -> None:
    """Refuse values that the parameters cell of a notebook does not declare, or of a wrong type.

    Raises:
        ConfigurationError: names the notebook, the parameter and what would be right.
    """
    declared = parameters(notebook, name)
    for key, value in values.items():
        if key not in declared:
            raise ConfigurationError(
                f"{name} has no parameter {key!r}; it knows "
                f"{', '.join(sorted(declared)) or 'no parameters'}"
            )
        if not declared[key].accepts(value):
            raise ConfigurationError(
                f"{name}: parameter {key!r} must be a {declared[key].annotation}, found "
                f"{value!r} ({type(value).__name__})"
            )


def scrub(notebook: NotebookNode) -> NotebookNode:
    """Remove what differs from run to run and tells nothing; outputs and counts stay. In place."""
    from nbstripout import strip_output

    strip_output(
        notebook,
        keep_output=True,
        keep_count=True,
        keep_id=True,
        extra_keys=["metadata.papermill", "metadata.widgets"],
    )
    notebook.metadata = NotebookNode(kernelspec=KERNELSPEC, language_info=LANGUAGE_INFO)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
        for output in cell.get("outputs", []):
            # The id of a widget means nothing without the state of its kernel.
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if picture := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = _smaller(picture)
    return notebook


def _smaller(picture: str) -> str:
    """A PNG (base64) with a palette of 128 colours: plots look the same at a third of the size."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        if image.mode == "P":
            return picture
        colours = image.convert("RGB").quantize(128, method=Image.Quantize.MEDIANCUT, dither=0)
    buffer = io.BytesIO()
    colours.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def problems(path: Path, *, solution: bool = False) -> list[str]:
    """The rules a committed notebook breaks, each as one line that begins with the file's name.

    Args:
        path: the notebook.
        solution: a notebook of solutions needs no parameters cell, goal or run time.
    """
    if not FILE_NAME.fullmatch(path.stem):
        return [f"{path.name}: the name must look like 05_snag.ipynb"]
    try:
        notebook = load(path)
        found = [
            *_file_problems(path, notebook),
            *_title_problems(notebook, solution),
            *_parameter_problems(notebook, path.name, solution),
            *_metadata_problems(notebook),
            *_execution_problems(notebook),
            *_text_problems(notebook),
        ]
    except (ConfigurationError, SyntaxError) as error:
        found = [str(error).removeprefix(f"{path.name}: ")]
    return [f"{path.name}: {problem}" for problem in found]


def _file_problems(path: Path, notebook: NotebookNode) -> Iterator[str]:
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        yield f"nbformat {notebook.nbformat}.{notebook.nbformat_minor}, expected 4.5"
        return
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not valid: {error.message}"
    # From the file: nbformat mends double ids while it reads.
    ids = [cell.get("id") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    if len(set(ids)) != len(ids):
        yield "two cells share one id"
    if path.stat().st_size > MAX_BYTES:
        yield f"{path.stat().st_size / 1000:.0f} KB, at most {MAX_BYTES / 1000:.0f} KB"


def _title_problems(notebook: NotebookNode, solution: bool) -> Iterator[str]:
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell must be a title (`# ...`)"
    elif not solution:
        missing = [word for word in HEADINGS if word not in first.source.lower()]
        if missing:
            yield f"the first cell does not state: {', '.join(missing)}"


def _parameter_problems(notebook: NotebookNode, name: str, solution: bool) -> Iterator[str]:
    parameters(notebook, name)
    tags = [cell.metadata.get("tags", []) for cell in code_cells(notebook)]
    if not solution and (len(tags) < 2 or "parameters" not in tags[1]):
        yield "the second code cell must be tagged `parameters`"
    if any("injected-parameters" in row for row in tags):
        yield "holds an `injected-parameters` cell: execute it without parameters before a commit"


def _metadata_problems(notebook: NotebookNode) -> Iterator[str]:
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        yield f"kernelspec {kernel!r}, expected 'python3'"
    noise = set(notebook.metadata) - {"kernelspec", "language_info"}
    noise |= set(notebook.metadata.get("language_info", {})) - set(LANGUAGE_INFO)
    for cell in notebook.cells:
        noise |= {f"cell {key}" for key in set(cell.metadata) - {"tags"}}
        unknown = set(cell.metadata.get("tags", [])) - TAGS - {"injected-parameters"}
        if unknown:
            yield f"unknown cell tags {sorted(unknown)}, allowed are {sorted(TAGS)}"
        if any(WIDGET_VIEW in output.get("data", {}) for output in cell.get("outputs", [])):
            noise.add("widget views")
    if noise:
        yield f"metadata to be scrubbed: {', '.join(sorted(noise))}"


def _execution_problems(notebook: NotebookNode) -> Iterator[str]:
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"execution counts are {counts}, expected 1..{len(cells)}"
    if not any(cell.outputs for cell in cells):
        yield "no outputs"
    for number, cell in enumerate(cells, start=1):
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"code cell {number} ended with an error"
        if not cell.outputs and _displays(cell.source):
            yield f"code cell {number} prints or shows something but has no output"


def _displays(source: str) -> bool:
    """Whether a cell certainly displays something: a top-level call of print, display or show."""
    try:
        tree = ast.parse(_plain_python(source))
    except SyntaxError:
        return False
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in _DISPLAYING:
                return True
    return False


def _plain_python(source: str) -> str:
    """A cell's code with IPython's magic lines emptied, so that it parses as Python."""
    return re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE)


def _text_problems(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(code_cells(notebook), start=1):
        where = f"code cell {number}"
        source = cell.source
        if not source.strip():
            yield f"{where} is empty"
        try:
            ast.parse(_plain_python(source))
        except SyntaxError as error:
            yield f"{where} is not Python: {error}"
        if source.rstrip().endswith(";"):
            yield f"{where} ends with a semicolon (end a plot with plt.show())"
        if re.search(r"^\s*!|^%%(bash|sh|script)|^%(pip|conda|cd|env)\b", source, re.MULTILINE):
            yield f"{where} runs a shell command"
        if "NBVAL_" in source:
            yield f"{where} steers nbval by a comment; use a tag"
        if _MACHINE_PATH.search(source):
            yield f"{where} holds an absolute path"
        for text in _output_texts(cell):
            found = _MACHINE_PATH.search(text)
            if found:
                line = text[text.rfind("\n", 0, found.start()) + 1 :].splitlines()[0]
                yield f"{where} printed a path of this machine: {line[:120]!r}"
                break


def _output_texts(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        if "text" in output:
            yield output.text
        for kind, value in output.get("data", {}).items():
            if isinstance(value, str) and not kind.startswith("image/"):
                yield value


def used_modules(notebook: NotebookNode) -> set[str]:
    """Dotted names of the library's modules that the code cells import."""
    names: set[str] = set()
    for cell in code_cells(notebook):
        names |= imported_names(ast.parse(_plain_python(cell.source)))
    return {name for name in names if is_module(name)}
