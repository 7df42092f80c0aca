"""Sizes that the limits read from files of onnxruntime's quantizer, against the values that onnxruntime computes."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from robustq.export.graph_limits import broken_limit, is_feed_forward, tensor_shapes
from tests.twin.files import Net, quantized, write


@pytest.mark.parametrize("kind", [("QOperator", True, "QUInt8", "QInt8"), ("QDQ", False, "QUInt8", "QInt8"), None])
def test_sizes_are_those_of_the_values(tmp_path: Path, kind: tuple[str, bool, str, str] | None) -> None:
    torch.manual_seed(0)
    source = write(Net().eval(), tmp_path / "float.onnx")
    path = quantized(source, tmp_path / "net.onnx", torch.rand(16, 1, 8, 8), kind)
    model = onnx.load(path)
    assert broken_limit(model) is None
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(model).items()}
    names = [name for node in model.graph.node for name in node.output if name]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    values = session.run(names, {"images": torch.rand(1, 1, 8, 8).numpy()})
    assert {name: sizes[name] for name in names} == {name: one.size for name, one in zip(names, values, strict=True)}


def test_operators_with_inner_graphs_and_of_unknown_domains_are_no_feed_forward_ones() -> None:
    refused = [("Loop", ""), ("If", ""), ("Scan", ""), ("Einsum", ""), ("Nothing", ""), ("Attention", "com.microsoft")]
    refused.append(("Relu", "com.example"))
    allowed = [("Conv", ""), ("ArgMax", "ai.onnx"), ("CumSum", ""), ("QLinearAdd", "com.microsoft")]
    for expected, pairs in ((False, refused), (True, allowed)):
        for operator, domain in pairs:
            assert is_feed_forward(helper.make_node(operator, [], [], domain=domain)) == expected, operator
