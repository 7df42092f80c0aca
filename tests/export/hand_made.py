"""Tiny ONNX graphs written by hand, and onnxruntime's answers to them exactly as written (no optimisation)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Constant = Any
"""What numpy makes an array of: an array or a scalar of the wanted element type."""

FLOAT, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Constant],
    *,
    x: Sequence[int | str],
    outputs: Mapping[str, int],
) -> onnx.ModelProto:
    """A checked opset 17 model with float input ``x`` of the given shape; ``outputs``: float tensor -> rank."""
    graph = helper.make_graph(
        list(nodes),
        "hand_made",
        [helper.make_tensor_value_info("x", FLOAT, list(x))],
        [
            helper.make_tensor_value_info(name, FLOAT, [f"{name}_{axis}" for axis in range(rank)])
            for name, rank in outputs.items()
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    # IR 8 is what opset 17 came with; newer onnx packages would write a newer one than onnxruntime reads.
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def quantize(x: str, y: str, scale: str, zero_point: str | None = None, **kwargs: Any) -> onnx.NodeProto:
    inputs = [x, scale] if zero_point is None else [x, scale, zero_point]
    return helper.make_node("QuantizeLinear", inputs, [y], name=f"{y}_q", **kwargs)


def dequantize(x: str, y: str, scale: str, zero_point: str | None = None, **kwargs: Any) -> onnx.NodeProto:
    inputs = [x, scale] if zero_point is None else [x, scale, zero_point]
    return helper.make_node("DequantizeLinear", inputs, [y], name=f"{y}_dq", **kwargs)


def node(kind: str, inputs: Sequence[str], y: str, **kwargs: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [y], name=f"{y}_{kind.lower()}", **kwargs)


def answers(made: onnx.ModelProto, x: Array) -> list[Array]:
    """Every output for input ``x``, with onnxruntime's optimisations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(answer) for answer in session.run(None, {"x": x.astype(np.float32)})]


def counts(made: onnx.ModelProto) -> dict[str, int]:
    """Operation -> how many nodes."""
    return dict(Counter(each.op_type for each in made.graph.node))


def constant(made: onnx.ModelProto, name: str) -> Array:
    (found,) = [tensor for tensor in made.graph.initializer if tensor.name == name]
    return np.asarray(numpy_helper.to_array(found))


def same_answers(before: onnx.ModelProto, after: onnx.ModelProto, x: Array) -> bool:
    """Bit for bit, on every output."""
    pairs = zip(answers(before, x), answers(after, x), strict=True)
    return all(one.dtype == two.dtype and one.tobytes() == two.tobytes() for one, two in pairs)


def lowered(
    lower: Callable[[onnx.ModelProto], int], before: onnx.ModelProto, x: Array | None = None, *, count: int
) -> onnx.ModelProto:
    """The model after a pass that must fire ``count`` times, keep every answer to ``x``, and then find no more."""
    after = copy.deepcopy(before)
    assert lower(after) == count
    onnx.checker.check_model(after, full_check=True)
    assert x is None or same_answers(before, after, x)
    assert unchanged(lower, after)
    return after


def unchanged(lower: Callable[[onnx.ModelProto], int], model: onnx.ModelProto) -> bool:
    """Whether the pass leaves the model as it is."""
    before = model.SerializeToString()
    return lower(model) == 0 and model.SerializeToString() == before


def optimised_operations(path: Path, *, arm_defaults: bool) -> Counter[str]:
    """Operation -> how many, in the graph that onnxruntime would run; written without robustq, to check robustq."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    if arm_defaults:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(each.op_type for each in onnx.load(options.optimized_model_filepath).graph.node)
