"""Graph passes that bring a traced network into standard form.

Clamps become rectifiers.

Contract: ``clamp(min=0)`` becomes ``relu``, ``clamp(0, m)`` becomes ``hardtanh`` of these bounds; any other clamp is
refused, since its lower end is on no unsigned grid.

Functions and methods that a quantizer replaces become modules, by Brevitas' own rewriters.

Contract: every call of a function in :data:`FUNCTIONS` or a method in :data:`METHODS` is a module of its own
afterwards, named like its node. Brevitas' table lacks some functions, and its rewriter takes a name that the network
may have already.

A module without parameters that is called several times gets a copy for each call.

Contract: afterwards no two calls name the same rectifier, pooling or dropout, since each call has a scale of its own.
Brevitas has such a pass (DuplicateSharedStatelessModule), which overwrites a module that has the copy's name already.

No operation works in place any more.

Contract: what worked in place gives its result to everybody who read its input afterwards, and leaves the input alone.
Why: quantizers are put between operations, and a value that somebody changes behind its quantizer is off its grid.

A rectifier behind max pooling, dropout or a flatten moves in front of it.

Contract: the order of the two changes, their values do not: the largest of rectified values is the rectified largest,
and ReLU of a positive multiple is that multiple of ReLU. Why: a convolution is one integer operation only together with
a quantizer right behind it, and the rectifier is where the quantizer is. Needs shapes
(:func:`robustq.models.fx.trace.probe`).
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.base import FnToModule, MethodToModule
from brevitas.graph.standardize import TorchFunctionalToModule
from brevitas.graph.utils import set_module
from torch import nn
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.fx.ops import GRID_METHODS, LAYERS, NORMS, RECTIFIERS
from robustq.models.fx.trace import describe


def clamps_to_rectifiers(graph: GraphModule) -> None:
    """Rewrite ``graph``.

    Raises:
        UsageError: a clamp that does not start at 0; it is named.
    """
    for node in list(graph.graph.nodes):
        function = node.op == "call_function" and node.target in (torch.clamp, torch.clip)
        if not function and not (node.op == "call_method" and node.target in ("clamp", "clip")):
            continue
        bounds = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
        low, high = bounds.get("min"), bounds.get("max")
        if low != 0 or not (high is None or (isinstance(high, int | float) and high > 0)):
            raise UsageError(
                f"{describe(graph, node)} clamps to [{low}, {high}], which cannot be quantized; a clamp must start at 0"
            )
        with graph.graph.inserting_before(node):
            call = (
                graph.graph.call_function(functional.relu, (node.args[0],))
                if high is None
                else graph.graph.call_function(functional.hardtanh, (node.args[0], 0.0, float(high)))
            )
            call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.recompile()


FUNCTIONS: tuple[tuple[Any, type[nn.Module]], ...] = (
    *(pair for pair in TorchFunctionalToModule.FN_TO_MODULE_MAP if not pair[1].__name__.endswith(("1d", "3d"))),
    (torch.relu, nn.ReLU),
    (functional.dropout2d, nn.Dropout2d),
    (functional.silu, nn.SiLU),
    (functional.hardswish, nn.Hardswish),
    (functional.hardsigmoid, nn.Hardsigmoid),
    (functional.sigmoid, nn.Sigmoid),
    (functional.elu, nn.ELU),
    (functional.gelu, nn.GELU),
    (functional.softplus, nn.Softplus),
    (functional.adaptive_max_pool2d, nn.AdaptiveMaxPool2d),
)
"""Brevitas' table of functions and their modules, and what it lacks."""

METHODS: tuple[tuple[str, type[nn.Module]], ...] = (("relu", nn.ReLU),)


def functions_to_modules(graph: GraphModule) -> None:
    """Rewrite ``graph``."""
    for node in graph.graph.nodes:
        while node.op in ("call_function", "call_method") and hasattr(graph, node.name):
            node.name = graph.graph._graph_namespace.create_name(f"{node.name}_call", None)
    for function, module in FUNCTIONS:
        FnToModule(function, module).apply(graph)
    for method, module in METHODS:
        MethodToModule(method, module).apply(graph)


def one_module_a_call(graph: GraphModule) -> None:
    """Rewrite ``graph``."""
    seen: set[str] = set()
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        module = graph.get_submodule(target)
        if target in seen and not isinstance(module, LAYERS + NORMS) and not list(module.parameters()):
            node.target = free_name(graph, target)
            set_module(graph, copy.deepcopy(module), node.target)
        seen.add(str(node.target))
    graph.recompile()


def free_name(graph: GraphModule, wanted: str) -> str:
    """``wanted_1``, ``wanted_2``, ...: the first that the network does not use."""
    *path, last = wanted.split(".")
    owner = graph.get_submodule(".".join(path))
    number = 1
    while hasattr(owner, f"{last}_{number}"):
        number += 1
    return ".".join([*path, f"{last}_{number}"])


OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    functional.relu_: functional.relu,
    torch.relu_: torch.relu,
    functional.hardtanh_: functional.hardtanh,
    functional.leaky_relu_: functional.leaky_relu,
}


def out_of_place(graph: GraphModule) -> None:
    """Rewrite ``graph``.

    Raises:
        UsageError: something is changed in place that is a part of another tensor; it is named.
    """
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        if not _works_in_place(graph, node) or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        if _is_part(source) and (len(source.users) > 1 or not node.users):
            raise UsageError(f"{describe(graph, node)} changes a part of a tensor in place; write it out of place")
        for user in [one for one in source.users if order[one] > order[node]]:
            user.replace_input_with(source, node)
        _replace(graph, node)
    graph.recompile()


def _is_part(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and (
        node.target in GRID_METHODS or node.target is operator.getitem
    )


def _replace(graph: GraphModule, node: Node) -> None:
    if node.op == "call_module":
        module = copy.copy(graph.get_submodule(str(node.target)))
        module.inplace = False
        set_module(graph, module, str(node.target))
    elif node.op == "call_method":
        node.target = str(node.target).rstrip("_")
    else:
        node.target = OUT_OF_PLACE.get(node.target, node.target)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}


def _works_in_place(graph: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op == "call_function" and (node.target in OUT_OF_PLACE or bool(node.kwargs.get("inplace", False)))


def rectifiers_first(graph: GraphModule) -> None:
    """Rewrite ``graph`` until nothing moves any more."""
    while any(_moved(graph, node) for node in list(graph.graph.nodes)):
        pass
    graph.graph.lint()
    graph.recompile()


def _moved(graph: GraphModule, node: Node) -> bool:
    if node.op != "call_module":
        return False
    rectifier = graph.get_submodule(str(node.target))
    if not isinstance(rectifier, RECTIFIERS):
        return False
    before = node.all_input_nodes[0]
    if len(before.users) > 1:
        return False
    if not _commutes(graph, before, bounded=not isinstance(rectifier, nn.ReLU)):
        return False
    source = before.all_input_nodes[0]
    node.replace_all_uses_with(before)
    before.replace_input_with(source, node)
    node.replace_input_with(before, source)
    source.append(node)
    node.meta["shape"] = source.meta["shape"]
    return True


def _commutes(graph: GraphModule, node: Node, *, bounded: bool) -> bool:
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, nn.MaxPool2d | nn.Flatten):
            return not getattr(module, "return_indices", False)
        # While training, dropout scales by 1 / (1 - p), which a bound from above does not let pass.
        return isinstance(module, nn.Dropout | nn.Dropout2d) and not bounded
    return node.target is torch.flatten
