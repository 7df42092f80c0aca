"""Float layers between quantizers, read as the integer layers that onnxruntime makes of them.

onnxruntime sums codes where the file says to dequantize, compute in float and quantize. The sums differ by rounding,
and a value at the edge of two codes gets the other one. On x86 it does so for activations in uint8, not in int8.
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
_ACTIVATIONS = TensorProto.UINT8
_BYTES = (TensorProto.UINT8, TensorProto.INT8)


def with_integer_layers(nodes: Sequence[Node], constants: Mapping[str, NDArray[Any]], output: str) -> list[Node]:
    """The nodes, where each Conv, Gemm and GlobalAveragePool whose inputs are dequantized and whose result is quantized
    to 8 bits has become one integer layer. A Relu before a quantizer whose lowest code stands for 0 goes with it.

    Args:
        nodes: in order of execution.
        constants: initializers by name.
        output: name of the graph's output.
    """
    made_by = {name: node for node in nodes for name in node.outputs}
    readers = Counter([output, *(name for node in nodes for name in node.inputs)])
    found: dict[str, Node] = {}  # result of a quantizer -> its integer layer
    gone: set[str] = set()  # results of the layers
    for node in nodes:
        if node.operator != "QuantizeLinear" or _type(node) != _ACTIVATIONS or not _is_plain(node, constants):
            continue
        layer = made_by.get(node.inputs[0])
        inner = [node.inputs[0]]
        if layer is not None and layer.operator == "Relu" and _lowest_is_zero(node, constants):
            inner.append(layer.inputs[0])
            layer = made_by.get(layer.inputs[0])
        if layer is None or layer.operator not in _LAYERS or any(readers[name] != 1 for name in inner):
            continue
        made = _integer_layer(node, layer, [made_by.get(name) for name in layer.inputs if name], constants)
        if made is not None:
            found[node.outputs[0]] = made
            gone |= set(inner)
    return [found.get(node.outputs[0], node) for node in nodes if node.outputs[0] not in gone]


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
    quantizer: Node, layer: Node, inputs: list[Node | None], constants: Mapping[str, NDArray[Any]]
) -> Node | None:
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
        bias: Part = ((), ())
        if len(sources) > 2:
            if not _is_bias(sources, constants):
                return None
            bias = (sources[2].inputs[:1], sources[2].types[:1])
        elif layer.operator == "Gemm":
            bias = (("",), (None,))
        parts += [result, bias] if layer.operator == "Conv" else [bias, result]
    bounds = {name: quantizer.attributes[name] for name in ("lowest", "highest") if name in quantizer.attributes}
    return replace(
        quantizer,
        operator=_LAYERS[layer.operator],
        inputs=tuple(name for names, _ in parts for name in names),
        types=tuple(kind for _, kinds in parts for kind in kinds),
        attributes={**layer.attributes, **bounds},
    )


def _is_bias(sources: list[Node], constants: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the bias counts in the product of the scales, as an integer layer needs it."""
    x, w, bias = sources
    if bias.inputs[0] not in constants or bias.inputs[1] not in constants or bias.types[0] != TensorProto.INT32:
        return False
    product = constants[x.inputs[1]].reshape(-1) * constants[w.inputs[1]].reshape(-1)
    scale = constants[bias.inputs[1]].reshape(-1)
    return scale.size in (1, product.size) and bool(np.allclose(scale, product, rtol=1e-4, atol=0.0))
