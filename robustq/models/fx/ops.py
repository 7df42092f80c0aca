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
from robustq.models.fx.adaptive_pooling import PickedPixels
from robustq.models.fx.attention import Attention
from robustq.models.fx.trace import Constant, call_arguments, called_module, calls, describe
from robustq.models.fx.tracer import is_normalise
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
BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
NORMS = (*BATCH_NORMS, nn.InstanceNorm2d)
"""Without running statistics an InstanceNorm2d is a function in float, and a BatchNorm is refused."""
RELUS = (nn.ReLU, nn.ReLU6)
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
GRID_MODULES = (
    PickedPixels,
    *(nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten, nn.Identity),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.UpsamplingNearest2d),
    *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
)
SPLITS = {torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"}
"""Functions that return a tuple of tensors on the grid of their input."""
GRID_FUNCTIONS = {
    *(torch.flatten, torch.permute, torch.transpose, torch.reshape, torch.squeeze, torch.unsqueeze, torch.clone),
    *(torch.roll, torch.flip, torch.movedim, torch.swapaxes, torch.narrow, torch.select, torch.amax, torch.amin),
    torch.index_select,
    *(functional.pixel_shuffle, functional.pixel_unshuffle, operator.getitem, functional.pad, functional.interpolate),
}
GRID_METHODS = {
    *("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "clone", "contiguous", "roll"),
    *("flip", "movedim", "swapaxes", "narrow", "select", "amax", "amin", "to", "float", "type_as", "expand"),
    "expand_as",
}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate, torch.stack}
SUMS = {torch.add, operator.add, operator.iadd, "add", "add_"}
SUBTRACTIONS = {torch.sub, operator.sub, operator.isub, "sub", "sub_"}
PRODUCTS = {torch.mul, operator.mul, operator.imul, "mul", "mul_"}
DIVISIONS = {torch.div, operator.truediv, operator.itruediv, "div", "div_"}
JOINS = CONCATENATIONS | SUMS | SUBTRACTIONS | PRODUCTS | DIVISIONS
UNSIGNED_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softmax, nn.Softmax2d)
FLOAT_MODULES = (
    *UNSIGNED_MODULES,
    *(nn.SiLU, nn.Hardswish, nn.Tanh, nn.GELU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish),
    *(nn.Softsign, nn.LogSigmoid, nn.LogSoftmax, nn.GroupNorm, nn.LayerNorm),
    *(nn.ConvTranspose2d, nn.UpsamplingBilinear2d, Attention),
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

SOFTMAX = {functional.softmax, torch.softmax, "softmax"}
UNSIGNED_CALLS = {*SOFTMAX, torch.sigmoid, torch.exp, torch.sqrt, torch.abs, "sigmoid", "exp", "sqrt", "abs"}
AVERAGING_CALLS = {torch.mean, torch.sum, "mean", "sum"}
"""Their result is unsigned where their input is."""
REDUCTIONS = AVERAGING_CALLS | {torch.amax, torch.amin, torch.var, torch.std, "amax", "amin", "var", "std"}
FLOAT_CALLS = {
    *(*UNSIGNED_CALLS, *AVERAGING_CALLS),
    *(torch.tanh, functional.log_softmax, torch.log_softmax, "tanh", "log_softmax"),
    *(torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", functional.scaled_dot_product_attention),
    *(functional.layer_norm, functional.group_norm, functional.instance_norm),
    *(functional.normalize, functional.conv_transpose2d, functional.prelu),
    *(torch.log, torch.rsqrt, torch.pow, torch.square, torch.neg, torch.maximum, torch.minimum, operator.pow),
    *(torch.var, torch.std, "var", "std"),
    *(operator.neg, "log", "rsqrt", "pow", "square", "neg", "maximum", "minimum"),
}
"""Functions that run in float."""


def kind(model: GraphModule, node: Node) -> Kind:
    """The kind of ``node``; needs the shapes of :func:`robustq.models.fx.trace.shape_prop`.

    UsageError names an operation that is in no table, with the line that made it.
    """
    if node.op in ("placeholder", "output"):
        return Kind.INPUT if node.op == "placeholder" else Kind.OUTPUT
    if node.op == "get_attr" or node.meta.get("constant", False):
        return Kind.CONSTANT
    module = called_module(model, node)
    found = _call_kind(node) if module is None else _module_kind(module)
    is_softmax = calls(node, SOFTMAX) or isinstance(module, nn.Softmax)
    gives_probabilities = is_softmax and _reaches_output(node)
    if calls(node, REDUCTIONS) and 0 in _reduced_axes(node):
        raise UsageError(f"{describe(model, node)} mixes the images of a batch; reduce the other axes alone")
    if found is None or gives_probabilities or getattr(module, "return_indices", False):
        advice = "cannot be quantized; replace it, or compute it outside the network"
        if gives_probabilities:
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
    if isinstance(module, NORMS):
        if module.track_running_stats:
            return Kind.NORM
        # The answer of a BatchNorm would depend on the other images of the batch.
        return None if isinstance(module, BATCH_NORMS) else Kind.FLOAT
    if isinstance(module, nn.Hardtanh):
        return Kind.RELU if module.min_val == 0.0 and module.max_val > 0.0 else Kind.FLOAT
    if isinstance(module, nn.Upsample):
        return Kind.KEEPS_GRID if module.mode == "nearest" else Kind.FLOAT
    return None


def _call_kind(node: Node) -> Kind | None:
    """The kind of a function (``target`` is one) or a method (``target`` is its name)."""
    target = node.target
    if not node.meta.get("tensor", False):
        if node.meta.get("shape") is not None:
            return None  # a tensor, but not of floats: argmax, complex numbers
        if target in SPLITS:
            return Kind.KEEPS_GRID
        return None if node.meta.get("tensors") else Kind.NOT_A_TENSOR
    computed = len(computed_inputs(node))
    if target in GRID_FUNCTIONS | GRID_METHODS:
        return _kind_of_move(node)
    if target in CONCATENATIONS and computed == 1:
        zeros = [one for one in node.all_input_nodes if one.meta["constant"]]
        return Kind.KEEPS_GRID if all(one.meta["zero"] for one in zeros) else Kind.JOIN
    if target in JOINS:
        return Kind.JOIN if computed > 1 else Kind.AFFINE
    return Kind.FLOAT if target in FLOAT_CALLS else None


def _reduced_axes(node: Node) -> set[int]:
    rank = len(node.all_input_nodes[0].meta["shape"])
    dims = call_arguments(node, "dim").get("dim")
    if dims is None or dims == ():
        return set(range(rank))
    return {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}


def _kind_of_move(node: Node) -> Kind:
    """FLOAT for padding with another value than zero, and for interpolation between values."""
    if node.target is functional.pad:
        arguments = call_arguments(node, "pad", "mode", "value")
        zeros = arguments.get("mode", "constant") != "constant" or arguments.get("value", 0) in (0, 0.0, None)
        return Kind.KEEPS_GRID if zeros else Kind.FLOAT
    if node.target is functional.interpolate:
        mode = call_arguments(node, "size", "scale_factor", "mode").get("mode", "nearest")
        return Kind.KEEPS_GRID if mode == "nearest" else Kind.FLOAT
    return Kind.KEEPS_GRID


def _reaches_output(node: Node) -> bool:
    """Whether the values are the answer of the network, possibly moved."""
    moved = GRID_FUNCTIONS | GRID_METHODS
    return any(user.op == "output" or (calls(user, moved) and _reaches_output(user)) for user in node.users)
