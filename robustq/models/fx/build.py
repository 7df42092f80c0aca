"""From a custom model to its quantized graph: traced, standardised and quantized at any width."""

from __future__ import annotations

import difflib

import torch
from brevitas.backport.fx import GraphModule, Node
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.fx import passes, shapes, windows
from robustq.models.fx.adaptive_pooling import fix_adaptive_pooling
from robustq.models.fx.attention import attention_to_values
from robustq.models.fx.fixed_convolutions import buffers_to_convolutions
from robustq.models.fx.own_layers import own_layers_to_modules
from robustq.models.fx.quantize import quantize
from robustq.models.fx.trace import BATCH, called_module, free_name, shape_prop, trace
from robustq.models.layers import Normalisation, Normalise
from robustq.models.quant.quantizers import Widths
from robustq.models.state_dict import FEATURE_LAYER


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
    """The graph of a model at a width, in eval mode; parameters keep their names.

    At 32 bits its answers are those of ``network``, bit for bit.

    Args:
        network, name: a float model, whose parameters are used, not copied, and its name for messages.
        widths: of the inner layers; 32 is float, 1 is refused.
        classes, channels, image_size: of images (N, channels, image_size, image_size) in [0, 1], logits (N, classes).
        normalisation: mean and standard deviation in front of the model; None where it has none or its own.
        feature_layer: see :func:`find_feature_layer`.
        shared_sum_scale: quantize both inputs of each sum by one quantizer.

    UsageError names the operation for which a model cannot be quantized.
    """
    model = trace(network.float(), name=name, images=(channels, image_size, image_size))
    own_layers_to_modules(model, network)
    if normalisation is not None:
        _normalise_first(model, normalisation)
    standardise(model, channels=channels, image_size=image_size, name=name)
    check_graph(network, model, normalisation, channels=channels, image_size=image_size, name=name)
    output = next(node for node in model.graph.nodes if node.op == "output")
    shape = output.all_input_nodes[0].meta["shape"]
    if shape is None or len(shape) != 2:
        raise UsageError(f"{name}: its answer has the shape {shape} for 2 images; it must be (2, classes)")
    if shape[1] != classes:
        raise UsageError(f"{name}: answers with {shape[1]} logits, the data have {classes} classes; give other data")
    model.meta[FEATURE_LAYER] = find_feature_layer(model, feature_layer, name=name)
    fix_adaptive_pooling(model, averages=not widths.is_float)
    if not widths.is_float:
        shapes.stacks_to_sums(model)
        windows.explicit_padding(model)
        shapes.linear_on_rows(model)
        quantize(model, widths=widths, name=name, shared_sum_scale=shared_sum_scale)
    return model.eval()


def standardise(model: GraphModule, *, channels: int, image_size: int, name: str) -> None:
    """Rewrite a traced model in place into standard form; answers stay bit for bit, and all nodes get their shapes.

    UsageError names an operation that cannot be rewritten, or does not take images of this shape.
    """
    attention_to_values(model)
    passes.remove_inplace(model)
    passes.clamp_to_relu(model)
    passes.maxima_to_values(model)
    passes.functions_to_modules(model)
    passes.duplicate_shared_modules(model)
    shape_prop(model, channels=channels, image_size=image_size, name=name)
    passes.drop_no_ops(model)
    buffers_to_convolutions(model)
    shapes.mean_to_pooling(model)
    windows.fix_upsampling(model)
    windows.fix_pooling_windows(model)
    shapes.fix_reshapes(model)
    shapes.tokens_to_sums(model)
    passes.relu_first(model)
    shape_prop(model, channels=channels, image_size=image_size, name=name)


@torch.no_grad()
def check_graph(
    network: nn.Module,
    model: GraphModule,
    normalisation: Normalisation | None,
    *,
    channels: int,
    image_size: int,
    name: str,
) -> None:
    """UsageError unless a standardised model answers as the network it was traced from, on images of random pixels.

    Rounding alone may differ, by 1e-5 of the largest logit.
    """
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (BATCH, channels, image_size, image_size), generator=draws) / 255.0
    x = pixels.to(next(model.parameters(), torch.empty(0)).device)
    expected = network(x if normalisation is None else Normalise(normalisation)(x))
    if not isinstance(expected, Tensor):
        return  # refused below by its shape
    again = network(x if normalisation is None else Normalise(normalisation)(x))
    if not torch.equal(expected.nan_to_num(), again.nan_to_num()):
        raise UsageError(f"{name}: answers twice differently to the same images; make its forward deterministic")
    found = model(x)
    close = found.shape == expected.shape and torch.allclose(
        found, expected, rtol=0.0, atol=1e-5 * float(expected.nan_to_num().abs().max()), equal_nan=True
    )
    if not close:
        raise UsageError(
            f"{name}: its graph, traced in eval mode, answers otherwise than the network; write its forward without "
            "branches on values, calls or modes that tracing cannot see"
        )


_POOLING = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d)


def find_feature_layer(model: GraphModule, wanted: str | None, *, name: str) -> str | None:
    """The layer whose inputs are the features that ODG-Q aligns, in a standardised model.

    It is the first layer of the module ``wanted``; by default the last global pooling, else the last pooling of all, as
    in VGG; None without any pooling of (N, C, H, W).
    UsageError if ``wanted`` is no layer, or takes no (N, C, H, W).
    """
    calls = [node for node in model.graph.nodes if node.op == "call_module"]
    if wanted is not None:
        matching = [node for node in calls if f"{node.target}.".startswith(f"{wanted}.")]
        if not matching:
            known = sorted({str(node.target) for node in calls})
            near = ", ".join(difflib.get_close_matches(wanted, known, n=2, cutoff=0.0))
            raise UsageError(f"--feature-layer {wanted}: {name} has no such layer; nearest: {near}")
        shape = _input_shape(matching[0])
        if len(shape) != 4:
            raise UsageError(
                f"--feature-layer {wanted}: a tensor of shape {shape} enters it; "
                "name a layer that takes (images, channels, height, width)"
            )
        return str(matching[0].target)
    pooling = [node for node in calls if isinstance(called_module(model, node), _POOLING)]
    # Pooling that returns indices too has a pair of tensors for its output, and is refused later by its name.
    pooling = [node for node in pooling if len(_input_shape(node)) == 4 and node.meta["shape"] is not None]
    chosen = [node for node in pooling if node.meta["shape"][2:] == (1, 1)] or pooling
    return str(chosen[-1].target) if chosen else None


def _input_shape(node: Node) -> tuple[int, ...]:
    return next((tuple(source.meta["shape"] or ()) for source in node.all_input_nodes), ())


def _normalise_first(model: GraphModule, normalisation: Normalisation) -> None:
    images = next(node for node in model.graph.nodes if node.op == "placeholder")
    name = free_name(model, "normalise")
    model.add_module(name, Normalise(normalisation))
    with model.graph.inserting_after(images):
        normalised = model.graph.call_module(name, (images,))
    images.replace_all_uses_with(normalised, lambda user: user is not normalised)
    model.recompile()
