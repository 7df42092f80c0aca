"""BatchNorm folded into weights and int32 biases, on the graph of a custom model.

Every layer holds the scale of its bias: values between layers are plain tensors, and other operations do not change.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import brevitas.nn as qnn
import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustq.errors import ExportError
from robustq.models.fx.ops import NORMS
from robustq.models.fx.quantize import QuantReLU6
from robustq.models.fx.trace import called_module
from robustq.models.layers import weight_quantizer
from robustq.models.quant.folded_layers import BiasQuant, ExactConv2d, ExactLinear
from robustq.models.quant.quantizers import QuantReLU


class FoldLayer(Protocol):
    """The arithmetic of one layer (:func:`robustq.models.quant.folding.fold_layer`)."""

    def __call__(self, layer: Any, norm: _BatchNorm | None, target: Any, quantizer: Any) -> None:
        """Write weight, scales and bias of ``layer`` and its ``norm`` into ``target``; ``quantizer`` is that of the
        layer's input, None in a float model.
        """


def fold_graph(model: GraphModule, *, fold_layer: FoldLayer) -> GraphModule:
    """A copy of ``model`` on the CPU, in eval mode, with each BatchNorm folded into the layer before it.

    A BatchNorm that does not directly follow a layer stays in float. ``fold_layer`` is the arithmetic of one layer.
    """
    folded: GraphModule = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        for node in list(folded.graph.nodes):
            layer = called_module(folded, node)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                _fold(folded, node, layer, fold_layer)
            elif isinstance(layer, QuantReLU6):  # its quantizer clips at or below the bound of the ReLU
                relu = QuantReLU(bit_width=_scaling(layer).bit_width)
                _scaling(relu).log_threshold.copy_(_scaling(layer).limited(_scaling(layer).log_threshold))
                set_module(folded, relu.eval(), str(node.target))
            elif isinstance(layer, nn.Dropout | nn.Dropout2d):
                node.replace_all_uses_with(node.all_input_nodes[0])
                folded.graph.erase_node(node)
    folded.graph.lint()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded.eval()


def _scaling(relu: Any) -> Any:
    return relu.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl


def _fold(folded: GraphModule, node: Node, layer: Any, fold_layer: FoldLayer) -> None:
    norm: Any = None
    users = list(node.users)
    if len(users) == 1 and isinstance(called_module(folded, users[0]), NORMS):
        norm = called_module(folded, users[0])
        users[0].replace_all_uses_with(node)
        folded.graph.erase_node(users[0])
        if norm.weight is None:
            norm.weight, norm.bias = (nn.Parameter(one(norm.num_features)) for one in (torch.ones, torch.zeros))
    is_float = not hasattr(layer, "weight_quant")
    target = _without_weights(layer, is_float=is_float)
    quantizer: Any = None if is_float else _input_quantizer(folded, node).act_quant
    fold_layer(layer, norm, target, quantizer)
    if not is_float:
        largest_code = 2 ** (int(quantizer.bit_width()) - int(quantizer.is_signed))
        target.set_input_scale(quantizer.scale().item(), largest_code=largest_code)
    set_module(folded, target.eval(), str(node.target))


def _without_weights(layer: Any, *, is_float: bool) -> Any:
    """A layer of the same shape, with a bias and fresh weights."""
    is_conv = isinstance(layer, nn.Conv2d)
    sizes = ("in_channels", "out_channels", "kernel_size") if is_conv else ("in_features", "out_features")
    shape: list[Any] = [getattr(layer, size) for size in sizes]
    geometry = ("stride", "padding", "dilation", "groups") if is_conv else ()
    options: dict[str, Any] = {"bias": True, **{name: getattr(layer, name) for name in geometry}}
    if is_float:
        return (nn.Conv2d if is_conv else nn.Linear)(*shape, **options)
    options |= weight_quantizer(int(layer.weight_quant.bit_width()), folded=True)
    return (ExactConv2d if is_conv else ExactLinear)(*shape, bias_quant=BiasQuant, **options)


def _input_quantizer(folded: GraphModule, node: Node) -> Any:
    """The quantizer of the values that reach the layer, possibly through operations that keep the grid."""
    source = node.all_input_nodes[0]
    while source.op != "placeholder":
        module = called_module(folded, source)
        if isinstance(module, qnn.QuantReLU | qnn.QuantIdentity):
            return module
        source = source.all_input_nodes[0]
    raise ExportError(f"no quantizer stands before layer '{node.target}', so it cannot run as integers")
