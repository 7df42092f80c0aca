"""Finds the training methods by name and builds them from a recipe.

A method is a module of this package with its own subclasses of :class:`robustq.recipe.schema.MethodSettings` and
:class:`.method.Method`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import asdict
from typing import Any

from robustq.data import KNOWN, usual_augment
from robustq.errors import UsageError
from robustq.hardening import methods
from robustq.hardening.methods.method import Method, MethodContext
from robustq.recipe import Recipe
from robustq.recipe.schema import MethodSettings, check_settings

SETTINGS: dict[str, type[MethodSettings]] = {}  # name -> the dataclass of the method's own table in a recipe
METHODS: dict[str, type[Method]] = {}  # name -> method, of those that train

for _found in pkgutil.iter_modules(methods.__path__):
    _module = importlib.import_module(f"{methods.__name__}.{_found.name}")
    _own = [kind for kind in vars(_module).values() if isinstance(kind, type) and kind.__module__ == _module.__name__]
    for _settings in [kind for kind in _own if issubclass(kind, MethodSettings)]:
        SETTINGS[_settings.method] = _settings
        METHODS.update((_settings.method, kind) for kind in _own if issubclass(kind, Method))


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
    if recipe.data in KNOWN and recipe.trains:
        usual = usual_augment(recipe.data, recipe.image_size or KNOWN[recipe.data].side)
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
    if recipe.method not in METHODS:
        raise UsageError(f"method '{recipe.method}' does not train; it has no batches to build it for")
    return METHODS[recipe.method](context, settings)
