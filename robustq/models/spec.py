"""What a model file says of its network besides the weights, and the network built from it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from typing import Any

from torch import nn

from robustq.errors import ModelFileError, UsageError
from robustq.models.fx.factory import TORCHVISION, check_permission, float_network, is_custom
from robustq.models.layers import Layers
from robustq.models.mixed_widths import set_layer_bits
from robustq.models.normalise import Normalisation
from robustq.models.quant.quantizers import Widths
from robustq.models.resnet import ResNet


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to rebuild, harden, attack and export a network, in plain JSON types.

    Args:
        architecture: a key of :data:`ARCHITECTURES`, or ``torchvision:NAME``, or ``module:function`` of the user's own.
        weight_bits, act_bits: widths of the inner layers; 32 is float.
        classes, channels, image_size: shape of the task; images are square.
        data: the data set the network was trained on, as the user named it (a name, a folder or an .npz file).
        epsilon: radius of the threat model it was trained for, in [0, 1]; None when it was trained without one.
        class_names: one name per class.
        normalisation: (mean, std) per channel applied inside the model before the input quantizer, or None.
        layer_bits: (layer name, bits) of layers whose width is their own; a table in JSON.
        feature_layer: the layer that the features enter which are aligned; None: found on the network.
        shared_sum_scale: whether one quantizer serves both inputs of each residual sum.
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

    @property
    def widths(self) -> Widths:
        """The bit widths, checked against the table."""
        return Widths(self.weight_bits, self.act_bits)

    @property
    def label(self) -> str:
        """Short name, as in ``resnet20-w4a4``, ``resnet20-w4a4-mixed`` or ``mobilenet_v2-float``; good for a file."""
        width = "float" if self.widths.is_float else f"w{self.weight_bits}a{self.act_bits}"
        name = self.architecture.removeprefix(TORCHVISION).replace(":", ".")
        return f"{name}-{width}{'-mixed' if self.layer_bits else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as kept in model.pt and result.json."""
        return {**asdict(self), "layer_bits": dict(self.layer_bits)}

    @classmethod
    def from_dict(cls, stored: Any) -> ModelSpec:
        """Rebuild a spec from what a model file holds.

        Raises:
            ModelFileError: a key is missing or has another type, usually because another program wrote the file.
        """
        if not isinstance(stored, dict):
            raise ModelFileError(f"spec is {type(stored).__name__}, not a table; this is not a robustq model file")
        needed = [one.name for one in fields(cls) if one.default is MISSING]
        missing = [name for name in needed if name not in stored]
        if missing:
            raise ModelFileError(f"spec lacks {', '.join(missing)}; write the model file again with robustq")
        known = {one.name: stored[one.name] for one in fields(cls) if one.name in stored}
        for name in ("weight_bits", "act_bits", "classes", "channels", "image_size"):
            if not isinstance(known[name], int) or isinstance(known[name], bool) or known[name] < 1:
                raise ModelFileError(f"spec says {name} = {known[name]!r}; it must be an integer of at least 1")
        if not isinstance(known["architecture"], str) or not isinstance(known["data"], str):
            raise ModelFileError("spec names no architecture or no data set; write the model file again with robustq")
        epsilon = known["epsilon"]
        if epsilon is not None and not (_is_number(epsilon) and 0.0 <= epsilon <= 1.0):
            raise ModelFileError(f"spec says epsilon = {epsilon!r}; it must be a number in [0, 1], or None")
        names = known["class_names"]
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ModelFileError(f"spec says class_names = {names!r}; they must be a list of texts")
        known["class_names"] = tuple(names)
        if known.get("normalisation") is not None:
            known["normalisation"] = _mean_and_std(known["normalisation"], known["channels"])
        own = known.get("layer_bits", {})
        if not isinstance(own, dict) or not all(isinstance(key, str) and _is_bits(own[key]) for key in own):
            raise ModelFileError(f"spec says layer_bits = {own!r}; it must map layer names to whole numbers")
        known["layer_bits"] = tuple(own.items())
        if not isinstance(known.get("feature_layer"), str | None):
            raise ModelFileError(f"spec says feature_layer = {known['feature_layer']!r}; it must be a layer's name")
        shared = known.get("shared_sum_scale", False)
        if not isinstance(shared, bool):
            raise ModelFileError(f"spec says shared_sum_scale = {shared!r}; it must be true or false")
        return cls(**known)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_bits(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mean_and_std(stored: Any, channels: int) -> Normalisation:
    pair = stored if isinstance(stored, list | tuple) and len(stored) == 2 else ()
    rows = [row for row in pair if isinstance(row, list | tuple) and len(row) == channels and all(map(_is_number, row))]
    if len(rows) != 2:
        raise ModelFileError(f"spec says normalisation = {stored!r}; it must be (mean, std), {channels} numbers each")
    mean, std = (tuple(map(float, row)) for row in rows)
    return mean, std


Build = Callable[[Layers, int, int], nn.Module]


def _resnet(layers: Layers, channels: int, classes: int, **shape: Any) -> nn.Module:
    return ResNet(layers, channels=channels, classes=classes, **shape)


ARCHITECTURES: dict[str, Build] = {
    "resnet8": partial(_resnet, blocks=(1, 1, 1), widths=(16, 32, 64)),
    "resnet20": partial(_resnet, blocks=(3, 3, 3), widths=(16, 32, 64)),
    "resnet20-a": partial(_resnet, blocks=(3, 3, 3), widths=(16, 32, 64), shortcut="padding"),
    "resnet18": partial(_resnet, blocks=(2, 2, 2, 2), widths=(64, 128, 256, 512), large_images=True),
}
"""Architecture name -> constructor from (layers, channels, classes)."""


def check_architecture(name: str) -> str:
    """Return ``name`` when it is known, or names a network that is not ours.

    Raises:
        UsageError: neither; the nearest known name is given.
    """
    if name not in ARCHITECTURES and not is_custom(name):
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown architecture '{name}'; known: {', '.join(ARCHITECTURES)} (nearest: {near})")
    return name


def build_model(spec: ModelSpec, *, folded: bool = False, own_model: str | None = None) -> nn.Module:
    """A network with fresh weights, in eval mode.

    Args:
        spec: what to build.
        folded: build the BatchNorm-free form that :func:`robustq.models.quant.folding.fold` fills (our networks only).
        own_model: the ``module:function`` whose code the user allows to run.

    Raises:
        ModelFileError: the network is the user's own code, and ``own_model`` does not allow it.
        UsageError: unknown architecture or bit width, a layer that cannot have the width asked for, or a network that
            cannot be quantized.
    """
    check_permission(spec.architecture, own_model)
    if spec.shared_sum_scale and spec.widths.is_binary:
        raise UsageError("1 bit has no blocks with shared_sum_scale; set it to false, or choose 8, 4, 3 or 2 bits")
    if is_custom(spec.architecture):
        # Not before it is needed: reading graphs loads sympy, which takes as long as torch.
        from robustq.models.fx.build import quantized_graph

        graph = quantized_graph(
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
            raise UsageError(
                f"{spec.architecture}: 1 bit needs blocks made for it, as resnet20 has; choose 8, 4, 3 or 2"
            )
        set_layer_bits(graph, dict(spec.layer_bits))
        graph.eval()
        network: nn.Module = graph
        return network
    layers = Layers(
        spec.widths, folded=folded, normalisation=spec.normalisation, shared_sum_scale=spec.shared_sum_scale
    )
    model = ARCHITECTURES[check_architecture(spec.architecture)](layers, spec.channels, spec.classes)
    set_layer_bits(model, dict(spec.layer_bits))
    return model.eval()
