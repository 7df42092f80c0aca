"""Finds the training methods by name and builds them from a recipe.

A method is a module of this package with a constant ``METHOD`` (:class:`.method.MethodEntry`).
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import asdict
from typing import Any

from robustq.data import SIDES, usual_augment
from robustq.errors import UsageError
from robustq.hardening import methods
from robustq.hardening.methods.method import Method, MethodContext, MethodEntry
from robustq.recipe import Recipe
from robustq.recipe.schema import MethodSettings, check_settings


def _find_methods() -> dict[str, MethodEntry]:
    modules = (
        importlib.import_module(f"{methods.__name__}.{one.name}") for one in pkgutil.iter_modules(methods.__path__)
    )
    entries = (getattr(module, "METHOD", None) for module in modules)
    return {entry.settings.method: entry for entry in entries if isinstance(entry, MethodEntry)}


METHODS = _find_methods()
"""Name -> method, ``ptq`` included, which does not train."""

SETTINGS: dict[str, type[MethodSettings]] = {name: entry.settings for name, entry in METHODS.items()}
"""Name -> the dataclass of the method's own table in a recipe."""


def resolved_settings(recipe: Recipe) -> dict[str, Any]:
    """The method's own table with every default written out, so that a run stays described when a default changes."""
    return asdict(check_settings(recipe.settings, SETTINGS[recipe.method], table=recipe.method))


def resolved_recipe(recipe: Recipe) -> dict[str, Any]:
    """Plain JSON types with every value that the recipe alone decides; None if the model or an option decides it.

    Raises:
        RecipeError: an unknown key or value in the method's own table.
    """
    values = {**recipe.to_dict(), "settings": resolved_settings(recipe)}
    # One bit width applies to both.
    values["weight_bits"] = recipe.weight_bits or recipe.act_bits
    values["act_bits"] = recipe.act_bits or recipe.weight_bits
    if recipe.data in SIDES and recipe.trains:
        usual = usual_augment(recipe.data, recipe.image_size or SIDES[recipe.data])
        values["crop_padding"] = usual.crop_padding if recipe.crop_padding is None else recipe.crop_padding
        values["flip"] = usual.flip if recipe.flip is None else recipe.flip
    return values


def build_method(recipe: Recipe, context: MethodContext) -> Method:
    """The method that ``recipe`` names.

    Raises:
        RecipeError: an invalid value in the method's own table.
        UsageError: ``rslad`` without a teacher, or a method that does not train.
    """
    settings = check_settings(recipe.settings, SETTINGS[recipe.method], table=recipe.method)
    build = METHODS[recipe.method].build
    if build is None:
        raise UsageError(f"method '{recipe.method}' does not train; it has no batches to build it for")
    return build(context, settings)
