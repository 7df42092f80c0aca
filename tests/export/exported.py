"""Small trained networks, folded and exported once per process, for the tests of the export stage."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from robustq.data import to_float
from robustq.export.formats import FORMATS, build
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec
from tests.models.small_nets import digits, small_spec, trained

SLOW_WIDTH = 3

QUANTIZED = [name for name, one in FORMATS.items() if not one.is_float]
RUNNABLE = [name for name in QUANTIZED if FORMATS[name].runs]
INTEGER = [name for name in QUANTIZED if FORMATS[name].promises_integers]


@dataclass(frozen=True)
class Net:
    """A ResNet, its folded twin (shared: do not change it), and uint8 images (N, 1, 8, 8)."""

    spec: ModelSpec
    model: nn.Module
    folded: nn.Module
    images: Tensor

    @property
    def x(self) -> Tensor:
        return to_float(self.images)


@functools.cache
def net(bits: int, *, architecture: str = "resnet8", seed: int = 0) -> Net:
    spec = small_spec(bits, architecture=architecture)
    model = trained(spec, seed=seed)
    return Net(spec, model, fold(model, spec), digits()[0][:200])


@functools.cache
def exported(bits: int, format_name: str, *, architecture: str = "resnet8") -> bytes:
    """The serialised ONNX model; parse it anew to change it."""
    made = net(bits, architecture=architecture)
    content: bytes = build(format_name, made.folded, made.spec).SerializeToString()
    return content


def parsed(bits: int, format_name: str) -> onnx.ModelProto:
    return onnx.load_from_string(exported(bits, format_name))


def written(folder: Path, bits: int, format_name: str, *, architecture: str = "resnet8") -> Path:
    path = folder / f"{architecture}-{bits}-{format_name}.onnx"
    path.write_bytes(exported(bits, format_name, architecture=architecture))
    return path


class Shifted(nn.Module):
    """Moves a few values just beyond the boundary below which the file has them: then both codes are as near."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        value = getattr(x, "value", x)
        position = value / self.step
        shift = position.floor() + 0.5 + 1e-4 - position
        # Only what the file rounds down.
        few = (position > 1) & (position - position.floor() < 0.5) & (torch.arange(value.shape[-1]) == 3)
        return value + torch.where(few, shift * self.step, 0.0)


def with_ties(folded: nn.Module) -> nn.Module:
    """A copy of the network in which some values behind the first layer sit on ties."""
    other: Any = copy.deepcopy(folded)
    relu: Any = other.get_submodule("relu")
    other.bn1 = Shifted(float(relu.act_quant.scale().detach()))
    copied: nn.Module = other
    return copied
