"""Binary activations become comparisons of uint8 codes.

DequantizeLinear - Mul - Sub - QuantizeLinear - Clip - DequantizeLinear, which makes -1 or +1 of every uint8 code and
switches once at most in each channel, becomes Less(codes, first code of the upper side) - Where(0, 2) -
DequantizeLinear with zero point 1. A channel that falls where others rise is negated, and so are the weights that read
it; therefore all readers must be convolutions of one group with constant weights. Their sums stay exactly the same.

onnxruntime has no integer kernel for the first chain. Of the ways to write -1 and +1 it makes only uint8 codes around a
zero point of 1 a QLinearConv on both x86 and ARM, and there a padding of 0 stays 0. The thresholds are expanded along a
row of pixels: onnxruntime compares channels-last, where a row against a row takes a fifth of the time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from robustq.errors import ExportError
from robustq.export.lowering.graph import (
    GraphIndex,
    add_initializer,
    attributes,
    drop_unused_initializers,
    insert_nodes,
)

CODES = 256


class _Chain(NamedTuple):
    """The nodes from the DequantizeLinear of the input to that of the binary activations."""

    values: onnx.NodeProto
    product: onnx.NodeProto
    difference: onnx.NodeProto
    quantize: onnx.NodeProto
    clip: onnx.NodeProto
    binary: onnx.NodeProto


def binary_activations(model: onnx.ModelProto) -> int:
    """Lower every such chain; returns how many.

    Raises:
        ExportError: a channel switches twice, or another operator than such a convolution reads the activations.
    """
    graph = model.graph
    rows = _row_lengths(model)
    lowered = 0
    index = GraphIndex(graph)
    for node in list(graph.node):
        chain = _chain_from(index, node) if node.op_type == "Clip" else None
        if chain is None:
            continue
        first, rises = _steps(index, chain)
        for reader in index.used_by[chain.binary.output[0]]:
            _negate_weights(index, reader, chain.binary.output[0], ~rises)
        _compare(index, chain, first, row=rows.get(chain.values.output[0], 1))
        index = GraphIndex(graph)
        lowered += 1
    if lowered:
        drop_unused_initializers(graph)
        del graph.value_info[:]
    return lowered


def _chain_from(index: GraphIndex, clip: onnx.NodeProto) -> _Chain | None:
    quantize = index.maker(clip)
    difference = index.maker(quantize)
    product = index.maker(difference)
    kinds = [one.op_type for one in (quantize, difference, product) if one is not None]
    if kinds != ["QuantizeLinear", "Sub", "Mul"]:
        return None
    values = index.maker(product) or index.maker(product, 1)
    readers = index.used_by[clip.output[0]]
    if values is None or values.op_type != "DequantizeLinear" or [one.op_type for one in readers] != [values.op_type]:
        return None
    return _Chain(values, product, difference, quantize, clip, readers[0])


def _steps(index: GraphIndex, chain: _Chain) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The first code of each channel's upper side (C,), 0 without a lower side; and whether that side is +1 (C,)."""

    def constant(node: onnx.NodeProto, place: int) -> NDArray[Any]:
        found = index.input(node, place)
        if found is None:
            raise ExportError(
                f"{node.name}: input {place} is computed, not constant; cannot make its binary activations integers"
            )
        return found

    scale, zero_point = constant(chain.values, 1), constant(chain.values, 2)
    gain = constant(chain.product, [name in index.made_by for name in chain.product.input].index(False))
    if zero_point.dtype != np.uint8:
        raise ExportError(f"{chain.values.name}: its codes are not uint8; cannot make its binary activations integers")
    codes = np.arange(CODES, dtype=np.int32)
    values = ((codes - zero_point.astype(np.int32)).astype(np.float32) * scale).reshape(1, -1)
    distances = gain.reshape(-1, 1) * values - constant(chain.difference, 1).reshape(-1, 1)  # float32, as the graph
    out_scale, out_zero = constant(chain.quantize, 1), constant(chain.quantize, 2).astype(np.int32)
    low, high = (constant(chain.clip, place).astype(np.int32) for place in (1, 2))
    found = np.clip(np.rint(distances / out_scale) + out_zero, low, high) - constant(chain.binary, 2).astype(np.int32)
    signs = found * constant(chain.binary, 1)
    changes = (signs[:, 1:] != signs[:, :-1]).sum(axis=1)
    if not (np.abs(signs) == 1).all() or (changes > 1).any():
        raise ExportError(f"{chain.clip.name}: is not -1 and +1 on either side of one code; cannot make it an integer")
    return np.where(changes == 1, (signs == signs[:, :1]).sum(axis=1), 0).astype(np.uint8), signs[:, -1] > 0


def _negate_weights(index: GraphIndex, conv: onnx.NodeProto, activations: str, negated: NDArray[np.bool_]) -> None:
    """Negate the weights of ``conv`` that read a ``negated`` channel."""
    group = attributes(conv).get("group", 1)
    holder = index.maker(conv, 1)
    if conv.op_type != "Conv" or group != 1 or activations in conv.input[1:] or holder is None:
        raise ExportError(f"{conv.name} ({conv.op_type}) reads binary activations; only convolutions of one group can")
    while index.maker(holder) is not None:
        holder = index.maker(holder)
    codes = index.constant(holder.input[0])
    if codes is None or codes.dtype != np.int8 or codes.min(initial=0) == -128:
        raise ExportError(f"{conv.name}: its weights are not constant int8 codes from -127 on; cannot negate them")
    signs = np.where(negated, -1, 1).astype(np.int8).reshape(1, -1, 1, 1)
    holder.input[0] = add_initializer(index.graph, f"{conv.name}_codes", codes * signs)


def _row_lengths(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> its width in pixels, for every (N, C, H, W) tensor whose width is fixed."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.value_info}
    return {name: shape[3].dim_value for name, shape in shapes.items() if len(shape) == 4 and shape[3].dim_value > 0}


def _compare(index: GraphIndex, chain: _Chain, first: NDArray[np.uint8], *, row: int) -> None:
    """Replace the chain by the comparison."""
    graph, name = index.graph, chain.clip.name
    below, codes = f"{name}_below", f"{name}_codes"
    inputs: dict[str, NDArray[Any]] = {
        "first": first.reshape(-1, 1, 1),
        "minus": np.array(0, np.uint8),
        "plus": np.array(2, np.uint8),
        "one": np.array(1, np.uint8),
        "unit": np.array(1, np.float32),
        "row": np.array([len(first), 1, row], np.int64),
    }
    made = {what: add_initializer(graph, f"{name}_{what}", value) for what, value in inputs.items()}
    place = list(graph.node).index(chain.clip)
    inserted = [
        helper.make_node("Expand", [made["first"], made["row"]], [f"{name}_rows"], name=f"{name}_expand"),
        helper.make_node("Less", [chain.values.input[0], f"{name}_rows"], [below], name=f"{name}_less"),
        helper.make_node("Where", [below, made["minus"], made["plus"]], [codes], name=f"{name}_where"),
    ]
    insert_nodes(graph, place, inserted)
    del chain.binary.input[:]
    chain.binary.input.extend([codes, made["unit"], made["one"]])
    for node in (chain.clip, chain.quantize, chain.difference, chain.product):
        graph.node.remove(node)
    if not GraphIndex(graph).used_by[chain.values.output[0]]:
        graph.node.remove(chain.values)
