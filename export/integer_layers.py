"""Which layers of a file onnxruntime runs as integers, read from the graph that it executes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx

from robustq.export.session import open_session, session_options

INTEGER_LAYERS = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
    | {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    | {"QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool"}
)

NOT_LAYERS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "Cast",
        "Identity",
        "Clip",
        "Relu",
        "Less",
        "Where",
        "MaxPool",
    }
    | {"NhwcMaxPool", "Concat", "DepthToSpace", "Flatten", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze", "ReorderInput", "ReorderOutput", "Expand", "Gather", "ReduceMax"}
    | {"Max", "Min", "ReduceMin", "Resize", "Shape"}
)
"""Operators that move, convert or compare values. Operators in neither set count as float layers."""


@dataclass(frozen=True)
class Layers:
    """Names of the layers of an optimised graph, in their order; ``float_convolutions`` are part of ``in_float``."""

    integer: tuple[str, ...]
    in_float: tuple[str, ...]
    float_convolutions: tuple[str, ...]


def optimised_layers(path: Path, *, arm_defaults: bool = False) -> Layers:
    """Which layers of the .onnx file onnxruntime runs as integers and which in float, read from the graph it executes.

    ``arm_defaults``: as onnxruntime decides on ARM, where layers with int8 activations stay in float.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = session_options(optimise=True)
        options.optimized_model_filepath = str(optimised)
        if arm_defaults:
            options.add_session_config_entry("session.qdqisint8allowed", "1")
        open_session(path, options)
        nodes = onnx.load(optimised).graph.node
    integer = tuple(_name(node) for node in nodes if node.op_type in INTEGER_LAYERS)
    in_float = [node for node in nodes if node.op_type not in INTEGER_LAYERS | NOT_LAYERS]
    # Conv, FusedConv, NhwcFusedConv, ...; a transposed one has no integer form.
    convolutions = [node for node in in_float if "Conv" in node.op_type and node.op_type != "ConvTranspose"]
    return Layers(integer, tuple(map(_name, in_float)), tuple(map(_name, convolutions)))


def _name(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}({node.output[0]})"
