"""One run of a graph on two blank images: which nodes are tensors, of which shape, and which depend on the images."""

from __future__ import annotations

from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Interpreter, Node
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.own.tracing import Constant, describe

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
