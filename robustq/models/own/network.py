"""The user's own network at any width: traced, rewritten, read and quantized."""

from __future__ import annotations

from brevitas.backport.fx import GraphModule
from torch import nn

from robustq.errors import UsageError
from robustq.models.feature_layer import FEATURE_LAYER
from robustq.models.normalise import Normalisation, Normalise
from robustq.models.own.feature_layer import find_feature_layer
from robustq.models.own.passes.fixed_pooling import fixed_pooling
from robustq.models.own.quantize import quantize
from robustq.models.own.standardise import standardise
from robustq.models.own.tracing import trace
from robustq.models.quantizers import Widths

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
