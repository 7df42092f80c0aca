"""Tracing a custom network with torch.fx.

A float network -> its graph, by Brevitas' symbolic tracer: one node a tensor operation, module names kept.

The network is traced in eval mode, so a branch on ``self.training`` is taken as in eval mode for good; dropout and
BatchNorm are modules and still follow the mode.

One run of a graph on two blank images: which nodes are tensors, of which shape, and which depend on the images.
"""

from __future__ import annotations

import inspect
import os
import traceback
from pathlib import Path
from typing import Any

import brevitas
import torch
from brevitas.backport.fx import GraphModule, Interpreter, Node, Tracer
from torch import Tensor, nn

from robustq.errors import UsageError

_LIBRARIES = (
    *(str(Path(module.__file__).parent) + os.sep for module in (torch, brevitas) if module.__file__),
    str(Path(__file__).parent) + os.sep,
)
"""Where a frame is never the user's own line."""

_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d)


class Constant(nn.Module):
    """A tensor that the network uses and its state dict does not hold; as a module it stays out of ours as well."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        """Return the tensor."""
        return self.value


class _NamedTracer(Tracer):  # type: ignore[misc]
    """Keeps the user's line of every node, and takes as one node what must stay one."""

    record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch.nn's modules, normalisation transforms, and subclasses of layers that only change the constructor."""
        if is_normalise(m):
            return True
        for layer in _LAYERS:
            if isinstance(m, layer):
                # A subclass with a forward of its own is traced through: what it does to its weights must be seen.
                own = type(m).forward is not layer.forward
                return not own and getattr(type(m), "_conv_forward", None) is getattr(layer, "_conv_forward", None)
        return bool(super().is_leaf_module(m, module_qualified_name))


def is_normalise(module: nn.Module) -> bool:
    """Whether ``module`` is one of torchvision's Normalize transforms, which look into the tensor and trace badly."""
    kind = type(module)
    return kind.__name__ == "Normalize" and kind.__module__.startswith("torchvision.transforms")


def trace(network: nn.Module, *, name: str) -> GraphModule:
    """The graph of ``network``, in eval mode, with its own parameters (not copies).

    Entries of the state dict that the forward never uses (auxiliary heads) are left out and listed in
    ``graph.meta["unused_entries"]``.

    Args:
        network: the float network.
        name: what messages call it.

    Raises:
        UsageError: control flow that depends on values, several inputs or outputs, a layer that is used twice; with
            the line of the user's code where it is known.
    """
    network.eval()
    entries = set(network.state_dict())
    tracer = _NamedTracer()
    try:
        graph = tracer.trace(network, _defaults(network, name))
    except UsageError:
        raise
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        text = " ".join(str(error).split())[:140] or type(error).__name__
        raise UsageError(
            f"{name}: its forward cannot be traced{_place_of(error)}: {text}; "
            "write it without branches and loops over tensor values"
        ) from error
    traced = GraphModule(tracer.root, graph, type(network).__name__)
    _remember_places(traced)
    _constants_to_modules(traced, entries)
    _check_shape(traced, name)
    traced.eval()
    traced.meta["unused_entries"] = tuple(sorted(entries - set(traced.state_dict())))
    return traced


def place(node: Node) -> str:
    """`` (file:line)`` of the user's own code that made ``node``, or nothing where it is not known."""
    return str(node.meta.get("place", ""))


def describe(graph: GraphModule, node: Node) -> str:
    """A node in words: what it is, its name and the line that made it."""
    if node.op == "call_module":
        return f"{type(graph.get_submodule(str(node.target))).__name__} '{node.target}'{place(node)}"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target))
    return f"{target}() '{node.name}'{place(node)}"


def _place_of(error: Exception) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_LIBRARIES) and not frame.filename.startswith("<"):
            return f" at {frame.filename}:{frame.lineno}"
    return ""


def _remember_places(traced: GraphModule) -> None:
    """Of each node's whole stack, innermost frame first, keep the innermost line outside the libraries."""
    for node in traced.graph.nodes:
        for line in (node.meta.pop("stack_trace", None) or "").splitlines():
            words = line.strip().split('"')
            if len(words) >= 3 and words[0] == "File " and not words[1].startswith(_LIBRARIES):
                node.meta["place"] = f" ({words[1]}:{words[2].split()[2].rstrip(',')})"
                break


def _defaults(network: nn.Module, name: str) -> dict[str, Any]:
    """Arguments of forward behind the first keep their defaults."""
    parameters = list(inspect.signature(network.forward).parameters.values())
    if not parameters:
        raise UsageError(f"{name}: its forward takes no input")
    for parameter in parameters[1:]:
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variadic and parameter.default is parameter.empty:
            raise UsageError(f"{name}: its forward needs a second input '{parameter.name}'; it must take images alone")
    return {p.name: p.default for p in parameters[1:] if p.default is not p.empty}


def _constants_to_modules(traced: GraphModule, entries: set[str]) -> None:
    for node in list(traced.graph.nodes):
        if node.op != "get_attr" or str(node.target) in entries:
            continue
        *path, last = str(node.target).split(".")
        owner = traced.get_submodule(".".join(path))
        value = getattr(owner, last)
        if isinstance(value, Tensor):
            delattr(owner, last)
            owner.add_module(last, Constant(value.detach()))
        with traced.graph.inserting_before(node):
            call = traced.graph.call_module(str(node.target))
            call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        traced.graph.erase_node(node)
    traced.recompile()


def _check_shape(traced: GraphModule, name: str) -> None:
    for node in list(traced.graph.nodes):
        if node.op == "placeholder" and node.args and not node.users:
            traced.graph.erase_node(node)  # an argument that kept its default
        if node.op == "output" and not isinstance(node.args[0], Node):
            raise UsageError(
                f"{name}: its forward returns a {type(node.args[0]).__name__}; it must return the logits alone"
            )
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise UsageError(f"{name}: its forward takes {len(inputs)} inputs; it must take images alone")
    calls: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for target, count in calls.items():
        module = traced.get_submodule(target)
        if count > 1 and isinstance(module, _LAYERS):
            raise UsageError(
                f"{name}: {type(module).__name__} '{target}' is called {count} times; a layer that is shared has no "
                "one scale for its input, so give each call a layer of its own"
            )


BATCH = 2
"""Two images tell the batch axis from an axis of length one."""


class _Probe(Interpreter):  # type: ignore[misc]
    def __init__(self, graph: GraphModule, name: str) -> None:
        super().__init__(graph)
        self.name = name

    def run_node(self, node: Node) -> Any:
        try:
            value = super().run_node(node)
        except UsageError:
            raise
        except Exception as error:  # an operation of the user's network may raise anything
            text = " ".join(str(error).split("\n")[0].split())[:140]
            raise UsageError(
                f"{self.name}: {describe(self.module, node)} does not take what reaches it ({text}); "
                "check the image size and the channels of the data"
            ) from error
        node.meta["tensor"] = isinstance(value, Tensor) and value.is_floating_point()
        node.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        node.meta["constant"] = node.op == "get_attr" or (
            node.op == "call_module" and isinstance(self.module.get_submodule(str(node.target)), Constant)
        )
        if node.op in ("call_function", "call_method") and isinstance(value, Tensor):
            # What is computed from constants alone, such as a reshaped mean, is one.
            sources = [one for one in node.all_input_nodes if one.meta["tensor"]]
            node.meta["constant"] = bool(sources) and all(one.meta["constant"] for one in sources)
        return value


@torch.no_grad()
def probe(graph: GraphModule, *, channels: int, image_size: int, name: str) -> None:
    """Write ``tensor``, ``shape`` (with a batch of two) and ``constant`` into every node's ``meta``.

    Raises:
        UsageError: an operation fails on images of this shape; it is named.
    """
    graph.eval()
    parameter = next(graph.parameters(), torch.empty(0))
    x = torch.zeros(BATCH, channels, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    _check_channels(graph, channels, name)
    _Probe(graph, name).run(x)


def _check_channels(graph: GraphModule, channels: int, name: str) -> None:
    first = next((module for module in _modules_in_order(graph) if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != channels:
        raise UsageError(
            f"{name} takes images of {first.in_channels} channels, the data have {channels}; give other data"
        )


def _modules_in_order(graph: GraphModule) -> list[nn.Module]:
    return [graph.get_submodule(str(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
