"""Operators that work element by element: arithmetic, activation functions, comparisons, casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from robustq.errors import ModelFileError
from robustq.twin.gradients import clip_codes, rounded, step
from robustq.twin.registry import MICROSOFT, Call, common_shape, operator

_INTEGERS = frozenset(getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (4, 8, 16, 32, 64))


def is_integer(call: Call, place: int, x: Tensor) -> bool:
    """Whether an input counts as integers in the file; codes are float tensors here."""
    kind = call.node.types[place] if len(call.node.types) > place else None
    return kind in _INTEGERS if kind else not x.is_floating_point()


def _check(call: Call, *inputs: Tensor) -> None:
    common_shape(call, *(one.shape for one in inputs))


@operator("Add")
def add(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Add.html"""
    _check(call, a, b)
    return a + b


@operator("Sub")
def sub(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Sub.html"""
    _check(call, a, b)
    return a - b


@operator("Mul")
def mul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Mul.html"""
    _check(call, a, b)
    return a * b


@operator("Div")
def div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Div.html; integers are truncated."""
    _check(call, a, b)
    if not is_integer(call, 0, a):
        return a / b
    quotient = torch.true_divide(a.double(), b.double()).trunc().to(a.dtype)
    return rounded(a / b, quotient) if a.is_floating_point() else quotient


@operator("Pow")
def power(call: Call, x: Tensor, exponent: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Pow.html"""
    _check(call, x, exponent)
    return torch.pow(x, exponent)


@operator("Sum")
def total(call: Call, *inputs: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Sum.html"""
    _check(call, *inputs)
    return reduce(torch.add, inputs)


@operator("Max")
def maximum(call: Call, *inputs: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Max.html"""
    _check(call, *inputs)
    return reduce(torch.maximum, inputs)


@operator("Min")
def minimum(call: Call, *inputs: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Min.html"""
    _check(call, *inputs)
    return reduce(torch.minimum, inputs)


@operator("Mean")
def mean(call: Call, *inputs: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Mean.html"""
    return torch.div(total(call, *inputs), len(inputs))


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Erf": torch.erf,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "HardSwish": functional.hardswish,
    "Mish": functional.mish,
    "Identity": lambda x: x,
}
for _name in _PLAIN:

    @operator(_name)
    def plain(call: Call, x: Tensor) -> Tensor:
        """A function of one number."""
        return _PLAIN[call.node.operator](x)


@operator("Dropout")
def dropout(call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Dropout.html: nothing, in a network that is no longer trained."""
    if training is not None and bool(training):
        raise ModelFileError(f"{call.node} drops at random (training mode); export the network in eval mode")
    return x


@operator("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__LeakyRelu.html"""
    return functional.leaky_relu(x, call.get("alpha", 0.01))


@operator("PRelu")
def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__PRelu.html"""
    _check(call, x, slope)
    return torch.where(x >= 0, x, slope * x)


@operator("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Elu.html"""
    return functional.elu(x, call.get("alpha", 1.0))


@operator("Celu")
def celu(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Celu.html"""
    return functional.celu(x, call.get("alpha", 1.0))


@operator("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Selu.html"""
    alpha, gamma = call.get("alpha", 1.6732632423543772), call.get("gamma", 1.0507009873554805)
    return torch.where(x > 0, gamma * x, gamma * alpha * torch.expm1(x.clamp(max=0.0)))


@operator("Gelu", MICROSOFT + "Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Gelu.html"""
    return functional.gelu(x, approximate=call.get("approximate", b"none").decode())


@operator("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__HardSigmoid.html"""
    y: Tensor = (call.get("alpha", 0.2) * x + call.get("beta", 0.5)).clamp(0.0, 1.0)
    return y


@operator("Softmax", "LogSoftmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Softmax.html; before opset 13 over all axes from ``axis`` on."""
    function = torch.softmax if call.node.operator == "Softmax" else torch.log_softmax
    if call.node.opset >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % max(x.dim(), 1)
    return function(x.flatten(axis), axis).reshape(x.shape)


@operator("Clip")
def clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Clip.html; of codes it is the end of a quantizer."""
    low = call.get("min", None) if low is None else low
    high = call.get("max", None) if high is None else high
    bounds = [-math.inf if low is None else float(low), math.inf if high is None else float(high)]
    if is_integer(call, 0, x) and x.is_floating_point():
        return clip_codes(x, bounds[0], bounds[1], call.rule)
    return x.clamp(*bounds)


@operator("Floor", "Ceil", "Round")
def rounding(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Round.html and its kind; the gradient passes."""
    function = {"Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round}[call.node.operator]
    with torch.no_grad():
        value = function(x)
    return rounded(x, value)


@operator("Sign")
def sign(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Sign.html"""
    if not x.is_floating_point():
        return x.sign()
    with torch.no_grad():
        value = (x.sign() + 1.0) / 2.0
    return 2.0 * step(x, value, call.rule) - 1.0


def _above(call: Call, x: Tensor, *, strictly: bool) -> Tensor:
    """1.0 where x > 0 (or >= 0), else 0.0."""
    with torch.no_grad():
        value = (x > 0 if strictly else x >= 0).float()
    return step(x, value, call.rule) if x.is_floating_point() else value


@operator("Less", "LessOrEqual", "Greater", "GreaterOrEqual")
def compare(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Less.html and its kind."""
    _check(call, a, b)
    difference = b - a if call.node.operator.startswith("Less") else a - b
    return _above(call, difference, strictly=not call.node.operator.endswith("OrEqual"))


@operator("Equal")
def equal(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Equal.html"""
    _check(call, a, b)
    return (a == b).float()


@operator("Not")
def negation(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Not.html"""
    return 1.0 - x.float()


@operator("And")
def conjunction(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__And.html"""
    _check(call, a, b)
    return a.float() * b.float()


@operator("Or")
def disjunction(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Or.html"""
    _check(call, a, b)
    return torch.maximum(a.float(), b.float())


@operator("Where")
def where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Where.html; a comparison gets the gradient of the jump."""
    _check(call, condition, a, b)
    value = torch.where(condition != 0, a, b)
    if not (torch.is_grad_enabled() and condition.requires_grad):
        return value
    return value + (condition - condition.detach()) * (a - b).detach()


@operator("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    """https://onnx.ai/onnx/operators/onnx__Cast.html; activations that become integers stay float tensors."""
    kind = call.get("to", TensorProto.FLOAT)
    if kind in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return x.float()
    if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        half = torch.float16 if kind == TensorProto.FLOAT16 else torch.bfloat16
        with torch.no_grad():
            value = x.to(half).float()
        return rounded(x.float(), value)
    if kind == TensorProto.BOOL:
        return (x != 0).float() if not x.requires_grad else x
    if kind not in _INTEGERS:
        raise ModelFileError(f"{call.node} casts to element type {kind}, which is not supported")
    if not x.is_floating_point():
        return x
    with torch.no_grad():
        value = x.trunc()
    return rounded(x, value)
