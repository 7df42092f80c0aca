"""config.json of a training run: its entries, and whether they are those that the run began with."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from robustq.data import Augment
from robustq.errors import RecipeError, UsageError
from robustq.hardening.methods.registry import SETTINGS
from robustq.models.quant.quantizers import BITS
from robustq.models.spec import ARCHITECTURES, ModelSpec
from robustq.recipe import Recipe, parse_epsilon
from robustq.recipe.schema import Vocabulary, shown, validation_errors
from robustq.tables import misfit, read_table

CONFIG = "config.json"

_SHAPE: dict[str, Any] = {
    "command": str,
    "recipe": {"name": str, "method": str, "settings?": dict},
    "source?": {"path": str, "sha256": str, "float_accuracy?": float, "foreign?": bool},
    "spec": {"architecture": str},
    "data": {"name": str, "digest": str, "skip_bad_images": bool},
    "augment?": {"crop_padding": int, "flip": bool},
    "seed": int,
    "device": str,
    "versions": dict,
}
"""Entries of config.json, in the form of :func:`robustq.tables.misfit`; recipe and spec have checks of their own."""

MAY_CHANGE = ("tensorboard", "compile", "cuda_graphs")
"""Keys of the recipe in config.json that may be edited before a run is resumed."""


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run folder.

    Raises:
        UsageError: no such folder, or no run folder.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise UsageError(f"{path}: {what}; give the folder of a run, such as runs/NAME")
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path}: has no {CONFIG}, so it is not the folder of a run")
    config = read_table(path / CONFIG, error=UsageError)
    wrong = wrong_entry(config)
    if wrong is not None:
        raise UsageError(
            f"{path / CONFIG}: does not describe a run of robustq train or harden ('{wrong}' is missing or cannot be "
            "used); put it back, or start a new run"
        )
    return config


def wrong_entry(config: dict[str, Any]) -> str | None:
    """The name of the first entry that is missing or has another type; None if there is none.

    Recipe and network are checked by :func:`read_entries`.
    """
    return misfit(config, _SHAPE) or (None if config["command"] in ("train", "harden") else "command")


def read_entries(config: dict[str, Any]) -> tuple[Recipe, ModelSpec, Augment]:
    """Recipe, network and augmentation, checked as those of a new run.

    Raises:
        RecipeError, UsageError, ModelFileError: a value is missing or out of range.
    """
    values = {key: value for key, value in config["recipe"].items() if value is not None}
    name, settings = values.pop("name"), values.pop("settings", {})
    unknown = sorted(values.keys() - {entry.name for entry in fields(Recipe)})
    if unknown:
        raise UsageError(f"the recipe key '{unknown[0]}' is unknown")
    vocabulary = Vocabulary(SETTINGS, tuple(ARCHITECTURES), BITS)
    errors = validation_errors({**values, values["method"]: settings}, vocabulary)
    if errors:
        raise RecipeError("; ".join(errors))
    if "epsilon" in values:
        values["epsilon"] = parse_epsilon(values["epsilon"])
    values["milestones"] = tuple(values.get("milestones", ()))
    spec = ModelSpec.from_dict(config["spec"])
    if "augment" not in config:
        raise UsageError("'augment' is missing")
    augment = Augment(**config["augment"])
    if augment.crop_padding >= spec.image_size:
        raise UsageError(f"crop_padding = {augment.crop_padding} is no less than the side of the images")
    return Recipe(name=name, settings=settings, **values), spec, augment


def first_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first entry that differs, as ``seed is 1, and 0``; None if nothing but :data:`MAY_CHANGE` does."""
    before, now = ({**one, "recipe": {**one["recipe"], **dict.fromkeys(MAY_CHANGE)}} for one in (before, now))
    return _first_change(before, now)


def _first_change(before: Any, now: Any, name: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = ((key, before.get(key), now.get(key)) for key in {**before, **now})
        found = (_first_change(old, new, f"{name}.{key}" if name else key) for key, old, new in pairs)
        return next((change for change in found if change is not None), None)
    return None if before == now and type(before) is type(now) else f"{name} is {shown(now)}, and {shown(before)}"
