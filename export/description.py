"""Description of an ONNX file: layers with the width of their weights, inputs, outputs and metadata."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from robustq.errors import ModelFileError, one_line
from robustq.export.graph_limits import QUANTIZERS, broken_limit
from robustq.export.lowering.constants import folded_constants
from robustq.export.lowering.graph import attributes
from robustq.files import open_regular
from robustq.tables import parse_bounded

LAYERS = frozenset({"Conv", "Gemm", "MatMul", "QLinearConv", "QGemm", "ConvInteger", "MatMulInteger"})

MOST_UNPACKED = 1 << 27
"""Weights that are unpacked for a description."""

_WEIGHT = {"QLinearConv": 3, "QGemm": 3}
"""Index of the weight among a node's inputs, where it is not 1."""


def describe_onnx(path: Path) -> dict[str, Any]:
    """Layers, inputs, outputs, operators, opset and metadata of the file at ``path``.

    ``weight_bits`` of a layer is the smallest b with all codes in [-2^(b-1), 2^(b-1) - 1], after each output channel's
    codes were divided by their greatest common divisor (folding multiplies them to give the bias finer steps); 1 where
    all are -1 or 1, 32 for float weights, None where they cannot be read.

    Raises:
        ModelFileError: not an ONNX file.
    """
    try:
        with open_regular(path) as file:
            model = onnx.load(file, load_external_data=False)
        if all(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
            onnx.checker.check_model(model)
        found = _description(model)
        json.dumps(found)  # text that is not UTF-8 comes as bytes
        return found
    except ModelFileError:
        raise
    except Exception as error:  # protobuf, the checker and a broken graph have any exception
        reason = one_line(error, longest=120)
        raise ModelFileError(f"{path}: is not a whole ONNX file ({reason}); export it again") from error


def _description(model: onnx.ModelProto) -> dict[str, Any]:
    counts = Counter(node.op_type for node in model.graph.node)
    if broken_limit(model, constants=MOST_UNPACKED) is None:
        folded_constants(model)  # unpacks packed weights
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    values = {value.name: value for value in graph.initializer}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    spec = _json(metadata.get("robustq.spec"))
    return {
        "format": metadata.get("robustq.format"),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [_tensor(value) for value in graph.input if value.name not in values],
        "outputs": [_tensor(value) for value in graph.output],
        "operators": dict(sorted(counts.items())),
        "layers": [_layer(node, makers, values) for node in graph.node if node.op_type in LAYERS],
        "spec": spec if isinstance(spec, dict) else None,
        "not_for": _texts(metadata.get("robustq.not_for")),
        "failed": _texts(metadata.get("robustq.failed")),
        "metadata": metadata,
    }


def _json(text: str | None) -> Any:
    try:
        return parse_bounded(text or "null", json.loads)
    except ValueError:
        return text


def _texts(text: str | None) -> list[str]:
    """A JSON list of texts; other content counts as one text."""
    found = _json(text)
    return [str(one) for one in found] if isinstance(found, list) else [] if text is None else [text]


def _tensor(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
    return {"name": value.name, "type": onnx.TensorProto.DataType.Name(kind.elem_type), "shape": shape}


def _layer(
    node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], values: dict[str, onnx.TensorProto]
) -> dict[str, Any]:
    name = node.input[_WEIGHT.get(node.op_type, 1)]
    scale: np.ndarray[Any, Any] | None = None
    # Back to the initializer, through DequantizeLinear, Clip, Transpose, ...; QONNX keeps float weights.
    for _ in makers:  # so that a circle in a broken graph ends
        if name not in makers or not makers[name].input:
            break
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
    """The axis of output channels."""
    if "MatMul" in node.op_type:
        return 1
    return 1 if node.op_type in ("Gemm", "QGemm") and not attributes(node).get("transB") else 0


def _needed_bits(codes: np.ndarray[Any, Any], *, axis: int) -> int | None:
    if codes.dtype.kind not in "iu" or codes.ndim < 2 or codes.size == 0:
        return 32 if codes.dtype.kind == "f" else None
    channels = np.moveaxis(codes.astype(np.int64), axis, 0).reshape(codes.shape[axis], -1)
    channels //= np.maximum(np.gcd.reduce(channels, axis=1), 1)[:, None]
    if (np.abs(channels) == 1).all():
        return 1
    low, high = int(channels.min()), int(channels.max())
    return next(bits for bits in range(2, 65) if -(2 ** (bits - 1)) <= low and high <= 2 ** (bits - 1) - 1)
