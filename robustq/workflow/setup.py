"""Inputs of a job: device, recipe, data, starting model, normalisation and bit widths."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from robustq.checkpoint import check_finite, describe_state_dict, load_model
from robustq.data import DATASET_NAMES, Augment, Dataset, load_dataset, to_float, usual_augment
from robustq.errors import DataError, ModelFileError, RecipeError, UsageError
from robustq.hardening.methods.registry import SETTINGS
from robustq.hardening.precision import forbid_tf32
from robustq.memory import largest_that_fits, within_memory
from robustq.models.batch_norm import needs_two_images
from robustq.models.fx.factory import is_custom
from robustq.models.layers import parse_normalisation
from robustq.models.quant.quantizers import BITS, FLOAT_BITS
from robustq.models.spec import ARCHITECTURES, ModelSpec, check_architecture
from robustq.models.state_dict import find_state_dicts, with_usual_names
from robustq.progress import detail, note
from robustq.recipe import DEFAULT_EPSILON, Recipe, format_epsilon, load_recipe
from robustq.recipe.schema import Vocabulary
from robustq.safetensors_file import read_metadata
from robustq.torch_file import read_checkpoint
from robustq.workflow.float_check import stated_accuracy

T = TypeVar("T")


def pick_device(name: str | None) -> torch.device:
    """The device ``name``, by default a GPU if there is one; TF32 is switched off on it.

    Raises:
        UsageError: an unknown name, or a missing GPU.
    """
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{name}'; give cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"device '{name}' is not there ({count} GPUs found); use --device cpu")
        forbid_tf32()
    elif device.type != "cpu":
        raise UsageError(f"device '{name}' is not supported; give cpu, cuda or cuda:0")
    return device


def radius_of(spec: ModelSpec, epsilon: float | None = None) -> float:
    """``epsilon``, by default the radius that the model was trained for, else 8/255."""
    known = DEFAULT_EPSILON if spec.epsilon is None else spec.epsilon
    return known if epsilon is None else epsilon


def read_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe with every key and value checked: see :func:`robustq.recipe.load_recipe`."""
    return load_recipe(name, overrides, vocabulary=Vocabulary(SETTINGS, tuple(ARCHITECTURES), BITS))


def log_evaluation(
    spec: ModelSpec, *, data: Dataset, images: int, epsilon: float, seed: int, device: torch.device
) -> None:
    """Print the settings of an attack with --verbose."""
    detail(f"setting {spec.label} on {data.name}: {images:,} of {len(data.test):,} test images")
    detail(f"setting epsilon {format_epsilon(epsilon)} ({epsilon:.6f}) · seed {seed} · {device}")


def versions() -> dict[str, str]:
    """Versions that results depend on."""
    names = ("robustq", "torch", "brevitas", "onnx", "onnxruntime", "qonnx")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def augmentation(recipe: Recipe, data: Dataset) -> Augment:
    """The recipe's augmentation, completed by :func:`robustq.data.usual_augment`; RecipeError if a crop could contain
    padding only.
    """
    usual = usual_augment(data.name, data.image_size)
    padding = usual.crop_padding if recipe.crop_padding is None else recipe.crop_padding
    if padding >= data.image_size:
        raise RecipeError(
            f"crop_padding = {padding} is no less than the side of {data.name}'s images ({data.image_size} pixels), so "
            "that a crop could miss the image; give less"
        )
    return Augment(crop_padding=padding, flip=usual.flip if recipe.flip is None else recipe.flip)


def data_for(
    spec: ModelSpec,
    data: str | None,
    path: Path,
    *,
    train_images: int = 0,
    resize: str | None = None,
    skip_bad_images: bool = False,
) -> Dataset:
    """``data``, by default the data of the model; folders are read as the model's were: at its image size, resized as
    its spec says, and without unreadable files where these were skipped before.

    ``path`` of the model is for messages; ``train_images`` limits the training part (0: all); ``resize`` overrides the
    model's.

    Raises:
        DataError: as :func:`robustq.data.load_dataset`; the data are missing; classes, channels or image size differ.
    """
    name = data or spec.data
    if data is None and name not in DATASET_NAMES and not os.path.exists(name):
        raise DataError(f"{path} was made on {name}, which is missing; name its new place with --data NEW")
    resized = name == "imagenet" or Path(name).is_dir()
    loaded = load_dataset(
        name,
        train_images=train_images,
        image_size=spec.image_size if resized else None,
        resize=resize or (spec.resize if resized else None),
        skip_bad_images=skip_bad_images or spec.skip_bad_images,
    )
    check_fit(spec, loaded, path)
    return loaded


def check_fit(spec: ModelSpec, data: Dataset, path: Path) -> None:
    """DataError if classes, channels or image size are not the model's."""
    for what, wanted, got in (
        ("classes", spec.classes, data.classes),
        ("channels", spec.channels, data.channels),
        ("pixels a side", spec.image_size, data.image_size),
    ):
        if wanted != got:
            raise DataError(
                f"{path} was made for {wanted} {what}, {data.name} has {got}; give the data it was trained on"
            )


def check_last_batch(model: nn.Module, spec: ModelSpec, images: int, recipe: Recipe) -> None:
    """RecipeError for a last batch of one image, if BatchNorm would get one value per channel.

    Dropping that image instead would change every other run.
    """
    shape = (spec.channels, spec.image_size, spec.image_size)
    if images % recipe.batch_size == 1 and needs_two_images(model, shape):
        raise RecipeError(
            f"batch_size = {recipe.batch_size} leaves a last batch of one image ({images} training images), which "
            f"BatchNorm cannot normalise at {spec.image_size}x{spec.image_size} pixels; add --set batch_size="
            f"{recipe.batch_size + 1 if images % (recipe.batch_size + 1) != 1 else recipe.batch_size + 2}"
        )


class Source(NamedTuple):
    """The network that harden starts from."""

    state: dict[str, torch.Tensor]
    spec: ModelSpec
    is_foreign: bool = False  # from a state dict: its normalisation may be unknown
    stated: float | None = None  # accuracy in the checkpoint, as a fraction
    data: Dataset | None = None  # that told the classes of a state dict
    network: nn.Module | None = None  # of a model file, with the state


def open_source(
    path: Path,
    data: str | None,
    *,
    image_size: int | None = None,
    train_images: int = 0,
    architecture: str | None = None,
    custom_model: str | None = None,
    weights: str | None = None,
    trust_pickle: bool = False,
    resize: str | None = None,
    skip_bad_images: bool = False,
) -> Source:
    """Weights and spec of a robustq model file or of a bare float state dict.

    A state dict may be part of a training checkpoint (``{"state_dict": ...}``). For a known architecture its names
    become torchvision's; else they stay as in the file.

    Args:
        data: name, folder or file, needed for a state dict; None: as in the model file.
        image_size: image side for a folder and a state dict.
        train_images: limit of the training part that is loaded for a state dict; 0: all.
        architecture: of a state dict whose names do not tell it; a model file must have the same.
        custom_model, weights, trust_pickle, resize, skip_bad_images: as :func:`robustq.workflow.harden.harden_model`.

    Raises:
        ModelFileError: as :func:`robustq.checkpoint.load_model`; a bare state dict without ``data``, or with NaN.
        DataError: the data do not fit a bare state dict.
    """
    content = read_checkpoint(path, trust_pickle=trust_pickle)
    sets = find_state_dicts(content)
    if not sets:
        model, spec, _ = load_model(path, custom_model=custom_model)
        if architecture is not None and architecture != spec.architecture:
            raise UsageError(
                f"{path}: holds a {spec.architecture}, not a {architecture}; leave --arch {architecture} out"
            )
        return Source(model.state_dict(), spec, network=model)
    state = _chosen_weights(sets, weights, path)
    chosen = custom_model or architecture
    if chosen is not None:
        check_architecture(chosen)
    if chosen is None or not is_custom(chosen):
        state = with_usual_names(state)
    found, classes, channels = describe_state_dict(state, path) if chosen is None else (chosen, None, None)
    check_finite(state, path)
    if data is None:
        shown = found if classes is None else f"{found}, {classes} classes"
        raise ModelFileError(
            f"{path}: is a bare state dict ({shown}) that does not name its training data; "
            "add --data NAME, FOLDER or FILE.npz"
        )
    loaded = load_dataset(
        data, train_images=train_images, image_size=image_size, resize=resize, skip_bad_images=skip_bad_images
    )
    spec = ModelSpec(
        found,
        FLOAT_BITS,
        FLOAT_BITS,
        loaded.classes if classes is None else classes,
        loaded.channels if channels is None else channels,
        loaded.image_size,
        loaded.name,
        None,
        loaded.class_names,
        resize=loaded.resize,
        skip_bad_images=loaded.skip_bad_images,
    )
    check_fit(spec, loaded, path)
    return Source(state, spec, is_foreign=True, stated=stated_accuracy(content, read_metadata(path)), data=loaded)


def _chosen_weights(
    sets: dict[str, dict[str, torch.Tensor]], wanted: str | None, path: Path
) -> dict[str, torch.Tensor]:
    """One of the sets of weights of a checkpoint, by default the first; a note names what was chosen among several."""
    if wanted is not None and wanted not in sets:
        known = ", ".join(filter(None, sets)) or "weights without a key"
        raise UsageError(f"--weights {wanted}: {path} holds {known}")
    key = next(iter(sets)) if wanted is None else wanted
    if wanted is None and len(sets) > 1:
        others = " or ".join(f"--weights {name}" for name in sets if name != key)
        note(f"weights {key} of {path.name}; the file holds others too: {others}")
    kinds = {str(one.dtype).removeprefix("torch.") for one in sets[key].values() if one.is_floating_point()}
    if kinds & {"float16", "bfloat16"}:
        note(f"weights {' and '.join(sorted(kinds))} in {path.name}; float32 from here on")
    return sets[key]


def with_normalisation(source: ModelSpec, text: str | None, path: Path) -> ModelSpec:
    """``source`` with the normalisation ``text`` of ``--normalisation``, which its weights were trained with.

    UsageError if that is no normalisation, or contradicts the model file.
    """
    wanted = source.normalisation if text is None else parse_normalisation(text, channels=source.channels)
    if wanted == source.normalisation:
        return source
    if source.normalisation is not None or not source.widths.is_float:
        known = "none" if source.normalisation is None else f"{source.normalisation}"
        raise UsageError(f"{path} was trained with the normalisation {known}; leave --normalisation {text} out")
    return replace(source, normalisation=wanted)


ATTACKED_AT_ONCE = 256  # images per call of an attack, as in evaluation/run_suite.py


def with_images(
    work: Callable[[], T], *, model: Callable[[Tensor], Tensor] | None, images: Tensor, device: torch.device
) -> T:
    """``work``, which takes gradients of ``model`` (None: of nothing) at uint8 ``images`` (N, C, H, W).

    Raises:
        OutOfMemoryError: names a number of images that fits, found by trying.
    """
    if model is None:
        return work()
    at_once = min(len(images), ATTACKED_AT_ONCE)

    def gradient(count: int) -> None:
        x = to_float(images[: count + count // 4].to(device)).requires_grad_()
        torch.autograd.grad(model(x).logsumexp(dim=1).sum(), x)

    def advice() -> str:
        fitting = largest_that_fits(gradient, too_large=at_once)
        remedy = "not even one image fits; take a machine with more memory"
        if fitting is not None:
            remedy = f"a batch of {fitting} fits: --images {fitting}"
        return f"out of memory on {device} with {len(images):,} images; {remedy}"

    return within_memory(work, advice, trial=lambda: gradient(at_once))
