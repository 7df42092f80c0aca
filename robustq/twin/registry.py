"""The table of operators: ONNX operator -> the function that computes it in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustq.errors import ModelFileError
from robustq.export.graph_limits import LARGEST_WORK
from robustq.twin.graph import MAX_ELEMENTS, Node

MICROSOFT = "com.microsoft."
QONNX = "qonnx.custom_op.general."
DIALECTS = (QONNX, "onnx.brevitas.")
"""Domains that onnxruntime does not have."""


@dataclass(frozen=True)
class Call:
    """A node, and the pass that calls it: its backward rule and its number of images."""

    node: Node
    rule: str
    images: int = 1

    def get(self, name: str, default: Any) -> Any:
        """An attribute of the node, or its default."""
        return self.node.get(name, default)


Operator = Callable[..., Any]
"""(call, *inputs) -> a tensor, or a tuple of them. Missing optional inputs are None. Activations, quantized ones too,
are float32 tensors; shapes and indices are int64 tensors on the CPU; truth values are float32 tensors of 0 and 1."""

OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Register a function under ONNX names, with the domain in front where it is not ONNX' own."""

    def register(function: Operator) -> Operator:
        for name in names:
            assert name not in OPERATORS, name
            OPERATORS[name] = function
        return function

    return register


def check_size(call: Call, shape: Iterable[int]) -> None:
    """Refuse a tensor of a size that no image classifier has, before it is allocated.

    Raises:
        ModelFileError: more than :data:`MAX_ELEMENTS` elements.
    """
    size = 1
    for one in shape:
        size *= int(one)
    if size > MAX_ELEMENTS:
        raise ModelFileError(f"{call.node} makes a tensor of {size:,} elements")


def check_work(call: Call, values: Iterable[int], each: int) -> None:
    """Refuse a layer that would compute for minutes, before it begins: torch cannot be stopped inside an operator.

    Args:
        values: shape of the result.
        each: multiplications, or pooled values, for one of them.

    Raises:
        ModelFileError: more than :data:`robustq.export.graph_limits.LARGEST_WORK` for an image.
    """
    steps = each
    for one in values:
        steps *= max(int(one), 0)
    if steps > LARGEST_WORK * call.images:
        raise ModelFileError(f"{call.node} takes {steps // call.images:,} steps for one image")


def common_shape(call: Call, *shapes: Iterable[int]) -> list[int]:
    """The shape to which all broadcast, checked.

    Raises:
        ModelFileError: they do not broadcast, or to too many elements.
    """
    rows = [list(shape) for shape in shapes]
    rank = max(len(row) for row in rows)
    found: list[int] = []
    for sizes in zip(*([1] * (rank - len(row)) + row for row in rows), strict=True):
        others = {size for size in sizes if size != 1} or {1}
        if len(others) > 1:
            raise ModelFileError(f"{call.node} combines shapes {', '.join(map(str, rows))}")
        found.append(others.pop())
    check_size(call, found)
    return found


def numbers(values: Tensor) -> list[int]:
    """A shape or a list of indices."""
    return [int(value) for value in values.reshape(-1).tolist()]
