"""Recipes as files: which ones come with robustq, what a name means, and what a recipe takes over from another one."""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from robustq.errors import RecipeError

EXTENDS = "extends"

OWN_KEYS = ("summary", "paper_rows", "evidence")
"""What a recipe says of itself alone: another one that extends it is another run, with other figures."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with robustq, sorted."""
    root = resources.files("robustq.recipes")
    found: list[str] = []

    def walk(folder: Any, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".toml"):
                found.append(prefix + entry.name.removesuffix(".toml"))

    walk(root, "")
    return sorted(found)


def read_values(name: str) -> dict[str, Any]:
    """What the recipe called ``name``, or the file of that path, says, laid over what it extends.

    ``extends`` names one recipe: one that comes with robustq, or a .toml file (relative to the folder of the file that
    names it). A key of the extending recipe replaces the other's; a table is merged key by key, since it is usually one
    key of it that differs. Where the extending recipe names another method, the other's table of its own method is
    left behind, which nothing would read.

    Raises:
        RecipeError: no such recipe, broken TOML, or a circle of recipes that extend one another.
    """
    return _merged(name, [])


def _merged(name: str, descendants: list[str]) -> dict[str, Any]:
    """``descendants``: recipes that, one by the other, extend this one; the first is the one that was asked for."""
    identity = str(Path(name).resolve()) if name.endswith(".toml") else name
    if identity in descendants:
        circle = " -> ".join([*descendants[descendants.index(identity) :], identity])
        raise RecipeError(f"{descendants[0]}: recipes extend one another in a circle ({circle}); let one of them not")
    try:
        values = _read(name)
    except RecipeError as error:
        if not descendants:
            raise
        raise RecipeError(f"{descendants[-1]} extends '{name}': {error}") from error
    if EXTENDS not in values:
        return values
    parent = values.pop(EXTENDS)
    if not isinstance(parent, str):
        raise RecipeError(f"{name}: extends = {str(parent)[:80]!r} is not a word; give one recipe's name or .toml file")
    if parent.endswith(".toml") and name.endswith(".toml"):
        parent = str(Path(name).parent / parent)
    inherited = _merged(parent, [*descendants, identity])
    before = inherited.get("method")
    if values.get("method", before) != before and isinstance(before, str):
        inherited.pop(before, None)
    return _laid_over({key: value for key, value in inherited.items() if key not in OWN_KEYS}, values)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        merged[key] = {**under, **value} if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _read(name: str) -> dict[str, Any]:
    """One file, without what it extends."""
    path = Path(name)
    if name.endswith(".toml"):
        if not path.is_file():
            raise RecipeError(f"{name}: no such recipe file; give a path to a .toml, or a name from 'robustq recipes'")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}: is not UTF-8 text, so not a recipe; give a .toml file") from error
    else:
        entry = resources.files("robustq.recipes").joinpath(*f"{name}.toml".split("/"))
        known = recipe_names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise RecipeError(f"unknown recipe '{name}' (nearest: {near}); 'robustq recipes' lists them all")
        text = entry.read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib's own error is a ValueError, a number too long another one
        raise RecipeError(f"{name}: not valid TOML ({' '.join(str(error).split())})") from error
