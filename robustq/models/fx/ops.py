"""What each operation of a traced graph does to numbers on a quantization grid: the table that the passes read.

A grid is what a quantizer puts values on: whole multiples of one scale. Operations that only move, pick or repeat
values keep it; sums, products and averages leave it; whatever is in no table is refused by name.
"""

from __future__ import annotations

import operator
from enum import Enum
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node
from torch import nn
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.fx.trace import Constant, describe, is_normalise
from robustq.models.layers import Normalise


class Kind(Enum):
    """What an operation is to the quantizer."""

    INPUT = "the images"
    LAYER = "weights: convolution or linear"
    NORM = "BatchNorm"
    RECTIFIER = "ReLU, ReLU6 and their like"
    KEEPS_GRID = "moves, picks or repeats values"
    AVERAGE = "average pooling"
    JOIN = "sum, product or concatenation of computed tensors"
    AFFINE = "sum or product with constants, as normalisation has them"
    FLOAT = "a function that runs in float"
    CONSTANT = "a tensor that does not depend on the images"
    NOT_A_TENSOR = "sizes and tuples"
    OUTPUT = "the logits"


LAYERS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
RECTIFIERS = (nn.ReLU, nn.ReLU6)
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
GRID_MODULES = (
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ZeroPad2d,
    nn.UpsamplingNearest2d,
)
GRID_FUNCTIONS = frozenset(
    {
        torch.flatten,
        torch.permute,
        torch.transpose,
        torch.reshape,
        torch.squeeze,
        torch.unsqueeze,
        torch.chunk,
        torch.split,
        torch.clone,
        functional.pixel_shuffle,
        functional.pixel_unshuffle,
        operator.getitem,
    }
)
GRID_METHODS = frozenset(
    {
        "view",
        "reshape",
        "flatten",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "chunk",
        "split",
        "clone",
        "contiguous",
    }
)
CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})
JOIN_FUNCTIONS = CONCATENATIONS | frozenset(
    {
        torch.add,
        operator.add,
        operator.iadd,
        torch.sub,
        operator.sub,
        operator.isub,
        torch.mul,
        operator.mul,
        operator.imul,
        torch.div,
        operator.truediv,
        operator.itruediv,
    }
)
JOIN_METHODS = frozenset({"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"})
DIVISIONS = frozenset({torch.div, operator.truediv, operator.itruediv, "div", "div_"})
SUMS = frozenset({torch.add, operator.add, operator.iadd, "add", "add_"})
SUBTRACTIONS = frozenset({torch.sub, operator.sub, operator.isub, "sub", "sub_"})
FLOAT_MODULES = (
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softplus,
    nn.SiLU,
    nn.Hardswish,
    nn.Tanh,
    nn.GELU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.LogSoftmax,
)
FLOAT_FUNCTIONS = frozenset({torch.sigmoid, torch.tanh, functional.log_softmax, torch.log_softmax})
FLOAT_METHODS = frozenset({"sigmoid", "tanh", "log_softmax"})
UNSIGNED_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
UNSIGNED_TARGETS = frozenset({torch.sigmoid, "sigmoid"})
SOFTMAX = frozenset({functional.softmax, torch.softmax, "softmax"})


def kind(graph: GraphModule, node: Node) -> Kind:
    """What ``node`` is to the quantizer; needs the shapes of :func:`robustq.models.fx.trace.probe`.

    Raises:
        UsageError: an operation that is in no table; it is named, with the line that made it.
    """
    if node.op == "placeholder":
        return Kind.INPUT
    if node.op == "output":
        return Kind.OUTPUT
    if node.op == "get_attr" or node.meta.get("constant", False):
        return Kind.CONSTANT
    found = _module_kind(graph.get_submodule(str(node.target))) if node.op == "call_module" else _call_kind(node)
    if found is None or (found is Kind.KEEPS_GRID and _changes_values(graph, node)):
        raise UsageError(
            f"{describe(graph, node)} cannot be quantized; replace it, or compute it outside the network{_hint(node)}"
        )
    return found


def is_unsigned(graph: GraphModule, node: Node) -> bool:
    """Whether a float function never gives a negative value."""
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), UNSIGNED_MODULES)
    return node.target in UNSIGNED_TARGETS


def _module_kind(module: nn.Module) -> Kind | None:
    if isinstance(module, Constant):
        return Kind.CONSTANT
    if is_normalise(module) or isinstance(module, Normalise):
        return Kind.AFFINE
    for types, found in (
        (LAYERS, Kind.LAYER),
        (RECTIFIERS, Kind.RECTIFIER),
        (AVERAGES, Kind.AVERAGE),
        (GRID_MODULES, Kind.KEEPS_GRID),
        (FLOAT_MODULES, Kind.FLOAT),
    ):
        if isinstance(module, types):
            return found
    if isinstance(module, NORMS):  # without running statistics an answer depends on the images beside it
        return Kind.NORM if module.track_running_stats else None
    if isinstance(module, nn.Hardtanh):
        return Kind.RECTIFIER if module.min_val == 0.0 and module.max_val > 0.0 else Kind.FLOAT
    if isinstance(module, nn.Upsample):
        return Kind.KEEPS_GRID if module.mode == "nearest" else None
    return None


def _call_kind(node: Node) -> Kind | None:
    if not node.meta.get("tensor", False):
        splits = node.target in (torch.chunk, torch.split, "chunk", "split")
        whole_numbers = node.meta.get("shape") is not None  # an argmax, or something complex: nothing to compute with
        return None if whole_numbers else Kind.KEEPS_GRID if splits else Kind.NOT_A_TENSOR
    target = node.target
    joins, keeps, floats = (
        (JOIN_FUNCTIONS, GRID_FUNCTIONS, FLOAT_FUNCTIONS)
        if node.op == "call_function"
        else (JOIN_METHODS, GRID_METHODS, FLOAT_METHODS)
    )
    if target in CONCATENATIONS and len(computed_inputs(node)) == 1:
        return Kind.KEEPS_GRID
    if target in joins:
        return Kind.JOIN if len(computed_inputs(node)) > 1 else Kind.AFFINE
    if target in keeps or (target in (functional.pad, functional.interpolate)):
        return Kind.KEEPS_GRID
    return Kind.FLOAT if target in floats else None


def computed_inputs(node: Node) -> list[Node]:
    """The tensors that depend on the images and enter ``node``."""
    return [one for one in node.all_input_nodes if one.meta.get("tensor") and not one.meta.get("constant")]


def _changes_values(graph: GraphModule, node: Node) -> bool:
    """Padding with another value than zero, or interpolation between values, leaves the grid."""

    def argument(name: str, place: int, default: Any) -> Any:
        return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)

    if node.target is functional.pad:
        return argument("mode", 2, "constant") != "constant" or argument("value", 3, 0) not in (0, 0.0, None)
    if node.target is functional.interpolate:
        return bool(argument("mode", 3, "nearest") != "nearest")
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "return_indices", False))
    return False


def _hint(node: Node) -> str:
    return " (robustq needs the logits: return the tensor that enters the softmax)" if node.target in SOFTMAX else ""
