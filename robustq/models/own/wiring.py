"""What the graph says of values and layers: which may be negative, which come first, which last."""

from __future__ import annotations

from brevitas.backport.fx import GraphModule, Node

from robustq.models.own.operations import SUBTRACTIONS, Kind, computed_inputs, is_unsigned, kind


def kinds(graph: GraphModule) -> dict[Node, Kind]:
    """The kind of every node.

    Raises:
        UsageError: an operation that cannot be quantized; it is named.
    """
    return {node: kind(graph, node) for node in graph.graph.nodes}


def unsigned_values(graph: GraphModule, of: dict[Node, Kind]) -> set[Node]:
    """The nodes whose values are never negative, by what made them; pixels are among them."""
    unsigned: set[Node] = set()
    for node, its_kind in of.items():
        sources = computed_inputs(node)
        inherits = its_kind in (Kind.KEEPS_GRID, Kind.AVERAGE, Kind.JOIN) and node.target not in SUBTRACTIONS
        if (
            its_kind in (Kind.INPUT, Kind.RECTIFIER)
            or (its_kind is Kind.FLOAT and is_unsigned(graph, node))
            or (inherits and bool(sources) and all(one in unsigned for one in sources))
            or (its_kind is Kind.KEEPS_GRID and bool(node.all_input_nodes) and node.all_input_nodes[0] in unsigned)
        ):
            unsigned.add(node)
    return unsigned


def first_layers(of: dict[Node, Kind]) -> set[Node]:
    """The layers that see the images without another layer in between."""
    behind: set[Node] = set()  # nodes with a layer somewhere before them
    first = set()
    for node, its_kind in of.items():
        if any(one in behind or of[one] is Kind.LAYER for one in node.all_input_nodes):
            behind.add(node)
        elif its_kind is Kind.LAYER:
            first.add(node)
    return first


def last_layers(of: dict[Node, Kind]) -> set[Node]:
    """The layers whose values reach the logits without another layer in between."""
    ahead: set[Node] = set()  # nodes with a layer somewhere after them
    last = set()
    for node in reversed(of):
        if any(user in ahead or of[user] is Kind.LAYER for user in node.users):
            ahead.add(node)
        elif of[node] is Kind.LAYER:
            last.add(node)
    return last


def layers_ahead(node: Node, of: dict[Node, Kind]) -> set[Node]:
    """The layers that the values of ``node`` reach on their grid: through nothing but moves of values."""
    found: set[Node] = set()
    open_nodes, seen = [node], {node}
    while open_nodes:
        for user in open_nodes.pop().users:
            if of[user] is Kind.LAYER:
                found.add(user)
            elif of[user] is Kind.KEEPS_GRID and user not in seen:
                seen.add(user)
                open_nodes.append(user)
    return found


def leads_to_logits_alone(node: Node, of: dict[Node, Kind]) -> bool:
    """Whether nothing takes the values of ``node`` but the output, moved about or through functions in float."""
    return bool(node.users) and all(
        of[user] is Kind.OUTPUT
        or (of[user] in (Kind.KEEPS_GRID, Kind.FLOAT, Kind.AFFINE) and leads_to_logits_alone(user, of))
        for user in node.users
    )


def norm_of(layer: Node, of: dict[Node, Kind]) -> Node | None:
    """The BatchNorm that takes the values of ``layer``, and nobody else does: it folds into the layer."""
    users = list(layer.users)
    return users[0] if len(users) == 1 and of[users[0]] is Kind.NORM else None
