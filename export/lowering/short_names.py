"""Short names: an exporter's names take more bytes than a binary layer's biases, and each is written several times."""

from __future__ import annotations

import numpy as np
import onnx

from robustq.export.lowering.graph import unique_name

LAYERS = frozenset({"Add", "Conv", "Gemm", "GlobalAveragePool", "MatMul"})
"""Operations whose node keeps a name."""


def short_names(model: onnx.ModelProto) -> int:
    """Call tensors but inputs and outputs by a number in base 36, layers by their module, and other nodes by nothing;
    drop doc strings and shapes; returns how many tensors got another name.
    """
    graph = model.graph
    kept = {value.name for value in [*graph.input, *graph.output]}
    names: dict[str, str] = {}
    for name in [tensor.name for tensor in graph.initializer] + [name for node in graph.node for name in node.output]:
        if name and name not in kept and name not in names:
            short = np.base_repr(len(names), 36).lower()
            names[name] = f"_{short}" if short in kept else short
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type in LAYERS:
            node.name = unique_name(module_name(node.name), taken)
            taken.add(node.name)
        else:
            node.name = ""
        node.doc_string = ""
        for names_of in (node.input, node.output):
            for place, name in enumerate(names_of):
                names_of[place] = names.get(name, name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
        tensor.doc_string = ""
    del graph.value_info[:]
    graph.doc_string = model.doc_string = ""
    return len(names)


def module_name(node_name: str) -> str:
    """``/layer1/layer1.0/conv1/Conv`` -> ``layer1.0.conv1``: the exporter writes each scope with its parent's name."""
    path = ""
    scopes = [scope for scope in node_name.split("/") if scope]
    for scope in scopes[:-1]:
        parent = path.rsplit(".", 1)[-1] if path else ""
        last_is_container = bool(parent) and scope.startswith(f"{parent}.")
        path = f"{path}{scope[len(parent) :]}" if last_is_container else f"{path}.{scope}".lstrip(".")
    kind = scopes[-1] if scopes else ""
    if kind.split("_")[0] in ("Conv", "Gemm"):
        return path or kind
    return f"{path}.{kind}".lstrip(".").lower()
