"""The form in which a file takes images: layout, size, and range of the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import TensorProto
from torch import Tensor

from robustq.errors import ModelFileError, UsageError
from robustq.models.layers import Normalisation, parse_normalisation
from robustq.twin.gradients import rounded
from robustq.twin.graph import Graph

LAYOUTS = ("nchw", "nhwc")
_CHANNELS = (1, 3, 4)
SPEC = "robustq.spec"
"""Metadata of a file of robustq: its spec. Such a file takes [0, 1] as float, or uint8."""


@dataclass(frozen=True)
class ImageForm:
    """The input of a file.

    Args:
        layout: one of :data:`LAYOUTS`.
        channels, image_size: of the images; None where the file leaves them open. Images are square.
        pixels: whether the file takes pixels 0 to 255, as uint8 or as float numbers, instead of [0, 1].
        normalisation: (mean, std) that the file expects to be applied to [0, 1], or None.
        single: whether the file takes one image at a time.
    """

    layout: str
    channels: int | None
    image_size: int | None
    pixels: bool
    normalisation: Normalisation | None
    single: bool

    def apply(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> the file's input in float32, differentiable."""
        if self.pixels:
            levels = 255.0 * x
            x = rounded(levels, levels.detach().round())
        if self.normalisation is not None:
            mean, std = (
                torch.tensor(row, dtype=x.dtype, device=x.device).reshape(-1, 1, 1) for row in self.normalisation
            )
            x = (x - mean) / std
        return x.permute(0, 2, 3, 1) if self.layout == "nhwc" else x


def find_form(path: Path, graph: Graph, *, pixels: str | None = None, layout: str | None = None) -> ImageForm:
    """The input form of a file, from its type, shape and metadata, completed by options.

    Args:
        path: for messages.
        graph: of the file.
        pixels: ``unit`` ([0, 1]), ``uint8`` (0 to 255), ``imagenet`` or ``MEAN/STD``; None: as the file says.
        layout: one of :data:`LAYOUTS`; None: as its shape says.

    Raises:
        UsageError: the file does not say it and no option does, or an option contradicts the file.
        ModelFileError: images that are not square.
    """
    layout = _layout(path, graph, layout)
    order = (1, 2, 3) if layout == "nchw" else (3, 1, 2)
    channels, height, width = (graph.input_shape[place] for place in order)
    if height is not None and width is not None and height != width:
        raise ModelFileError(f"{path}: takes images of {height} x {width} pixels; only square images are supported")
    integers = graph.input_type == TensorProto.UINT8
    if pixels is None and not integers and SPEC not in graph.metadata:
        raise UsageError(
            f"{path}: does not say how it takes pixels; add --input unit ([0, 1]), uint8 (0 to 255), imagenet or "
            "MEAN/STD, as it was trained"
        )
    if pixels not in (None, "uint8") and integers:
        raise UsageError(f"{path}: takes uint8 pixels; leave --input {pixels} out")
    normalisation = None
    if pixels not in (None, "uint8", "unit"):
        if channels is None:
            channels = 3
        normalisation = parse_normalisation(pixels, channels=channels)
    single = graph.input_shape[0] == 1
    return ImageForm(layout, channels, height or width, integers or pixels == "uint8", normalisation, single)


def _layout(path: Path, graph: Graph, given: str | None) -> str:
    _, first, _, last = graph.input_shape
    if given is not None:
        if given not in LAYOUTS:
            raise UsageError(f"layout '{given}' is unknown; give {' or '.join(LAYOUTS)}")
        return given
    fits = [name for name, size in (("nchw", first), ("nhwc", last)) if size in _CHANNELS]
    if len(fits) == 1:
        return fits[0]
    raise UsageError(f"{path}: its input {graph.input_shape} does not show its layout; add --layout nchw or nhwc")
