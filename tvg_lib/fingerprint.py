"""Fingerprints that decide what is up to date: of code, of files, of plain values.

A fingerprint of code covers what the code does. Comments, docstrings and layout are left out, so
that better prose does not throw away hours of training.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tvg_lib.errors import ConfigurationError

PACKAGE = Path(__file__).resolve().parent
DRAWING = "inline"  # how things draw themselves decides no number


def value_fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def code_fingerprint(*modules: ModuleType | str, package: Path = PACKAGE) -> str:
    """SHA-256 of the code of modules and of every module of the package they import, at any depth.

    The syntax tree is hashed without docstrings and comments. Imports are followed wherever they
    stand, inside functions too; a module outside the package is not followed. The package's own
    `__init__` is left out, but what is imported from it is found where it is defined. Drawing code
    is left out, too.

    Args:
        modules: modules of the package, or their dotted names.
        package: folder of the package; its name is the first part of the dotted names.

    Raises:
        ConfigurationError: if a name is not a module of the package.
    """
    names = [m if isinstance(m, str) else m.__name__ for m in modules]
    for name in names:
        if not is_module(name, package):
            raise ConfigurationError(f"{name!r} is not a module of {package.name}")
    code: dict[str, str] = {}
    waiting = names
    while waiting:
        name = waiting.pop()
        source = _source(name, package)
        if source is None:
            waiting += _defined_in(name, package)
            continue
        if name in code or name in (package.name, f"{package.name}.{DRAWING}"):
            continue
        tree = ast.parse(source.read_text(encoding="utf-8"), filename=str(source))
        is_package = source.name == "__init__.py"
        waiting += [n for n in imported_names(tree, name, is_package) if _inside(n, package)]
        waiting += _parents(name)
        code[name] = ast.unparse(_without_docstrings(tree))
    return value_fingerprint(code)


def is_module(name: str, package: Path = PACKAGE) -> bool:
    """Whether a dotted name is a module of the package."""
    return _source(name, package) is not None


def imported_names(tree: ast.AST, module: str = "", is_package: bool = False) -> set[str]:
    """Dotted names that a syntax tree imports; `from a import b` gives both `a` and `a.b`.

    Args:
        tree: a parsed module or notebook cell.
        module: dotted name of the module, needed to resolve relative imports.
        is_package: whether the module is a package's `__init__`.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def files_fingerprint(files: Iterable[Path], base: Path, *, contents: bool = True) -> str:
    """SHA-256 of a set of files: their paths below `base` and their bytes.

    With `contents=False` size and time of change stand for the bytes: quick on hundreds of
    gigabytes of features.
    """
    rows = []
    for file in sorted(files):
        if contents:
            mark: str | list[int] = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            stat = file.stat()
            mark = [stat.st_size, stat.st_mtime_ns]
        rows.append([file.relative_to(base).as_posix(), mark])
    return value_fingerprint(rows)


def _inside(name: str, package: Path) -> bool:
    return name == package.name or name.startswith(package.name + ".")


def _source(name: str, package: Path) -> Path | None:
    """The file of a dotted name of the package; None if it names an attribute or something else."""
    if not _inside(name, package):
        return None
    path = package.joinpath(*name.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _defined_in(name: str, package: Path) -> list[str]:
    """The modules that the package's `__init__` imports an attribute of its own from."""
    attribute = name.removeprefix(f"{package.name}.")
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    return [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module
        and any(alias.name == attribute for alias in node.names)
    ]


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                # An emptied body still needs a statement to be valid code.
                node.body = node.body[1:] or [ast.Pass()]
    return tree
