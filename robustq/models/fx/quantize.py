"""Placing the quantizers of :mod:`robustq.models.quant.quantizers` in a standardised graph.

The result of every layer, sum and average is quantized at once, by the ReLU behind it or by a quantizer of its own, so
that each operation becomes one integer operation of the deployed file. Bit widths:

- weights: the model's width; 8 bits in the first and the last layer;
- values that cannot be negative: unsigned, at the activation width; 8 bits where only the last layer or the logits use
  them;
- values that may be negative (linear bottlenecks, residual branches, functions such as SiLU): signed, 8 bits;
- pixels: scale 1/255; behind a normalisation, which stays in float, signed 8 bits with a learned scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import brevitas.nn as qnn
from brevitas.backport.fx import GraphModule, Node
from brevitas.function.ops_ste import scalar_clamp_ste
from brevitas.graph.base import ModuleToModuleByInstance
from brevitas.graph.utils import set_module
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from robustq.errors import UsageError
from robustq.models.fx.fixed_convolutions import FixedConv2d, FixedQuantConv2d
from robustq.models.fx.ops import AVERAGING_CALLS, SUBTRACTIONS, SUMS, Kind, computed_inputs, is_unsigned, kind
from robustq.models.fx.trace import called_module, calls, describe, free_name
from robustq.models.layers import OUTER_BITS, same_shape, weight_quantizer
from robustq.models.quant import quantizers
from robustq.models.quant.quantizers import QuantReLU, Widths
from robustq.models.state_dict import FLOAT_LAYERS


class BoundedThreshold(quantizers.LearnedThreshold):
    """:class:`LearnedThreshold` of at most ``bound`` (in the unit of the activations), for ReLU6.

    A ReLU that clips at ``bound``, followed by a quantizer that clips below, equals the quantizer alone: the deployed
    file needs no clipping of its own, which would keep onnxruntime from running the layer before it as integers.
    """

    def __init__(self, bit_width: int, signed: bool, bound: float) -> None:
        super().__init__(bit_width, signed)
        self.bound = bound

    def limited(self, log_threshold: Tensor) -> Tensor:
        """At most the bound; the gradient passes above it too, so that training can come back."""
        limited: Tensor = scalar_clamp_ste(log_threshold, -math.inf, math.log(self.bound))
        return limited


class BoundedActQuant(quantizers.ActQuant):
    """Unsigned activations behind a ReLU that clips at ``bound``."""

    scaling_impl = BoundedThreshold  # type: ignore[assignment]


class QuantReLU6(qnn.QuantReLU):  # type: ignore[misc]
    """A ReLU that clips at ``bound``, with its unsigned quantizer."""

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


@dataclass(frozen=True)
class _Plan:
    """The model before any change: kinds of its nodes, and sets of nodes."""

    model: GraphModule
    widths: Widths
    kinds: dict[Node, Kind]
    outer: set[Node]  # first and last layers
    last: set[Node]
    before_layer: set[Node]
    shared_sums: set[Node]


def quantize(model: GraphModule, *, widths: Widths, name: str, shared_sum_scale: bool = False) -> None:
    """Quantize ``model`` (after :func:`robustq.models.fx.build.standardise`) in place; weights and names stay.

    Args as for :func:`robustq.models.fx.build.quantized_graph`. UsageError for binary widths, no layer at all, or an
    operation that cannot be quantized (named).
    """
    if widths.weight_bits == 1 or widths.act_bits == 1:
        raise UsageError(f"{name}: 1 bit needs blocks made for it, as resnet20 has; choose 8, 4, 3 or 2 (or 32)")
    kinds = {node: kind(model, node) for node in model.graph.nodes}
    first, _ = _outer_layers(kinds, kinds, lambda node: node.all_input_nodes)
    last, before_layer = _outer_layers(reversed(kinds), kinds, lambda node: node.users)
    sums = {node for node in kinds if kinds[node] is Kind.JOIN and node.target in SUMS} if shared_sum_scale else set()
    plan = _Plan(model, widths, kinds, first | last, last, before_layer, sums)
    if not first:
        raise UsageError(f"{name}: has no convolution and no linear layer; there is nothing to quantize")
    unsigned, float_prefix = _unsigned_values(model, kinds), _float_prefix(kinds)
    model.meta[FLOAT_LAYERS] = tuple(
        str(node.target) if node.op == "call_module" else node.name
        for node in kinds
        if _is_in_float(node, kinds) and not (kinds[node] is Kind.AFFINE and node in float_prefix)
    )
    for node, its_kind in kinds.items():
        if its_kind is Kind.LAYER:
            _quantize_layer(plan, node)
        elif its_kind is Kind.RELU:
            relu, bits = called_module(model, node), _act_bits(plan, node)
            bound = {nn.ReLU: None, nn.ReLU6: 6.0}.get(type(relu), getattr(relu, "max_val", None))
            made = QuantReLU(bit_width=bits) if bound is None else QuantReLU6(bit_width=bits, bound=float(bound))
            set_module(model, made, str(node.target))
    for node in kinds:
        if node is float_prefix[-1]:
            act_quant = quantizers.PixelQuant if kinds[node] is Kind.INPUT else quantizers.NormalisedQuant
            _insert_after(plan, node, "input_quant", qnn.QuantIdentity(act_quant=act_quant))
        elif node not in float_prefix and _needs_quantizer(plan, node):
            if node in unsigned:
                quantizer = qnn.QuantIdentity(act_quant=quantizers.ActQuant, bit_width=_act_bits(plan, node))
            else:
                quantizer = qnn.QuantIdentity(act_quant=quantizers.BranchQuant)
            made_by = str(node.target) if node.op == "call_module" else node.name
            _insert_after(plan, node, f"{made_by}_quant", quantizer)
    for node in kinds:
        if node in sums:
            _share_quantizer(model, node)
    model.graph.lint()
    model.recompile()


def _outer_layers(
    nodes: Iterable[Node], kinds: dict[Node, Kind], neighbours: Callable[[Node], Iterable[Node]]
) -> tuple[set[Node], set[Node]]:
    """The layers that no other layer separates from the images (or the logits), and all nodes that one separates.

    ``nodes`` begin at the images (or the logits); ``neighbours`` are the next nodes in their direction.
    """
    outer, separated = set(), set()
    for node in nodes:
        if any(one in separated or kinds[one] is Kind.LAYER for one in neighbours(node)):
            separated.add(node)
        elif kinds[node] is Kind.LAYER:
            outer.add(node)
    return outer, separated


def _unsigned_values(model: GraphModule, kinds: dict[Node, Kind]) -> set[Node]:
    """The nodes whose values cannot be negative, given the operations alone; pixels are among them."""
    unsigned: set[Node] = set()
    for node, its_kind in kinds.items():
        sources = computed_inputs(node)
        inherits = its_kind in (Kind.KEEPS_GRID, Kind.AVERAGE, Kind.JOIN) and node.target not in SUBTRACTIONS
        inherits = inherits or calls(node, AVERAGING_CALLS)
        if (
            its_kind in (Kind.INPUT, Kind.RELU)
            or (its_kind is Kind.FLOAT and is_unsigned(model, node))
            or (inherits and bool(sources) and unsigned.issuperset(sources))
            or (its_kind is Kind.KEEPS_GRID and bool(node.all_input_nodes) and node.all_input_nodes[0] in unsigned)
        ):
            unsigned.add(node)
    return unsigned


IN_FLOAT = {Kind.AFFINE, Kind.NORM, Kind.FLOAT}
"""Kinds of functions in float, a norm where it follows no layer."""


def _float_prefix(kinds: dict[Node, Kind]) -> list[Node]:
    """The images and the operations in float before the input quantizer: normalisation, if any."""
    node = next(node for node, its_kind in kinds.items() if its_kind is Kind.INPUT)
    chain, prefix = [node], [node]
    while True:
        users = [user for user in node.users if kinds[user] is not Kind.NOT_A_TENSOR]
        if len(users) != 1 or kinds[users[0]] not in IN_FLOAT | {Kind.KEEPS_GRID}:
            return prefix
        node = users[0]
        chain.append(node)
        if kinds[node] is not Kind.KEEPS_GRID:
            prefix = list(chain)


def _quantize_layer(plan: _Plan, node: Node) -> None:
    layer = called_module(plan.model, node)
    is_conv = isinstance(layer, nn.Conv2d)
    if is_parametrized(layer) or any(hasattr(layer, hidden) for hidden in ("weight_g", "weight_orig", "weight_v")):
        raise UsageError(
            f"{describe(plan.model, node)} computes its weight (weight or spectral norm, pruning), which cannot be "
            "quantized; make the result its weight first, as torch.nn.utils.parametrize.remove_parametrizations does"
        )
    bits = OUTER_BITS if node in plan.outer or isinstance(layer, FixedConv2d) else plan.widths.weight_bits
    options = {"bias_quant": None, **weight_quantizer(bits, folded=False)}
    if isinstance(layer, FixedConv2d):  # no training adapts its weights to few bits
        made = same_shape(layer, FixedQuantConv2d, bias=False, **options)
        set_module(plan.model, made.fix(layer.weight, persistent=layer.persistent), str(node.target))
        return
    # Not the rewriter's apply, which searches all modules for this one.
    rewriter = ModuleToModuleByInstance(layer, qnn.QuantConv2d if is_conv else qnn.QuantLinear, **options)
    set_module(plan.model, rewriter.init_new_module(layer, str(node.target)).train(layer.training), str(node.target))


def _needs_quantizer(plan: _Plan, node: Node) -> bool:
    kinds = plan.kinds
    its_kind = kinds[node]
    if its_kind not in (Kind.LAYER, Kind.NORM, Kind.AVERAGE, Kind.JOIN, Kind.AFFINE, Kind.FLOAT):
        return False
    users = [user for user in node.users if kinds[user] is not Kind.NOT_A_TENSOR]
    user_kinds = {kinds[user] for user in users}
    if not users or _reaches_logits_alone(node, kinds):
        return False
    if user_kinds == {Kind.RELU} and (len(users) == 1 or _is_in_float(node, kinds)):
        return False  # two quantizers would keep onnxruntime from running a layer as integers
    if plan.shared_sums.issuperset(users):
        return False  # their quantizer takes the values
    if its_kind is Kind.LAYER and len(node.users) == 1 and user_kinds == {Kind.NORM}:
        return False  # the norm folds into the layer
    # No rounding between functions in float.
    return not (
        _is_in_float(node, kinds) and {kinds[user] for user in _grid_users(node, kinds)} <= IN_FLOAT | {Kind.RELU}
    )


def _is_in_float(node: Node, kinds: dict[Node, Kind]) -> bool:
    own_norm = kinds[node] is Kind.NORM and kinds.get(node.all_input_nodes[0]) is Kind.LAYER
    return kinds[node] in IN_FLOAT and not own_norm


def _reaches_logits_alone(node: Node, kinds: dict[Node, Kind]) -> bool:
    """Whether the values reach only the output, possibly through moves and functions in float."""
    return bool(node.users) and all(
        kinds[user] is Kind.OUTPUT
        or (kinds[user] in (Kind.KEEPS_GRID, Kind.FLOAT, Kind.AFFINE) and _reaches_logits_alone(user, kinds))
        for user in node.users
    )


def _act_bits(plan: _Plan, node: Node) -> int:
    """8 where no inner layer uses the values: only the last layer, or the logits."""
    users = _grid_users(node, plan.kinds)
    layers = {user for user in users if plan.kinds[user] is Kind.LAYER}
    mixed = any(plan.kinds[user] in (Kind.JOIN, Kind.AVERAGE) for user in users)
    outer = node not in plan.before_layer or (layers and layers <= plan.last and not mixed)
    return OUTER_BITS if outer else plan.widths.act_bits


def _grid_users(node: Node, kinds: dict[Node, Kind]) -> set[Node]:
    """The nodes that use the values of ``node`` on their grid: directly, or through moves of values."""
    found: set[Node] = set()
    for user in node.users:
        if kinds[user] is not Kind.NOT_A_TENSOR:
            found |= _grid_users(user, kinds) if kinds[user] is Kind.KEEPS_GRID else {user}
    return found


def _share_quantizer(model: GraphModule, node: Node) -> None:
    """Quantize both inputs of the sum ``node`` by one quantizer."""
    name = free_name(model, f"{node.name}_shared_quant")
    set_module(model, qnn.QuantIdentity(act_quant=quantizers.BranchQuant), name)
    for source in computed_inputs(node):
        with model.graph.inserting_before(node):
            quantized = model.graph.call_module(name, (source,))
        node.replace_input_with(source, quantized)


def _insert_after(plan: _Plan, node: Node, wanted: str, quantizer: nn.Module) -> None:
    name = free_name(plan.model, wanted)
    set_module(plan.model, quantizer, name)
    sizes = [user for user in node.users if plan.kinds[user] is Kind.NOT_A_TENSOR]
    with plan.model.graph.inserting_after(node):
        quantized = plan.model.graph.call_module(name, (node,))
    node.replace_all_uses_with(quantized, lambda user: user is not quantized and user not in sizes)
