"""Tracing a custom model by Brevitas' torch.fx tracer: its graph, and the shapes of all values.

A branch on ``self.training`` is fixed as in eval mode; dropout and BatchNorm are modules and follow the mode.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import traceback
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import brevitas
import torch
from brevitas.backport.fx import GraphModule, Interpreter, Node
from torch import Tensor, nn

from robustq.errors import UsageError, one_line
from robustq.models.fx.tracer import LAYERS, SizedTracer, write_sizes

_LIBRARIES = tuple(str(Path(str(file)).parent) + os.sep for file in (torch.__file__, brevitas.__file__, __file__))
"""Folders without code of the user."""

BATCH = 2
"""Batch size of the shapes in ``meta``: not 1, which other axes may have too."""


class Constant(nn.Module):
    """A tensor outside the state dict; as a module it stays outside the state dict of the graph as well."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        """Return the tensor."""
        return self.value


def trace(network: nn.Module, *, name: str, images: tuple[int, int, int] | None = None) -> GraphModule:
    """The graph of ``network``, in eval mode, with its own parameters (not copies).

    ``meta["unused_entries"]`` lists the entries of the state dict that forward never uses (auxiliary heads). UsageError
    for control flow that depends on values, several inputs or outputs, or a layer that is called twice.
    """
    network.eval()
    entries = set(network.state_dict())
    network = _with_shared_tensors(network)
    tracer = SizedTracer(images)
    try:
        try:
            graph = tracer.trace(network, _defaults(network, name))
        except TypeError:  # a method of a buffer that gets sizes of the images, such as expand
            tracer = SizedTracer(images)
            tracer.proxy_buffer_attributes = True
            graph = tracer.trace(network, _defaults(network, name))
    except UsageError:
        raise
    except Exception as error:  # the user's forward may raise anything
        raised = [(frame.filename, frame.lineno) for frame in reversed(traceback.extract_tb(error.__traceback__))]
        raise UsageError(
            f"{name}: its forward cannot be traced{_location(' at {}:{}', raised)}: {one_line(error, longest=140)}; "
            "write it without branches and loops over tensor values"
        ) from error
    model = GraphModule(tracer.root, graph, type(network).__name__)
    for node in graph.nodes:  # of its stack trace, whose innermost frame comes first, the user's innermost line
        frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.pop("stack_trace", None) or "")
        node.meta["location"] = _location(" ({}:{})", frames)
    _constants_to_modules(model, entries)
    _check_graph(model, name)
    model.eval()
    model.meta["unused_entries"] = tuple(sorted(entries - set(model.state_dict())))
    return model


def _with_shared_tensors(network: nn.Module) -> nn.Module:
    """A copy of the modules alone: some keep values of their forward, which are symbolic while tracing."""
    tensors = [*network.parameters(), *network.buffers()]
    try:
        return copy.deepcopy(network, {id(one): one for one in tensors})
    except Exception:  # a module that cannot be copied
        return network


def called_module(model: GraphModule, node: Node) -> Any:
    """The module that ``node`` calls; None where it calls none."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def calls(node: Node, targets: Container[Any]) -> bool:
    """Whether ``node`` calls one of the functions or methods ``targets``; a module may have the name of a method."""
    return node.op in ("call_function", "call_method") and node.target in targets


def call_arguments(node: Node, *names: str) -> dict[str, Any]:
    """The arguments of a call behind the first one, by name; ``names`` are those of positional arguments."""
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)


def replace_call(model: GraphModule, node: Node, target: Any, *args: Any) -> Node:
    """Replace ``node`` by a call of ``target``, a function or the name of a module; return the new node."""
    with model.graph.inserting_before(node):
        call = model.graph.create_node("call_module" if isinstance(target, str) else "call_function", target, args)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)
    return call


def free_name(model: GraphModule, wanted: str) -> str:
    """``wanted``, else ``wanted_1``, ``wanted_2``, ...: the first name that the model does not use."""
    path, _, last = wanted.rpartition(".")
    owner = model.get_submodule(path)
    name, number = last, 1
    while hasattr(owner, name):
        name, number = f"{last}_{number}", number + 1
    return f"{path}.{name}" if path else name


def describe(model: GraphModule, node: Node) -> str:
    """Operation and name of a node, and the line of the user's code that made it, for messages."""
    module, target = called_module(model, node), node.target
    if module is not None:
        return f"{type(module).__name__} '{target}'{node.meta.get('location', '')}"
    called = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
    return f"{called}() '{node.name}'{node.meta.get('location', '')}"


def _location(text: str, frames: Iterable[tuple[str, Any]]) -> str:
    """``text`` with file and line of the first of ``frames`` that is the user's code; else nothing."""
    for file, line in frames:
        if not file.startswith((*_LIBRARIES, "<")):
            return text.format(file, line)
    return ""


def _defaults(network: nn.Module, name: str) -> dict[str, Any]:
    """Defaults of forward's arguments behind the first."""
    parameters = list(inspect.signature(network.forward).parameters.values())
    if not parameters:
        raise UsageError(f"{name}: its forward takes no input")
    for parameter in parameters[1:]:
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variadic and parameter.default is parameter.empty:
            raise UsageError(f"{name}: its forward needs a second input '{parameter.name}'; it must take images alone")
    return {p.name: p.default for p in parameters[1:] if p.default is not p.empty}


def _constants_to_modules(model: GraphModule, entries: set[str]) -> None:
    """Make a :class:`Constant` of each tensor that is not among the ``entries`` of the state dict."""
    for node in list(model.graph.nodes):
        if node.op != "get_attr" or str(node.target) in entries:
            continue
        path, _, last = str(node.target).rpartition(".")
        owner = model.get_submodule(path)
        value = getattr(owner, last)
        if isinstance(value, Tensor):
            delattr(owner, last)
            owner.add_module(last, Constant(value.detach()))
        replace_call(model, node, str(node.target))
    model.recompile()


def _erase_with_users(model: GraphModule, node: Node) -> None:
    for user in list(node.users):
        _erase_with_users(model, user)
    model.graph.erase_node(node)


def _check_graph(model: GraphModule, name: str) -> None:
    """One input, one output, and no layer that is called twice."""
    for node in reversed([node for node in model.graph.nodes if node.op == "placeholder" and node.args]):
        _erase_with_users(model, node)  # an argument that keeps its default, and the assertion that it does
    for node in list(model.graph.nodes):
        if node.op == "output" and not isinstance(node.args[0], Node):
            kind = type(node.args[0]).__name__
            raise UsageError(f"{name}: its forward returns a {kind}; it must return the logits alone")
    inputs = [node for node in model.graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise UsageError(f"{name}: its forward takes {len(inputs)} inputs; it must take images alone")
    for target, count in Counter(str(node.target) for node in model.graph.nodes if node.op == "call_module").items():
        layer = model.get_submodule(target)
        if count > 1 and isinstance(layer, LAYERS):
            raise UsageError(
                f"{name}: {type(layer).__name__} '{target}' is called {count} times; a layer that is shared has no "
                "one scale for its input, so give each call a layer of its own"
            )


class _ShapeProp(Interpreter):  # type: ignore[misc]
    def __init__(self, model: GraphModule, name: str) -> None:
        super().__init__(model)
        self.name = name

    def run_node(self, node: Node) -> Any:
        try:
            value = super().run_node(node)
        except UsageError:
            raise
        except Exception as error:  # an operation of a custom model may raise anything
            text = " ".join(str(error).split("\n")[0].split())[:140]
            raise UsageError(
                f"{self.name}: {describe(self.module, node)} does not take what reaches it ({text}); "
                "check the image size and the channels of the data"
            ) from error
        node.meta["tensor"] = isinstance(value, Tensor) and value.is_floating_point()
        node.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        node.meta["tensors"] = isinstance(value, tuple | list) and any(isinstance(one, Tensor) for one in value)
        node.meta["dtype"] = value.dtype if isinstance(value, Tensor) else None
        node.meta["constant"] = node.op == "get_attr" or isinstance(called_module(self.module, node), Constant)
        if node.op.startswith("call") and (isinstance(value, Tensor) or node.meta["tensors"]):
            # The result of constants alone, such as a reshaped mean, or the embedding of positions.
            sources = [one for one in node.all_input_nodes if one.meta["shape"] is not None or one.meta["tensors"]]
            node.meta["constant"] = all(one.meta["constant"] for one in sources)
        node.meta["zero"] = node.meta["constant"] and isinstance(value, Tensor) and not bool(value.any())
        return value


@torch.no_grad()
def shape_prop(model: GraphModule, *, channels: int, image_size: int, name: str) -> None:
    """Write ``tensor`` (is it one, of floats), ``shape`` (for :data:`BATCH` images), ``sizes`` (see
    :func:`robustq.models.fx.tracer.write_sizes`) and ``constant`` into ``meta``.

    UsageError names an operation that fails on images of this shape.
    """
    model.eval()
    weight = next(model.parameters(), torch.empty(0))
    x = torch.zeros(BATCH, channels, image_size, image_size, dtype=weight.dtype, device=weight.device)
    try:
        _ShapeProp(model, name).run(x)
        write_sizes(model, (channels, image_size, image_size))
    except UsageError as error:
        modules = [called_module(model, node) for node in model.graph.nodes]
        first = next((module for module in modules if isinstance(module, nn.Conv2d)), None)
        if first is not None and first.in_channels != channels:
            raise UsageError(
                f"{name} takes images of {first.in_channels} channels, the data have {channels}; give other data"
            ) from error
        # Brevitas' Interpreter appends the node and a traceback to the message.
        raise UsageError(str(error).partition("\n\nWhile executing")[0]) from error
