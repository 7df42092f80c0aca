"""Recipes: all settings of a training run in one small TOML file, checked as a whole before anything starts.

The name of a recipe is its path below recipes/ without the ending, such as ``cifar10/resnet20-w4a4-odgq``. Absent keys
are filled in by the model, the data set or the command line. The table named like the method (``[odgq]``) holds the
method's own settings.
"""

from __future__ import annotations

from robustq.recipe.epsilon import DEFAULT_EPSILON, format_epsilon, parse_epsilon
from robustq.recipe.files import check_name, load_recipe, recipe_names
from robustq.recipe.schema import METADATA, Recipe

__all__ = [
    "DEFAULT_EPSILON",
    "METADATA",
    "Recipe",
    "check_name",
    "format_epsilon",
    "load_recipe",
    "parse_epsilon",
    "recipe_names",
]
