"""What a model file says of its network besides the weights, and the network built from it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from robustq.errors import ModelFileError, UsageError
from robustq.models.layers import Layers
from robustq.models.quantizers import Widths
from robustq.models.resnet import ResNet


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to rebuild, harden, attack and export a network, in plain JSON types.

    Args:
        architecture: a key of :data:`ARCHITECTURES`.
        weight_bits, act_bits: widths of the inner layers; 32 is float.
        classes, channels, image_size: shape of the task; images are square.
        data: the data set the network was trained on, as the user named it (a name, a folder or an .npz file).
        epsilon: radius of the threat model it was trained for, in [0, 1]; None when it was trained without one.
        class_names: one name per class.
        normalisation: (mean, std) per channel applied inside the model before the input quantizer, or None.
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
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def widths(self) -> Widths:
        """The bit widths, checked against the table."""
        return Widths(self.weight_bits, self.act_bits)

    @property
    def label(self) -> str:
        """Short name, as in ``resnet20-w4a4`` or ``resnet20-float``."""
        width = "float" if self.widths.is_float else f"w{self.weight_bits}a{self.act_bits}"
        return f"{self.architecture}-{width}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as kept in model.pt and result.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Any) -> ModelSpec:
        """Rebuild a spec from what a model file holds.

        Raises:
            ModelFileError: a key is missing or has another type, usually because another program wrote the file.
        """
        if not isinstance(stored, dict):
            raise ModelFileError(f"spec is {type(stored).__name__}, not a table; this is not a robustq model file")
        missing = [field.name for field in fields(cls) if field.name not in stored and field.name != "normalisation"]
        if missing:
            raise ModelFileError(f"spec lacks {', '.join(missing)}; write the model file again with robustq")
        known = {field.name: stored[field.name] for field in fields(cls) if field.name in stored}
        for name in ("weight_bits", "act_bits", "classes", "channels", "image_size"):
            if not isinstance(known[name], int) or isinstance(known[name], bool) or known[name] < 1:
                raise ModelFileError(f"spec says {name} = {known[name]!r}; it must be a whole number of at least 1")
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
        return cls(**known)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mean_and_std(stored: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pair = stored if isinstance(stored, list | tuple) and len(stored) == 2 else ()
    rows = [row for row in pair if isinstance(row, list | tuple) and len(row) == channels and all(map(_is_number, row))]
    if len(rows) != 2:
        raise ModelFileError(f"spec says normalisation = {stored!r}; it must be (mean, std), {channels} numbers each")
    mean, std = (tuple(map(float, row)) for row in rows)
    return mean, std


Build = Callable[[Layers, int, int], nn.Module]

ARCHITECTURES: dict[str, Build] = {
    "resnet8": lambda layers, channels, classes: ResNet(layers, blocks=1, channels=channels, classes=classes),
    "resnet20": lambda layers, channels, classes: ResNet(layers, blocks=3, channels=channels, classes=classes),
}
"""Architecture name -> constructor from (layers, channels, classes)."""


def check_architecture(name: str) -> str:
    """Return ``name`` when it is known.

    Raises:
        UsageError: it is not; the nearest known name is given.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown architecture '{name}'; known: {', '.join(ARCHITECTURES)} (nearest: {near})")
    return name


def build_model(spec: ModelSpec, *, folded: bool = False) -> nn.Module:
    """A network with fresh weights, in eval mode.

    Args:
        spec: what to build.
        folded: build the BatchNorm-free form that :func:`robustq.models.folding.fold` fills.

    Raises:
        UsageError: unknown architecture or bit width.
    """
    layers = Layers(spec.widths, folded=folded)
    model = ARCHITECTURES[check_architecture(spec.architecture)](layers, spec.channels, spec.classes)
    return model.eval()
