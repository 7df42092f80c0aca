"""Adaptive average pooling gets the window that it has at this image size.

Contract: AdaptiveAvgPool2d from (H, W) to the same size becomes nothing, to a divisor of it AvgPool2d, to a multiple of
it a nearest-neighbour enlargement, and one to (1, 1) stays; windows of unequal size are refused. Why: ONNX has no
adaptive pooling other than the global one; VGG and AlexNet pool to 7 x 7 and 6 x 6 whatever the image. Needs shapes
(:func:`robustq.models.own.values.probe`).
"""

from __future__ import annotations

from brevitas.backport.fx import GraphModule
from brevitas.graph.utils import set_module
from torch import nn

from robustq.errors import UsageError
from robustq.models.own.tracing import describe


def fixed_pooling(graph: GraphModule) -> None:
    """Rewrite ``graph``; modules keep their names.

    Raises:
        UsageError: a pooling with unequal windows; it is named, with its sizes.
    """
    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), nn.AdaptiveAvgPool2d):
            continue
        before, after = node.all_input_nodes[0].meta["shape"][-2:], node.meta["shape"][-2:]
        if after == (1, 1):
            continue
        if before == after:
            made: nn.Module = nn.Identity()
        elif all(old % new == 0 for old, new in zip(before, after, strict=True)):
            made = nn.AvgPool2d(tuple(old // new for old, new in zip(before, after, strict=True)))
        elif all(new % old == 0 for old, new in zip(before, after, strict=True)):
            made = nn.UpsamplingNearest2d(size=after)
        else:
            raise UsageError(
                f"{describe(graph, node)} pools {before[0]}x{before[1]} to {after[0]}x{after[1]} in unequal windows, "
                "which ONNX has no operation for; use images whose size makes one a multiple of the other"
            )
        set_module(graph, made, str(node.target))
    graph.recompile()
