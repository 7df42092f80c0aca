"""Limits of the ONNX files that robustq runs: operators without loops, and sizes of tensors.

onnxruntime would run a loop without end, and computes constants when it loads a file: a few bytes can ask for 100 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx

from robustq.export.lowering.constants import folded_constants

QUANTIZERS = frozenset({"Quant", "BipolarQuant"})
"""Operators of QONNX; the first input is quantized, the second is the scale."""

UNBOUNDED = frozenset({"Einsum"})
"""Operators whose inner values may be larger than their inputs and outputs."""

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""

SAME_SHAPE: dict[str, tuple[str, slice]] = {
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), ("Add", slice(0, 4, 3))),
    **dict.fromkeys(("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"), ("Identity", slice(0, 1))),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "Gelu"), ("Identity", slice(0, 1))),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul"), ("MatMul", slice(0, 2))),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", slice(0, 1)),
    "QLinearAveragePool": ("AveragePool", slice(0, 1)),
    "QLinearConcat": ("Concat", slice(2, None, 3)),
    "QGemm": ("Gemm", slice(0, 4, 3)),
    "FusedConv": ("Conv", slice(0, 2)),
}
"""Operator of onnxruntime -> the one of ONNX with the same shape, and the inputs that it has of the first."""

LARGEST_ACTIVATION = 1 << 24
"""Elements of a tensor that depends on the image, for one image."""

LARGEST_CONSTANTS = 1 << 29
"""Elements of all other tensors together."""


LARGEST_WORK = 1 << 33
"""Multiplications, or pooled values, of one operator for one image: four times the largest layer of VGG-16.

onnxruntime can be stopped between two operators only. A batch of 200 images has at most 1.7e12, minutes on one core.
"""

_WEIGHT = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Place of the weight (K, C, height, width) among the inputs."""

_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "QLinearMatMul", "Gemm"})


def broken_limit(model: onnx.ModelProto, *, constants: int = LARGEST_CONSTANTS, side: int = 1) -> str | None:
    """The limit that a file exceeds, in words; None if it keeps all. Nothing large is computed.

    The limits: operators without inner graphs (:func:`is_feed_forward`) or QONNX' quantizers, all weights in the file,
    no constant of more elements than are stored, no tensor that is too large or of unknown size, and no operator of
    more than :data:`LARGEST_WORK`.

    Args:
        model: without external data loaded.
        constants: see :data:`LARGEST_CONSTANTS`.
        side: see :func:`tensor_shapes`.

    Raises:
        Exception: onnx cannot infer the shapes of a broken graph.
    """
    graph = model.graph
    for node in graph.node:
        if node.op_type not in QUANTIZERS and not is_feed_forward(node):
            return f"has the operator {node.op_type}"
    if model.functions:
        return "has functions"
    for tensor in stored_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            return f"keeps the values of {tensor.name or 'a constant'} in another file"
        if _count(tensor.dims) > 8 * tensor.ByteSize():  # at most 8 elements a byte
            return f"declares {_count(tensor.dims):,} values of {tensor.name or 'a constant'}, and has fewer"
    shapes = tensor_shapes(model, side=side)
    stored = {tensor.name for tensor in graph.initializer}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    from_image = {value.name for value in graph.input} - stored
    for node in graph.node:
        depends = not from_image.isdisjoint(node.input)
        from_image |= set(node.output) if depends else set()
        for name in filter(None, node.output):
            if name not in shapes:
                return f"has a tensor of unknown size ({name}, by {node.op_type})"
            size = _count(shapes[name])
            constants -= 0 if depends else size
            if size > LARGEST_ACTIVATION if depends else constants < 0:
                return f"makes a tensor of {size:,} values ({name}, by {node.op_type})"
            work = size * _work_per_value(node, shapes)
            if work > LARGEST_WORK:
                return f"takes {work:,} steps for one tensor ({name}, by {node.op_type})"
    return None


def is_feed_forward(node: onnx.NodeProto) -> bool:
    """Whether an operator of ONNX runs no inner graph (loop, condition, scan), or one of onnxruntime is known here."""
    if node.domain == MICROSOFT:
        return node.op_type in SAME_SHAPE
    if node.domain not in ("", "ai.onnx") or node.op_type in UNBOUNDED or not onnx.defs.has(node.op_type):
        return False
    kinds = {attribute.type for attribute in onnx.defs.get_schema(node.op_type).attributes.values()}
    return kinds.isdisjoint({onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS})


def _work_per_value(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiplications, or pooled values, for one value of the output; 1 for all operators but the costly ones."""
    if node.op_type in _WEIGHT:
        return _count(shapes.get(node.input[_WEIGHT[node.op_type]], ())[1:])
    if node.op_type in _PRODUCTS:
        return max(shapes.get(node.input[0], ()), default=1)
    if node.op_type in ("AveragePool", "MaxPool"):
        return math.prod(next((each.ints for each in node.attribute if each.name == "kernel_shape"), ()))
    return 1


def stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and tensors in attributes."""
    yield from model.graph.initializer
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in model.graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors


def tensor_shapes(model: onnx.ModelProto, *, side: int = 1) -> dict[str, tuple[int, ...]]:
    """Name -> shape for one image, of the computed tensors whose shape the graph tells.

    ``side`` is the size of the input's axes that are open, but for the first, which counts images.
    """
    single = onnx.ModelProto()
    single.CopyFrom(model)
    del single.graph.value_info[:]  # what the file claims
    for node in single.graph.node:
        if node.op_type in QUANTIZERS:
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))
        elif node.domain == MICROSOFT and node.op_type in SAME_SHAPE:
            node.domain = ""
            node.op_type, kept = SAME_SHAPE[node.op_type]
            node.input[:] = node.input[kept]
    for output in single.graph.output:
        output.type.tensor_type.ClearField("shape")
    for value in single.graph.input:
        for place, axis in enumerate(value.type.tensor_type.shape.dim):
            if not axis.HasField("dim_value"):
                axis.dim_value = side if place else 1
    shapes = _inferred_shapes(single)
    if any(name and name not in shapes for node in single.graph.node for name in node.output):
        # The amounts of a Pad, which the exporter writes as seven nodes.
        folded_constants(single, sizes={name: _count(shape) for name, shape in shapes.items()})
        shapes |= _inferred_shapes(single)
    return shapes


def _inferred_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {}
    for value in [*inferred.value_info, *inferred.output]:
        shape = value.type.tensor_type.shape
        if value.type.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in shape.dim):
            shapes[value.name] = tuple(axis.dim_value for axis in shape.dim)
    return shapes


def _count(dims: Iterable[int]) -> int:
    return math.prod(max(size, 0) for size in dims)
