"""A module without parameters that is called several times gets a copy for each call.

Contract: afterwards no two calls name the same rectifier, pooling or dropout, since each call has a scale of its own.
Brevitas has such a pass (DuplicateSharedStatelessModule), which overwrites a module that has the copy's name already.
"""

from __future__ import annotations

import copy

from brevitas.backport.fx import GraphModule
from brevitas.graph.utils import set_module

from robustq.models.own.operations import LAYERS, NORMS


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
