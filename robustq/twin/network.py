"""The twin: a torch module that computes an ONNX graph node by node."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.errors import ModelFileError, one_line
from robustq.models.quant.backward_rules import STRAIGHT_THROUGH
from robustq.twin import elementwise, integers, layers, quantizers, shapes
from robustq.twin.gradients import rounded
from robustq.twin.graph import Graph, Node, read_graph
from robustq.twin.integer_layers import with_integer_layers
from robustq.twin.quantizers import dequantized
from robustq.twin.registry import OPERATORS, Call
from robustq.twin.shapes import to_tensor

FAMILIES = (elementwise, layers, quantizers, integers, shapes)
"""The modules whose import fills the table of operators."""

_FAULTS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError)
"""Errors of torch and of operators on inputs that do not fit a node."""


class Twin(nn.Module):
    """Images in the form of the file's input -> logits (B, K), with the gradients of a backward rule.

    Nodes that depend on no input are computed once, when the twin is made. Of a file that ends in Softmax or Sigmoid
    the logits are its inputs, since probabilities near 0 and 1 have no gradient in float32.

    Args:
        graph: the graph of a file.
        rule: one of `robustq.models.quant.backward_rules.RULES`.

    Raises:
        ModelFileError: an operator that is not supported, or a node that cannot be computed.
    """

    def __init__(self, graph: Graph, rule: str = STRAIGHT_THROUGH) -> None:
        super().__init__()
        self.rule = rule
        self.graph = graph
        self._shapes: dict[str, Tensor] = {}  # int64, on the CPU whatever the device of the network
        self._buffers_of: dict[str, str] = {}
        _check_operators(graph.nodes)
        nodes: list[Node] = []
        with torch.no_grad():
            integers_first, biases = with_integer_layers(_with_code_bounds(graph), graph.constants, graph.output)
            known = {name: to_tensor(values) for name, values in {**graph.constants, **biases}.items()}
            for node in _for_batches(integers_first, graph):
                if node.operator != "Shape" and all(name in known for name in node.inputs if name):
                    known |= _run(node, [known.get(name) for name in node.inputs], rule)
                else:
                    nodes.append(node)
        used = {name for node in nodes for name in node.inputs} | {graph.output}
        for number, (name, values) in enumerate(known.items()):
            if name not in used:
                continue
            if values.dtype == torch.int64:
                self._shapes[name] = values
            else:
                self._buffers_of[name] = f"constant{number}"
                self.register_buffer(f"constant{number}", values, persistent=False)
        self.nodes = tuple(nodes)
        self._end = _find_end(self.nodes, graph.output)
        last = {name: place for place, node in enumerate(nodes) for name in node.inputs}
        self._finished = [
            tuple(name for name in {*node.inputs, *node.outputs} if name and last.get(name, -1) <= place)
            for place, node in enumerate(nodes)
        ]

    def under_rule(self, rule: str) -> Twin:
        """The same twin, with the same tensors, under another backward rule."""
        other = self.__new__(type(self))
        other.__dict__ = dict(self.__dict__)
        other.rule = rule
        return other

    @property
    def quantizes(self) -> bool:
        """Whether values are rounded or compared on their way, so that backward rules differ."""
        plain = {"Floor", "Ceil", "Round", "Sign", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
        return any(
            "Quant" in node.operator or "QLinear" in node.operator or node.operator in plain for node in self.nodes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images as the file takes them -> logits (B, K).

        Raises:
            ModelFileError: a node cannot be computed, or its result is not one row of logits for each image.
        """
        return self.with_values(x, [])[0]

    def with_values(self, x: Tensor, names: list[str]) -> list[Tensor]:
        """Logits (B, K), and the tensors ``names``; errors as :meth:`forward`."""
        ends = [] if self._end is None else [name for name in self._end.inputs[:3] if name]
        answer, *values = self.values(x, [self.graph.output, *ends, *names])
        logits = answer
        if logits.dim() != 2 or len(logits) != len(x):
            logits = logits.reshape(len(x), -1) if logits.numel() and logits.shape[0] == len(x) else logits
        if logits.dim() != 2 or len(logits) != len(x):
            raise ModelFileError(
                f"the output has shape {tuple(logits.shape)} for {len(x)} images, not (images, classes)"
            )
        if self._end is not None and values[0].shape == answer.shape:
            logits = _before_end(self._end, values[: len(ends)], answer)
        return [logits, *values[len(ends) :]]

    def values(self, x: Tensor, names: list[str]) -> list[Tensor]:
        """The tensors ``names`` for images ``x``, in their order."""
        known: dict[str, Tensor] = {**self._shapes, self.graph.input: x}
        known |= {name: getattr(self, buffer) for name, buffer in self._buffers_of.items()}
        kept = set(names)
        for node, finished in zip(self.nodes, self._finished, strict=True):
            inputs = [known[name] if name else None for name in node.inputs]
            known |= _run(node, inputs, self.rule, images=max(len(x), 1))
            for name in finished:
                if name not in kept:
                    known.pop(name, None)
        return [known[name] for name in names]


def load_twin(path: Path) -> Twin:
    """The twin of an .onnx file, on the CPU, in eval mode.

    Raises:
        ModelFileError: the file cannot be read, or holds an operator that is not supported.
    """
    graph = read_graph(path)
    try:
        return Twin(graph).eval()
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def without_operator(nodes: tuple[Node, ...]) -> list[Node]:
    """The nodes whose operator the twin does not have."""
    return [node for node in nodes if node.operator not in OPERATORS]


def _check_operators(nodes: tuple[Node, ...]) -> None:
    missing = without_operator(nodes)
    if missing:
        kinds = Counter(node.operator for node in missing)
        others = f" (and {len(kinds) - 1} other kinds)" if len(kinds) > 1 else ""
        raise ModelFileError(f"{missing[0]} is an operator that is not supported{others}")


def _run(node: Node, inputs: list[Tensor | None], rule: str, *, images: int = 1) -> dict[str, Tensor]:
    try:
        found: Any = OPERATORS[node.operator](Call(node, rule, images), *inputs)
    except torch.OutOfMemoryError:
        raise
    except _FAULTS as error:
        if "allocate memory" in str(error):
            raise
        raise ModelFileError(f"{node} cannot be computed ({one_line(error, longest=160)})") from error
    outputs = found if isinstance(found, tuple) else (found,)
    return {name: value for name, value in zip(node.outputs, outputs, strict=False) if name}


_EXACT = "exact"
"""Attribute of an end whose probabilities have no ties that its inputs do not have."""


def _find_end(nodes: tuple[Node, ...], output: str) -> Node | None:
    """The Softmax over classes or Sigmoid whose result, quantized or not, is the output of the file."""
    made_by = {name: node for node in nodes for name in node.outputs}
    node, exact = made_by.get(output), True
    while node is not None and node.operator in ("Identity", "QuantizeLinear", "DequantizeLinear"):
        exact = exact and node.operator == "Identity"
        node = made_by.get(node.inputs[0])
    if node is None or node.operator.rpartition(".")[2] not in ("Softmax", "Sigmoid", "QLinearSoftmax"):
        return None
    if "Softmax" in node.operator and node.get("axis", -1) not in (-1, 1):
        return None
    return replace(node, attributes={**node.attributes, _EXACT: exact and node.operator == "Softmax"})


def _before_end(end: Node, inputs: list[Tensor], answer: Tensor) -> Tensor:
    """Logits of a file that ends in probabilities, in the order of those, with ties of quantized or saturated ones."""
    logits = dequantized(inputs[0], inputs[1], inputs[2]) if "QLinear" in end.operator else inputs[0]
    if end.get(_EXACT, False):
        return logits
    logits = functional.logsigmoid(logits) if end.operator.endswith("Sigmoid") else logits.log_softmax(1)
    return rounded(logits, answer.detach().clamp(min=torch.finfo(answer.dtype).tiny).log())


def _for_batches(nodes: list[Node], graph: Graph) -> list[Node]:
    """The nodes of a file that takes one image at a time, whose Reshape then takes any number of images."""
    if graph.input_shape[:1] != (1,):
        return nodes
    return [
        replace(node, attributes={**node.attributes, "single": True}) if node.operator == "Reshape" else node
        for node in nodes
    ]


def _with_code_bounds(graph: Graph) -> list[Node]:
    """The nodes, where a QuantizeLinear has taken over the Clip that alone reads its codes.

    Quantizers of fewer bits than their type are written so. One node that knows its true codes has the gradient of the
    quantizer under every rule.
    """
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    made_by = {name: place for place, node in enumerate(graph.nodes) for name in node.outputs}
    nodes = list(graph.nodes)
    for place, node in enumerate(graph.nodes):
        source = made_by.get(node.inputs[0]) if node.operator == "Clip" and node.inputs else None
        if source is None or nodes[source].operator != "QuantizeLinear" or readers[node.inputs[0]] != 1:
            continue
        bounds = [graph.constants.get(name) for name in node.inputs[1:3]]
        if len(bounds) != 2 or any(bound is None or bound.size != 1 for bound in bounds):
            continue
        lowest, highest = (float(bound.reshape(-1)[0]) for bound in bounds if bound is not None)
        known = {**nodes[source].attributes, "lowest": lowest, "highest": highest}
        nodes[source] = replace(nodes[source], attributes=known)
        nodes[place] = replace(node, operator="Identity", inputs=node.inputs[:1])
    return nodes
