"""train and harden: from recipe, network and data to a run folder with best.pt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from robustq.data import load_dataset
from robustq.errors import UsageError
from robustq.files import check_output
from robustq.hardening.methods.registry import SETTINGS
from robustq.hardening.run_folder import RUNS, check_new_run
from robustq.models.fx.factory import is_custom, runs_user_code
from robustq.models.layers import parse_normalisation
from robustq.models.spec import ModelSpec, build_model, check_architecture
from robustq.progress import note
from robustq.recipe import DEFAULT_EPSILON, Recipe
from robustq.workflow.export_check import check_export, check_file_size
from robustq.workflow.float_check import count_float_network, note_normalisation
from robustq.workflow.job import Job, TrainResult
from robustq.workflow.quantize import quantize, quantize_only
from robustq.workflow.setup import data_for, open_source, pick_device, read_recipe, with_normalisation
from robustq.workflow.teacher import with_absolute_teacher
from robustq.workflow.training_run import check_job, run_recipe
from robustq.workflow.widths import WidthOptions
from robustq.zoo import model_path


def train_model(
    recipe: str = "natural",
    *,
    overrides: tuple[str, ...] = (),
    data: str | None = None,
    architecture: str | None = None,
    custom_model: str | None = None,
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
) -> TrainResult:
    """Train a network from scratch.

    Args:
        recipe: name or TOML file.
        overrides: ``key=value``, override the recipe.
        data, architecture, bits: override the recipe's; ``weight_bits`` and ``act_bits`` override ``bits``. An
            architecture may be ``torchvision:NAME`` or ``timm:NAME``.
        custom_model: a custom model, ``module:function``, instead of an architecture.
        feature_layer: the layer whose inputs are aligned, in a network that is not ours; None: the last global pooling.
        bits_per_layer: TOML file, layer name -> bits.
        normalisation: ``imagenet`` or ``MEAN/STD`` inside the model, before its input quantizer; None: none.
        skip_bad_images: skip image files that cannot be read, with a warning.
        seed: of initialisation, order, augmentation and the method's draws.
        device: ``cpu``, ``cuda``; None: a GPU if there is one.
        out: run folder; must not exist. None: ``runs/<name>``.

    Raises:
        RobustqError: bad input; nothing is written.
    """
    settings = with_absolute_teacher(read_recipe(recipe, overrides))
    if not settings.trains:
        raise UsageError(f"recipe {recipe} quantizes a trained network; use robustq harden MODEL --recipe {recipe}")
    place = pick_device(device)
    wanted_data = data or settings.data
    if wanted_data is None:
        raise UsageError(f"recipe {recipe} names no data; add --data NAME, FOLDER or FILE.npz")
    wanted_architecture = chosen_architecture(architecture, custom_model) or settings.architecture
    if wanted_architecture is None:
        raise UsageError(f"recipe {recipe} names no architecture; add --architecture resnet20")
    check_architecture(wanted_architecture)
    options = WidthOptions(bits=bits, weight_bits=weight_bits, act_bits=act_bits, bits_per_layer=bits_per_layer)
    options.check()
    widths, layer_bits = options.resolve(settings, source=None)
    if out is not None:
        check_new_run(out)
    check_output(out, RUNS)
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
        normalisation=None if normalisation is None else parse_normalisation(normalisation, channels=loaded.channels),
        layer_bits=layer_bits,
        feature_layer=feature_layer,
        shared_sum_scale=bool(settings.shared_sum_scale),
    )
    torch.manual_seed(seed)
    model = build_model(spec, custom_model=custom_model).to(place)
    job = Job(
        spec=spec,
        data=loaded,
        recipe=settings,
        seed=seed,
        device=place,
        out=out,
        source=None,
        skip_bad_images=skip_bad_images,
    )
    return run_recipe(model, job)


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
    custom_model: str | None = None,
    feature_layer: str | None = None,
    epsilon: float | None = None,
    weights: str | None = None,
    trust_pickle: bool = False,
    skip_bad_images: bool = False,
    checks: bool = True,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
) -> TrainResult:
    """Quantize a trained network and fine-tune it by a recipe (default: ODG-Q).

    Args:
        model: a robustq model file, or a bare float state dict (then ``data`` is needed).
        bits: of weights and activations; None: the recipe's, else the model's.
        weight_bits, act_bits, bits_per_layer: as :func:`train_model`.
        normalisation: of a state dict; model files of robustq contain theirs.
        recipe, overrides, skip_bad_images, seed, device, out: as :func:`train_model`.
        data: overrides the model's.
        architecture: of a state dict of none of our networks: ``torchvision:NAME`` or ``timm:NAME``.
        custom_model: the ``module:function`` that builds the network, if it is a custom model.
        feature_layer: as :func:`train_model`; overrides the model's.
        epsilon: radius of the threat model; None: the recipe's, else the model's, else 8/255.
        weights: key of the weights in a checkpoint that holds several, such as ``state_dict_ema``; None: the first of
            :data:`robustq.models.state_dict.WRAPPERS`.
        trust_pickle: also load a ``torch.save(model)`` file, which can run any code.
        checks: refuse a state dict whose float network answers near chance, or far below what its file states, and a
            custom network that cannot be exported.

    Returns:
        As :func:`train_model`, with ``bits`` and ``method``.

    Raises:
        RobustqError: bad input; nothing is written.
    """
    settings = with_absolute_teacher(read_recipe(recipe, overrides))
    if epsilon is not None:
        settings = replace(settings, epsilon=epsilon)
    place = pick_device(device)
    if out is not None:
        check_new_run(out)
    check_output(out, RUNS)
    options = WidthOptions(bits=bits, weight_bits=weight_bits, act_bits=act_bits, bits_per_layer=bits_per_layer)
    options.check()
    wanted_data = data or settings.data
    model = model_path(model)
    opened = open_source(
        model,
        wanted_data,
        image_size=settings.image_size or None,
        architecture=chosen_architecture(architecture, custom_model),
        custom_model=custom_model,
        weights=weights,
        trust_pickle=trust_pickle,
        skip_bad_images=skip_bad_images,
    )
    source = with_normalisation(opened.spec, normalisation, model)
    if opened.is_foreign and normalisation is None:
        note_normalisation(source.architecture)
    widths, layer_bits = options.resolve(settings, source=source)
    loaded = data_for(source, wanted_data, model, train_images=settings.train_images, skip_bad_images=skip_bad_images)
    if not settings.trains:
        if widths.is_float:
            raise UsageError(f"recipe {recipe} at 32 bits leaves nothing to quantize; add --bits 4 (or 8, 3, 2)")
    elif widths.is_float and not source.widths.is_float:
        note("bits    32: the quantizers are dropped and the float weights behind them are trained")
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
    job = Job(
        spec=spec,
        data=loaded,
        recipe=settings,
        seed=seed,
        device=place,
        out=out,
        source=model,
        skip_bad_images=skip_bad_images,
    )
    if checks and is_custom(spec.architecture):
        check_file_size(opened.state)
    network = quantize(opened.state, source, job, path=model, custom_model=custom_model)
    if settings.trains:
        check_job(network, job)  # before the float network is counted
    if checks and source.widths.is_float:
        with torch.random.fork_rng():  # the training draws what it would draw without this
            counted = count_float_network(
                opened.state,
                source,
                loaded,
                path=model,
                custom_model=custom_model,
                device=place,
                is_foreign=opened.is_foreign,
                stated=opened.stated,
            )
        job = replace(job, float_accuracy=counted)
    if checks and is_custom(spec.architecture):
        check_export(network, spec, loaded)
    return run_recipe(network, job) if settings.trains else quantize_only(network, job)


def chosen_architecture(architecture: str | None, custom_model: str | None) -> str | None:
    """The architecture of ``--arch`` or ``--model``.

    Raises:
        UsageError: both are given, or one holds a value of the other.
    """
    if architecture is not None and custom_model is not None:
        raise UsageError(f"--arch {architecture} and --model {custom_model} both set the network; leave one out")
    if architecture is not None and runs_user_code(architecture):
        raise UsageError(f"--arch {architecture} is a custom model; give it as --model {architecture}")
    if custom_model is not None and not runs_user_code(custom_model):
        raise UsageError(
            f"--model {custom_model} is not module:function; give --arch {custom_model} for a known network"
        )
    return custom_model or architecture


def _epsilon(recipe: Recipe, known: float | None) -> float | None:
    if recipe.epsilon is not None:
        return recipe.epsilon
    if known is not None:
        return known
    return DEFAULT_EPSILON if SETTINGS[recipe.method].defends else None
