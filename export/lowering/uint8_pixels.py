"""The file takes uint8 pixels as a camera gives them.

Contract: the float32 input in [0, 1] becomes a uint8 input of the same name and shape, 255 times as large. Where its
only reader is a QuantizeLinear to uint8 with scale 1/255 and zero point 0, that one goes: the pixels are its codes.
Elsewhere (a normalisation in front, a float network) Cast and Div by 255 take its place. Answers are the same for every
uint8 picture, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers

SCALE = np.float32(1 / 255)


def uint8_pixels(model: onnx.ModelProto) -> bool:
    """Change the input; returns whether a quantizer could go."""
    graph = model.graph
    index = GraphIndex(graph)
    (source,) = (value for value in graph.input if index.constant(value.name) is None)
    source.type.tensor_type.elem_type = TensorProto.UINT8
    readers = index.used_by[source.name]
    quantizer = readers[0] if len(readers) == 1 and _keeps_pixels(index, readers[0]) else None
    if quantizer is not None:
        for reader in index.used_by[quantizer.output[0]]:
            for place, name in enumerate(reader.input):
                if name == quantizer.output[0]:
                    reader.input[place] = source.name
        graph.node.remove(quantizer)
        drop_unused_initializers(graph)
    else:
        values = f"{source.name}_in_0_1"
        for reader in readers:
            for place, name in enumerate(reader.input):
                if name == source.name:
                    reader.input[place] = values
        largest = add_initializer(graph, f"{source.name}_largest", np.array(255.0, np.float32))
        graph.node.insert(0, helper.make_node("Cast", [source.name], [f"{values}_times_255"], to=TensorProto.FLOAT))
        graph.node.insert(1, helper.make_node("Div", [f"{values}_times_255", largest], [values]))
    del graph.value_info[:]
    return quantizer is not None


def _keeps_pixels(index: GraphIndex, node: onnx.NodeProto) -> bool:
    if node.op_type != "QuantizeLinear":
        return False
    scale: NDArray[Any] | None = index.constant(node.input[1])
    zero_point = index.constant(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
    if scale is None or zero_point is None or zero_point.dtype != np.uint8 or zero_point.any():
        return False
    return scale.size == 1 and bool(np.abs(scale - SCALE).max() <= np.spacing(SCALE))
