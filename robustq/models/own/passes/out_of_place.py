"""No operation works in place any more.

Contract: what worked in place gives its result to everybody who read its input afterwards, and leaves the input alone.
Why: quantizers are put between operations, and a value that somebody changes behind its quantizer is off its grid.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.own.operations import GRID_METHODS
from robustq.models.own.tracing import describe

OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    functional.relu_: functional.relu,
    torch.relu_: torch.relu,
    functional.hardtanh_: functional.hardtanh,
    functional.leaky_relu_: functional.leaky_relu,
}


def out_of_place(graph: GraphModule) -> None:
    """Rewrite ``graph``.

    Raises:
        UsageError: something is changed in place that is a part of another tensor; it is named.
    """
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        if not _works_in_place(graph, node) or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        if _is_part(source) and (len(source.users) > 1 or not node.users):
            raise UsageError(f"{describe(graph, node)} changes a part of a tensor in place; write it out of place")
        for user in [one for one in source.users if order[one] > order[node]]:
            user.replace_input_with(source, node)
        _replace(graph, node)
    graph.recompile()


def _is_part(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and (
        node.target in GRID_METHODS or node.target is operator.getitem
    )


def _replace(graph: GraphModule, node: Node) -> None:
    if node.op == "call_module":
        module = copy.copy(graph.get_submodule(str(node.target)))
        module.inplace = False
        set_module(graph, module, str(node.target))
    elif node.op == "call_method":
        node.target = str(node.target).rstrip("_")
    else:
        node.target = OUT_OF_PLACE.get(node.target, node.target)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}


def _works_in_place(graph: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op == "call_function" and (node.target in OUT_OF_PLACE or bool(node.kwargs.get("inplace", False)))
