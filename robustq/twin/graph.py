"""ONNX graphs as lists of nodes: checked reading of a file that anybody may have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from onnx.inliner import inline_local_functions

from robustq.errors import ModelFileError, one_line
from robustq.files import check_model_file, open_regular

MAX_ELEMENTS = 2**27
"""Elements of one tensor: 512 MiB in float32, 50 times the largest activation of a ResNet-50 for one image."""

_ONNX_DOMAINS = ("", "ai.onnx")

_MOVES = frozenset({"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"})
"""Operators that keep classes as they are."""


@dataclass(frozen=True)
class Node:
    """One operator call.

    Args:
        name: of the node, or its first output.
        operator: such as ``Conv``; with the domain in front if it is not ONNX' own: ``com.microsoft.QLinearAdd``.
        inputs, outputs: names of tensors; "" where an optional one is missing.
        attributes: name -> value.
        types: ONNX element type of each input; None where it is unknown.
        opset: version of the operator's domain.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    types: tuple[int | None, ...]
    opset: int

    def __str__(self) -> str:
        return f"{self.operator} '{self.name}'"

    def get(self, name: str, default: Any) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(name, default)


@dataclass(frozen=True)
class Graph:
    """A checked ONNX graph with one input.

    Args:
        nodes: in order of execution.
        constants: initializers by name.
        input, output: names of the input and of the first output.
        input_type: ONNX element type of the input.
        input_shape: of a classifier (N, C, H, W) or (N, H, W, C); None where a size is free.
        metadata: ``metadata_props``.
        domains: domain -> opset version.
        answers_classes: the file's output is the ArgMax of ``output``, and not ``output`` itself.
    """

    nodes: tuple[Node, ...]
    constants: Mapping[str, NDArray[Any]]
    input: str
    output: str
    input_type: int
    input_shape: tuple[int | None, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    domains: Mapping[str, int] = field(default_factory=dict)
    answers_classes: bool = False


def read_graph(path: Path) -> Graph:
    """Read and check an .onnx file; external data must lie inside its folder.

    Raises:
        ModelFileError: not an ONNX model, not a classifier of images, a graph out of order, or a tensor without its
            data.
    """
    check_model_file(path)
    try:
        with open_regular(path) as file:
            model = onnx.load(file, load_external_data=False)
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # protobuf's own errors share no base with onnx'
        raise ModelFileError(f"{path}: is not a readable ONNX model ({one_line(error, longest=160)})") from error
    try:
        graph = graph_of(model)
        _check_classifier(graph, [one.name for one in model.graph.output])
        return _without_argmax(graph)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def graph_of(model: onnx.ModelProto) -> Graph:
    """Check a model in memory.

    Raises:
        ModelFileError: as :func:`read_graph`, without the file's name in front.
    """
    if model.functions:
        model = inline_local_functions(model)
    graph = model.graph
    constants = _constants(graph)
    inputs = [one for one in graph.input if one.name not in constants]
    if len(inputs) != 1 or not graph.output:
        raise ModelFileError(f"has {len(inputs)} inputs and {len(graph.output)} outputs; a classifier has one of each")
    (source,) = inputs
    domains = {one.domain: one.version for one in model.opset_import}
    types = _types(model, constants)
    nodes = tuple(_node(one, number, domains, types) for number, one in enumerate(graph.node))
    known = {source.name, "", *constants}
    for node in nodes:
        for name in node.inputs:
            if name not in known:
                raise ModelFileError(f"{node} reads '{name}', which no node before it writes")
        known |= set(node.outputs)
    if graph.output[0].name not in known:
        raise ModelFileError(f"no node writes the output '{graph.output[0].name}'")
    return Graph(
        nodes=nodes,
        constants=constants,
        input=source.name,
        output=graph.output[0].name,
        input_type=source.type.tensor_type.elem_type,
        input_shape=tuple(
            one.dim_value if one.HasField("dim_value") and one.dim_value > 0 else None
            for one in source.type.tensor_type.shape.dim
        ),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        domains=domains,
    )


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    if graph.sparse_initializer:
        raise ModelFileError("holds sparse weights, which are not supported")
    return {tensor.name: array(tensor) for tensor in graph.initializer}


def array(tensor: TensorProto) -> NDArray[Any]:
    """The values of a tensor, after a check of its declared size.

    Raises:
        ModelFileError: too large, of an unknown type, or the data do not have the declared size.
    """
    size = int(np.prod([int(size) for size in tensor.dims], dtype=object)) if tensor.dims else 1
    if not 0 <= size <= MAX_ELEMENTS or any(one < 0 for one in tensor.dims):
        raise ModelFileError(f"constant '{tensor.name}' declares {size:,} elements")
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ModelFileError(f"constant '{tensor.name}' cannot be read ({one_line(error, longest=160)})") from error


def _check_classifier(graph: Graph, outputs: list[str]) -> None:
    if len(outputs) != 1:
        names = ", ".join(outputs[:4]) + (", ..." if len(outputs) > 4 else "")
        raise ModelFileError(
            f"has {len(outputs)} outputs ({names}); a classifier has one: cut the file to its logits with "
            "onnx.utils.extract_model"
        )
    if len(graph.input_shape) != 4 or graph.input_type not in (TensorProto.FLOAT, TensorProto.UINT8):
        kind = helper.tensor_dtype_to_string(graph.input_type) if graph.input_type else "no tensor"
        raise ModelFileError(
            f"input '{graph.input}' is {kind} {graph.input_shape}; images are float or uint8 with 4 axes"
        )


def _without_argmax(graph: Graph) -> Graph:
    """The graph up to the logits, if it ends with the class of the highest one."""
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    last = makers.get(graph.output)
    while last is not None and last.operator in _MOVES:
        last = makers.get(last.inputs[0])
    if last is None or last.operator != "ArgMax":
        return graph
    needed, nodes = {last.inputs[0]}, []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            needed.update(filter(None, node.inputs))
            nodes.append(node)
    return replace(graph, nodes=tuple(reversed(nodes)), output=last.inputs[0], answers_classes=True)


def _types(model: onnx.ModelProto, constants: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Element types of the tensors that ONNX' shape inference knows, and of all constants."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
        found = {one.name: one.type.tensor_type.elem_type for one in inferred.graph.value_info}
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, RuntimeError):
        found = {}
    found |= {one.name: one.type.tensor_type.elem_type for one in (*model.graph.input, *model.graph.output)}
    found |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return found


def _node(node: onnx.NodeProto, number: int, domains: Mapping[str, int], types: Mapping[str, int]) -> Node:
    ours = node.domain in _ONNX_DOMAINS
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    opset = domains.get(node.domain, 1)
    if ours:
        opset = max(domains.get(one, 0) for one in _ONNX_DOMAINS)
    return Node(
        name=node.name or (node.output[0] if node.output else f"node {number}"),
        operator=node.op_type if ours else f"{node.domain}.{node.op_type}",
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attributes=attributes,
        types=tuple(types.get(name) for name in node.input),
        opset=opset,
    )
