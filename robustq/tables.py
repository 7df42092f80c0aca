"""JSON and TOML files: read within bounds, and checked against the shape that a reader needs."""

from __future__ import annotations

import json
from collections.abc import Callable, ValuesView
from pathlib import Path
from typing import Any

from robustq.errors import RobustqError, one_line
from robustq.files import open_regular

LARGEST_TEXT = 16 << 20
"""Bytes of a JSON or TOML file."""

DEEPEST = 32
"""Levels of tables and lists in JSON and TOML."""


def parse_bounded(text: str, parse: Callable[[str], Any]) -> Any:
    """``parse(text)``, where ``parse`` is ``json.loads`` or ``tomllib.loads``.

    Raises:
        ValueError: it cannot be parsed, is nested deeper than :data:`DEEPEST`, or has an integer of over 64 bits.
    """
    try:
        content = parse(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [content]
    for _ in range(DEEPEST):
        if any(isinstance(value, int) and value.bit_length() > 64 for value in level):
            raise ValueError("an integer of more than 64 bits")
        tables = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for table in tables if isinstance(table, list | ValuesView) for value in table]
        if not level:
            return content
    raise ValueError("nested too deeply")


def read_table(path: Path, parse: Callable[[str], Any] = json.loads, *, error: type[RobustqError]) -> dict[str, Any]:
    """The table in a JSON file, or with ``tomllib.loads`` in a TOML file.

    Raises:
        error: no readable regular file, more bytes than :data:`LARGEST_TEXT`, not valid (see :func:`parse_bounded`), or
            no table.
    """
    with open_regular(path, error=error) as file:
        raw = file.read(LARGEST_TEXT + 1)
    kind = "JSON" if parse is json.loads else "TOML"
    if len(raw) > LARGEST_TEXT:
        raise error(f"{path}: is not valid {kind} (more than {LARGEST_TEXT >> 20} MB)")
    try:
        content = parse_bounded(raw.decode("utf-8"), parse)
    except UnicodeDecodeError as cause:
        raise error(f"{path}: is not UTF-8 text, so not {kind}") from cause
    except ValueError as cause:
        raise error(f"{path}: is not valid {kind} ({one_line(cause, longest=200)})") from cause
    if not isinstance(content, dict):
        raise error(f"{path}: is {kind}, but holds no table")
    return content


def misfit(value: Any, shape: Any, name: str = "content") -> str | None:
    """The name of the first entry of parsed JSON that does not have its shape; None if all do.

    Args:
        value: any JSON value.
        shape: a type; ``[shape]`` for a list of any length; ``(shape, ...)`` for a list of that length; or
            ``{key: shape}`` for a table with at least these keys, where ``"key?"`` may be missing or null.
        name: of ``value``.
    """
    rows: list[tuple[Any, Any, str]] = []
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            found = value.get(plain := key.removesuffix("?"))
            if found is not None or plain == key:
                rows.append((found, inner, plain))
    elif isinstance(shape, list | tuple) and isinstance(value, list):
        shapes = shape * len(value) if isinstance(shape, list) else shape
        if len(value) != len(shapes):
            return name
        rows = [(each, inner, name) for each, inner in zip(value, shapes, strict=True)]
    elif isinstance(shape, dict | list | tuple) or not isinstance(value, shape):
        return name
    return next((found for row in rows if (found := misfit(*row)) is not None), None)
