"""Places the quantizers of :mod:`robustq.models.quantizers` in a standardised graph.

Every value that a layer, a sum or an average makes is quantized at once: by the rectifier that follows it, or by a
quantizer of its own, so that each operation in between is one integer operation of the deployed file. Widths:

- weights: the network's width, 8 bit in the first and the last layer;
- values that cannot be negative: unsigned, at the activation width, 8 bit where only the last layer or the logits see
  them;
- values that may be negative (linear bottlenecks, residual branches, functions such as SiLU): signed 8 bit;
- pixels: scale 1/255; behind a normalisation, which stays in float in front, signed 8 bit with a learned scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import brevitas.nn as qnn
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.base import InsertModuleCallAfter, ModuleToModuleByInstance
from brevitas.graph.utils import set_module
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from robustq.errors import UsageError
from robustq.models.layers import OUTER_BITS, weight_quantizer
from robustq.models.own.bounded_threshold import BoundedActQuant
from robustq.models.own.operations import SUMS, Kind, computed_inputs
from robustq.models.own.tracing import describe
from robustq.models.own.wiring import (
    first_layers,
    kinds,
    last_layers,
    layers_ahead,
    leads_to_logits_alone,
    norm_of,
    unsigned_values,
)
from robustq.models.quantizers import ActQuant, BranchQuant, NormalisedQuant, PixelQuant, Widths
from robustq.models.rectifier import QuantReLU

INPUT_QUANTIZER = "input_quant"


class QuantReLU6(qnn.QuantReLU):  # type: ignore[misc]
    """A rectifier that clips at ``bound``, and its unsigned quantizer, whose threshold stays at or below the bound."""

    def __init__(self, *, bit_width: int, bound: float) -> None:
        QuantNonLinearActLayer.__init__(
            self,
            act_impl=nn.Hardtanh,
            passthrough_act=True,
            input_quant=None,
            act_quant=BoundedActQuant,
            return_quant_tensor=False,
            bit_width=bit_width,
            bound=bound,
            min_val=0.0,
            max_val=bound,
        )


@dataclass
class _Plan:
    """What the graph says, read once before anything is changed."""

    graph: GraphModule
    widths: Widths
    of: dict[Node, Kind]
    unsigned: set[Node]
    first: set[Node]
    last: set[Node]
    before_layer: set[Node] = field(default_factory=set)
    shared_sums: set[Node] = field(default_factory=set)


def quantize(graph: GraphModule, *, widths: Widths, name: str, shared_sum_scale: bool = False) -> GraphModule:
    """Quantize ``graph`` (standardised and probed) in place and return it; weights and names stay.

    Args:
        graph: a float graph.
        widths: of the inner layers; neither float nor binary.
        name: what messages call the network.
        shared_sum_scale: quantize both inputs of each sum by one signed 8-bit quantizer.

    Raises:
        UsageError: binary widths, no layer at all, or an operation that cannot be quantized (named).
    """
    if widths.weight_bits == 1 or widths.act_bits == 1:
        raise UsageError(f"{name}: 1 bit needs blocks made for it, as resnet20 has; choose 8, 4, 3 or 2 (or 32)")
    of = kinds(graph)
    plan = _Plan(graph, widths, of, unsigned_values(graph, of), first_layers(of), last_layers(of))
    if shared_sum_scale:
        plan.shared_sums |= {node for node in of if of[node] is Kind.JOIN and node.target in SUMS}
    if not plan.first:
        raise UsageError(f"{name}: has no convolution and no linear layer; there is nothing to quantize")
    for node in reversed(of):
        if any(of[user] is Kind.LAYER or user in plan.before_layer for user in node.users):
            plan.before_layer.add(node)
    in_front = _in_front(of)
    for node, its_kind in of.items():
        if its_kind is Kind.LAYER:
            _quantize_layer(plan, node)
        elif its_kind is Kind.RECTIFIER:
            _quantize_rectifier(plan, node)
    for node in list(of):
        if node is in_front[-1]:
            only_pixels = of[node] is Kind.INPUT
            quantizer = qnn.QuantIdentity(act_quant=PixelQuant if only_pixels else NormalisedQuant)
            _insert_after(plan, node, _free(graph, INPUT_QUANTIZER), quantizer)
        elif node not in in_front and _needs_quantizer(plan, node):
            _insert_after(plan, node, _quantizer_name(graph, node), _quantizer(plan, node))
    for node in of:
        if node in plan.shared_sums:
            _share_quantizer(graph, node)
    graph.graph.lint()
    graph.recompile()
    return graph


def _in_front(of: dict[Node, Kind]) -> list[Node]:
    """The images and what is done to them in float before the input quantizer: normalisation, if any."""
    node = next(node for node, its_kind in of.items() if its_kind is Kind.INPUT)
    chain = [node]
    front = 1
    while True:
        users = [user for user in node.users if of[user] is not Kind.NOT_A_TENSOR]
        if len(users) != 1 or of[users[0]] not in (Kind.AFFINE, Kind.NORM, Kind.KEEPS_GRID):
            return chain[:front]
        node = users[0]
        chain.append(node)
        if of[node] is not Kind.KEEPS_GRID:
            front = len(chain)


def _quantize_layer(plan: _Plan, node: Node) -> None:
    layer: Any = plan.graph.get_submodule(str(node.target))
    if is_parametrized(layer) or any(hasattr(layer, hidden) for hidden in ("weight_g", "weight_orig", "weight_v")):
        raise UsageError(
            f"{describe(plan.graph, node)} computes its weight (weight or spectral norm, pruning), which cannot be "
            "quantized; make the result its weight first, as torch.nn.utils.parametrize.remove_parametrizations does"
        )
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise UsageError(
            f"{describe(plan.graph, node)} pads with '{layer.padding_mode}', which cannot be quantized; "
            "use padding_mode='zeros'"
        )
    bits = OUTER_BITS if node in plan.first | plan.last else plan.widths.weight_bits
    kind = qnn.QuantConv2d if isinstance(layer, nn.Conv2d) else qnn.QuantLinear
    swap = ModuleToModuleByInstance(layer, kind, bias_quant=None, **weight_quantizer(bits, folded=False))
    swap.apply(plan.graph)


def _quantize_rectifier(plan: _Plan, node: Node) -> None:
    rectifier = plan.graph.get_submodule(str(node.target))
    bits = _act_bits(plan, node)
    bound = {nn.ReLU: None, nn.ReLU6: 6.0}.get(type(rectifier), getattr(rectifier, "max_val", None))
    quantized = QuantReLU(bit_width=bits) if bound is None else QuantReLU6(bit_width=bits, bound=float(bound))
    set_module(plan.graph, quantized, str(node.target))


def _needs_quantizer(plan: _Plan, node: Node) -> bool:
    of = plan.of
    its_kind = of[node]
    if its_kind not in (Kind.LAYER, Kind.NORM, Kind.AVERAGE, Kind.JOIN, Kind.AFFINE, Kind.FLOAT):
        return False
    users = {of[user] for user in node.users} - {Kind.NOT_A_TENSOR}
    if not users or users == {Kind.RECTIFIER} or leads_to_logits_alone(node, of):
        return False
    if all(user in plan.shared_sums or of[user] is Kind.NOT_A_TENSOR for user in node.users):
        return False  # the sums quantize what enters them
    if its_kind is Kind.LAYER and norm_of(node, of) is not None:
        return False
    own_norm = its_kind is Kind.NORM and of[node.all_input_nodes[0]] is Kind.LAYER
    in_float = its_kind in (Kind.FLOAT, Kind.AFFINE) or (its_kind is Kind.NORM and not own_norm)
    # Functions in float that follow each other round nothing in between.
    return not (in_float and users <= {Kind.FLOAT, Kind.AFFINE, Kind.RECTIFIER})


def _share_quantizer(graph: GraphModule, node: Node) -> None:
    """Let one quantizer take each input of the sum ``node``."""
    name = _free(graph, f"{node.name}_shared_quant")
    set_module(graph, qnn.QuantIdentity(act_quant=BranchQuant), name)
    for source in computed_inputs(node):
        with graph.graph.inserting_before(node):
            quantized = graph.graph.call_module(name, (source,))
        node.replace_input_with(source, quantized)


def _quantizer(plan: _Plan, node: Node) -> nn.Module:
    if node in plan.unsigned:
        layer: nn.Module = qnn.QuantIdentity(act_quant=ActQuant, bit_width=_act_bits(plan, node))
    else:
        layer = qnn.QuantIdentity(act_quant=BranchQuant)
    return layer


def _act_bits(plan: _Plan, node: Node) -> int:
    """8 where no inner layer takes the values: only the last one, or nothing but the logits."""
    ahead = layers_ahead(node, plan.of)
    if node not in plan.before_layer or (ahead and ahead <= plan.last and not _joins(node, plan.of)):
        return OUTER_BITS
    return plan.widths.act_bits


def _joins(node: Node, of: dict[Node, Kind]) -> bool:
    return any(
        of[user] in (Kind.JOIN, Kind.AVERAGE) or (of[user] is Kind.KEEPS_GRID and _joins(user, of))
        for user in node.users
    )


def _quantizer_name(graph: GraphModule, node: Node) -> str:
    made_by = str(node.target) if node.op == "call_module" else node.name
    return _free(graph, f"{made_by}_quant")


def _free(graph: GraphModule, wanted: str) -> str:
    *path, last = wanted.split(".")
    owner = graph.get_submodule(".".join(path))
    name, number = last, 1
    while hasattr(owner, name):
        name, number = f"{last}_{number}", number + 1
    return ".".join([*path, name])


def _insert_after(plan: _Plan, node: Node, name: str, quantizer: nn.Module) -> None:
    set_module(plan.graph, quantizer, name)
    sizes = [user for user in node.users if plan.of[user] is Kind.NOT_A_TENSOR]
    InsertModuleCallAfter(name, node, sizes).apply(plan.graph)
