"""Float layers between quantizers, read as the integer layers that onnxruntime makes of them.

onnxruntime sums codes where the file says to dequantize, compute in float and quantize. The sums differ by rounding,
and a value at the edge of two codes gets the other one. On x86 it does so for inputs in uint8, not in int8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from robustq.twin.graph import Node
from robustq.twin.quantizers import CODES
from robustq.twin.registry import MICROSOFT

_LAYERS = {
    "Conv": "QLinearConv",
    "Gemm": MICROSOFT + "QGemm",
    "GlobalAveragePool": MICROSOFT + "QLinearGlobalAveragePool",
}
_MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators between a layer and its quantizer that onnxruntime moves behind the quantizer."""

_ACTIVATIONS = TensorProto.UINT8
_BYTES = (TensorProto.UINT8, TensorProto.INT8)


def with_integer_layers(
    nodes: Sequence[Node], constants: Mapping[str, NDArray[Any]], output: str
) -> tuple[list[Node], dict[str, NDArray[Any]]]:
    """The nodes, where each Conv, Gemm and GlobalAveragePool whose inputs are dequantized and whose result is quantized
    to 8 bits has become one integer layer; and the codes that float biases become there, by new names.

    A Relu before a quantizer whose lowest code stands for 0 goes with its layer. Reshapes and transpositions between
    the two get codes instead of values.

    Args:
        nodes: in order of execution.
        constants: initializers by name.
        output: name of the graph's output.
    """
    made_by = {name: node for node in nodes for name in node.outputs}
    readers = Counter([output, *(name for node in nodes for name in node.inputs)])
    put: dict[str, Node] = {}  # result of a node -> what stands in its place
    gone: set[str] = set()  # results of nodes that go
    biases: dict[str, NDArray[Any]] = {}
    for node in nodes:
        if node.operator != "QuantizeLinear" or not _is_plain(node, constants):
            continue
        inner = [node.inputs[0]]
        moves: list[Node] = []
        while (layer := made_by.get(inner[-1])) is not None and layer.operator in _MOVES:
            moves.append(layer)
            inner.append(layer.inputs[0])
        quantized = inner[-1]
        if layer is not None and layer.operator == "Relu" and _lowest_is_zero(node, constants):
            inner.append(layer.inputs[0])
            layer = made_by.get(layer.inputs[0])
        if layer is None or layer.operator not in _LAYERS or any(readers[name] != 1 for name in inner):
            continue
        made = _integer_layer(node, layer, made_by, constants, biases)
        if made is None:
            continue
        gone |= {layer.outputs[0], quantized, node.outputs[0]}
        if not moves:
            put[node.outputs[0]] = made
            continue
        put[quantized] = replace(made, outputs=(quantized,))
        for number, move in enumerate(moves):
            outputs = move.outputs if number else node.outputs
            put[move.outputs[0]] = replace(move, outputs=outputs, types=(_type(node), *move.types[1:]))
    kept = [put.get(node.outputs[0], node) for node in nodes if node.outputs[0] in put or node.outputs[0] not in gone]
    return kept, biases


Part = tuple[tuple[str, ...], tuple[int | None, ...]]
"""Names and element types of some inputs."""


def _type(node: Node) -> int | None:
    """Element type of a quantizer's codes."""
    place = 0 if node.operator == "DequantizeLinear" else 2
    return node.types[place] if len(node.types) > place else None


def _is_plain(node: Node, constants: Mapping[str, NDArray[Any]], *, channels: bool = False) -> bool:
    """Whether a quantizer of 8 bits has a constant scale and zero point, one for all or, if ``channels``, for each."""
    given = [name for name in node.inputs[1:] if name]
    if _type(node) not in _BYTES or not given or not all(name in constants for name in given):
        return False
    return channels or all(constants[name].size == 1 for name in given)


def _codes(node: Node) -> Part:
    """Codes, scale and zero point of a dequantizer."""
    names = (*node.inputs, "")[:3]
    return names, (*node.types, None)[:3]


def _lowest_is_zero(node: Node, constants: Mapping[str, NDArray[Any]]) -> bool:
    kind = _type(node)
    return kind is not None and float(constants[node.inputs[2]].reshape(-1)[0]) == CODES[kind][0]


def _integer_layer(
    quantizer: Node,
    layer: Node,
    made_by: Mapping[str, Node],
    constants: Mapping[str, NDArray[Any]],
    biases: dict[str, NDArray[Any]],
) -> Node | None:
    """The integer layer, or None; the codes of a float bias are added to ``biases``."""
    names = [name for name in layer.inputs if name]
    inputs = [made_by.get(name) for name in names[:2]]
    sources = [one for one in inputs if one is not None and one.operator == "DequantizeLinear"]
    if len(sources) != len(inputs) or _type(sources[0]) != _ACTIVATIONS or not _is_plain(sources[0], constants):
        return None
    parts = [_codes(sources[0])]
    result: Part = (quantizer.inputs[1:], quantizer.types[1:])
    if layer.operator == "GlobalAveragePool":
        parts.append(result)
    else:
        if len(sources) < 2 or not _is_plain(sources[1], constants, channels=True):
            return None
        if layer.get("alpha", 1.0) != 1.0 or layer.get("beta", 1.0) != 1.0 or layer.get("transA", 0):
            return None
        parts.append(_codes(sources[1]))
        bias: Part = ((), ()) if layer.operator == "Conv" else (("",), (None,))
        if len(names) > 2:
            step = constants[sources[0].inputs[1]].reshape(-1) * constants[sources[1].inputs[1]].reshape(-1)
            name = _bias_codes(names[2], made_by.get(names[2]), step, constants, biases)
            if name is None:
                return None
            bias = ((name,), (TensorProto.INT32,))
        parts += [result, bias] if layer.operator == "Conv" else [bias, result]
    bounds = {name: quantizer.attributes[name] for name in ("lowest", "highest") if name in quantizer.attributes}
    return replace(
        quantizer,
        operator=_LAYERS[layer.operator],
        inputs=tuple(name for names, _ in parts for name in names),
        types=tuple(kind for _, kinds in parts for kind in kinds),
        attributes={**layer.attributes, **bounds},
    )


def _bias_codes(
    name: str,
    source: Node | None,
    step: NDArray[Any],
    constants: Mapping[str, NDArray[Any]],
    biases: dict[str, NDArray[Any]],
) -> str | None:
    """The name of a bias in steps of an integer layer, the product of its scales; None where there is none.

    A bias in float is rounded to these steps, as onnxruntime does; its codes are added to ``biases``.
    """
    if source is not None:
        if source.operator != "DequantizeLinear" or source.types[0] != TensorProto.INT32:
            return None
        if source.inputs[0] not in constants or source.inputs[1] not in constants:
            return None
        scale = constants[source.inputs[1]].reshape(-1)
        same = scale.size in (1, step.size) and bool(np.allclose(scale, step, rtol=1e-4, atol=0.0))
        return source.inputs[0] if same else None
    if name not in constants or constants[name].dtype != np.float32 or not np.all(step > 0):
        return None
    codes = np.rint(constants[name].astype(np.float32) / step.astype(np.float32))
    made = f"{name} in steps of {float(step[0])!r}"
    biases[made] = np.clip(codes, -(2**31), 2**31 - 1).astype(np.int32)
    return made
