"""What every job settles first: the device, the data behind a model, and what this run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from robustq.checkpoint import describe_state_dict, is_bare_state_dict, load_model, read_checkpoint
from robustq.data import Augment, Dataset, load_dataset
from robustq.errors import DataError, ModelFileError, UsageError
from robustq.models.quantizers import FLOAT_BITS
from robustq.models.spec import ModelSpec
from robustq.recipe import Recipe

DEFAULT_EPSILON = 8 / 255
"""Radius when neither option, recipe nor model says one: the usual one for CIFAR-10."""

_MIRRORED = frozenset({"cifar10", "cifar100", "fashion-mnist", "imagenet"})
"""Named sets whose pictures may be mirrored."""


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``, by default a GPU where there is one.

    Raises:
        UsageError: an unknown name, or a GPU that is not there.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{name}'; give cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"device '{name}' is not there ({count} GPUs found); use --device cpu")
    elif device.type != "cpu":
        raise UsageError(f"device '{name}' is not supported; give cpu, cuda or cuda:0")
    return device


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("robustq", "torch", "brevitas", "onnx", "onnxruntime", "qonnx")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def augmentation(recipe: Recipe, data: Dataset) -> Augment:
    """The recipe's augmentation, gaps filled by the data: crops padded by an eighth of the side, flips of photographs.

    Digits and the user's own data are not mirrored: a mirrored digit is another sign.
    """
    padding = data.image_size // 8 if recipe.crop_padding is None else recipe.crop_padding
    flip = data.name in _MIRRORED if recipe.flip is None else recipe.flip
    return Augment(crop_padding=padding, flip=flip)


def data_for(spec: ModelSpec, data: str | None, path: Path, *, train_images: int = 0) -> Dataset:
    """The data a model was made for, or ``data`` in its place; folders are read at the model's image size.

    Raises:
        DataError: as :func:`robustq.data.load_dataset`; classes, channels or image size differ from the model's.
    """
    name = data or spec.data
    resized = name == "imagenet" or Path(name).is_dir()
    loaded = load_dataset(name, train_images=train_images, image_size=spec.image_size if resized else None)
    check_fit(spec, loaded, path)
    return loaded


def check_fit(spec: ModelSpec, data: Dataset, path: Path) -> None:
    """Refuse data of another shape than the model's.

    Raises:
        DataError: classes, channels or image size differ.
    """
    for what, wanted, got in (
        ("classes", spec.classes, data.classes),
        ("channels", spec.channels, data.channels),
        ("pixels a side", spec.image_size, data.image_size),
    ):
        if wanted != got:
            raise DataError(
                f"{path} was made for {wanted} {what}, {data.name} has {got}; give the data it was trained on"
            )


def open_source(
    path: Path, data: str | None, *, image_size: int | None = None
) -> tuple[dict[str, torch.Tensor], ModelSpec]:
    """Weights and spec of a robustq model file or of a bare float state dict (which needs ``data``).

    A state dict does not say its image size: folders of images are read at ``image_size``.

    Raises:
        ModelFileError: as :func:`robustq.checkpoint.load_model`; a bare state dict without ``data``.
        DataError: the data do not fit a bare state dict.
    """
    content = read_checkpoint(path)
    if not is_bare_state_dict(content):
        model, spec, _ = load_model(path)
        return model.state_dict(), spec
    architecture, classes, channels = describe_state_dict(content, path)
    if data is None:
        raise ModelFileError(
            f"{path}: is a bare state dict ({architecture}, {classes} classes) and does not say which data it was "
            "trained on; add --data NAME, FOLDER or FILE.npz"
        )
    loaded = load_dataset(data, image_size=image_size)
    spec = ModelSpec(
        architecture,
        FLOAT_BITS,
        FLOAT_BITS,
        classes,
        channels,
        loaded.image_size,
        loaded.name,
        None,
        loaded.class_names,
    )
    check_fit(spec, loaded, path)
    return content, spec
