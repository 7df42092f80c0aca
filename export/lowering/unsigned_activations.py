"""int8 activations become uint8 with zero point 128.

Contract: every QuantizeLinear of a computed tensor with an int8 zero point 0, its optional Clip and its
DequantizeLinear nodes get codes shifted by 128; the represented values are the same, bit for bit (QuantizeLinear rounds
before it adds the zero point). Weights, which are constants, stay int8. Why: onnxruntime's ARM defaults leave
convolutions in float that meet an int8 activation.
"""

from __future__ import annotations

import numpy as np
import onnx

from robustq.errors import ExportError
from robustq.export.lowering.graph import GraphIndex, add_initializer, drop_unused_initializers

SHIFT = 128


def unsigned_activations(model: onnx.ModelProto) -> int:
    """Shift every int8 activation; returns how many QuantizeLinear nodes were changed."""
    graph = model.graph
    index = GraphIndex(graph)
    changed = 0
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or index.constant(node.input[0]) is not None:
            continue
        zero_point = index.constant(node.input[2]) if len(node.input) > 2 else None
        if zero_point is None or zero_point.dtype != np.int8:
            continue
        shifted = (zero_point.astype(np.int16) + SHIFT).astype(np.uint8)
        node.input[2] = add_initializer(graph, f"{node.name}_zero_point", shifted)
        _shift_consumers(index, graph, node.output[0], node.name)
        changed += 1
    drop_unused_initializers(graph)
    del graph.value_info[:]  # the element types written there no longer hold
    return changed


def _shift_consumers(index: GraphIndex, graph: onnx.GraphProto, codes: str, origin: str) -> None:
    for consumer in index.used_by[codes]:
        if consumer.op_type == "Clip":
            for place in range(1, len(consumer.input)):
                bound = index.constant(consumer.input[place])
                if bound is None:
                    raise ExportError(f"{consumer.name}: a Clip of int8 codes has a computed bound; cannot shift it")
                shifted = (bound.astype(np.int16) + SHIFT).astype(np.uint8)
                consumer.input[place] = add_initializer(graph, f"{consumer.name}_bound_{place}", shifted)
            _shift_consumers(index, graph, consumer.output[0], origin)
        elif consumer.op_type == "DequantizeLinear":
            zero_point = index.constant(consumer.input[2]) if len(consumer.input) > 2 else np.zeros((), np.int8)
            if zero_point is None or zero_point.dtype != np.int8:
                raise ExportError(f"{consumer.name}: reads int8 codes of {origin} without an int8 zero point")
            shifted = (zero_point.astype(np.int16) + SHIFT).astype(np.uint8)
            name = add_initializer(graph, f"{consumer.name}_zero_point", shifted)
            if len(consumer.input) > 2:
                consumer.input[2] = name
            else:
                consumer.input.append(name)
        else:
            raise ExportError(f"{consumer.name} ({consumer.op_type}) reads int8 codes of {origin}; cannot shift them")
