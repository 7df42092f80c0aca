"""Graph passes that fix shapes, for ONNX and onnxruntime; no answer changes.

All of them need the shapes of :func:`robustq.models.fx.trace.shape_prop`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch import nn
from torch.nn import functional

from robustq.models.fx import passes
from robustq.models.fx.ops import CONCATENATIONS, DIVISIONS, PRODUCTS, SUBTRACTIONS, SUMS
from robustq.models.fx.trace import (
    BATCH,
    Constant,
    call_arguments,
    called_module,
    calls,
    free_name,
    replace_call,
)


def mean_to_pooling(model: GraphModule) -> None:
    """``x.mean((2, 3))`` becomes ``AdaptiveAvgPool2d(1)``, flattened unless ``keepdim``, and so does the maximum.

    Why: onnxruntime has an integer rule for pooling and none for ReduceMean. Brevitas' pass of this kind knows only one
    spelling of the mean, and flattens by sizes computed at run time. A mean over other axes stays, in float.
    """
    for node in list(model.graph.nodes):
        if node.target is not torch.mean and not (node.op == "call_method" and node.target == "mean"):
            continue
        source = node.all_input_nodes[0]
        arguments = call_arguments(node, "dim", "keepdim")
        dims, shape = arguments.get("dim"), source.meta["shape"]
        if not isinstance(dims, list | tuple) or len(shape) != 4 or {dim % 4 for dim in dims} != {2, 3}:
            continue
        name = free_name(model, "mean")
        set_module(model, nn.AdaptiveAvgPool2d(1), name)
        with model.graph.inserting_before(node):
            pooled = model.graph.call_module(name, (source,))
        pooled.meta = {**node.meta, "shape": (*shape[:2], 1, 1)}
        if arguments.get("keepdim", False):
            node.replace_all_uses_with(pooled)
            model.graph.erase_node(node)
        else:
            replace_call(model, node, torch.flatten, pooled, 1)
    model.recompile()


def stacks_to_sums(model: GraphModule) -> None:
    """The sum of two stacked tensors becomes ``a + b``, which onnxruntime has as integers."""
    for node in list(model.graph.nodes):
        stack = node.all_input_nodes[0] if node.all_input_nodes else None
        if not calls(node, (torch.sum, "sum")) or stack is None or stack.target is not torch.stack:
            continue
        parts = list(stack.args[0] if stack.args else stack.kwargs["tensors"])
        axis: int = call_arguments(stack, "dim").get("dim", 0)
        summed: Any = call_arguments(node, "dim").get("dim")
        summed = summed[0] if isinstance(summed, list | tuple) and len(summed) == 1 else summed
        rank = len(stack.meta["shape"])
        keeps = call_arguments(node, "dim", "keepdim").get("keepdim", False)
        if not isinstance(summed, int) or summed % rank != axis % rank or keeps:
            continue
        total = parts[0]
        for part in parts[1:]:
            with model.graph.inserting_before(node):
                total = model.graph.call_function(torch.add, (total, part))
            total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        model.graph.erase_node(node)
    model.graph.eliminate_dead_code()
    model.recompile()


_SHUFFLES = (functional.channel_shuffle, torch.channel_shuffle)


def _shuffle_by_reshapes(model: GraphModule, node: Node, groups: int) -> None:
    source = node.all_input_nodes[0]
    batch, channels, *sides = source.meta["shape"]
    grouped, shuffled = (groups, channels // groups, *sides), (channels // groups, groups, *sides)
    with model.graph.inserting_before(node):
        split = model.graph.call_function(torch.reshape, (source, (-1, *grouped)))
        moved = model.graph.call_function(torch.transpose, (split, 1, 2))
    split.meta = {**node.meta, "shape": (batch, *grouped)}
    moved.meta = {**node.meta, "shape": (batch, *shuffled)}
    replace_call(model, node, torch.reshape, moved, (-1, channels, *sides))


EXPANSIONS = {"expand", "expand_as", "repeat"}


def _is_broadcast(node: Node) -> bool:
    """Whether values are repeated for operations alone that repeat them anyway, beside another tensor of the shape."""
    source = node.all_input_nodes[0]
    before, after = source.meta["shape"] or (), node.meta["shape"]
    if len(before) != len(after) or any(old not in (1, new) for old, new in zip(before, after, strict=True)):
        return False

    def repeats(user: Node) -> bool:
        others = [one for one in user.all_input_nodes if one is not node]
        return user.target in SUMS | SUBTRACTIONS | PRODUCTS | DIVISIONS and any(
            one.meta["shape"] == user.meta["shape"] for one in others
        )

    return all(map(repeats, node.users))


_RESHAPES = ("view", "reshape", "squeeze", "flatten", torch.reshape, torch.squeeze, torch.flatten)


def fix_reshapes(model: GraphModule) -> None:
    """Reshapes get fixed sizes on all axes but that of the images; ``chunk`` becomes ``torch.split`` with fixed sizes.

    They become ``torch.flatten(x, 1)`` where two axes are left of an image, else ``torch.reshape(x, (-1, C, H, W))``. A
    channel shuffle becomes two reshapes around a transposition, as ONNX has no operation for it.

    Why: behind sizes computed at run time an ONNX file has no fixed shapes, and onnxruntime runs the layers in float.
    """
    for node in list(model.graph.nodes):
        shuffle = called_module(model, node)
        if isinstance(shuffle, nn.ChannelShuffle) or node.target in _SHUFFLES:
            groups = getattr(shuffle, "groups", None) or call_arguments(node, "groups")["groups"]
            _shuffle_by_reshapes(model, node, groups)
            continue
        if node.target in ("chunk", torch.chunk):
            arguments = {"dim": 0} | call_arguments(node, "chunks", "dim")
            source = node.all_input_nodes[0]
            length = source.meta["shape"][arguments["dim"]]
            size = -(-length // arguments["chunks"])
            sizes = [min(size, length - start) for start in range(0, length, size)]
            replace_call(model, node, torch.split, source, sizes, arguments["dim"])
            continue
        if calls(node, EXPANSIONS) and _is_broadcast(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            continue
        if node.op not in ("call_method", "call_function") or node.target not in _RESHAPES:
            continue
        source = node.all_input_nodes[0]
        before: tuple[int, ...] = source.meta["shape"] or ()
        after: tuple[int, ...] = node.meta["shape"] or ()
        sizes = node.meta.get("sizes", ())
        if len(before) < 2 or len(after) < 2 or sizes.count(None) != 1:
            continue
        keeps_images = before[0] == after[0] == BATCH and all(
            one.meta.get("sizes", ())[:1] == (None,) for one in (source, node)
        )
        fixed = tuple(-1 if size is None else size for size in sizes)
        call = (torch.flatten, source, 1) if len(after) == 2 and keeps_images else (torch.reshape, source, fixed)
        replace_call(model, node, *call)
    model.graph.eliminate_dead_code()
    model.recompile()


def tokens_to_sums(model: GraphModule) -> None:
    """``cat([token.expand(x.shape[0], -1, -1), x], dim=1)`` becomes ``pad(x) + cat([token, zeros], dim=1)``.

    ``token`` is a constant, or a parameter, of one image. Why: a tensor whose first axis is computed at run time has no
    fixed shape in an ONNX file.
    """
    for node in list(model.graph.nodes):
        if not calls(node, CONCATENATIONS) or len(node.meta["shape"]) < 2:
            continue
        parts: list[Node] = list(node.args[0] if node.args else node.kwargs["tensors"])
        dim = call_arguments(node, "dim").get("dim", 0) % len(node.meta["shape"])
        computed = [part for part in parts if not part.meta["constant"]]
        constants = [part for part in parts if part.meta["constant"]]
        expanded = [part for part in constants if calls(part, ("expand",)) and _source_shape(part)[:1] == (1,)]
        if dim == 0 or len(computed) != 1 or not constants or expanded != constants:
            continue
        place = parts.index(computed[0])
        sizes = [part.meta["shape"][dim] for part in parts]
        pads = [0] * (2 * (len(node.meta["shape"]) - 1 - dim)) + [sum(sizes[:place]), sum(sizes[place + 1 :])]
        with model.graph.inserting_before(node):
            name = free_name(model, "zeros")
            shape = (1, *(computed[0].meta["shape"][1:]))
            model.add_module(name, Constant(torch.zeros(shape)))
            zeros = model.graph.call_module(name)
            tokens = [zeros if part is computed[0] else part.all_input_nodes[0] for part in parts]
            joined = model.graph.call_function(torch.cat, (tokens, dim))
            padded = model.graph.call_function(functional.pad, (computed[0], pads))
        single = (1, *node.meta["shape"][1:])
        zeros.meta = {**node.meta, "shape": shape, "constant": True, "zero": True}
        joined.meta = {**node.meta, "shape": single, "constant": True, "zero": False}
        padded.meta = dict(node.meta)
        replace_call(model, node, torch.add, padded, joined)
    model.graph.eliminate_dead_code()
    model.recompile()


def _source_shape(node: Node) -> tuple[int, ...]:
    return tuple(node.all_input_nodes[0].meta["shape"] or ())


def linear_on_rows(model: GraphModule) -> None:
    """Give each linear layer two axes: (N, H, W, C) is reshaped to rows (N * H * W, C) in front of it, and back behind.

    Why: onnxruntime has an integer rule for Gemm with a bias, and none for MatMul and the sum behind it.
    """
    for node in list(model.graph.nodes):
        if not isinstance(called_module(model, node), nn.Linear) or len(node.meta["shape"]) == 2:
            continue
        (source,) = node.all_input_nodes
        *outer, features = source.meta["shape"]
        *_, out = node.meta["shape"]
        rows = math.prod(outer)
        with model.graph.inserting_before(node):
            flat = model.graph.call_function(torch.reshape, (source, (-1, features)))
        flat.meta = {**node.meta, "shape": (rows, features)}
        node.replace_input_with(source, flat)
        with model.graph.inserting_after(node):
            back = model.graph.call_function(torch.reshape, (node, (-1, *outer[1:], out)))
        back.meta = dict(node.meta)
        node.replace_all_uses_with(back, lambda user, back=back: user is not back)
        node.meta["shape"] = (rows, out)
    passes.relu_first(model)
