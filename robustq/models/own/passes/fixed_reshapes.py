"""Reshapes get fixed sizes, all but the batch.

Contract: a view, reshape, squeeze or flatten that keeps the batch axis becomes ``torch.flatten(x, 1)`` where it makes
one axis of the rest, else ``torch.reshape(x, (-1, C, H, W))`` with numbers; ``chunk`` becomes ``torch.split`` with
numbers; what computed sizes goes. Why: sizes
computed at run time leave a deployed file without fixed shapes there, and onnxruntime then runs the layers behind in
float. Needs shapes (:func:`robustq.models.own.values.probe`).
"""

from __future__ import annotations

import torch
from brevitas.backport.fx import GraphModule, Node

from robustq.models.own.values import BATCH

_METHODS = ("view", "reshape", "squeeze", "flatten")
_FUNCTIONS = (torch.reshape, torch.squeeze, torch.flatten)


def fixed_reshapes(graph: GraphModule) -> None:
    """Rewrite ``graph``."""
    for node in list(graph.graph.nodes):
        if node.target in ("chunk", torch.chunk):
            _chunk_to_split(graph, node)
            continue
        reshapes = (node.op == "call_method" and node.target in _METHODS) or (
            node.op == "call_function" and node.target in _FUNCTIONS
        )
        if not reshapes:
            continue
        source = node.all_input_nodes[0]
        before: tuple[int, ...] = source.meta["shape"] or ()
        after: tuple[int, ...] = node.meta["shape"] or ()
        if len(before) < 2 or len(after) < 2 or before[0] != BATCH or after[0] != BATCH:
            continue
        with graph.graph.inserting_before(node):
            made = (
                graph.graph.call_function(torch.flatten, (source, 1))
                if len(after) == 2
                else graph.graph.call_function(torch.reshape, (source, (-1, *after[1:])))
            )
            made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _chunk_to_split(graph: GraphModule, node: Node) -> None:
    source = node.all_input_nodes[0]
    arguments = {"dim": 0} | dict(zip(("chunks", "dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    length = source.meta["shape"][arguments["dim"]]
    size = -(-length // arguments["chunks"])
    sizes = [min(size, length - start) for start in range(0, length, size)]
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(torch.split, (source, sizes, arguments["dim"]))
        made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)
