"""Building the quantized graph of a custom network.

All rewrites that a traced graph goes through before it is read and quantized, in the order that they need.

Which layer of a user's own network the features enter that ODG-Q aligns: the last global pooling, or the one that
the user names.

The user's own network at any width: traced, rewritten, read and quantized.
"""

from __future__ import annotations

import difflib

from brevitas.backport.fx import GraphModule, Node
from torch import nn

from robustq.errors import UsageError
from robustq.models.fx.passes import (
    clamps_to_rectifiers,
    functions_to_modules,
    one_module_a_call,
    out_of_place,
    rectifiers_first,
)
from robustq.models.fx.quantize import quantize
from robustq.models.fx.shapes import fixed_pooling, fixed_reshapes, means_to_pooling, pooling_windows
from robustq.models.fx.trace import probe, trace
from robustq.models.layers import Normalisation, Normalise
from robustq.models.quant.quantizers import Widths
from robustq.models.state_dict import FEATURE_LAYER


def standardise(graph: GraphModule, *, channels: int, image_size: int, name: str) -> None:
    """Rewrite ``graph`` in place; every answer stays, bit for bit, and every node knows its shape afterwards.

    Args:
        graph: from :func:`robustq.models.fx.trace.trace`.
        channels, image_size: of the images.
        name: what messages call the network.

    Raises:
        UsageError: an operation that cannot be rewritten, or does not take images of this shape; it is named.
    """
    out_of_place(graph)
    clamps_to_rectifiers(graph)
    functions_to_modules(graph)
    one_module_a_call(graph)
    probe(graph, channels=channels, image_size=image_size, name=name)
    means_to_pooling(graph)
    pooling_windows(graph)
    fixed_reshapes(graph)
    rectifiers_first(graph)
    probe(graph, channels=channels, image_size=image_size, name=name)


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


NORMALISE = "normalise"


def quantized_graph(
    network: nn.Module,
    *,
    name: str,
    widths: Widths,
    classes: int,
    channels: int,
    image_size: int,
    normalisation: Normalisation | None = None,
    feature_layer: str | None = None,
    shared_sum_scale: bool = False,
) -> GraphModule:
    """The network at a width, in eval mode, with its own parameters and their names.

    At 32 bits its answers are those of ``network``, bit for bit.

    Args:
        network: a float network; it is taken over, not copied.
        name: what messages call it.
        widths: of the inner layers; 32 is float, 1 is refused.
        classes, channels, image_size: what goes in, (N, channels, image_size, image_size) in [0, 1], and what comes
            out, (N, classes).
        normalisation: mean and standard deviation in front of the network; None where it has none or its own.
        feature_layer: the layer that the features of the last images enter; None: the last global pooling.
        shared_sum_scale: quantize both inputs of each sum by one quantizer.

    Raises:
        UsageError: a network that cannot be quantized; what and where is named.
    """
    graph = trace(network.float(), name=name)
    if normalisation is not None:
        _normalise_first(graph, normalisation)
    standardise(graph, channels=channels, image_size=image_size, name=name)
    _check_logits(graph, classes, name)
    graph.meta[FEATURE_LAYER] = find_feature_layer(graph, feature_layer, name=name)
    if not widths.is_float:
        fixed_pooling(graph)
        quantize(graph, widths=widths, name=name, shared_sum_scale=shared_sum_scale)
    return graph.eval()


def _normalise_first(graph: GraphModule, normalisation: Normalisation) -> None:
    images = next(node for node in graph.graph.nodes if node.op == "placeholder")
    name = NORMALISE
    while hasattr(graph, name):
        name = f"{name}_first"
    graph.add_module(name, Normalise(normalisation))
    with graph.graph.inserting_after(images):
        normalised = graph.graph.call_module(name, (images,))
    images.replace_all_uses_with(normalised, lambda user: user is not normalised)
    graph.recompile()


def _check_logits(graph: GraphModule, classes: int, name: str) -> None:
    output = next(node for node in graph.graph.nodes if node.op == "output")
    shape = output.all_input_nodes[0].meta["shape"]
    if shape is None or len(shape) != 2:
        raise UsageError(f"{name}: its answer has the shape {shape} for 2 images; it must be (2, classes)")
    if shape[1] != classes:
        raise UsageError(f"{name}: answers with {shape[1]} logits, the data have {classes} classes; give other data")
