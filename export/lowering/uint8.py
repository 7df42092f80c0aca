"""Passes that make int8 activations and float images uint8."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from robustq.errors import ExportError
from robustq.export.lowering.graph import (
    GraphIndex,
    add_initializer,
    drop_unused_initializers,
    insert_nodes,
    replace_input,
)

SHIFT = 128

PIXEL_SCALE = np.float32(1 / 255)


def unsigned_activations(model: onnx.ModelProto) -> int:
    """Shift the codes and the zero point of every int8 activation by 128; returns how many QuantizeLinear changed.

    Values stay the same, bit for bit: QuantizeLinear rounds before it adds the zero point. Weights, which are
    constants, stay int8. onnxruntime's ARM defaults leave convolutions with int8 activations in float.

    Raises:
        ExportError: int8 codes are read by another operator than Clip and DequantizeLinear.
    """
    graph = model.graph
    index = GraphIndex(graph)
    changed = 0
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or index.constant(node.input[0]) is not None:
            continue
        zero_point = index.input(node, 2)
        if zero_point is None or zero_point.dtype != np.int8:
            continue
        node.input[2] = add_initializer(graph, f"{node.name}_zero_point", _shifted(zero_point))
        _shift_consumers(index, graph, node.output[0], node.name)
        changed += 1
    drop_unused_initializers(graph)
    del graph.value_info[:]  # the element types written there no longer hold
    return changed


def _shifted(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    shifted: NDArray[np.uint8] = (codes.astype(np.int16) + SHIFT).astype(np.uint8)
    return shifted


def _shift_consumers(index: GraphIndex, graph: onnx.GraphProto, codes: str, origin: str) -> None:
    for consumer in index.used_by[codes]:
        if consumer.op_type == "Clip":
            for place in range(1, len(consumer.input)):
                bound = index.constant(consumer.input[place])
                if bound is None:
                    raise ExportError(f"{consumer.name}: a Clip of int8 codes has a computed bound; cannot shift it")
                consumer.input[place] = add_initializer(graph, f"{consumer.name}_bound_{place}", _shifted(bound))
            _shift_consumers(index, graph, consumer.output[0], origin)
        elif consumer.op_type == "DequantizeLinear":
            zero_point = index.input(consumer, 2) if len(consumer.input) > 2 else np.zeros((), np.int8)
            if zero_point is None or zero_point.dtype != np.int8:
                raise ExportError(f"{consumer.name}: reads int8 codes of {origin} without an int8 zero point")
            del consumer.input[2:]
            consumer.input.append(add_initializer(graph, f"{consumer.name}_zero_point", _shifted(zero_point)))
        else:
            raise ExportError(f"{consumer.name} ({consumer.op_type}) reads int8 codes of {origin}; cannot shift them")


def uint8_pixels(model: onnx.ModelProto) -> bool:
    """Make the float32 input in [0, 1] a uint8 input of the same name, 255 times as large; returns whether the first
    quantizer went.

    It goes where it is the only reader and has scale 1/255 and zero point 0: pixels are its codes. Elsewhere (a
    normalisation in front, a float network) Cast and Div by 255 take its place. Answers stay, bit for bit.
    """
    graph = model.graph
    index = GraphIndex(graph)
    (source,) = (value for value in graph.input if index.constant(value.name) is None)
    source.type.tensor_type.elem_type = TensorProto.UINT8
    readers = index.used_by[source.name]
    quantizer = readers[0] if len(readers) == 1 and _keeps_pixels(index, readers[0]) else None
    if quantizer is not None:
        replace_input(index.used_by[quantizer.output[0]], quantizer.output[0], source.name)
        graph.node.remove(quantizer)
        drop_unused_initializers(graph)
    else:
        values = f"{source.name}_in_0_1"
        replace_input(readers, source.name, values)
        largest = add_initializer(graph, f"{source.name}_largest", np.array(255.0, np.float32))
        cast = helper.make_node("Cast", [source.name], [f"{values}_times_255"], to=TensorProto.FLOAT)
        insert_nodes(graph, 0, [cast, helper.make_node("Div", [f"{values}_times_255", largest], [values])])
    del graph.value_info[:]
    return quantizer is not None


def _keeps_pixels(index: GraphIndex, node: onnx.NodeProto) -> bool:
    if node.op_type != "QuantizeLinear":
        return False
    scale = index.input(node, 1)
    zero_point = index.input(node, 2) if len(node.input) > 2 else np.zeros((), np.uint8)
    if scale is None or zero_point is None or zero_point.dtype != np.uint8 or zero_point.any():
        return False
    return scale.size == 1 and bool(np.abs(scale - PIXEL_SCALE).max() <= np.spacing(PIXEL_SCALE))
