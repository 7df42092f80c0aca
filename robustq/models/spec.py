"""ModelSpec: the description of a network in its model file, and the network built from it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from typing import Any

from torch import nn

from robustq.data.resize import is_resize
from robustq.errors import ModelFileError, UsageError
from robustq.models.fx.factory import (
    TIMM,
    TORCHVISION,
    check_permission,
    float_network,
    is_custom,
    plain_name,
    timm_names,
    torchvision_names,
)
from robustq.models.layers import Layers, Normalisation
from robustq.models.mixed_widths import set_layer_bits
from robustq.models.quant.quantizers import Widths
from robustq.models.resnet import ResNet


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to rebuild, harden, attack and export a network, in plain JSON types.

    Args:
        architecture: a key of :data:`ARCHITECTURES`, or of a custom network ``torchvision:NAME``, ``timm:NAME``
            or ``module:function``.
        weight_bits, act_bits: widths of the inner layers; 32 is float.
        classes, class_names, channels, image_size: shape of the task, and a name per class; images are square.
        data: the data set that the network was trained on, as the user named it (a name, a folder or an .npz file).
        epsilon: radius of the threat model that it was trained for, in [0, 1]; None when trained without one.
        normalisation: (mean, std) per channel that the model applies before the input quantizer, or None.
        layer_bits: (layer name, bits) of layers with a width of their own; a table in JSON.
        feature_layer: the layer whose input is the features to align; None: found on the network.
        shared_sum_scale: whether one quantizer serves both inputs of each residual sum.
        resize: how images of other sizes became square ones of ``image_size`` (:mod:`robustq.data.resize`); None: the
            images of the data were used as they are, or the file is older than this entry.
        skip_bad_images: whether unreadable image files of the data were left out.
    """

    architecture: str
    weight_bits: int
    act_bits: int
    classes: int
    channels: int
    image_size: int
    data: str
    epsilon: float | None
    class_names: tuple[str, ...]
    normalisation: Normalisation | None = None
    layer_bits: tuple[tuple[str, int], ...] = ()
    feature_layer: str | None = None
    shared_sum_scale: bool = False
    resize: str | None = None
    skip_bad_images: bool = False

    @property
    def widths(self) -> Widths:
        """The bit widths; UsageError for a width outside the table."""
        return Widths(self.weight_bits, self.act_bits)

    @property
    def label(self) -> str:
        """Short name, as in ``resnet20-w4a4``, ``resnet20-w4a4-mixed`` or ``mobilenet_v2-float``; good for a file."""
        width = "float" if self.widths.is_float else f"w{self.weight_bits}a{self.act_bits}"
        return f"{plain_name(self.architecture)}-{width}{'-mixed' if self.layer_bits else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as kept in model.pt and result.json."""
        return {**asdict(self), "layer_bits": dict(self.layer_bits)}

    @classmethod
    def from_dict(cls, stored: Any) -> ModelSpec:
        """The spec of a model file; ModelFileError if a key is missing or has another type."""
        if not isinstance(stored, dict):
            raise ModelFileError(f"spec is {type(stored).__name__}, not a table; this is not a robustq model file")
        missing = [one.name for one in fields(cls) if one.default is MISSING and one.name not in stored]
        if missing:
            raise ModelFileError(f"spec lacks {', '.join(missing)}; write the model file again with robustq")
        known = {one.name: stored[one.name] for one in fields(cls) if one.name in stored}
        for name, (is_valid, requirement) in _REQUIREMENTS.items():
            if name in known and not is_valid(known[name]):
                raise ModelFileError(f"spec says {name} = {known[name]!r}; it must be {requirement}")
        known["class_names"] = tuple(known["class_names"])
        known["layer_bits"] = tuple(known.get("layer_bits", {}).items())
        if known.get("normalisation") is not None:
            known["normalisation"] = _mean_and_std(known["normalisation"], known["channels"])
        return cls(**known)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_Requirement = tuple[Callable[[Any], bool], str]


def _size(largest: int) -> _Requirement:
    """Bounds the memory that a file of a few bytes can ask for."""
    return lambda value: _is_integer(value) and 1 <= value <= largest, f"an integer from 1 to {largest:,}"


_REQUIREMENTS: dict[str, _Requirement] = {
    "architecture": (_is_text, "a text"),
    **dict.fromkeys(("weight_bits", "act_bits"), _size(32)),
    **{"classes": _size(100_000), "channels": _size(4096), "image_size": _size(4096)},
    "data": (_is_text, "a text"),
    "epsilon": (lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "a number in [0, 1], or None"),
    "class_names": (lambda names: isinstance(names, list | tuple) and all(map(_is_text, names)), "a list of texts"),
    "layer_bits": (
        lambda bits: isinstance(bits, dict) and all(map(_is_text, bits)) and all(map(_is_integer, bits.values())),
        "a table of layer names and integers",
    ),
    "feature_layer": (lambda value: value is None or _is_text(value), "a layer's name"),
    **dict.fromkeys(("shared_sum_scale", "skip_bad_images"), (lambda value: isinstance(value, bool), "true or false")),
    "resize": (lambda value: value is None or is_resize(value), "squash, short-side or short-side:PIXELS"),
}


def _mean_and_std(stored: Any, channels: int) -> Normalisation:
    pair = stored if isinstance(stored, list | tuple) and len(stored) == 2 else ()
    rows = [row for row in pair if isinstance(row, list | tuple) and len(row) == channels and all(map(_is_number, row))]
    if len(rows) != 2:
        raise ModelFileError(f"spec says normalisation = {stored!r}; it must be (mean, std), {channels} numbers each")
    mean, std = (tuple(map(float, row)) for row in rows)
    return mean, std


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(ResNet, blocks=(1, 1, 1), widths=(16, 32, 64)),
    "resnet20": partial(ResNet, blocks=(3, 3, 3), widths=(16, 32, 64)),
    "resnet20-a": partial(ResNet, blocks=(3, 3, 3), widths=(16, 32, 64), shortcut="padding"),
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2), widths=(64, 128, 256, 512), large_images=True),
}
"""Architecture name -> constructor from (layers, channels=, classes=)."""


def check_architecture(name: str) -> str:
    """Return ``name`` if it is known or has the form of a custom network's; else UsageError with the nearest name."""
    if name not in ARCHITECTURES and not is_custom(name):
        if name in torchvision_names():
            raise UsageError(f"unknown architecture '{name}'; torchvision's is {TORCHVISION}{name}")
        if name.partition(".")[0] in timm_names():
            raise UsageError(f"unknown architecture '{name}'; timm's is {TIMM}{name}")
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown architecture '{name}'; known: {', '.join(ARCHITECTURES)} (nearest: {near})")
    return name


def build_model(spec: ModelSpec, *, folded: bool = False, custom_model: str | None = None) -> nn.Module:
    """A network with fresh weights, in eval mode.

    ``folded`` builds the form that :func:`robustq.models.quant.folding.fold` fills (not of custom networks);
    ``custom_model`` is the ``module:function`` whose code the user allows to run.

    Raises:
        ModelFileError: the network is the user's code, and ``custom_model`` does not allow it.
        UsageError: unknown architecture or width, a layer without that width, or a network that cannot be quantized.
    """
    check_permission(spec.architecture, custom_model)
    if spec.shared_sum_scale and spec.widths.is_binary:
        raise UsageError("1 bit has no blocks with shared_sum_scale; set it to false, or choose 8, 4, 3 or 2 bits")
    if is_custom(spec.architecture):
        model = _custom_network(spec)
    else:
        layers = Layers(
            spec.widths, folded=folded, normalisation=spec.normalisation, shared_sum_scale=spec.shared_sum_scale
        )
        construct = ARCHITECTURES[check_architecture(spec.architecture)]
        model = construct(layers, channels=spec.channels, classes=spec.classes)
    set_layer_bits(model, dict(spec.layer_bits))
    return model.eval()


def _custom_network(spec: ModelSpec) -> nn.Module:
    # Imported here: graphs load sympy, which takes as long as torch.
    from robustq.models.fx.build import quantized_graph

    graph: nn.Module = quantized_graph(
        float_network(spec.architecture, classes=spec.classes),
        name=spec.architecture,
        widths=spec.widths,
        classes=spec.classes,
        channels=spec.channels,
        image_size=spec.image_size,
        normalisation=spec.normalisation,
        feature_layer=spec.feature_layer,
        shared_sum_scale=spec.shared_sum_scale,
    )
    if 1 in dict(spec.layer_bits).values():
        raise UsageError(f"{spec.architecture}: 1 bit needs blocks made for it, as resnet20 has; choose 8, 4, 3 or 2")
    return graph
