"""Reading and rewiring an ONNX graph."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Container, Iterable
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


class GraphIndex:
    """Makers, readers and constants of one graph as it was when the index was made: a pass that adds or removes nodes
    makes a new index afterwards.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.used_by: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.used_by[name].append(node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}

    def constant(self, name: str) -> NDArray[Any] | None:
        """The array of an initializer, or None for a tensor that is computed."""
        tensor = self._initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def input(self, node: onnx.NodeProto, place: int) -> NDArray[Any] | None:
        """The constant input of ``node`` at ``place``; None where it is computed or missing."""
        return self.constant(node.input[place]) if len(node.input) > place else None

    def maker(self, node: onnx.NodeProto | None, place: int = 0, *, through: Container[str] = ()) -> Any:
        """The node that makes the input of ``node`` at ``place``, seen through the first inputs of operators
        ``through``; None where there is none.
        """
        found = self.made_by.get(node.input[place]) if node is not None and len(node.input) > place else None
        return self.maker(found, through=through) if found is not None and found.op_type in through else found

    def codes(self, dequantizer: onnx.NodeProto) -> NDArray[Any] | None:
        """The constant codes that a DequantizeLinear takes, in front of a Clip that marks their width."""
        clip = self.maker(dequantizer)
        return self.input(clip if clip is not None and clip.op_type == "Clip" else dequantizer, 0)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Name -> value."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def replace_input(readers: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Let ``readers`` take the tensor ``new`` wherever they take ``old``."""
    for reader in readers:
        for place, name in enumerate(reader.input):
            if name == old:
                reader.input[place] = new


def insert_nodes(graph: onnx.GraphProto, place: int, nodes: Iterable[onnx.NodeProto]) -> None:
    """Insert ``nodes`` in their order, the first of them at ``place``."""
    for step, node in enumerate(nodes):
        graph.node.insert(place + step, node)


def add_initializer(graph: onnx.GraphProto, name: str, values: NDArray[Any]) -> str:
    """Add a constant under ``name``, with a number behind it when the name is taken; returns the name it got."""
    taken = {tensor.name for tensor in graph.initializer} | {out for node in graph.node for out in node.output}
    unique = unique_name(name, taken)
    graph.initializer.append(numpy_helper.from_array(values, unique))
    return unique


def unique_name(name: str, taken: set[str]) -> str:
    """``name``, or with the first number from 2 on behind it that is not taken."""
    if name not in taken:
        return name
    return next(unique for number in itertools.count(2) if (unique := f"{name}_{number}") not in taken)


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    """Remove constants that no node takes any more."""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
