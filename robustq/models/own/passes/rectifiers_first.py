"""A rectifier behind max pooling, dropout or a flatten moves in front of it.

Contract: the order of the two changes, their values do not: the largest of rectified values is the rectified largest,
and ReLU of a positive multiple is that multiple of ReLU. Why: a convolution is one integer operation only together with
a quantizer right behind it, and the rectifier is where the quantizer is. Needs shapes
(:func:`robustq.models.own.values.probe`).
"""

from __future__ import annotations

import torch
from brevitas.backport.fx import GraphModule, Node
from torch import nn

from robustq.models.own.operations import RECTIFIERS


def rectifiers_first(graph: GraphModule) -> None:
    """Rewrite ``graph`` until nothing moves any more."""
    while any(_moved(graph, node) for node in list(graph.graph.nodes)):
        pass
    graph.graph.lint()
    graph.recompile()


def _moved(graph: GraphModule, node: Node) -> bool:
    if node.op != "call_module":
        return False
    rectifier = graph.get_submodule(str(node.target))
    if not isinstance(rectifier, RECTIFIERS):
        return False
    before = node.all_input_nodes[0]
    if len(before.users) > 1:
        return False
    if not _commutes(graph, before, bounded=not isinstance(rectifier, nn.ReLU)):
        return False
    source = before.all_input_nodes[0]
    node.replace_all_uses_with(before)
    before.replace_input_with(source, node)
    node.replace_input_with(before, source)
    source.append(node)
    node.meta["shape"] = source.meta["shape"]
    return True


def _commutes(graph: GraphModule, node: Node, *, bounded: bool) -> bool:
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, nn.MaxPool2d | nn.Flatten):
            return not getattr(module, "return_indices", False)
        # While training, dropout scales by 1 / (1 - p), which a bound from above does not let pass.
        return isinstance(module, nn.Dropout | nn.Dropout2d) and not bounded
    return node.target is torch.flatten
