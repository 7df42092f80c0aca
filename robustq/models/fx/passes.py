"""Graph passes that rewrite a traced model into standard form; no answer changes.

They run in the order of this file; :func:`relu_first` needs the shapes of :func:`robustq.models.fx.trace.shape_prop`.
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
from robustq.models.fx.ops import GRID_METHODS, LAYERS, NORMS, RELUS
from robustq.models.fx.trace import call_arguments, called_module, calls, describe, free_name, replace_call

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
    (functional.mish, nn.Mish),
    (functional.selu, nn.SELU),
    (functional.celu, nn.CELU),
    (functional.softsign, nn.Softsign),
    (functional.logsigmoid, nn.LogSigmoid),
    (functional.adaptive_max_pool2d, nn.AdaptiveMaxPool2d),
)
"""Brevitas' table of functions and their modules, and the functions that it lacks."""


DROPOUTS = {
    *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, torch.dropout),
    *(functional.alpha_dropout, functional.feature_alpha_dropout),
}


def remove_inplace(model: GraphModule) -> None:
    """Replace in-place operations: nodes behind one read its result, and its input keeps its value.

    Why: an in-place change behind a quantizer would take the quantized values off their grid. UsageError names an
    operation that changes a part of a tensor in place.
    """
    order = {node: index for index, node in enumerate(model.graph.nodes)}
    for node in model.graph.nodes:
        if not _is_inplace(model, node) or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        is_part = source.op in ("call_function", "call_method") and source.target in (*GRID_METHODS, operator.getitem)
        if is_part and (len(source.users) > 1 or not node.users):
            raise UsageError(f"{describe(model, node)} changes a part of a tensor in place; write it out of place")
        for user in [one for one in source.users if order[one] > order[node]]:
            user.replace_input_with(source, node)
        if node.op == "call_module":
            module = copy.copy(called_module(model, node))
            module.inplace = False
            set_module(model, module, str(node.target))
        elif node.op == "call_method":
            node.target = str(node.target).rstrip("_")
        else:
            node.target = OUT_OF_PLACE.get(node.target, node.target)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    model.recompile()


def _is_inplace(model: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(called_module(model, node), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.op == "call_function" and (node.target in OUT_OF_PLACE or bool(node.kwargs.get("inplace", False)))


def clamp_to_relu(model: GraphModule) -> None:
    """``clamp(min=0)`` becomes ``relu``, and ``clamp(0, m)`` becomes ``hardtanh`` with these bounds.

    UsageError names a clamp that does not start at 0: its lower end is on no unsigned grid.
    """
    for node in list(model.graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in (
            torch.clamp,
            torch.clip,
            "clamp",
            "clip",
        ):
            continue
        bounds = call_arguments(node, "min", "max")
        low, high = bounds.get("min"), bounds.get("max")
        if low != 0 or not (high is None or (isinstance(high, int | float) and high > 0)):
            raise UsageError(
                f"{describe(model, node)} clamps to [{low}, {high}], which cannot be quantized; a clamp must start at 0"
            )
        if high is None:
            replace_call(model, node, functional.relu, node.args[0])
        else:
            replace_call(model, node, functional.hardtanh, node.args[0], 0.0, float(high))
    model.recompile()


MAXIMA: dict[Any, tuple[Any, Any]] = {
    **dict.fromkeys((torch.max, "max"), (torch.amax, torch.maximum)),
    **dict.fromkeys((torch.min, "min"), (torch.amin, torch.minimum)),
}
"""Functions that return values and their indices; the same for values alone, and for two tensors."""


def maxima_to_values(model: GraphModule) -> None:
    """``max(x, dim)[0]`` becomes ``amax(x, dim)``, and ``max(x, y)`` becomes ``maximum(x, y)``; so does the minimum."""
    for node in list(model.graph.nodes):
        if not calls(node, MAXIMA):
            continue
        along, of_two = MAXIMA[node.target]
        if len(node.all_input_nodes) == 2:
            replace_call(model, node, of_two, *node.all_input_nodes)
            continue
        arguments = call_arguments(node, "dim", "keepdim")
        values = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        if "dim" not in arguments or not all(user in values or not user.users for user in node.users):
            continue
        for value in values:
            replace_call(model, value, along, node.args[0], arguments["dim"], arguments.get("keepdim", False))
        model.graph.eliminate_dead_code()
    model.recompile()


def functions_to_modules(model: GraphModule) -> None:
    """Each call of a function in :data:`FUNCTIONS`, and of the method ``relu``, becomes a module named like its node.

    By Brevitas' rewriters, which would overwrite a module that has the name already: such nodes are renamed first.
    UsageError names a dropout that is on in eval mode too: the module would be off there.
    """
    for node in model.graph.nodes:
        if node.target in DROPOUTS and _is_always_on(node):
            raise UsageError(
                f"{describe(model, node)} drops values in eval mode too, so that answers are random; "
                "pass training=self.training"
            )
        while node.op in ("call_function", "call_method") and hasattr(model, node.name):
            node.name = model.graph._graph_namespace.create_name(f"{node.name}_call", None)
    called = {node.target for node in model.graph.nodes}
    for function, module in FUNCTIONS:
        if function in called:  # the rewriter compiles the graph anew in any case
            FnToModule(function, module).apply(model)
    MethodToModule("relu", nn.ReLU).apply(model)


def _is_always_on(node: Node) -> bool:
    arguments = call_arguments(node, "p", "training")
    on = arguments.get("training", arguments.get("train", True))
    return bool(on) and arguments.get("p", 0.5) != 0


def duplicate_shared_modules(model: GraphModule) -> None:
    """Give each call of a module without parameters its own copy, since each call gets its own scale.

    Brevitas' DuplicateSharedStatelessModule would overwrite a module that has the name of the copy already.
    """
    seen: set[str] = set()
    for node in model.graph.nodes:
        module = called_module(model, node)
        if module is None:
            continue
        if str(node.target) in seen and not isinstance(module, LAYERS + NORMS) and not list(module.parameters()):
            node.target = free_name(model, str(node.target))
            set_module(model, copy.deepcopy(module), node.target)
        seen.add(str(node.target))
    model.recompile()


CASTS = {"float", "to", "type", "type_as"}


def drop_no_ops(model: GraphModule) -> None:
    """Remove assertions, which have held once, and casts to the type that a tensor has already.

    Why: a layer's shape in an assertion is no second use of the layer.
    """
    for node in list(model.graph.nodes):
        if node.target is torch._assert:
            model.graph.erase_node(node)
        elif node.op == "call_method" and node.target in CASTS:
            source = node.all_input_nodes[0]
            if source.meta["dtype"] is not None and source.meta["dtype"] == node.meta["dtype"]:
                node.replace_all_uses_with(source)
                model.graph.erase_node(node)
    model.graph.eliminate_dead_code()
    model.recompile()


def relu_first(model: GraphModule) -> None:
    """Move each ReLU in front of the max pooling, dropout or flatten before it, where the two commute.

    Why: a convolution is one integer operation only with a quantizer right behind it, and the quantizer is in the ReLU.
    """
    while any(_swap_with_input(model, node) for node in list(model.graph.nodes)):
        pass
    model.graph.lint()
    model.recompile()


def _swap_with_input(model: GraphModule, node: Node) -> bool:
    relu = called_module(model, node)
    if not isinstance(relu, RELUS):
        return False
    before = node.all_input_nodes[0]
    if len(before.users) > 1 or not _commutes(model, before, bounded=not isinstance(relu, nn.ReLU)):
        return False
    source = before.all_input_nodes[0]
    node.replace_all_uses_with(before)
    before.replace_input_with(source, node)
    node.replace_input_with(before, source)
    source.append(node)
    node.meta["shape"] = source.meta["shape"]
    return True


def _commutes(model: GraphModule, node: Node, *, bounded: bool) -> bool:
    module = called_module(model, node)
    if isinstance(module, nn.MaxPool2d | nn.Flatten):
        return not getattr(module, "return_indices", False)
    if isinstance(module, nn.Dropout | nn.Dropout2d):
        return not bounded  # in training, dropout scales by 1 / (1 - p), possibly over the bound
    return calls(node, (torch.flatten, torch.reshape, torch.permute, torch.transpose, "permute", "transpose"))
