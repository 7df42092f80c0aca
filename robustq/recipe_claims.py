"""What a recipe claims of itself, which decides nothing of the run: rows of the paper's tables, and its evidence.

Evidence is absent until it exists: a recipe without figures has not been run at full size yet, whatever it promises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from robustq.recipe_faults import shown, unknown_value

PAPER_TABLES: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "I": ("CIFAR-10, ResNet-20 at 4 bits", 11),
        "II": ("MNIST, ResNet-20 at 4 bits", 11),
        "III": ("ImageNet, ResNet-18 at 4 bits and 1 bit", 10),
        "IV": ("ablations of ODG-Q: CIFAR-10, ResNet-20 at 4 bits", 5),
        "V": ("bit widths: CIFAR-10, ResNet-20 at 32, 8, 4, 3, 2 and 1 bit", 12),
    }
)
"""Tables of arXiv:2210.08701 -> what they show, and their rows. The last row of IV is ours: the paper lacks it."""

EVIDENCE: Mapping[str, str] = MappingProxyType(
    {
        "command": "the command that made the figures, as typed",
        "seed": "its seed, or a list of them where figures are means over seeds",
        "hardware": "what it ran on",
        "figures": "numbers by name; accuracies as fractions",
    }
)
"""Keys of the ``[evidence]`` table; it has all of them or does not exist."""


class Claiming(Protocol):
    """A recipe, as far as its name and its rows go."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def paper_rows(self) -> Mapping[str, int]:
        """Table -> row."""


def by_table(recipes: Sequence[Claiming]) -> dict[str, list[str]]:
    """Table -> names of the recipes that are its rows, in the paper's order; a shared one stands in each."""
    return {
        table: [recipe.name for recipe in sorted(_of(table, recipes), key=lambda recipe: recipe.paper_rows[table])]
        for table in PAPER_TABLES
    }


def _of(table: str, recipes: Sequence[Claiming]) -> list[Claiming]:
    return [recipe for recipe in recipes if table in recipe.paper_rows]


def paper_rows_faults(rows: object) -> list[str]:
    """What is wrong with ``paper_rows = { I = 10, V = 6 }`` (table -> row, from 1, in the paper's order), in words."""
    if not isinstance(rows, dict):
        return [f"paper_rows = {shown(rows)} is not a table such as {{ I = 10, V = 6 }}"]
    faults = []
    for table, row in rows.items():
        if table not in PAPER_TABLES:
            faults.append(unknown_value("paper_rows' table", table, list(PAPER_TABLES)))
        elif type(row) is not int or not 1 <= row <= PAPER_TABLES[table][1]:
            faults.append(f"paper_rows.{table} = {shown(row)} is no row from 1 to {PAPER_TABLES[table][1]}")
    return faults


def evidence_faults(evidence: object) -> list[str]:
    """What is wrong with an ``[evidence]`` table, in words."""
    if not isinstance(evidence, dict):
        return [f"evidence = {shown(evidence)} is not a table with {', '.join(EVIDENCE)}"]
    faults = [unknown_value("evidence's key", key, list(EVIDENCE)) for key in evidence if key not in EVIDENCE]
    faults += [f"evidence.{key} is missing ({what})" for key, what in EVIDENCE.items() if key not in evidence]
    for key in ("command", "hardware"):
        value = evidence.get(key, "given")
        if not isinstance(value, str) or not value.strip():
            faults.append(f"evidence.{key} = {shown(value)} is not a text ({EVIDENCE[key]})")
    seed = evidence.get("seed", 0)
    seeds = seed if isinstance(seed, list) else [seed]
    if not seeds or any(type(one) is not int or one < 0 for one in seeds):
        faults.append(f"evidence.seed = {shown(seed)} is not a seed, nor a list of seeds")
    figures = evidence.get("figures", {"": 0})
    if not isinstance(figures, dict) or not figures:
        faults.append(f"evidence.figures = {shown(figures)} is not a table of at least one number")
    else:
        faults += [
            f"evidence.figures.{name} = {shown(value)} is not a finite number"
            for name, value in figures.items()
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ]
    return faults
