"""Quantizing a traced network.

A learned threshold with a largest value: the quantizer of ReLU6, which clips at 6 whatever it learns.

What the graph says of values and layers: which may be negative, which come first, which last.

Places the quantizers of :mod:`robustq.models.quant.quantizers` in a standardised graph.

Every value that a layer, a sum or an average makes is quantized at once: by the rectifier that follows it, or by a
quantizer of its own, so that each operation in between is one integer operation of the deployed file. Widths:

- weights: the network's width, 8 bit in the first and the last layer;
- values that cannot be negative: unsigned, at the activation width, 8 bit where only the last layer or the logits see
  them;
- values that may be negative (linear bottlenecks, residual branches, functions such as SiLU): signed 8 bit;
- pixels: scale 1/255; behind a normalisation, which stays in float in front, signed 8 bit with a learned scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.base import InsertModuleCallAfter, ModuleToModuleByInstance
from brevitas.graph.utils import set_module
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from robustq.errors import UsageError
from robustq.models.fx.ops import SUBTRACTIONS, SUMS, Kind, computed_inputs, is_unsigned, kind
from robustq.models.fx.trace import describe
from robustq.models.layers import OUTER_BITS, weight_quantizer
from robustq.models.quant.quantizers import (
    ActQuant,
    BranchQuant,
    LearnedThreshold,
    NormalisedQuant,
    PixelQuant,
    QuantReLU,
    Widths,
)


class _AtMost(torch.autograd.Function):
    """min(value, largest) with the gradient of the identity."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, largest: float) -> Tensor:
        return value.clamp(max=largest)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class BoundedThreshold(LearnedThreshold):
    """:class:`LearnedThreshold` that is never above ``bound``.

    A rectifier that clips at ``bound`` followed by a quantizer that clips at a threshold up to ``bound`` is the
    quantizer alone, so a deployed file needs no clipping of its own between convolution and quantizer, which would keep
    onnxruntime from running the convolution as integers.

    Args:
        bit_width, signed: as :class:`LearnedThreshold`.
        bound: largest threshold, in the unit of the activations.
    """

    def __init__(self, bit_width: int, signed: bool, bound: float) -> None:
        super().__init__(bit_width, signed)
        self.bound = bound

    def limited(self, log_threshold: Tensor) -> Tensor:
        """At most the bound; above it the gradient goes on, so that training can come back."""
        return _AtMost.apply(log_threshold, math.log(self.bound))  # type: ignore[no-any-return]


class BoundedActQuant(ActQuant):
    """Unsigned activations after a rectifier that clips at ``bound``."""

    scaling_impl = BoundedThreshold  # type: ignore[assignment]


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
