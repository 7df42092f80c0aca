"""A file in onnxruntime: its logits and inner values, and which of its layers run as integers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from robustq.errors import ModelFileError

INTEGER_LAYERS = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
    | {"QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool"}
)

NOT_LAYERS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "Cast",
        "Identity",
        "Clip",
        "Relu",
        "Less",
        "Where",
        "MaxPool",
        "NhwcMaxPool",
    }
    | {"Concat", "DepthToSpace", "Flatten", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze", "ReorderInput", "ReorderOutput"}
)
"""Operators that move, convert or compare values. Operators in neither set count as float layers."""


@dataclass(frozen=True)
class Layers:
    """Names of the layers of an optimised graph, in their order; ``float_convolutions`` are part of ``in_float``."""

    integer: tuple[str, ...]
    in_float: tuple[str, ...]
    float_convolutions: tuple[str, ...]


class OnnxModel:
    """Images in, logits out, by onnxruntime on the CPU.

    Args:
        path: an .onnx file with one image input (N, C, H, W), float32 or uint8, and one logits output (N, K).
        optimise: run onnxruntime's graph optimisations (as a device does) or none.
        exact: ask for exact 8-bit products on CPUs whose AVX2 path saturates (``session.x64quantprecision``).
        threads: of one operator; 0 lets onnxruntime choose.

    Raises:
        ModelFileError: onnxruntime cannot load the file.
    """

    def __init__(self, path: Path, *, optimise: bool = True, exact: bool = False, threads: int = 0) -> None:
        options = _options(optimise=optimise)
        options.intra_op_num_threads = threads
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = _open(path, options)
        source = self._session.get_inputs()[0]
        self._input = source.name
        self.takes_uint8 = source.type == "tensor(uint8)"

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [0, 1] on any device -> (B, K) float32 logits on the CPU.

        A file that takes uint8 pixels is fed 255 * x, rounded.
        """
        (logits,) = self.values(x, None)
        return logits

    def values(self, x: Tensor, names: list[str] | None) -> list[Tensor]:
        """The graph outputs called ``names`` (None: all) for images ``x``, as in :meth:`__call__`."""
        images = x.detach().cpu()
        if self.takes_uint8:
            images = (images * 255).round().to(torch.uint8)
        found = self._session.run(names, {self._input: images.contiguous().numpy()})
        return [torch.from_numpy(each) for each in found]


def optimised_layers(path: Path, *, arm_defaults: bool = False) -> Layers:
    """Which layers onnxruntime runs as integers and which in float, read from the graph it would execute.

    Args:
        path: the .onnx file.
        arm_defaults: decide as onnxruntime does on ARM, where layers with int8 activations stay in float.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = _options(optimise=True)
        options.optimized_model_filepath = str(optimised)
        if arm_defaults:
            options.add_session_config_entry("session.qdqisint8allowed", "1")
        _open(path, options)
        nodes = onnx.load(optimised).graph.node
    integer = tuple(_name(node) for node in nodes if node.op_type in INTEGER_LAYERS)
    in_float = [node for node in nodes if node.op_type not in INTEGER_LAYERS | NOT_LAYERS]
    convolutions = [node for node in in_float if "Conv" in node.op_type]  # Conv, FusedConv, NhwcFusedConv, ...
    return Layers(integer, tuple(map(_name, in_float)), tuple(map(_name, convolutions)))


def _name(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}({node.output[0]})"


def _options(*, optimise: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors come back as exceptions
    return options


def _open(path: Path, options: ort.SessionOptions) -> Any:
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types share no base below Exception
        first = str(error).strip().splitlines()[0][:160]
        raise ModelFileError(f"{path}: onnxruntime cannot load it ({first})") from error
