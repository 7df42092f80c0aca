"""Recipes as text: the list of them, and one as TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from robustq.recipe import CLAIMS, parse_epsilon
from robustq.recipe_claims import PAPER_TABLES

_OPEN = {
    "data": "what model.pt or --data says",
    "architecture": "what model.pt or --architecture says",
    "weight_bits": "what --bits says, else model.pt",
    "act_bits": "what --bits says, else model.pt",
    "shared_sum_scale": "what model.pt says, else false",
    "epsilon": "what --epsilon or model.pt says, else 8/255",
    "crop_padding": "an eighth of the images' side",
    "flip": "true for photographs known by name, else false",
}
"""What settles a key that a recipe leaves open."""


def list_lines(recipes: Sequence[dict[str, Any]], tables: Mapping[str, Sequence[str]]) -> list[str]:
    """A name and a sentence for each: the rows of the paper's tables first, in its order, then the others.

    Args:
        recipes: as JSON lists them.
        tables: table -> names of its rows; a recipe that several tables share stands in each.
    """
    summaries = {recipe["name"]: recipe["summary"] for recipe in recipes}
    sections = {
        f"Table {table} of arXiv:2210.08701: {PAPER_TABLES[table][0]}": names for table, names in tables.items()
    }
    in_tables = {name for names in tables.values() for name in names}
    sections["Others"] = [name for name in summaries if name not in in_tables]
    lines = []
    for head, names in sections.items():
        width = max(map(len, names), default=0)
        lines += ["", head, *(f"  {name.ljust(width)}  {summaries[name]}" for name in names)] if names else []
    return lines[1:]


def toml_lines(recipe: dict[str, Any]) -> list[str]:
    """One recipe as TOML: every value that it settles, and in comments what settles the others."""
    lines = [f"# {' '.join(recipe['name'].split())}", *_claims(recipe)]
    for key, value in recipe.items():
        if key in ("name", "settings", *CLAIMS):
            continue
        lines.append(f"# {key}: {_OPEN[key]}" if value is None else f"{key} = {_toml(key, value)}")
    if recipe["settings"]:
        lines += ["", f"[{recipe['method']}]"]
        lines += [f"{key} = {_toml(key, value)}" for key, value in recipe["settings"].items()]
    return lines


def _claims(recipe: dict[str, Any]) -> list[str]:
    """Comments, since they are true of this recipe and not of what is made of it."""
    lines = [f"# row {row} of Table {table} of arXiv:2210.08701" for table, row in recipe.get("paper_rows", {}).items()]
    evidence = recipe.get("evidence", {})
    if evidence:
        figures = ", ".join(f"{name} {value:g}" for name, value in evidence["figures"].items())
        lines.append(f"# evidence: {figures} (seed {evidence['seed']}, {evidence['hardware']})")
        lines.append(f"#   {' '.join(evidence['command'].split())}")
    return lines


def _toml(key: str, value: object) -> str:
    if key == "epsilon" and isinstance(value, float):
        levels = f"{round(value * 255)}/255"
        return f'"{levels}"' if parse_epsilon(levels) == value else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's; DEL alone may stand as it is there and not here.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
