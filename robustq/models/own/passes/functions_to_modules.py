"""Functions and methods that a quantizer replaces become modules, by Brevitas' own rewriters.

Contract: every call of a function in :data:`FUNCTIONS` or a method in :data:`METHODS` is a module of its own
afterwards, named like its node. Brevitas' table lacks some functions, and its rewriter takes a name that the network
may have already.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.backport.fx import GraphModule
from brevitas.graph.base import FnToModule, MethodToModule
from brevitas.graph.standardize import TorchFunctionalToModule
from torch import nn
from torch.nn import functional

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
