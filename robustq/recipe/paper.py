"""The metadata of a recipe, on which no run depends: its rows in the paper's tables, and the evidence of its figures.

A recipe without evidence has not been run at full size yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from robustq.recipe.schema import Recipe, shown, unknown_value

PAPER_TABLES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "I": ("CIFAR-10, ResNet-20 at 4 bits", 11),
        "II": ("MNIST, ResNet-20 at 4 bits", 11),
        "III": ("ImageNet, ResNet-18 at 4 bits and 1 bit", 10),
        "IV": ("ablations of ODG-Q: CIFAR-10, ResNet-20 at 4 bits", 5),
        "V": ("bit widths: CIFAR-10, ResNet-20 at 32, 8, 4, 3, 2 and 1 bit", 12),
    }
)
"""Tables of arXiv:2210.08701 -> title and number of rows. The last row of IV is ours: the paper lacks it."""

EVIDENCE: Mapping[str, str] = MappingProxyType(
    {
        "command": "the command that made the figures, as typed",
        "seed": "its seed, or a list of them where figures are means over seeds",
        "hardware": "what it ran on",
        "figures": "numbers by name; accuracies as fractions",
    }
)
"""Keys of the ``[evidence]`` table; all of them are required."""


def by_table(recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    """Table -> names of the recipes that are its rows, in the paper's order."""
    rows = {table: [recipe for recipe in recipes if table in recipe.paper_rows] for table in PAPER_TABLES}
    return {
        table: [recipe.name for recipe in sorted(found, key=lambda recipe: recipe.paper_rows[table])]
        for table, found in rows.items()
    }


def paper_rows_errors(rows: object) -> list[str]:
    """Validation errors of ``paper_rows = { I = 10, V = 6 }``: table -> row, from 1, in the paper's order."""
    if not isinstance(rows, dict):
        return [f"paper_rows = {shown(rows)} is not a table such as {{ I = 10, V = 6 }}"]
    errors = []
    for table, row in rows.items():
        if table not in PAPER_TABLES:
            errors.append(unknown_value("paper_rows' table", table, list(PAPER_TABLES)))
        elif type(row) is not int or not 1 <= row <= PAPER_TABLES[table][1]:
            errors.append(f"paper_rows.{table} = {shown(row)} is no row from 1 to {PAPER_TABLES[table][1]}")
    return errors


def evidence_errors(evidence: object) -> list[str]:
    """Validation errors of an ``[evidence]`` table."""
    if not isinstance(evidence, dict):
        return [f"evidence = {shown(evidence)} is not a table with {', '.join(EVIDENCE)}"]
    errors = [unknown_value("evidence's key", key, list(EVIDENCE)) for key in evidence if key not in EVIDENCE]
    errors += [f"evidence.{key} is missing ({what})" for key, what in EVIDENCE.items() if key not in evidence]
    for key in ("command", "hardware"):
        value = evidence.get(key, "given")
        if not isinstance(value, str) or not value.strip():
            errors.append(f"evidence.{key} = {shown(value)} is not a text ({EVIDENCE[key]})")
    seed = evidence.get("seed", 0)
    seeds = seed if isinstance(seed, list) else [seed]
    if not seeds or any(type(one) is not int or one < 0 for one in seeds):
        errors.append(f"evidence.seed = {shown(seed)} is not a seed, nor a list of seeds")
    figures = evidence.get("figures", {"": 0})
    if not isinstance(figures, dict) or not figures:
        return [*errors, f"evidence.figures = {shown(figures)} is not a table of at least one number"]
    return errors + [
        f"evidence.figures.{name} = {shown(value)} is not a finite number"
        for name, value in figures.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ]
