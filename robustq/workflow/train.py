"""train: from recipe and data to a run folder with best.pt."""

from __future__ import annotations

from pathlib import Path

import torch

from robustq.data import load_dataset
from robustq.errors import UsageError
from robustq.files import check_output, optional_path
from robustq.hardening.methods.registry import SETTINGS
from robustq.hardening.run_folder import RUNS, check_new_run
from robustq.models.fx.factory import runs_user_code
from robustq.models.layers import parse_normalisation
from robustq.models.spec import ModelSpec, build_model, check_architecture
from robustq.recipe import DEFAULT_EPSILON, Recipe
from robustq.workflow.job import Job, TrainResult
from robustq.workflow.setup import pick_device, read_recipe
from robustq.workflow.teacher import with_absolute_teacher
from robustq.workflow.training_run import run_recipe
from robustq.workflow.widths import WidthOptions


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
    bits_per_layer: Path | str | None = None,
    normalisation: str | None = None,
    resize: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
    out: Path | str | None = None,
) -> TrainResult:
    """Train a network from scratch by a recipe, and count its accuracy on the test images.

    Args:
        recipe: name of a recipe (``robustq recipes``) or path of a .toml file.
        overrides: texts ``key=value`` that override keys of the recipe, such as ``"epochs=10"``.
        data: data set: a known name (``"cifar10"``), a folder of images or an .npz file; None: the recipe's.
        architecture: a known architecture (``"resnet20"``) or ``torchvision:NAME`` or ``timm:NAME``; None: the
            recipe's.
        custom_model: ``module:function`` that returns the network, instead of an architecture; its code is run.
        feature_layer: name of the layer whose inputs ODG-Q aligns, in a network that is not ours; None: the last global
            pooling.
        bits: width of weights and activations in bits: 8, 4, 3, 2, 1, or 32 for float; None: the recipe's, else 32.
        weight_bits, act_bits: widths of weights and of activations in bits; override ``bits``.
        bits_per_layer: path of a TOML file of widths of single layers, layer name -> bits.
        normalisation: ``"imagenet"`` or ``"MEAN/STD"`` (``"0.49,0.48,0.45/0.25,0.24,0.26"``, in units of pixel / 255):
            becomes the first layer of the network; None: none.
        resize: how images of a folder become square: ``"short-side"``, ``"short-side:PIXELS"`` or ``"squash"``; None:
            as ``"short-side"``.
        skip_bad_images: leave out image files that cannot be read, with a warning, instead of refusing the folder.
        seed: of initialisation, order, augmentation and the method's draws.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"``; None: a GPU if there is one.
        out: path of the new run folder; None: ``runs/<network>-<method>``, numbered if it exists.

    Returns:
        accuracies as fractions with 95% intervals, and the paths of the run folder and of its best.pt
        (``result["checkpoint"]``).

    Raises:
        UsageError: an unknown architecture, width or device, or a value that is missing.
        RecipeError: an unknown recipe or key, or a value out of range.
        DataError: data that are missing, broken or unfit.
        OutputExistsError: ``out`` exists.
        OutOfMemoryError: a batch does not fit; one that does is named.
        NotFiniteError: NaN or Inf in training; saved states are kept.
        RunStoppedError: stopped by Ctrl-C; the command that resumes the run is named.
    """
    settings, out = with_absolute_teacher(read_recipe(recipe, overrides)), optional_path(out)
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
        resize=resize,
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
        epsilon=training_epsilon(settings, None),
        class_names=loaded.class_names,
        normalisation=None if normalisation is None else parse_normalisation(normalisation, channels=loaded.channels),
        layer_bits=layer_bits,
        feature_layer=feature_layer,
        shared_sum_scale=bool(settings.shared_sum_scale),
        resize=loaded.resize,
        skip_bad_images=loaded.skip_bad_images,
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
    )
    return run_recipe(model, job)


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


def training_epsilon(recipe: Recipe, known: float | None) -> float | None:
    """The radius of a run: the recipe's, else ``known``, else the default of methods that defend."""
    if recipe.epsilon is not None:
        return recipe.epsilon
    if known is not None:
        return known
    return DEFAULT_EPSILON if SETTINGS[recipe.method].defends else None
