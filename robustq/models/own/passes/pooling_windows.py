"""Rewrites pooling layers so that every runtime uses the same windows and divisors.

Contract: ``ceil_mode`` is dropped where it adds no window, and ``count_include_pad`` where there is no padding. An
average with both, and with a window that ``ceil_mode`` adds, gets its padding from an explicit zero pad in front.
``divisor_override`` is refused: ONNX has no such attribute. Needs shapes (:func:`robustq.models.own.values.probe`).

Why: PyTorch divides by the pixels of a window that lie in the image or its padding. onnxruntime's QLinearAveragePool
(1.32) divides by the whole window, also beyond the padding; its float kernel does as PyTorch. PyTorch drops an added
window that lies in the padding alone, onnxruntime does not.
"""

from __future__ import annotations

from typing import Any

from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch import nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from robustq.errors import UsageError
from robustq.models.own.tracing import describe


def pooling_windows(graph: GraphModule) -> None:
    """Rewrite ``graph``; modules keep their names.

    Raises:
        UsageError: an average with a divisor of its own; it is named.
    """
    for node in list(graph.graph.nodes):
        pool = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(pool, nn.AvgPool2d):
            set_module(graph, _average(graph, node, pool), str(node.target))
        elif isinstance(pool, nn.MaxPool2d) and pool.ceil_mode and not _adds_windows(node, pool):
            sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            set_module(graph, nn.MaxPool2d(*sizes, pool.return_indices), str(node.target))
    graph.recompile()


def _average(graph: GraphModule, node: Node, pool: nn.AvgPool2d) -> nn.AvgPool2d:
    if pool.divisor_override is not None:
        raise UsageError(
            f"{describe(graph, node)} has divisor_override={pool.divisor_override}, which ONNX does not have; leave it "
            "out, and multiply the average by the window's height * width / divisor"
        )
    padding: Any = _pair(pool.padding)
    adds = pool.ceil_mode and _adds_windows(node, pool)
    counts = pool.count_include_pad and padding != (0, 0)
    if adds and counts:
        _pad_in_front(graph, node, *padding)
        padding, counts = (0, 0), False
    return nn.AvgPool2d(pool.kernel_size, pool.stride, padding, ceil_mode=adds, count_include_pad=counts)


def _adds_windows(node: Node, pool: nn.AvgPool2d | nn.MaxPool2d) -> bool:
    """Whether ``ceil_mode`` gives the output of ``node`` more rows or columns."""
    before, after = node.all_input_nodes[0].meta["shape"][-2:], node.meta["shape"][-2:]
    kernel, stride, padding, dilation = (
        _pair(getattr(pool, name, 1)) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    sizes = zip(before, kernel, stride, padding, dilation, strict=True)
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes) != tuple(after)


def _pad_in_front(graph: GraphModule, node: Node, rows: int, columns: int) -> None:
    source = node.all_input_nodes[0]
    *outer, height, width = source.meta["shape"]
    with graph.graph.inserting_before(node):
        padded = graph.graph.call_function(functional.pad, (source, (columns, columns, rows, rows)))
    padded.meta = {**source.meta, "shape": (*outer, height + 2 * rows, width + 2 * columns)}
    node.replace_input_with(source, padded)
