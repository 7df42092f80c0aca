"""Description of an ONNX file: layers with the width of their weights, inputs, outputs and metadata."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from robustq.errors import ModelFileError, one_line
from robustq.export.graph_limits import QUANTIZERS, broken_limit, stored_tensors
from robustq.export.integer_layers import optimised_layers
from robustq.export.lowering.constants import folded_constants
from robustq.export.lowering.graph import attributes
from robustq.files import open_regular
from robustq.tables import parse_bounded

LAYERS = frozenset(
    {"Conv", "Gemm", "MatMul", "QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "FusedConv"}
    | {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
)

MOST_UNPACKED = 1 << 27
"""Weights that are unpacked for a description."""

COMPARISONS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Sign"})
"""Operators that make activations of one bit."""

_WEIGHT = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3}
"""Index of the weight among a node's inputs, where it is not 1."""

_WEIGHT_SCALE = {
    **dict.fromkeys(_WEIGHT, 4),
    "MatMulIntegerToFloat": 3,
    "DynamicQuantizeMatMul": 2,
}
"""Index of the scale of weights that are codes."""

_OUTPUT_SCALE = {
    "QuantizeLinear": 1,
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul"), 6),
    **dict.fromkeys(("QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearSigmoid", "QLinearLeakyRelu"), 3),
    "QLinearSoftmax": 3,
    "QLinearConcat": 0,
    "QGemm": 7,
}
"""Index of the scale of the codes that a node makes; the zero point follows."""


def describe_onnx(path: Path) -> dict[str, Any]:
    """Layers, quantizers, inputs, outputs, operators, opset and metadata of the file at ``path``.

    ``weight_bits`` of a layer is the smallest b with all codes in [-2^(b-1), 2^(b-1) - 1], after each output channel's
    codes were divided by their greatest common divisor (folding multiplies them to give the bias finer steps); 1 where
    all are -1 or 1, 32 for float weights, None where they cannot be read. ``scale`` is that of its weights: the
    smallest and the largest, per ``tensor`` or ``channel``. ``quantizers`` are those of activations. ``integer_layers``
    and ``float_layers`` are as onnxruntime runs the file, or None, and ``not_run`` says why.

    Raises:
        ModelFileError: not an ONNX file.
    """
    try:
        with open_regular(path) as file:
            model = onnx.load(file, load_external_data=False)
        if all(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
            onnx.checker.check_model(model)
        limit = broken_limit(model, constants=MOST_UNPACKED)
        unpack = limit is None
        if any(node.op_type in QUANTIZERS for node in model.graph.node):
            limit = "has operators of QONNX"
        found = _description(model, unpack=unpack) | _runs(path, limit)
        json.dumps(found)  # text that is not UTF-8 comes as bytes
        return found
    except ModelFileError:
        raise
    except Exception as error:  # protobuf, the checker and a broken graph have any exception
        reason = one_line(error, longest=120)
        raise ModelFileError(f"{path}: is not a whole ONNX file ({reason}); export it again") from error


def _runs(path: Path, limit: str | None) -> dict[str, Any]:
    """Layers as onnxruntime runs them; it is not started for a file beyond the limits."""
    try:
        if limit is not None:
            raise ModelFileError(f"it {limit}")
        layers = optimised_layers(path)
    except ModelFileError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return {"integer_layers": None, "float_layers": None, "not_run": reason}
    return {"integer_layers": list(layers.integer), "float_layers": list(layers.in_float), "not_run": None}


def _description(model: onnx.ModelProto, *, unpack: bool) -> dict[str, Any]:
    counts = Counter(node.op_type for node in model.graph.node)
    stored = [math.prod(tensor.dims) for tensor in stored_tensors(model)]
    if unpack:
        folded_constants(model)  # unpacks packed weights
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
        "stored_values": sum(stored),
        "layers": [_layer(node, makers, values) for node in graph.node if node.op_type in LAYERS],
        "quantizers": _quantizers(graph, values),
        "spec": _table(metadata.get("robustq.spec")),
        "preprocessing": _table(metadata.get("robustq.preprocessing")),
        "accuracy": _table(metadata.get("robustq.accuracy")),
        "not_for": _texts(metadata.get("robustq.not_for")),
        "failed": _texts(metadata.get("robustq.failed")),
        "metadata": metadata,
    }


def _json(text: str | None) -> Any:
    try:
        return parse_bounded(text or "null", json.loads)
    except ValueError:
        return text


def _table(text: str | None) -> dict[str, Any] | None:
    found = _json(text)
    return found if isinstance(found, dict) else None


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
    steps: str | None = _input(node, _WEIGHT_SCALE.get(node.op_type))
    scale: np.ndarray[Any, Any] | None = None
    # Back to the initializer, through DequantizeLinear, Clip, Transpose, ...; QONNX keeps float weights.
    for _ in makers:  # so that a circle in a broken graph ends
        if name not in makers or not makers[name].input:
            break
        maker = makers[name]
        if maker.op_type in (*QUANTIZERS, "DequantizeLinear"):
            steps = _input(maker, 1)
            if maker.op_type in QUANTIZERS and steps in values:
                scale = numpy_helper.to_array(values[steps])
        name = maker.input[0]
    row: dict[str, Any] = {"name": node.name or node.output[0], "kind": node.op_type, "shape": [], "weight_bits": None}
    row["scale"] = None
    if name not in values:
        return row
    row["scale"] = _scale(values.get(steps or ""))
    codes = numpy_helper.to_array(values[name])
    if scale is not None:
        codes = np.rint(codes / scale).astype(np.int64)
    return {**row, "shape": list(codes.shape), "weight_bits": _needed_bits(codes, axis=_channel_axis(node))}


def _input(node: onnx.NodeProto, place: int | None) -> str | None:
    return node.input[place] if place is not None and place < len(node.input) else None


def _scale(tensor: onnx.TensorProto | None) -> dict[str, Any] | None:
    """Smallest and largest of the scales of a quantizer; None where they are not in the file."""
    steps = np.zeros(0) if tensor is None else numpy_helper.to_array(tensor)
    if steps.dtype.kind != "f" or not steps.size or not np.isfinite(steps).all():
        return None
    low, high = float(steps.min()), float(steps.max())
    return {"per": "tensor" if steps.size == 1 else "channel", "low": low, "high": high}


def _quantizers(graph: onnx.GraphProto, values: dict[str, onnx.TensorProto]) -> list[dict[str, Any]]:
    """The quantizers of activations, in their order: name of the codes, operator, bits, scale."""
    from_image = {value.name for value in graph.input} - values.keys()
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    rows = []
    bits: int | None
    for node in graph.node:
        if from_image.isdisjoint(node.input):
            continue
        from_image |= set(node.output)
        place = _OUTPUT_SCALE.get(node.op_type)
        if node.op_type == "DynamicQuantizeLinear":
            bits, scale = 8, None
        elif node.op_type in QUANTIZERS:
            width = values.get(_input(node, 3) or "")
            bits = 1 if node.op_type == "BipolarQuant" else None if width is None else _number(width)
            scale = _scale(values.get(_input(node, 1) or ""))
        elif node.op_type in COMPARISONS:
            bits, scale = 1, None
        elif place is not None:
            bits = _code_bits(values.get(_input(node, place + 1) or ""), readers.get(node.output[0], []), values)
            scale = _scale(values.get(_input(node, place) or ""))
        else:
            continue
        rows.append({"name": node.output[0], "kind": node.op_type, "bits": bits, "scale": scale})
    return rows


def _number(tensor: onnx.TensorProto) -> int | None:
    found = numpy_helper.to_array(tensor).reshape(-1)
    return int(found[0]) if found.size and np.isfinite(found[0]) else None


def _code_bits(
    zero: onnx.TensorProto | None, readers: list[onnx.NodeProto], values: dict[str, onnx.TensorProto]
) -> int:
    """Width of codes: that of their type, or less where a Clip alone reads them."""
    kind = "UINT8" if zero is None else onnx.TensorProto.DataType.Name(zero.data_type)
    bits = int("".join(filter(str.isdigit, kind)) or 8)
    if len(readers) == 1 and readers[0].op_type == "Clip":
        bounds = [values.get(_input(readers[0], place) or "") for place in (1, 2)]
        known = [_number(bound) for bound in bounds if bound is not None]
        if len(known) == 2 and known[0] is not None and known[1] is not None and known[1] > known[0]:
            return min(bits, (known[1] - known[0]).bit_length())
    return bits


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
