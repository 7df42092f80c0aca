"""Clamps become rectifiers.

Contract: ``clamp(min=0)`` becomes ``relu``, ``clamp(0, m)`` becomes ``hardtanh`` of these bounds; any other clamp is
refused, since its lower end is on no unsigned grid.
"""

from __future__ import annotations

import torch
from brevitas.backport.fx import GraphModule
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.own.tracing import describe


def clamps_to_rectifiers(graph: GraphModule) -> None:
    """Rewrite ``graph``.

    Raises:
        UsageError: a clamp that does not start at 0; it is named.
    """
    for node in list(graph.graph.nodes):
        function = node.op == "call_function" and node.target in (torch.clamp, torch.clip)
        if not function and not (node.op == "call_method" and node.target in ("clamp", "clip")):
            continue
        bounds = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
        low, high = bounds.get("min"), bounds.get("max")
        if low != 0 or not (high is None or (isinstance(high, int | float) and high > 0)):
            raise UsageError(
                f"{describe(graph, node)} clamps to [{low}, {high}], which cannot be quantized; a clamp must start at 0"
            )
        with graph.graph.inserting_before(node):
            call = (
                graph.graph.call_function(functional.relu, (node.args[0],))
                if high is None
                else graph.graph.call_function(functional.hardtanh, (node.args[0], 0.0, float(high)))
            )
            call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.recompile()
