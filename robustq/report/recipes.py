"""The lines of `robustq recipes`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from robustq.recipe import METADATA, parse_epsilon
from robustq.recipe.paper import PAPER_TABLES

_OPEN = {
    "data": "from model.pt or --data",
    "architecture": "from model.pt or --architecture",
    "weight_bits": "from --bits, else model.pt",
    "act_bits": "from --bits, else model.pt",
    "shared_sum_scale": "from model.pt, else false",
    "epsilon": "from --epsilon or model.pt, else 8/255",
    "crop_padding": "an eighth of the image side",
    "flip": "true for known photograph data sets, else false",
}
"""Source of a value that a recipe leaves open."""


def list_lines(recipes: Sequence[dict[str, Any]], tables: Mapping[str, Sequence[str]]) -> list[str]:
    """A name and a sentence for each recipe: the rows of the paper's tables (table -> names) first, then the others."""
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
    """One recipe as TOML; comments name the source of the values that it leaves open."""
    lines = [f"# {' '.join(recipe['name'].split())}", *_metadata(recipe)]
    for key, value in recipe.items():
        if key in ("name", "settings", *METADATA):
            continue
        lines.append(f"# {key}: {_OPEN[key]}" if value is None else f"{key} = {_toml(key, value)}")
    if recipe["settings"]:
        lines += ["", f"[{recipe['method']}]"]
        lines += [f"{key} = {_toml(key, value)}" for key, value in recipe["settings"].items()]
    return lines


def _metadata(recipe: dict[str, Any]) -> list[str]:
    """Comments, since a changed copy of the recipe must not claim them."""
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
        # JSON's escapes are valid TOML, which must escape DEL as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
