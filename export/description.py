"""What an ONNX file holds: its layers with the width of their weights, its inputs, and what it says of itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from robustq.errors import ModelFileError
from robustq.export.lowering.constants import folded_constants

LAYERS = frozenset({"Conv", "Gemm", "MatMul", "QLinearConv", "QGemm", "ConvInteger", "MatMulInteger"})

QUANTIZERS = frozenset({"Quant", "BipolarQuant"})
"""Of QONNX: the second input is the scale."""

_WEIGHT = {"QLinearConv": 3, "QGemm": 3}
"""Place of the weight among a node's inputs, where it is not the second."""


def describe_onnx(path: Path) -> dict[str, Any]:
    """Layers, inputs, outputs, operators, opset and metadata of the file at ``path``.

    A layer's ``weight_bits`` is the width that its weights need: each output channel's codes are divided by their
    greatest common divisor (folding multiplies a channel's codes, and divides its scale, to give the bias finer steps),
    and the width is the smallest b with all of them in [-2^(b-1), 2^(b-1) - 1]; 1 where all are -1 or 1, 32 for float
    weights, None where they cannot be read.

    Raises:
        ModelFileError: not an ONNX file.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model) if _is_standard(model) else None
    except Exception as error:  # protobuf and the checker share no base class
        reason = " ".join(str(error).split())[:120]
        raise ModelFileError(f"{path}: is not a whole ONNX file ({reason}); export it again") from error
    counts = Counter(node.op_type for node in model.graph.node)
    folded_constants(model)  # packed weights are unpacked by operations on constants
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    values = {value.name: value for value in graph.initializer}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return {
        "format": metadata.get("robustq.format"),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [_tensor(value) for value in graph.input if value.name not in values],
        "outputs": [_tensor(value) for value in graph.output],
        "operators": dict(sorted(counts.items())),
        "layers": [_layer(node, makers, values) for node in graph.node if node.op_type in LAYERS],
        "spec": _spec(metadata.get("robustq.spec")),
        "not_for": _texts(metadata.get("robustq.not_for")),
        "failed": _texts(metadata.get("robustq.failed")),
        "metadata": metadata,
    }


def _is_standard(model: onnx.ModelProto) -> bool:
    return all(entry.domain in ("", "ai.onnx") for entry in model.opset_import)


def _spec(text: str | None) -> dict[str, Any] | None:
    try:
        spec = json.loads(text) if text is not None else None
    except ValueError:
        return None
    return spec if isinstance(spec, dict) else None


def _texts(text: str | None) -> list[str]:
    """A JSON list of texts; what is no such list stands as one text, since somebody wrote it."""
    if text is None:
        return []
    try:
        found = json.loads(text)
    except ValueError:
        return [text]
    return [str(one) for one in found] if isinstance(found, list) else [text]


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    shape = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
    return {
        "name": value.name,
        "type": onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
        "shape": shape,
    }


def _layer(
    node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], values: dict[str, onnx.TensorProto]
) -> dict[str, Any]:
    name = node.input[_WEIGHT.get(node.op_type, 1)]
    scale: np.ndarray[Any, Any] | None = None
    # From the layer back to the initializer, through DequantizeLinear, Clip, Transpose, ...; QONNX keeps float weights
    # and says in its Quant node what they are multiples of.
    while name in makers and makers[name].input:
        maker = makers[name]
        if maker.op_type in QUANTIZERS and maker.input[1] in values:
            scale = numpy_helper.to_array(values[maker.input[1]])
        name = maker.input[0]
    row: dict[str, Any] = {"name": node.name or node.output[0], "kind": node.op_type, "shape": [], "weight_bits": None}
    if name not in values:
        return row
    codes = numpy_helper.to_array(values[name])
    if scale is not None:
        codes = np.rint(codes / scale).astype(np.int64)
    return {**row, "shape": list(codes.shape), "weight_bits": _needed_bits(codes, axis=_channel_axis(node))}


def _channel_axis(node: onnx.NodeProto) -> int:
    """Axis of a weight that counts output channels."""
    if "MatMul" in node.op_type:
        return 1
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if node.op_type in ("Gemm", "QGemm") and not transposed else 0


def _needed_bits(codes: np.ndarray[Any, Any], *, axis: int) -> int | None:
    if codes.dtype.kind not in "iu" or codes.ndim < 2 or codes.size == 0:
        return 32 if codes.dtype.kind == "f" else None
    channels = np.moveaxis(codes.astype(np.int64), axis, 0).reshape(codes.shape[axis], -1)
    channels //= np.maximum(np.gcd.reduce(channels, axis=1), 1)[:, None]
    if (np.abs(channels) == 1).all():
        return 1
    low, high = int(channels.min()), int(channels.max())
    return next(bits for bits in range(2, 65) if -(2 ** (bits - 1)) <= low and high <= 2 ** (bits - 1) - 1)
