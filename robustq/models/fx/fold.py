"""BatchNorm folded into weights and int32 biases, on the graph of a custom model.

Every layer holds the scale of its bias: values between layers are plain tensors, and other operations do not change.
"""

from __future__ import annotations

import copy
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch import nn

from robustq.errors import ExportError
from robustq.models.fx.ops import NORMS
from robustq.models.fx.quantize import QuantReLU6
from robustq.models.fx.trace import called_module
from robustq.models.layers import same_shape, weight_quantizer
from robustq.models.quant.folded_layers import BiasQuant, ExactConv2d, ExactLinear, Grid, fold_layer
from robustq.models.quant.quantizers import QuantReLU


@torch.no_grad()
def fold_graph(model: GraphModule) -> GraphModule:
    """A copy of ``model`` on the CPU, in eval mode, with each BatchNorm folded into the layer before it.

    A BatchNorm that does not directly follow a layer stays in float.
    """
    folded: GraphModule = copy.deepcopy(model).cpu().eval()
    for node in list(folded.graph.nodes):
        layer = called_module(folded, node)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            _fold(folded, node, layer)
        elif isinstance(layer, QuantReLU6):  # its quantizer clips at or below the bound of the ReLU
            bounded = _scaling(layer)
            relu = QuantReLU(bit_width=bounded.bit_width)
            _scaling(relu).log_threshold.copy_(bounded.limited(bounded.log_threshold))
            set_module(folded, relu.eval(), str(node.target))
        elif isinstance(layer, nn.Dropout | nn.Dropout2d):
            _remove(folded, node)
        elif isinstance(layer, nn.InstanceNorm2d) and _is_norm(layer) and node.users:  # it was not folded
            # In eval mode it is a BatchNorm; the exporter wants a fixed batch size of it.
            norm = nn.BatchNorm2d(layer.num_features, layer.eps, affine=layer.affine)
            norm.load_state_dict(layer.state_dict())
            set_module(folded, norm.eval(), str(node.target))
    folded.graph.lint()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded.eval()


def _scaling(relu: Any) -> Any:
    return relu.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl


def _remove(folded: GraphModule, node: Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    folded.graph.erase_node(node)


def _is_norm(module: Any) -> bool:
    return isinstance(module, NORMS) and bool(module.track_running_stats)


def _fold(folded: GraphModule, node: Node, layer: Any) -> None:
    norm: Any = None
    users = list(node.users)
    if len(users) == 1 and _is_norm(called_module(folded, users[0])):
        norm = called_module(folded, users[0])
        _remove(folded, users[0])
        if norm.weight is None:
            norm.weight, norm.bias = (nn.Parameter(one(norm.num_features)) for one in (torch.ones, torch.zeros))
    is_conv = isinstance(layer, nn.Conv2d)
    if not hasattr(layer, "weight_quant"):
        target, grid = same_shape(layer, nn.Conv2d if is_conv else nn.Linear, bias=True), None
    else:
        quantizer = _input_quantizer(folded, node).act_quant
        signed = bool(quantizer.is_signed)
        grid = Grid.of(quantizer.scale().item(), bits=int(quantizer.bit_width()), signed=signed)
        options = weight_quantizer(int(layer.weight_quant.bit_width()), folded=True)
        kind = ExactConv2d if is_conv else ExactLinear
        target = same_shape(layer, kind, bias=True, bias_quant=BiasQuant, **options)
    fold_layer(layer, norm, target, grid)
    set_module(folded, target.eval(), str(node.target))


def _input_quantizer(folded: GraphModule, node: Node) -> Any:
    """The quantizer of the values that reach the layer, possibly through operations that keep the grid."""
    source = node.all_input_nodes[0]
    while source.op != "placeholder":
        module = called_module(folded, source)
        if isinstance(module, qnn.QuantReLU | qnn.QuantIdentity):
            return module
        source = source.all_input_nodes[0]
    raise ExportError(f"no quantizer stands before layer '{node.target}', so it cannot run as integers")
