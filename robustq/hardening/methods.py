"""Method name -> method, with its settings taken from the recipe's table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from robustq.data import SIDES, usual_augment
from robustq.hardening.method import CrossEntropy, Method
from robustq.hardening.natural import Natural, NaturalSettings
from robustq.hardening.odgq import Odgq, OdgqSettings
from robustq.hardening.ptq import PtqSettings
from robustq.recipe import Recipe
from robustq.recipe_faults import check_settings

SETTINGS: dict[str, type] = {"natural": NaturalSettings, "odgq": OdgqSettings, "ptq": PtqSettings}
"""Method -> the dataclass of its own table in a recipe."""


def resolved_settings(recipe: Recipe) -> dict[str, Any]:
    """The method's own table with every default written out, so that a run stays described when a default changes."""
    return asdict(check_settings(recipe.settings, SETTINGS[recipe.method], table=recipe.method))


def resolved_recipe(recipe: Recipe) -> dict[str, Any]:
    """Plain JSON types with every value that the recipe alone settles; None where the model or an option does.

    Raises:
        RecipeError: an unknown key or value in the method's own table.
    """
    values = {**recipe.to_dict(), "settings": resolved_settings(recipe)}
    # One width stands for both.
    values["weight_bits"] = recipe.weight_bits or recipe.act_bits
    values["act_bits"] = recipe.act_bits or recipe.weight_bits
    if recipe.data in SIDES and recipe.method != "ptq":
        usual = usual_augment(recipe.data, recipe.image_size or SIDES[recipe.data])
        values["crop_padding"] = usual.crop_padding if recipe.crop_padding is None else recipe.crop_padding
        values["flip"] = usual.flip if recipe.flip is None else recipe.flip
    return values


def build_method(
    recipe: Recipe,
    model: nn.Module,
    *,
    epsilon: float,
    image_shape: tuple[int, int, int],
    samples: int,
    device: torch.device,
    seed: int,
) -> Method:
    """The method that ``recipe`` names, bound to ``model``.

    Args:
        recipe: checked recipe.
        model: network in train mode on ``device``.
        epsilon: radius of the threat model in [0, 1].
        image_shape: (C, H, W).
        samples: number of training images.
        device: where training runs.
        seed: of the method's own random draws.
    """
    cross_entropy = CrossEntropy()
    if recipe.method == "natural":
        return Natural(model, cross_entropy=cross_entropy)
    return Odgq(
        model,
        check_settings(recipe.settings, OdgqSettings, table="odgq"),
        epsilon=epsilon,
        batch_size=recipe.batch_size,
        image_shape=image_shape,
        samples=samples,
        device=device,
        generator=torch.Generator().manual_seed(seed),
        cross_entropy=cross_entropy,
    )
