"""Recipe files: finding them by name, extending one by another, and loading one with overrides."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from robustq.errors import RecipeError, UsageError
from robustq.recipe.epsilon import parse_epsilon
from robustq.recipe.paper import evidence_errors, paper_rows_errors
from robustq.recipe.schema import METADATA, Recipe, Vocabulary, validation_errors
from robustq.tables import parse_bounded, read_table

EXTENDS = "extends"

MOST_EXTENDED = 16
"""Recipes in a row, each of which extends the next."""

NOT_INHERITED = ("summary", *METADATA)
"""Keys that describe one recipe alone: the recipe that extends it is another run, with other figures."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with robustq, sorted."""
    found: list[str] = []

    def walk(folder: Any, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".toml"):
                found.append(prefix + entry.name.removesuffix(".toml"))

    walk(resources.files("robustq.recipes"), "")
    return sorted(found)


def check_name(name: str) -> None:
    """Check that ``name`` is a recipe's name or a TOML file, and that the recipes it extends exist.

    Raises:
        RecipeError: one of them does not exist or is not TOML; the keys are not checked.
    """
    _read_extended(name, [])


def load_recipe(name: str, overrides: Sequence[str] = (), *, vocabulary: Vocabulary | None = None) -> Recipe:
    """The recipe called ``name`` (or the TOML file at that path), with ``key=value`` overrides.

    Without ``vocabulary`` the method's own table, the architecture and the bit widths are not checked.

    Raises:
        RecipeError: no such recipe (the message names the nearest), broken TOML, an unknown key, or a value of the
            wrong type or range; the message lists all errors of the recipe.
    """
    values = _read_extended(name, [])
    errors = [error for error in (_override(values, override) for override in overrides) if error is not None]
    metadata = {key: values.pop(key) for key in METADATA if key in values}
    errors += paper_rows_errors(metadata.get("paper_rows", {}))
    errors += evidence_errors(metadata["evidence"]) if "evidence" in metadata else []
    errors += validation_errors(values, vocabulary)
    if isinstance(values.get("epsilon"), int | float | str):
        try:
            values["epsilon"] = parse_epsilon(values["epsilon"])
        except UsageError as error:
            errors.append(str(error))
    if errors:
        raise RecipeError(f"{name}: " + "; ".join(errors))
    settings = values.pop(values["method"], {})
    values["milestones"] = tuple(values.get("milestones", ()))
    return Recipe(name=name, settings=settings, **{"epochs": 0, "batch_size": 0, "lr": 0.0, **values}, **metadata)


def _override(values: dict[str, Any], text: str) -> str | None:
    """Set ``key=value`` in ``values``; returns the error message, or None."""
    key, equals, raw = (part.strip() for part in text.partition("="))
    if not equals or not key:
        return f"--set '{text}' has no value; write --set key=value, e.g. --set epochs=10"
    table, dot, inner = key.partition(".")
    if table in (EXTENDS, *METADATA):
        return f"--set '{text}': {key} is allowed in a recipe file only; change it there"
    try:
        parsed = parse_bounded(f"value = {raw}", tomllib.loads)
        value = parsed["value"] if len(parsed) == 1 else raw
    except ValueError:
        value = raw  # a bare word: --set schedule=steps
    if not dot:
        values[table] = value
    elif isinstance(nested := values.setdefault(table, {}), dict):
        nested[inner] = value
    else:
        return f"--set '{text}': {table} is a value, not a table"
    return None


def _read_extended(name: str, children: list[str]) -> dict[str, Any]:
    """The values of recipe ``name``, merged over those of the recipe that it extends.

    ``extends`` names one recipe: one that comes with robustq, or a .toml file relative to the extending file. Tables
    are merged key by key. Where the extending recipe has another method, the table of the other method is dropped.

    ``children`` are the recipes that extend this one, directly or not; the first is the one that was asked for.

    Raises:
        RecipeError: no such recipe, broken TOML, or recipes that extend one another in a circle or in a long row.
    """
    identity = os.path.abspath(name) if name.endswith(".toml") else name
    if identity in children:
        circle = " -> ".join([*children[children.index(identity) :], identity])
        raise RecipeError(f"{children[0]}: recipes extend one another in a circle ({circle}); remove one 'extends'")
    if len(children) > MOST_EXTENDED:
        raise RecipeError(f"{children[0]}: extends more than {MOST_EXTENDED} recipes, one another; write one file")
    try:
        values = _read(name)
    except RecipeError as error:
        if not children:
            raise
        raise RecipeError(f"{children[-1]} extends '{name}': {error}") from error
    if EXTENDS not in values:
        return values
    parent = values.pop(EXTENDS)
    if not isinstance(parent, str):
        raise RecipeError(f"{name}: extends = {str(parent)[:80]!r} is not a word; give one recipe's name or .toml file")
    if parent.endswith(".toml") and name.endswith(".toml"):
        parent = str(Path(name).parent / parent)
    merged = _read_extended(parent, [*children, identity])
    method = merged.get("method")
    if values.get("method", method) != method and isinstance(method, str):
        merged.pop(method, None)
    for key in NOT_INHERITED:
        merged.pop(key, None)
    for key, value in values.items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read(name: str) -> dict[str, Any]:
    """The values of one file, without those of the recipe that it extends."""
    if name.endswith(".toml"):
        if not os.path.exists(name):
            raise RecipeError(f"{name}: no such recipe file; give a path to a .toml, or a name from 'robustq recipes'")
        return read_table(Path(name), tomllib.loads, error=RecipeError)
    known = recipe_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise RecipeError(f"unknown recipe '{name}' (nearest: {near}); 'robustq recipes' lists them all")
    return tomllib.loads(
        resources.files("robustq.recipes").joinpath(*f"{name}.toml".split("/")).read_text(encoding="utf-8")
    )
