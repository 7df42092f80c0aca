"""Graph passes for pooling windows, upsampling and padding, for ONNX and onnxruntime; no answer changes.

All of them need the shapes of :func:`robustq.models.fx.trace.shape_prop`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

from robustq.errors import UsageError
from robustq.models.fx.trace import Constant, call_arguments, called_module, describe, free_name, replace_call


def fix_pooling_windows(model: GraphModule) -> None:
    """Rewrite pooling layers so that every runtime has the same windows and divisors.

    ``ceil_mode`` is dropped where it adds no window, and ``count_include_pad`` where there is no padding. An average
    with both, and with a window added by ``ceil_mode``, gets an explicit zero padding in front.

    Why: PyTorch, and onnxruntime in float, divide by the pixels of a window that lie in the image or its padding;
    onnxruntime's QLinearAveragePool (1.32) divides by the whole window. PyTorch drops an added window that lies in the
    padding alone, onnxruntime does not. UsageError names an average with ``divisor_override``, which ONNX lacks.
    """
    for node in list(model.graph.nodes):
        pool = called_module(model, node)
        if isinstance(pool, nn.AvgPool2d):
            set_module(model, _fixed_average(model, node, pool), str(node.target))
        elif isinstance(pool, nn.MaxPool2d) and pool.ceil_mode and not _adds_windows(node, pool):
            sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            set_module(model, nn.MaxPool2d(*sizes, pool.return_indices), str(node.target))
    model.recompile()


def _fixed_average(model: GraphModule, node: Node, pool: nn.AvgPool2d) -> nn.AvgPool2d:
    if pool.divisor_override is not None:
        raise UsageError(
            f"{describe(model, node)} has divisor_override={pool.divisor_override}, which ONNX does not have; leave it "
            "out, and multiply the average by the window's height * width / divisor"
        )
    padding: Any = _pair(pool.padding)
    adds = pool.ceil_mode and _adds_windows(node, pool)
    counts = pool.count_include_pad and padding != (0, 0)
    if adds and counts:
        source, (rows, columns) = node.all_input_nodes[0], padding
        *outer, height, width = source.meta["shape"]
        with model.graph.inserting_before(node):
            padded = model.graph.call_function(functional.pad, (source, (columns, columns, rows, rows)))
        padded.meta = {**source.meta, "shape": (*outer, height + 2 * rows, width + 2 * columns)}
        node.replace_input_with(source, padded)
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


def fix_upsampling(model: GraphModule) -> None:
    """Interpolation between nearest pixels becomes ``UpsamplingNearest2d`` by integers, else a choice of rows, columns.

    Why: torch computes the pixel of other factors in float32, and runtimes do it otherwise.
    """
    for node in list(model.graph.nodes):
        module = called_module(model, node)
        if module is None and node.target is functional.interpolate:
            mode = call_arguments(node, "size", "scale_factor", "mode").get("mode", "nearest")
        else:
            mode = module.mode if isinstance(module, nn.Upsample) else ""
        shape, source = node.meta["shape"], node.all_input_nodes[0] if node.all_input_nodes else None
        if not mode.startswith("nearest") or source is None or len(shape) != 4:
            continue
        rows, columns = (_chosen(node, module, mode, axis) for axis in (2, 3))
        before = source.meta["shape"][2:]
        down, right = (max(wanted // size, 1) for wanted, size in zip(shape[2:], before, strict=True))
        whole = [torch.arange(size).repeat_interleave(by) for size, by in zip(before, (down, right), strict=True)]
        if torch.equal(rows, whole[0]) and torch.equal(columns, whole[1]):
            name = str(node.target) if module is not None else free_name(model, "interpolate")
            set_module(model, nn.UpsamplingNearest2d(scale_factor=(float(down), float(right))), name)
            if module is None:
                replace_call(model, node, name, source)
            continue
        chosen = source
        for axis, index in ((2, rows), (3, columns)):
            name = free_name(model, "pixels")
            model.add_module(name, Constant(index))
            with model.graph.inserting_before(node):
                places = model.graph.call_module(name)
                chosen = model.graph.call_function(torch.index_select, (chosen, axis, places))
            size = len(index)
            places.meta = {**node.meta, "tensor": False, "constant": True, "shape": (size,)}
            chosen.meta = {**node.meta, "shape": (*shape[:2], size if axis == 2 else shape[2], before[1])}
        chosen.meta = dict(node.meta)
        node.replace_all_uses_with(chosen)
        model.graph.erase_node(node)
    model.recompile()


def _chosen(node: Node, module: Any, mode: str, axis: int) -> Tensor:
    """Index of the pixel along ``axis`` of the input that each one of the output gets."""
    before = node.all_input_nodes[0].meta["shape"]
    places = torch.arange(before[axis], dtype=torch.float32)
    image = (places[:, None] if axis == 2 else places).expand(1, 1, *before[2:])
    options: dict[str, Any] = {"size": node.meta["shape"][2:]}
    given = call_arguments(node, "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    factor = given.get("scale_factor") if module is None else module.scale_factor
    again = given.get("recompute_scale_factor") if module is None else module.recompute_scale_factor
    if factor is not None and not again:
        options = {"scale_factor": factor}
    found = functional.interpolate(image, **options, mode=mode)
    return (found[0, 0, :, 0] if axis == 2 else found[0, 0, 0]).long()


def explicit_padding(model: GraphModule) -> None:
    """A convolution that pads with other values than zeros becomes ``functional.pad`` and the convolution without."""
    for node in list(model.graph.nodes):
        conv = called_module(model, node)
        if not isinstance(conv, nn.Conv2d) or conv.padding_mode == "zeros":
            continue
        (source,) = node.all_input_nodes
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        with model.graph.inserting_before(node):
            padded = model.graph.call_function(functional.pad, (source, [left, right, top, bottom], conv.padding_mode))
        *outer, height, width = source.meta["shape"]
        padded.meta = {**node.meta, "shape": (*outer, height + top + bottom, width + left + right)}
        node.replace_input_with(source, padded)
        plain = copy.copy(conv)
        plain.padding, plain.padding_mode = (0, 0), "zeros"
        set_module(model, plain, str(node.target))
    model.recompile()
