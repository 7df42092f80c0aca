"""Means over height and width become pooling.

Contract: ``x.mean((2, 3))`` becomes ``AdaptiveAvgPool2d(1)``, flattened unless ``keepdim``; any other mean is refused.
Why: onnxruntime has an integer rule for pooling and none for ReduceMean. Brevitas' pass of this kind knows one of the
ways to write the mean, and flattens by sizes computed at run time. Needs shapes
(:func:`robustq.models.own.values.probe`).
"""

from __future__ import annotations

import torch
from brevitas.backport.fx import GraphModule
from brevitas.graph.utils import set_module
from torch import nn

from robustq.errors import UsageError
from robustq.models.own.tracing import describe


def means_to_pooling(graph: GraphModule) -> None:
    """Rewrite ``graph``.

    Raises:
        UsageError: a mean over other axes; it is named.
    """
    for node in list(graph.graph.nodes):
        if node.target is not torch.mean and not (node.op == "call_method" and node.target == "mean"):
            continue
        source = node.all_input_nodes[0]
        arguments = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
        dims, shape = arguments.get("dim"), source.meta["shape"]
        if not isinstance(dims, list | tuple) or len(shape) != 4 or {dim % 4 for dim in dims} != {2, 3}:
            raise UsageError(
                f"{describe(graph, node)} is a mean over dim={dims} of shape {shape}; "
                "only a mean over height and width, dim=(2, 3), can be quantized"
            )
        name, number = "mean", 1
        while hasattr(graph, name):
            name, number = f"mean_{number}", number + 1
        set_module(graph, nn.AdaptiveAvgPool2d(1), name)
        with graph.graph.inserting_before(node):
            result = graph.graph.call_module(name, (source,))
            result.meta = {**node.meta, "shape": (*shape[:2], 1, 1)}
            if not arguments.get("keepdim", False):
                result = graph.graph.call_function(torch.flatten, (result, 1))
                result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
    graph.recompile()
