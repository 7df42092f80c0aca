"""train and harden: a recipe, a network and data in, a run folder with best.pt out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustq.checkpoint import load_weights
from robustq.data import Dataset, load_dataset
from robustq.errors import UsageError
from robustq.files import check_place
from robustq.hardening.run_folder import RUNS, check_new_run
from robustq.models.fx.factory import runs_user_code
from robustq.models.spec import ModelSpec, build_model, check_architecture
from robustq.progress import note
from robustq.recipe import UNDEFENDED, Recipe
from robustq.workflow.quantize import quantize_only
from robustq.workflow.setup import (
    DEFAULT_EPSILON,
    WidthOptions,
    chosen_normalisation,
    data_for,
    open_source,
    pick_device,
    read_recipe,
    with_normalisation,
)
from robustq.workflow.training_run import calibrate_on, run_recipe, with_teacher


def train_model(
    recipe: str = "natural",
    *,
    overrides: tuple[str, ...] = (),
    data: str | None = None,
    architecture: str | None = None,
    own_model: str | None = None,
    feature_layer: str | None = None,
    bits: int | None = None,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    bits_per_layer: Path | None = None,
    normalisation: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Train a network from scratch.

    Args:
        recipe: name or TOML file.
        overrides: ``key=value`` laid over the recipe.
        data, architecture, bits: over the recipe's; ``weight_bits`` and ``act_bits`` over ``bits``. An architecture may
            be ``torchvision:NAME``.
        own_model: the user's own network, ``module:function``, in place of an architecture.
        feature_layer: the layer that aligned features enter, in a network that is not ours; None: looked for.
        bits_per_layer: TOML file of layer names and widths of their own.
        normalisation: ``imagenet`` or ``MEAN/STD`` inside the model, in front of its input quantizer; None: none.
        skip_bad_images: leave out image files that cannot be read, with a warning.
        seed: of initialisation, order, augmentation and the method's draws.
        device: ``cpu``, ``cuda``; None: a GPU where there is one.
        out: run folder; must not exist. None: ``runs/<name>``.

    Returns:
        ``checkpoint clean_accuracy epochs seconds_per_epoch`` and more, as ``robustq train --json``.

    Raises:
        RobustqError: bad input; nothing is written.
    """
    settings = with_teacher(read_recipe(recipe, overrides))
    if settings.method == "ptq":
        raise UsageError(
            f"recipe {recipe} quantizes a trained network and trains none; use robustq harden MODEL --recipe {recipe}"
        )
    place = pick_device(device)
    wanted_data = data or settings.data
    if wanted_data is None:
        raise UsageError(f"recipe {recipe} names no data; add --data NAME, FOLDER or FILE.npz")
    wanted_architecture = chosen_architecture(architecture, own_model) or settings.architecture
    if wanted_architecture is None:
        raise UsageError(f"recipe {recipe} names no architecture; add --architecture resnet20")
    check_architecture(wanted_architecture)
    options = WidthOptions(bits=bits, weight_bits=weight_bits, act_bits=act_bits, bits_per_layer=bits_per_layer)
    options.check()
    widths, layer_bits = options.resolve(settings, source=None)
    if out is not None:
        check_new_run(out)
    check_place(out, RUNS)
    loaded = load_dataset(
        wanted_data,
        train_images=settings.train_images,
        image_size=settings.image_size or None,
        skip_bad_images=skip_bad_images,
    )
    spec = ModelSpec(
        architecture=wanted_architecture,
        weight_bits=widths.weight_bits,
        act_bits=widths.act_bits,
        classes=loaded.classes,
        channels=loaded.channels,
        image_size=loaded.image_size,
        data=loaded.name,
        epsilon=_epsilon(settings, None),
        class_names=loaded.class_names,
        normalisation=chosen_normalisation(normalisation, channels=loaded.channels),
        layer_bits=layer_bits,
        feature_layer=feature_layer,
        shared_sum_scale=bool(settings.shared_sum_scale),
    )
    torch.manual_seed(seed)
    model = build_model(spec, own_model=own_model).to(place)
    return run_recipe(
        model,
        spec,
        loaded,
        settings,
        seed=seed,
        device=place,
        out=out,
        source=None,
        skip_bad_images=skip_bad_images,
    )


def harden_model(
    model: Path | str,
    *,
    bits: int | None = None,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    bits_per_layer: Path | None = None,
    normalisation: str | None = None,
    recipe: str = "odgq",
    overrides: tuple[str, ...] = (),
    data: str | None = None,
    architecture: str | None = None,
    own_model: str | None = None,
    feature_layer: str | None = None,
    epsilon: float | None = None,
    trust_pickle: bool = False,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Quantize a trained network and fine-tune it by a recipe (default: ODG-Q).

    Args:
        model: a robustq model file, or a bare float state dict (then ``data`` is needed).
        bits: width of weights and activations; None: the recipe's, else the model's own.
        weight_bits, act_bits, bits_per_layer: as :func:`train_model`.
        normalisation: that a state dict was trained with; robustq's model files say theirs.
        recipe, overrides, skip_bad_images, seed, device, out: as :func:`train_model`.
        data: over what the model says.
        architecture: of a state dict that is none of our networks: ``torchvision:NAME``.
        own_model: the ``module:function`` that builds the network, where it is the user's own.
        feature_layer: as :func:`train_model`; over what the model says.
        epsilon: radius of the threat model; None: the recipe's, else the model's, else 8/255.
        trust_pickle: load a ``torch.save(model)`` file too, which runs whatever code it names.

    Returns:
        As :func:`train_model`, and ``bits method``.

    Raises:
        RobustqError: bad input; nothing is written.
    """
    settings = with_teacher(read_recipe(recipe, overrides))
    if epsilon is not None:
        settings = replace(settings, epsilon=epsilon)
    place = pick_device(device)
    if out is not None:
        check_new_run(out)
    check_place(out, RUNS)
    options = WidthOptions(bits=bits, weight_bits=weight_bits, act_bits=act_bits, bits_per_layer=bits_per_layer)
    options.check()
    wanted_data = data or settings.data
    model = Path(model)
    weights, source = open_source(
        model,
        wanted_data,
        image_size=settings.image_size or None,
        architecture=chosen_architecture(architecture, own_model),
        own_model=own_model,
        trust_pickle=trust_pickle,
        skip_bad_images=skip_bad_images,
    )
    source = with_normalisation(source, normalisation, model)
    widths, layer_bits = options.resolve(settings, source=source)
    loaded = data_for(source, wanted_data, model, train_images=settings.train_images, skip_bad_images=skip_bad_images)
    if settings.method == "ptq":
        if widths.is_float:
            raise UsageError(f"recipe {recipe} at 32 bits leaves nothing to quantize; add --bits 4 (or 8, 3, 2)")
    elif widths.is_float and not source.widths.is_float:
        note("bits    32: the quantizers are dropped; what is trained on are the float weights behind them")
    spec = replace(
        source,
        weight_bits=widths.weight_bits,
        act_bits=widths.act_bits,
        data=loaded.name,
        epsilon=_epsilon(settings, source.epsilon),
        class_names=loaded.class_names,
        layer_bits=layer_bits,
        feature_layer=feature_layer or source.feature_layer,
        shared_sum_scale=(source.shared_sum_scale if settings.shared_sum_scale is None else settings.shared_sum_scale),
    )
    torch.manual_seed(seed)
    network = quantize(weights, source, spec, loaded, settings, device=place, path=model, own_model=own_model)
    finish = quantize_only if settings.method == "ptq" else run_recipe
    return finish(
        network,
        spec,
        loaded,
        settings,
        seed=seed,
        device=place,
        out=out,
        source=model,
        skip_bad_images=skip_bad_images,
    )


def quantize(
    weights: dict[str, torch.Tensor],
    source: ModelSpec,
    target: ModelSpec,
    data: Dataset,
    recipe: Recipe,
    *,
    device: torch.device,
    path: Path,
    own_model: str | None = None,
) -> nn.Module:
    """A network of ``target``'s widths with ``weights``, activation scales calibrated where they are not known yet, and
    always for post-training quantization, which has nothing else to set them.
    """
    model = build_model(target, own_model=own_model)
    same_quantizers = all(
        getattr(source, name) == getattr(target, name) for name in ("widths", "layer_bits", "shared_sum_scale")
    )
    if same_quantizers and recipe.method != "ptq":
        model.load_state_dict(weights)
        return model.to(device)
    load_weights(model, weights, path)
    model = model.to(device)
    calibrate_on(model, data, recipe, device=device, from_scratch=False)
    return model


def chosen_architecture(architecture: str | None, own_model: str | None) -> str | None:
    """The one architecture that two options name.

    Raises:
        UsageError: both do, or the user's own code is named as an architecture, which does not allow it to run.
    """
    if architecture is not None and own_model is not None:
        raise UsageError(f"--arch {architecture} and --model {own_model} both name the network; leave one out")
    if architecture is not None and runs_user_code(architecture):
        raise UsageError(f"--arch {architecture} names code of your own; give it as --model {architecture}")
    if own_model is not None and not runs_user_code(own_model):
        raise UsageError(f"--model {own_model} is not module:function; give --arch {own_model} for a known network")
    return own_model or architecture


def _epsilon(recipe: Recipe, known: float | None) -> float | None:
    if recipe.epsilon is not None:
        return recipe.epsilon
    if known is not None:
        return known
    return None if recipe.method in UNDEFENDED else DEFAULT_EPSILON
