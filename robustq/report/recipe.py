"""Recipes as text: the list of them, and one as TOML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from robustq.recipe import parse_epsilon

_OPEN = {
    "data": "what model.pt or --data says",
    "architecture": "what model.pt or --architecture says",
    "weight_bits": "what --bits says, else model.pt",
    "act_bits": "what --bits says, else model.pt",
    "epsilon": "what --epsilon or model.pt says, else 8/255",
    "crop_padding": "an eighth of the images' side",
    "flip": "true for photographs known by name, else false",
}
"""What settles a key that a recipe leaves open."""


def list_lines(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """A name and a sentence for each."""
    width = max(len(recipe["name"]) for recipe in recipes)
    return [f"{recipe['name'].ljust(width)}  {recipe['summary']}" for recipe in recipes]


def toml_lines(recipe: dict[str, Any]) -> list[str]:
    """One recipe as TOML: every value that it settles, and in comments what settles the others."""
    lines = [f"# {' '.join(recipe['name'].split())}"]
    for key, value in recipe.items():
        if key in ("name", "settings"):
            continue
        lines.append(f"# {key}: {_OPEN[key]}" if value is None else f"{key} = {_toml(key, value)}")
    if recipe["settings"]:
        lines += ["", f"[{recipe['method']}]"]
        lines += [f"{key} = {_toml(key, value)}" for key, value in recipe["settings"].items()]
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
