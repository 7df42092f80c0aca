"""The form in which a file takes images: layout, size, and range of the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from robustq.errors import ModelFileError, UsageError
from robustq.models.layers import Normalisation, parse_normalisation
from robustq.twin.gradients import rounded
from robustq.twin.graph import Graph, Node, array

LAYOUTS = ("nchw", "nhwc")
_CHANNELS = (1, 3, 4)
SPEC = "robustq.spec"
"""Metadata of a file of robustq: its spec. Such a file takes [0, 1] as float, or uint8."""

NOMINAL_RANGES = {"Normalized_0_1": "unit", "NominalRange_0_255": "uint8", "Normalized_1_1": "0.5/0.5"}
"""Image.NominalPixelRange of ONNX' metadata for images -> the same as ``--input`` takes it."""

_FIRST_NODES = 4
"""Nodes that may lie between the images and the one whose constants show their range."""


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
    """The input form of a file, from its type, shape, metadata and first nodes, completed by options.

    Args:
        path: for messages.
        graph: of the file.
        pixels: ``unit`` ([0, 1]), ``uint8`` (0 to 255), ``imagenet`` or ``MEAN/STD``; None: as the file says.
        layout: one of :data:`LAYOUTS`; None: as its shape says.

    Raises:
        UsageError: the file does not say it and no option does, or an option contradicts the file.
        ModelFileError: images that are not square.
    """
    stated = stated_form(graph)
    layout = _layout(path, graph, layout, stated)
    order = (1, 2, 3) if layout == "nchw" else (3, 1, 2)
    channels, height, width = (graph.input_shape[place] for place in order)
    if height is not None and width is not None and height != width:
        raise ModelFileError(f"{path}: takes images of {height} x {width} pixels; only square images are supported")
    integers = graph.input_type == TensorProto.UINT8
    if pixels not in (None, "uint8") and integers:
        raise UsageError(f"{path}: takes uint8 pixels; leave --input {pixels} out")
    pixels = pixels or stated.pixels
    if pixels is None:
        raise UsageError(
            f"{path}: does not say how it takes pixels; add --input unit ([0, 1]), uint8 (0 to 255), imagenet or "
            "MEAN/STD, as it was trained"
        )
    normalisation = None
    if pixels not in ("uint8", "unit"):
        if channels is None:
            channels = 3
        normalisation = parse_normalisation(pixels, channels=channels)
    single = graph.input_shape[0] == 1
    return ImageForm(layout, channels, height or width, integers or pixels == "uint8", normalisation, single)


@dataclass(frozen=True)
class Stated:
    """What a file says about its input.

    Args:
        layout: one of :data:`LAYOUTS`, or None.
        pixels: as ``--input`` takes it, or None.
        source: where ``pixels`` was found, in words.
    """

    layout: str | None
    pixels: str | None
    source: str


def stated_form(graph: Graph) -> Stated:
    """Layout and pixel range as type, shape, metadata or first nodes of a file tell them."""
    _, first, _, last = graph.input_shape
    fits = [name for name, size in (("nchw", first), ("nhwc", last)) if size in _CHANNELS]
    layout = fits[0] if len(fits) == 1 else None
    if graph.input_type == TensorProto.UINT8:
        return Stated(layout, "uint8", "its type")
    if SPEC in graph.metadata:
        return Stated(layout, "unit", "metadata of robustq")
    nominal = NOMINAL_RANGES.get(graph.metadata.get("Image.NominalPixelRange", ""))
    if nominal is not None:
        return Stated(layout, nominal, "metadata Image.NominalPixelRange")
    pixels = _range_of_first_node(graph)
    return Stated(layout, pixels, "" if pixels is None else "its first nodes")


def _range_of_first_node(graph: Graph) -> str | None:
    """``unit`` or ``uint8`` where the node that reads the images shows it by its constants."""
    constants = dict(graph.constants)
    for node in graph.nodes:
        if node.operator == "Constant" and isinstance(node.get("value", None), TensorProto):
            constants[node.outputs[0]] = array(node.attributes["value"])
    name = graph.input
    for _ in range(_FIRST_NODES):
        readers = [node for node in graph.nodes if name in node.inputs]
        if len(readers) != 1:
            return None
        (node,) = readers
        if node.operator not in ("Cast", "Identity", "Transpose"):
            known = [constants[one].astype(np.float64) for one in node.inputs if one in constants]
            is_whole = len(known) == len(node.inputs) - 1 and node.inputs[0] == name
            return _range_shown(node, known) if is_whole and all(one.size for one in known) else None
        name = node.outputs[0]
    return None


def _range_shown(node: Node, constants: list[NDArray[np.float64]]) -> str | None:
    if node.operator == "QuantizeLinear" and [one.size for one in constants] == [1, 1]:  # calibrated on images
        step, zero = (one.item() for one in constants)
        lowest = -128 if node.types[2] == TensorProto.INT8 else 0
        low, high = step * (lowest - zero), step * (lowest + 255 - zero)
        for pixels, span in (("unit", 1.0), ("uint8", 255.0)):
            if abs(low) <= 0.01 * span and abs(high - span) <= 0.01 * span:
                return pixels
    if node.operator == "Div" and np.allclose(constants[0], 255.0, rtol=0.01):
        return "uint8"
    if node.operator == "Mul" and np.allclose(constants[0], 1 / 255.0, rtol=0.01):
        return "uint8"
    if node.operator == "Sub" and (constants[0] > 0).all():  # the mean of the pixels
        return "unit" if (constants[0] < 1).all() else "uint8" if (constants[0] > 1).all() else None
    return None


def _layout(path: Path, graph: Graph, given: str | None, stated: Stated) -> str:
    if given is not None:
        if given not in LAYOUTS:
            raise UsageError(f"layout '{given}' is unknown; give {' or '.join(LAYOUTS)}")
        return given
    if stated.layout is not None:
        return stated.layout
    raise UsageError(f"{path}: its input {graph.input_shape} does not show its layout; add --layout nchw or nhwc")
