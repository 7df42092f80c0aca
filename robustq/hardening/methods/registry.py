"""Method name -> method, with its settings taken from the recipe's table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from robustq.data import SIDES, usual_augment
from robustq.errors import UsageError
from robustq.hardening.methods.dq import Dq, DqSettings
from robustq.hardening.methods.fgsm_mep import FgsmMep, FgsmMepSettings
from robustq.hardening.methods.fgsm_rs import FgsmRs, FgsmRsSettings
from robustq.hardening.methods.free import Free, FreeSettings
from robustq.hardening.methods.method import CrossEntropy, Method
from robustq.hardening.methods.n_fgsm import NFgsm, NFgsmSettings
from robustq.hardening.methods.natural import Natural, NaturalSettings
from robustq.hardening.methods.odgq import Odgq, OdgqSettings
from robustq.hardening.methods.pgd import Pgd, PgdSettings
from robustq.hardening.methods.ptq import PtqSettings
from robustq.hardening.methods.rslad import Rslad, RsladSettings, Teacher
from robustq.hardening.methods.trades import Trades, TradesSettings
from robustq.recipe import Recipe
from robustq.recipe.schema import check_settings

SETTINGS: dict[str, type] = {
    "natural": NaturalSettings,
    "odgq": OdgqSettings,
    "pgd": PgdSettings,
    "free": FreeSettings,
    "dq": DqSettings,
    "fgsm-rs": FgsmRsSettings,
    "n-fgsm": NFgsmSettings,
    "fgsm-mep": FgsmMepSettings,
    "trades": TradesSettings,
    "rslad": RsladSettings,
    "ptq": PtqSettings,
}
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
    teacher: Teacher | None = None,
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
        teacher: of the method ``rslad``.

    Raises:
        RecipeError: a fault in the method's own table.
        UsageError: ``rslad`` without a teacher, or a method that does not train.
    """
    settings = check_settings(recipe.settings, SETTINGS[recipe.method], table=recipe.method)
    cross_entropy = CrossEntropy(recipe.label_smoothing)
    generator = torch.Generator().manual_seed(seed)
    match settings:
        case NaturalSettings():
            return Natural(model, cross_entropy=cross_entropy)
        case DqSettings():
            return Dq(model, settings, cross_entropy=cross_entropy)
        case OdgqSettings():
            return Odgq(
                model,
                settings,
                epsilon=epsilon,
                batch_size=recipe.batch_size,
                image_shape=image_shape,
                samples=samples,
                device=device,
                generator=generator,
                cross_entropy=cross_entropy,
            )
        case FreeSettings():
            return Free(
                model,
                settings,
                epsilon=epsilon,
                batch_size=recipe.batch_size,
                image_shape=image_shape,
                samples=samples,
                device=device,
                cross_entropy=cross_entropy,
            )
        case FgsmMepSettings():
            return FgsmMep(
                model,
                settings,
                epsilon=epsilon,
                image_shape=image_shape,
                samples=samples,
                device=device,
                generator=generator,
                cross_entropy=cross_entropy,
            )
        case PgdSettings():
            return Pgd(model, settings, epsilon=epsilon, generator=generator, cross_entropy=cross_entropy)
        case FgsmRsSettings():
            return FgsmRs(model, settings, epsilon=epsilon, generator=generator, cross_entropy=cross_entropy)
        case NFgsmSettings():
            return NFgsm(model, settings, epsilon=epsilon, generator=generator, cross_entropy=cross_entropy)
        case TradesSettings():
            return Trades(model, settings, epsilon=epsilon, generator=generator, cross_entropy=cross_entropy)
        case RsladSettings():
            if teacher is None:
                raise UsageError("method 'rslad' learns from a teacher and got none; set rslad.teacher to a model file")
            return Rslad(model, settings, teacher=teacher, epsilon=epsilon, generator=generator)
    raise UsageError(f"method '{recipe.method}' does not train; it has no batches to build it for")
