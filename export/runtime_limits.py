"""Runtimes and settings in which a file may not be used: a table, and the rows of it that hold for a file.

Every row was measured (docs/results/runtimes.md; QONNX: docs/results/finn.md and hls4ml.md). Runtimes and versions that
were not tried have no row: no row is no proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from robustq.models.spec import ModelSpec

BYTES = frozenset({TensorProto.INT8, TensorProto.UINT8})

QONNX_DOMAIN = "qonnx.custom_op"
"""What the domains of QONNX' operators begin with."""


@dataclass(frozen=True)
class Contents:
    """The properties of a file that decide where it runs.

    Args:
        operators: of all nodes.
        of_bytes: those of them that have an input of 8-bit integers.
        is_qonnx: whether it has operators of QONNX.
        has_signs: whether activations have 1 bit.
        consumer: the tool that a QONNX file was written for; None: the default one.
    """

    operators: frozenset[str]
    of_bytes: frozenset[str]
    is_qonnx: bool
    has_signs: bool
    consumer: str | None

    @property
    def is_quantized(self) -> bool:
        """Whether it is a quantized network in standard operators."""
        return "QuantizeLinear" in self.operators and not self.is_qonnx


@dataclass(frozen=True)
class Limit:
    """A runtime with versions and settings, its behaviour there and what to do, and the files that it concerns."""

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
        lambda file: file.is_quantized and not file.has_signs,
    ),
    Limit(
        "OpenVINO at any setting",
        "other answers from networks with activations of 1 bit",
        lambda file: file.is_quantized and file.has_signs,
    ),
    Limit(
        "onnxruntime",
        "refuses the file, which has operators of QONNX; export with --format integer",
        lambda file: file.is_qonnx,
    ),
    Limit(
        "hls4ml",
        "reads no other QONNX files than those written for it; export with --for hls4ml, at 2 bits or more",
        lambda file: file.is_qonnx and file.consumer != "hls4ml",
    ),
    Limit(
        "FINN",
        "not tried with files for hls4ml; export without --for hls4ml",
        lambda file: file.is_qonnx and file.consumer == "hls4ml",
    ),
)


def not_for(model: onnx.ModelProto, spec: ModelSpec, *, consumer: str | None = None) -> list[str]:
    """Where ``model`` may not be used: a sentence for each row of :data:`LIMITS` that concerns it.

    Args:
        model: a file of :func:`robustq.export.formats.build`.
        spec: the network in it.
        consumer: the tool that a QONNX file was written for.
    """
    found = contents(model, spec, consumer=consumer)
    return [f"{limit.runtime}: {limit.behaviour}" for limit in LIMITS if limit.concerns(found)]


def contents(model: onnx.ModelProto, spec: ModelSpec, *, consumer: str | None = None) -> Contents:
    """What decides, read from the graph (operators, element types) and from ``spec`` (widths)."""
    nodes = model.graph.node
    is_qonnx = any(node.domain.startswith(QONNX_DOMAIN) for node in nodes)
    types = {} if is_qonnx else _element_types(model)  # QONNX computes in float throughout
    return Contents(
        operators=frozenset(node.op_type for node in nodes),
        of_bytes=frozenset(node.op_type for node in nodes if any(types.get(name) in BYTES for name in node.input)),
        is_qonnx=is_qonnx,
        has_signs=spec.act_bits == 1,
        consumer=consumer,
    )


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        types[value.name] = value.type.tensor_type.elem_type
    return types
