"""Reading JSON that others wrote: every error names the file, the line and what was expected."""

import json
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from tvg_lib.errors import DataError


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return decode(data, str(path))


def decode(data: bytes, where: str) -> str:
    """Text in UTF-8, with or without a byte order mark.

    Raises:
        DataError: it is no UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: cannot be read as UTF-8 text: {error}") from error


def text_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank; only a line feed ends a line, as JSON allows others."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    return parse_json(read_text(path), str(path))


def json_lines(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines text, each with where it stands.

    Raises:
        DataError: a line is no JSON object.
    """
    for number, line in text_lines(text):
        place = f"{where}, line {number}"
        yield place, json_object(parse_json(line, place), place)


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; a key may occur once in an object.

    Raises:
        DataError: it is no JSON, or a key occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{where}: the key {twice!r} occurs twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


def field_of(entry: Mapping[str, Any], key: str, where: str) -> Any:
    """A field that must be there."""
    if key not in entry:
        raise DataError(f"{where}: expected the field {key!r}, found {sorted(entry)[:12]}")
    return entry[key]


def json_object(value: Any, where: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {_kind(value)}")
    return value


def json_list(value: Any, where: str) -> list[Any]:
    """The value, which must be a list."""
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list, found {_kind(value)}")
    return value


def json_text(value: Any, where: str) -> str:
    """The value, which must be text."""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, found {_kind(value)}")
    return value


def json_number(value: Any, where: str) -> float:
    """The value, which must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: expected a number, found {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not isfinite(number):
        raise DataError(f"{where}: expected a finite number, found {_kind(value)}")
    return number


def positive_number(value: Any, where: str) -> float:
    """The value, which must be a finite number above 0."""
    number = json_number(value, where)
    if number <= 0:
        raise DataError(f"{where}: expected a positive number, found {number}")
    return number


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
