"""BatchNorm folded into weights and int32 biases, on the graph of a custom model.

Every layer holds the scale of its bias: values between layers are plain tensors, and other operations do not change.
"""

from __future__ import annotations

import copy
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.backport.fx import GraphModule, Interpreter, Node
from brevitas.graph.utils import set_module
from torch import Tensor, nn

from robustq.errors import ExportError
from robustq.models.fx.ops import GRID_FUNCTIONS, GRID_METHODS, GRID_MODULES, NORMS
from robustq.models.fx.quantize import QuantReLU6
from robustq.models.fx.trace import called_module, calls, free_name
from robustq.models.layers import same_shape, weight_quantizer
from robustq.models.quant.folded_layers import BiasQuant, ExactConv2d, ExactLinear, Grid, fold_layer
from robustq.models.quant.quantizers import QuantReLU

MOVES = GRID_FUNCTIONS | GRID_METHODS


@torch.no_grad()
def fold_graph(model: GraphModule) -> GraphModule:
    """A copy of ``model`` on the CPU, in eval mode, with each BatchNorm folded into the layer before it.

    A BatchNorm that does not directly follow a layer stays in float. What layers make of constants is a constant.
    """
    folded: GraphModule = copy.deepcopy(model).cpu().eval()
    _constant_layers_to_buffers(folded)
    for node in list(folded.graph.nodes):
        layer = called_module(folded, node)
        if _is_layer(folded, node):
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


def _constant_layers_to_buffers(folded: GraphModule) -> None:
    """Replace what layers make of constants, such as the encoding of positions, by a buffer for one image."""
    made_by_layers: list[Node] = []
    for node in folded.graph.nodes:
        if node.meta.get("constant") and (
            _is_layer(folded, node) or any(source in made_by_layers for source in node.all_input_nodes)
        ):
            made_by_layers.append(node)
    last = [node for node in made_by_layers if any(user not in made_by_layers for user in node.users)]
    if not last:
        return
    images = next(node for node in folded.graph.nodes if node.op == "placeholder")
    one, two = (_values_of(folded, last, torch.zeros(count, *images.meta["shape"][1:])) for count in (1, 2))
    for node, value, for_two in zip(last, one, two, strict=True):
        if torch.equal(value.expand_as(for_two), for_two):
            name = free_name(folded, node.name)
            folded.register_buffer(name, value)
            with folded.graph.inserting_before(node):
                node.replace_all_uses_with(folded.graph.get_attr(name))
    folded.graph.eliminate_dead_code()


def _is_layer(folded: GraphModule, node: Node) -> bool:
    return isinstance(called_module(folded, node), nn.Conv2d | nn.Linear)


def _values_of(folded: GraphModule, nodes: list[Node], x: Tensor) -> list[Tensor]:
    interpreter = Interpreter(folded, garbage_collect_values=False)
    interpreter.run(x)
    return [interpreter.env[node] for node in nodes]


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
    is_conv = isinstance(layer, nn.Conv2d) and not _is_head(folded, node, layer)
    if not hasattr(layer, "weight_quant"):
        target, grid = same_shape(layer, nn.Conv2d if is_conv else nn.Linear, bias=True), None
    else:
        quantizer = _input_quantizer(folded, node).act_quant
        signed = bool(quantizer.is_signed)
        grid = Grid.of(quantizer.scale().item(), bits=int(quantizer.bit_width()), signed=signed)
        options = weight_quantizer(int(layer.weight_quant.bit_width()), folded=True)
        options |= {"bias": True, "bias_quant": BiasQuant}
        if is_conv or isinstance(layer, nn.Linear):
            target = same_shape(layer, ExactConv2d if is_conv else ExactLinear, **options)
        else:
            target = ExactLinear(layer.weight[0].numel(), len(layer.weight), **options)
            _call_with_rows(folded, node, len(layer.weight))
    fold_layer(layer, norm, target, grid)
    set_module(folded, target.eval(), str(node.target))


def _is_head(folded: GraphModule, node: Node, layer: nn.Conv2d) -> bool:
    """Whether a convolution gives the logits: one product of all pixels, with nothing but moves behind it.

    onnxruntime has no integer convolution with float outputs, but such a linear layer.
    """
    source = node.all_input_nodes[0]
    while "shape" not in source.meta:  # a quantizer, which came after the shapes
        source = source.all_input_nodes[0]
    takes_all = source.meta["shape"][2:] == layer.kernel_size and layer.groups == 1
    return takes_all and node.meta["shape"][2:] == (1, 1) and _is_answer(folded, node)


def _is_answer(folded: GraphModule, node: Node) -> bool:
    """Whether the values are the answer of the network alone, possibly moved."""
    moves = {user: calls(user, MOVES) or isinstance(called_module(folded, user), GRID_MODULES) for user in node.users}
    return all(user.op == "output" or (moved and _is_answer(folded, user)) for user, moved in moves.items())


def _call_with_rows(folded: GraphModule, node: Node, channels: int) -> None:
    """Call the module of ``node`` with a row for each image, and give its output two more axes."""
    with folded.graph.inserting_before(node):
        rows = folded.graph.call_method("flatten", (node.all_input_nodes[0], 1))
    node.args = (rows,)
    with folded.graph.inserting_after(node):
        pixels = folded.graph.call_method("reshape", (node, -1, channels, 1, 1))
    node.replace_all_uses_with(pixels, lambda user: user is not pixels)


def _input_quantizer(folded: GraphModule, node: Node) -> Any:
    """The quantizer of the values that reach the layer, possibly through operations that keep the grid."""
    source = node.all_input_nodes[0]
    while source.op != "placeholder":
        module = called_module(folded, source)
        if isinstance(module, qnn.QuantReLU | qnn.QuantIdentity):
            return module
        source = source.all_input_nodes[0]
    raise ExportError(f"no quantizer stands before layer '{node.target}', so it cannot run as integers")
