"""The kinds of operations in a traced graph: the tables of all operations that can be quantized.

A grid is the set of multiples of one scale on which a quantizer puts values. Operations that only move, pick or repeat
values keep it; sums, products and averages do not. An operation in no table is refused.
"""

from __future__ import annotations

import operator
from enum import Enum, auto
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node
from torch import nn
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.fx.trace import Constant, call_arguments, called_module, describe, is_normalise
from robustq.models.layers import Normalise


class Kind(Enum):
    """The kind of a node."""

    INPUT = auto()
    LAYER = auto()  # convolution or linear
    NORM = auto()  # BatchNorm
    RELU = auto()  # ReLU, ReLU6 and other clamps from 0
    KEEPS_GRID = auto()  # moves, picks or repeats values
    AVERAGE = auto()
    JOIN = auto()  # sum, product or concatenation of computed tensors
    AFFINE = auto()  # sum or product with constants, such as a normalisation
    FLOAT = auto()  # function that runs in float
    CONSTANT = auto()  # tensor that does not depend on the images
    NOT_A_TENSOR = auto()  # sizes and tuples
    OUTPUT = auto()


LAYERS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
RELUS = (nn.ReLU, nn.ReLU6)
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
GRID_MODULES = (
    *(nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten, nn.Identity),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad2d, nn.UpsamplingNearest2d),
)
GRID_FUNCTIONS = {
    *(torch.flatten, torch.permute, torch.transpose, torch.reshape, torch.squeeze, torch.unsqueeze, torch.chunk),
    *(torch.split, torch.clone, functional.pixel_shuffle, functional.pixel_unshuffle, operator.getitem),
    *(functional.pad, functional.interpolate),
}
GRID_METHODS = {
    *("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "clone"),
    "contiguous",
}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
SUMS = {torch.add, operator.add, operator.iadd, "add", "add_"}
SUBTRACTIONS = {torch.sub, operator.sub, operator.isub, "sub", "sub_"}
PRODUCTS = {torch.mul, operator.mul, operator.imul, "mul", "mul_"}
DIVISIONS = {torch.div, operator.truediv, operator.itruediv, "div", "div_"}
JOINS = CONCATENATIONS | SUMS | SUBTRACTIONS | PRODUCTS | DIVISIONS
UNSIGNED_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
FLOAT_MODULES = (
    *UNSIGNED_MODULES,
    *(nn.SiLU, nn.Hardswish, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.LogSoftmax),
)
KINDS: dict[Any, Kind] = {
    Constant: Kind.CONSTANT,
    Normalise: Kind.AFFINE,
    LAYERS: Kind.LAYER,
    RELUS: Kind.RELU,
    AVERAGES: Kind.AVERAGE,
    GRID_MODULES: Kind.KEEPS_GRID,
    FLOAT_MODULES: Kind.FLOAT,
}
"""Module types -> their kind. Those of other modules depend on their settings."""

FLOAT_CALLS = {
    *(torch.sigmoid, torch.tanh, functional.log_softmax, torch.log_softmax),
    *("sigmoid", "tanh", "log_softmax"),
}
UNSIGNED_CALLS = {torch.sigmoid, "sigmoid"}
SOFTMAX = {functional.softmax, torch.softmax, "softmax"}


def kind(model: GraphModule, node: Node) -> Kind:
    """The kind of ``node``; needs the shapes of :func:`robustq.models.fx.trace.shape_prop`.

    UsageError names an operation that is in no table, with the line that made it.
    """
    if node.op in ("placeholder", "output"):
        return Kind.INPUT if node.op == "placeholder" else Kind.OUTPUT
    if node.op == "get_attr" or node.meta.get("constant", False):
        return Kind.CONSTANT
    found = _module_kind(called_module(model, node)) if node.op == "call_module" else _call_kind(node)
    if found is None or (found is Kind.KEEPS_GRID and _leaves_grid(model, node)):
        advice = "cannot be quantized; replace it, or compute it outside the network"
        if node.target in SOFTMAX:
            advice += " (robustq needs the logits: return the tensor that enters the softmax)"
        raise UsageError(f"{describe(model, node)} {advice}")
    return found


def is_unsigned(model: GraphModule, node: Node) -> bool:
    """Whether a float function never returns a negative value."""
    module = called_module(model, node)
    return node.target in UNSIGNED_CALLS if module is None else isinstance(module, UNSIGNED_MODULES)


def computed_inputs(node: Node) -> list[Node]:
    """The inputs of ``node`` that are tensors and depend on the images."""
    return [one for one in node.all_input_nodes if one.meta.get("tensor") and not one.meta.get("constant")]


def _module_kind(module: nn.Module) -> Kind | None:
    if is_normalise(module):
        return Kind.AFFINE
    for types, found in KINDS.items():
        if isinstance(module, types):
            return found
    if isinstance(module, NORMS):  # without running statistics the answer depends on the other images of the batch
        return Kind.NORM if module.track_running_stats else None
    if isinstance(module, nn.Hardtanh):
        return Kind.RELU if module.min_val == 0.0 and module.max_val > 0.0 else Kind.FLOAT
    if isinstance(module, nn.Upsample):
        return Kind.KEEPS_GRID if module.mode == "nearest" else None
    return None


def _call_kind(node: Node) -> Kind | None:
    """The kind of a function (``target`` is one) or a method (``target`` is its name)."""
    target = node.target
    if not node.meta.get("tensor", False):
        if node.meta.get("shape") is not None:
            return None  # a tensor, but not of floats: argmax, complex numbers
        return Kind.KEEPS_GRID if target in (torch.chunk, torch.split, "chunk", "split") else Kind.NOT_A_TENSOR
    computed = len(computed_inputs(node))
    if target in GRID_FUNCTIONS | GRID_METHODS or (target in CONCATENATIONS and computed == 1):
        return Kind.KEEPS_GRID
    if target in JOINS:
        return Kind.JOIN if computed > 1 else Kind.AFFINE
    return Kind.FLOAT if target in FLOAT_CALLS else None


def _leaves_grid(model: GraphModule, node: Node) -> bool:
    """Padding with another value than zero, interpolation between values, or pooling that also returns indices."""
    if node.target is functional.pad:
        arguments = call_arguments(node, "pad", "mode", "value")
        return arguments.get("mode", "constant") != "constant" or arguments.get("value", 0) not in (0, 0.0, None)
    if node.target is functional.interpolate:
        return bool(call_arguments(node, "size", "scale_factor", "mode").get("mode", "nearest") != "nearest")
    return bool(getattr(called_module(model, node), "return_indices", False))
