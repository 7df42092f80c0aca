"""Logits of a QONNX file after FINN's conversion (and streamlining), by qonnx's executor.

Protocol: benchmarks/runtimes.py. Settings: convert, streamline.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from importlib.metadata import version
from typing import Any

import numpy as np
from finn.transformation.qonnx.convert_qonnx_to_finn import ConvertQONNXtoFINN
from finn.transformation.streamline.round_thresholds import RoundAndClipThresholds
from finn.transformation.streamline.streamline_plus import StreamlinePlus
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.util.cleanup import cleanup_model

LAYERS = ("Conv", "MatMul", "Gemm")


def main() -> None:
    """Convert, streamline, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("images")
    parser.add_argument("logits")
    parser.add_argument("--setting", choices=["convert", "streamline"], default="streamline")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        model = transformed(options.file, streamline=options.setting == "streamline")
        logits = executed(model, np.load(options.images).astype(np.float32))
    except Exception as error:  # FINN raises AssertionError, ValueError, ...
        sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    np.save(options.logits, logits)
    print(json.dumps(described(model)))


def transformed(path: str, *, streamline: bool) -> Any:
    """FINN's graph with a batch of one, as in its build flow."""
    model = cleanup_model(ModelWrapper(path), override_inpsize=1).transform(ConvertQONNXtoFINN())
    if streamline:
        model = model.transform(StreamlinePlus()).transform(InferDataTypes()).transform(RoundAndClipThresholds())
    return model.transform(InferShapes()).transform(InferDataTypes())


def executed(model: Any, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Logits (N, K) float32 of images (N, C, H, W), one by one."""
    source, sink = model.graph.input[0].name, model.graph.output[0].name
    logits = [execute_onnx(model, {source: images[place : place + 1]})[sink] for place in range(len(images))]
    return np.concatenate(logits).astype(np.float32)


def described(model: Any) -> dict[str, Any]:
    """Integer layers, multipliers before sums, and whether thresholds (not of pixels and averages) are integers."""
    source = model.graph.input[0].name
    layers = [node for node in model.graph.node if node.op_type in LAYERS]
    integer = [all(model.get_tensor_datatype(name).is_integer() for name in node.input[:2]) for node in layers]
    thresholds = [
        model.get_initializer(node.input[1])
        for node in model.graph.node
        if node.op_type == "MultiThreshold" and node.input[0] != source and not follows_average(model, node)
    ]
    return {
        "version": f"finn-plus {version('finn-plus')}",
        "integer_layers": sum(integer),
        "float_layers": len(integer) - sum(integer),
        "scalar_multipliers_before_sums": multipliers_before_sums(model),
        "thresholds_integer": all(bool(np.all(each == np.round(each))) for each in thresholds),
    }


def follows_average(model: Any, node: Any) -> bool:
    """Whether the input of the node comes from a GlobalAveragePool."""
    producer = model.find_producer(node.input[0])
    return producer is not None and producer.op_type == "GlobalAveragePool"


def multipliers_before_sums(model: Any) -> int:
    """Number of inputs of an Add of two computed tensors that are a Mul by one constant scalar."""
    count = 0
    for node in model.graph.node:
        if node.op_type != "Add" or any(model.get_initializer(name) is not None for name in node.input):
            continue
        for producer in (model.find_producer(name) for name in node.input):
            if producer is not None and producer.op_type == "Mul":
                factors = [model.get_initializer(name) for name in producer.input]
                count += any(factor is not None and factor.size == 1 for factor in factors)
    return count


if __name__ == "__main__":
    main()
