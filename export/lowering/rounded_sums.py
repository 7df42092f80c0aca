"""The branches of a sum are quantized twice, to the same grid.

Contract: where an Add takes Conv - QuantizeLinear(s, z) - DequantizeLinear(s, z), z not 0, with or without Relu or Clip
between them, QuantizeLinear(s, z) - DequantizeLinear(s, z) follows once more in front of the Add. Requantizing codes to
their own grid changes nothing.

Why: OpenVINO (2026.4; "drop rounding one special residual pattern" in its dnnl_postops_composer.cpp) fuses quantizer,
sum and the next quantizer into the convolution and leaves out the rounding of the first, which moves about one code in
fifty. With a second pair it fuses the first one only, and rounds. Where z is 0 it sees through the second pair; one of
the other integer type would help there too, but tract (0.23.9) cannot load such a pair. onnxruntime drops the second
pair when it loads the file.
"""

from __future__ import annotations

import onnx
from onnx import helper

from robustq.export.lowering.graph import GraphIndex

PASSED = frozenset({"Relu", "Clip"})
"""What may stand between a convolution and its quantizer, and behind the quantizer."""


def rounded_sums(model: onnx.ModelProto) -> int:
    """Quantize every such branch once more; returns how many."""
    graph = model.graph
    index = GraphIndex(graph)
    doubled = 0
    for node in list(graph.node):
        if node.op_type != "DequantizeLinear" or not _has_zero_point(index, node):
            continue
        sums = [reader for reader in index.used_by[node.output[0]] if reader.op_type == "Add"]
        if sums and _quantizes_convolution(index, node):
            _quantize_again(graph, node, sums)
            doubled += 1
    return doubled


def _has_zero_point(index: GraphIndex, node: onnx.NodeProto) -> bool:
    zero_point = index.constant(node.input[2]) if len(node.input) > 2 else None
    return zero_point is not None and zero_point.size == 1 and bool(zero_point.any())


def _quantizes_convolution(index: GraphIndex, dequantizer: onnx.NodeProto) -> bool:
    quantizer = _origin(index, dequantizer)
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return False
    layer = _origin(index, quantizer)
    return layer is not None and layer.op_type == "Conv"


def _origin(index: GraphIndex, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The maker of a node's first input, seen through :data:`PASSED`."""
    maker = index.made_by.get(node.input[0])
    while maker is not None and maker.op_type in PASSED:
        maker = index.made_by.get(maker.input[0])
    return maker


def _quantize_again(graph: onnx.GraphProto, dequantizer: onnx.NodeProto, sums: list[onnx.NodeProto]) -> None:
    branch, grid, name = dequantizer.output[0], list(dequantizer.input[1:]), f"{dequantizer.name}_again"
    codes, values = f"{branch}_again_codes", f"{branch}_again"
    for reader in sums:
        for place, read in enumerate(reader.input):
            if read == branch:
                reader.input[place] = values
    at = list(graph.node).index(dequantizer) + 1
    graph.node.insert(at, helper.make_node("QuantizeLinear", [branch, *grid], [codes], name=f"{name}_quantize"))
    graph.node.insert(at + 1, helper.make_node("DequantizeLinear", [codes, *grid], [values], name=f"{name}_dequantize"))
