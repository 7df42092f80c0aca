"""Which layer of a user's own network the features enter that ODG-Q aligns: the last global pooling, or the one that
the user names.
"""

from __future__ import annotations

import difflib

from brevitas.backport.fx import GraphModule, Node
from torch import nn

from robustq.errors import UsageError

_POOLING = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d)


def find_feature_layer(graph: GraphModule, wanted: str | None, *, name: str) -> str | None:
    """The layer that features enter, in a graph with shapes.

    Args:
        graph: a standardised graph.
        wanted: what the user named: a layer, or a group of layers (its first one is meant); None: look for one.
        name: what messages call the network.

    Returns:
        The last pooling that leaves one place (1 x 1) of several; without one the last pooling of all, as in VGG; None
        where there is none, or where what enters is no (N, C, H, W).

    Raises:
        UsageError: ``wanted`` is no layer, or takes no (N, C, H, W).
    """
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    if wanted is not None:
        return _named(calls, wanted, name)
    spatial = [
        node
        for node in calls
        if isinstance(graph.get_submodule(str(node.target)), _POOLING) and len(_entering(node)) == 4
    ]
    whole = [node for node in spatial if node.meta["shape"][2:] == (1, 1)]
    chosen = whole or spatial
    return str(chosen[-1].target) if chosen else None


def _named(calls: list[Node], wanted: str, name: str) -> str:
    matching = [node for node in calls if str(node.target) == wanted or str(node.target).startswith(f"{wanted}.")]
    if not matching:
        known = sorted({str(node.target) for node in calls})
        near = ", ".join(difflib.get_close_matches(wanted, known, n=2, cutoff=0.0))
        raise UsageError(f"--feature-layer {wanted}: {name} has no such layer; nearest: {near}")
    entering = _entering(matching[0])
    if len(entering) != 4:
        raise UsageError(
            f"--feature-layer {wanted}: a tensor of shape {entering} enters it; "
            "name a layer that takes (images, channels, height, width)"
        )
    return str(matching[0].target)


def _entering(node: Node) -> tuple[int, ...]:
    sources = node.all_input_nodes
    return tuple(sources[0].meta["shape"] or ()) if sources else ()
