"""BatchNorm into weights and biases, on the graph of the user's own network.

Each layer gets an int32 bias that holds its own scale, so that the values between layers stay plain tensors and every
operation in between is the one that the network was written with.
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
from robustq.models.layers import weight_quantizer
from robustq.models.quant.folded_layers import BiasQuant, ExactConv2d, ExactLinear
from robustq.models.quant.quantizers import QuantReLU

_GEOMETRY = ("stride", "padding", "dilation", "groups")


class FoldLayer(Protocol):
    """Fills one layer of the folded network (:func:`robustq.models.quant.folding.fold_layer`)."""

    def __call__(self, layer: Any, norm: _BatchNorm | None, target: Any, quantizer: Any) -> None:
        """Write weight, scales and bias of ``layer`` and the ``norm`` behind it into ``target``; ``quantizer`` is the
        one whose values enter, None in a float network.
        """


def fold_graph(model: GraphModule, *, fold_layer: FoldLayer) -> GraphModule:
    """The network with the answers of ``model`` in eval mode, its BatchNorms in weights and int32 biases; on the CPU.

    A BatchNorm that does not follow a layer alone stays as it is, in float.

    Args:
        model: a graph that :func:`robustq.models.fx.build.quantized_graph` made; stays as it was.
        fold_layer: the arithmetic of one layer.
    """
    folded: GraphModule = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        for node in list(folded.graph.nodes):
            if node.op != "call_module":
                continue
            layer = folded.get_submodule(str(node.target))
            if isinstance(layer, nn.Conv2d | nn.Linear):
                _fold(folded, node, layer, fold_layer)
            elif isinstance(layer, QuantReLU6):
                _plain_rectifier(folded, node, layer)
            elif isinstance(layer, nn.Dropout | nn.Dropout2d):
                node.replace_all_uses_with(node.all_input_nodes[0])
                folded.graph.erase_node(node)
    folded.graph.lint()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded.eval()


def _fold(folded: GraphModule, node: Node, layer: Any, fold_layer: FoldLayer) -> None:
    behind = _own_norm(folded, node)
    norm: Any = None
    if behind is not None:
        norm = folded.get_submodule(str(behind.target))
        if norm.weight is None:
            norm.weight, norm.bias = (nn.Parameter(one(norm.num_features)) for one in (torch.ones, torch.zeros))
        behind.replace_all_uses_with(node)
        folded.graph.erase_node(behind)
    is_float = not hasattr(layer, "weight_quant")
    target = _empty_twin(layer, is_float=is_float)
    quantizer: Any = None if is_float else _input_quantizer(folded, node).act_quant
    fold_layer(layer, norm, target, quantizer)
    if not is_float:
        largest_code = 2 ** (int(quantizer.bit_width()) - int(quantizer.is_signed))
        target.set_input_scale(quantizer.scale().item(), largest_code=largest_code)
    set_module(folded, target.eval(), str(node.target))


def _own_norm(folded: GraphModule, node: Node) -> Node | None:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    return users[0] if isinstance(folded.get_submodule(str(users[0].target)), NORMS) else None


def _empty_twin(layer: Any, *, is_float: bool) -> Any:
    is_conv = isinstance(layer, nn.Conv2d)
    sizes = ("in_channels", "out_channels", "kernel_size") if is_conv else ("in_features", "out_features")
    shape: list[Any] = [getattr(layer, size) for size in sizes]
    options: dict[str, Any] = {name: getattr(layer, name) for name in _GEOMETRY} if is_conv else {}
    options["bias"] = True
    if is_float:
        return (nn.Conv2d if is_conv else nn.Linear)(*shape, **options)
    options |= weight_quantizer(int(layer.weight_quant.bit_width()), folded=True)
    return (ExactConv2d if is_conv else ExactLinear)(*shape, bias_quant=BiasQuant, **options)


def _input_quantizer(folded: GraphModule, node: Node) -> nn.Module:
    """The quantizer whose values reach the layer, through whatever only moves them."""
    source = node.all_input_nodes[0]
    while source.op != "placeholder":
        if source.op == "call_module":
            module = folded.get_submodule(str(source.target))
            if isinstance(module, qnn.QuantReLU | qnn.QuantIdentity):
                found: nn.Module = module
                return found
        source = source.all_input_nodes[0]
    raise ExportError(f"no quantizer stands before layer '{node.target}', so it cannot run as integers")


def _plain_rectifier(folded: GraphModule, node: Node, layer: Any) -> None:
    """ReLU in place of a rectifier that clips: its quantizer clips at or below the same bound."""
    scaling = layer.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl
    plain = QuantReLU(bit_width=scaling.bit_width)
    own = plain.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl
    own.log_threshold.copy_(scaling.limited(scaling.log_threshold))
    set_module(folded, plain.eval(), str(node.target))
