"""Graph passes that fix shapes and pooling windows.

Adaptive average pooling gets the window that it has at this image size.

Contract: AdaptiveAvgPool2d from (H, W) to the same size becomes nothing, to a divisor of it AvgPool2d, to a multiple of
it a nearest-neighbour enlargement, and one to (1, 1) stays; windows of unequal size are refused. Why: ONNX has no
adaptive pooling other than the global one; VGG and AlexNet pool to 7 x 7 and 6 x 6 whatever the image. Needs shapes
(:func:`robustq.models.fx.trace.probe`).

Reshapes get fixed sizes, all but the batch.

Contract: a view, reshape, squeeze or flatten that keeps the batch axis becomes ``torch.flatten(x, 1)`` where it makes
one axis of the rest, else ``torch.reshape(x, (-1, C, H, W))`` with numbers; ``chunk`` becomes ``torch.split`` with
numbers; what computed sizes goes. Why: sizes
computed at run time leave a deployed file without fixed shapes there, and onnxruntime then runs the layers behind in
float. Needs shapes (:func:`robustq.models.fx.trace.probe`).

Means over height and width become pooling.

Contract: ``x.mean((2, 3))`` becomes ``AdaptiveAvgPool2d(1)``, flattened unless ``keepdim``; any other mean is refused.
Why: onnxruntime has an integer rule for pooling and none for ReduceMean. Brevitas' pass of this kind knows one of the
ways to write the mean, and flattens by sizes computed at run time. Needs shapes
(:func:`robustq.models.fx.trace.probe`).

Rewrites pooling layers so that every runtime uses the same windows and divisors.

Contract: ``ceil_mode`` is dropped where it adds no window, and ``count_include_pad`` where there is no padding. An
average with both, and with a window that ``ceil_mode`` adds, gets its padding from an explicit zero pad in front.
``divisor_override`` is refused: ONNX has no such attribute. Needs shapes (:func:`robustq.models.fx.trace.probe`).

Why: PyTorch divides by the pixels of a window that lie in the image or its padding. onnxruntime's QLinearAveragePool
(1.32) divides by the whole window, also beyond the padding; its float kernel does as PyTorch. PyTorch drops an added
window that lies in the padding alone, onnxruntime does not.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch import nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from robustq.errors import UsageError
from robustq.models.fx.trace import BATCH, describe


def fixed_pooling(graph: GraphModule) -> None:
    """Rewrite ``graph``; modules keep their names.

    Raises:
        UsageError: a pooling with unequal windows; it is named, with its sizes.
    """
    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), nn.AdaptiveAvgPool2d):
            continue
        before, after = node.all_input_nodes[0].meta["shape"][-2:], node.meta["shape"][-2:]
        if after == (1, 1):
            continue
        if before == after:
            made: nn.Module = nn.Identity()
        elif all(old % new == 0 for old, new in zip(before, after, strict=True)):
            made = nn.AvgPool2d(tuple(old // new for old, new in zip(before, after, strict=True)))
        elif all(new % old == 0 for old, new in zip(before, after, strict=True)):
            made = nn.UpsamplingNearest2d(size=after)
        else:
            raise UsageError(
                f"{describe(graph, node)} pools {before[0]}x{before[1]} to {after[0]}x{after[1]} in unequal windows, "
                "which ONNX has no operation for; use images whose size makes one a multiple of the other"
            )
        set_module(graph, made, str(node.target))
    graph.recompile()


_METHODS = ("view", "reshape", "squeeze", "flatten")
_FUNCTIONS = (torch.reshape, torch.squeeze, torch.flatten)


def fixed_reshapes(graph: GraphModule) -> None:
    """Rewrite ``graph``."""
    for node in list(graph.graph.nodes):
        if node.target in ("chunk", torch.chunk):
            _chunk_to_split(graph, node)
            continue
        reshapes = (node.op == "call_method" and node.target in _METHODS) or (
            node.op == "call_function" and node.target in _FUNCTIONS
        )
        if not reshapes:
            continue
        source = node.all_input_nodes[0]
        before: tuple[int, ...] = source.meta["shape"] or ()
        after: tuple[int, ...] = node.meta["shape"] or ()
        if len(before) < 2 or len(after) < 2 or before[0] != BATCH or after[0] != BATCH:
            continue
        with graph.graph.inserting_before(node):
            made = (
                graph.graph.call_function(torch.flatten, (source, 1))
                if len(after) == 2
                else graph.graph.call_function(torch.reshape, (source, (-1, *after[1:])))
            )
            made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _chunk_to_split(graph: GraphModule, node: Node) -> None:
    source = node.all_input_nodes[0]
    arguments = {"dim": 0} | dict(zip(("chunks", "dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    length = source.meta["shape"][arguments["dim"]]
    size = -(-length // arguments["chunks"])
    sizes = [min(size, length - start) for start in range(0, length, size)]
    with graph.graph.inserting_before(node):
        made = graph.graph.call_function(torch.split, (source, sizes, arguments["dim"]))
        made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)


def means_to_pooling(graph: GraphModule) -> None:
    """Rewrite ``graph``.

    Raises:
        UsageError: a mean over other axes; it is named.
    """
    for node in list(graph.graph.nodes):
        if node.target is not torch.mean and not (node.op == "call_method" and node.target == "mean"):
            continue
        source = node.all_input_nodes[0]
        arguments = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
        dims, shape = arguments.get("dim"), source.meta["shape"]
        if not isinstance(dims, list | tuple) or len(shape) != 4 or {dim % 4 for dim in dims} != {2, 3}:
            raise UsageError(
                f"{describe(graph, node)} is a mean over dim={dims} of shape {shape}; "
                "only a mean over height and width, dim=(2, 3), can be quantized"
            )
        name, number = "mean", 1
        while hasattr(graph, name):
            name, number = f"mean_{number}", number + 1
        set_module(graph, nn.AdaptiveAvgPool2d(1), name)
        with graph.graph.inserting_before(node):
            result = graph.graph.call_module(name, (source,))
            result.meta = {**node.meta, "shape": (*shape[:2], 1, 1)}
            if not arguments.get("keepdim", False):
                result = graph.graph.call_function(torch.flatten, (result, 1))
                result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
    graph.recompile()


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
