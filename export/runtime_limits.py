"""Runtimes and settings in which a file may not be used.

Every row was measured (docs/results/runtimes.md; QONNX: docs/results/finn.md and hls4ml.md). Runtimes and versions
without a row were not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from robustq.export.lowering.fixed_point_multipliers import CHANNELS_LAST
from robustq.models.spec import ModelSpec

BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8})

QONNX_DOMAIN = "qonnx.custom_op"
"""Prefix of the domains of QONNX' operators."""


@dataclass(frozen=True)
class Contents:
    """The properties of a file that decide where it runs."""

    operators: frozenset[str]  # of all nodes
    of_bytes: frozenset[str]  # operators with an input of 8-bit integers
    is_qonnx: bool  # has operators of QONNX
    is_binary: bool  # activations have 1 bit
    is_for_hls4ml: bool  # a QONNX file that was written for hls4ml

    @property
    def is_quantized(self) -> bool:
        """Whether it is a quantized network in standard operators."""
        return "QuantizeLinear" in self.operators and not self.is_qonnx


@dataclass(frozen=True)
class Limit:
    """A runtime with versions and settings, its behaviour and what to do, and the files that it concerns."""

    runtime: str
    behaviour: str
    concerns: Callable[[Contents], bool]


LIMITS = (
    Limit(
        "onnxruntime up to 1.20.1, also -web and -node",
        "refuses the file, having no Less of bytes; use 1.23.2 or newer (-web and -node: 1.30.0)",
        lambda file: "Less" in file.of_bytes,
    ),
    Limit(
        "onnxruntime-web 1.30.0 with graph optimisation",
        "the same classes, but other logits for a few images; set graphOptimizationLevel to disabled",
        lambda file: "Less" in file.of_bytes,
    ),
    Limit(
        "OpenVINO at its default setting, on processors that compute bfloat16",
        "other answers; set INFERENCE_PRECISION_HINT=f32",
        lambda file: file.is_quantized and not file.is_binary,
    ),
    Limit(
        "OpenVINO at any setting",
        "other answers from networks with activations of 1 bit",
        lambda file: file.is_quantized and file.is_binary,
    ),
    Limit(
        "onnxruntime",
        "refuses the file, which has operators of QONNX; export with --format integer",
        lambda file: file.is_qonnx,
    ),
    Limit(
        "hls4ml",
        "reads no other QONNX files than those written for it; export with --for hls4ml, at 2 bits or more",
        lambda file: file.is_qonnx and not file.is_for_hls4ml,
    ),
    Limit(
        "FINN",
        "not tried with files for hls4ml; export without --for hls4ml",
        lambda file: file.is_for_hls4ml,
    ),
)


def not_for(model: onnx.ModelProto, spec: ModelSpec) -> list[str]:
    """A sentence for each row of :data:`LIMITS` that holds for ``model``, a file of the network ``spec``."""
    found = contents(model, spec)
    return [f"{limit.runtime}: {limit.behaviour}" for limit in LIMITS if limit.concerns(found)]


def contents(model: onnx.ModelProto, spec: ModelSpec) -> Contents:
    """Read them from the graph (operators, element types) and from ``spec`` (widths)."""
    nodes = model.graph.node
    is_qonnx = any(node.domain.startswith(QONNX_DOMAIN) for node in nodes)
    types: dict[str, int] = {}
    if not is_qonnx:  # which computes in float throughout
        graph = onnx.shape_inference.infer_shapes(model).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            types[value.name] = value.type.tensor_type.elem_type
    return Contents(
        operators=frozenset(node.op_type for node in nodes),
        of_bytes=frozenset(node.op_type for node in nodes if any(types.get(name) in BYTES for name in node.input)),
        is_qonnx=is_qonnx,
        is_binary=spec.act_bits == 1,
        is_for_hls4ml=any(node.domain == CHANNELS_LAST for node in nodes),
    )
