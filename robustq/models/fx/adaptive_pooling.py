"""Adaptive pooling as pooling by fixed windows, since ONNX has no adaptive pooling other than the global one."""

from __future__ import annotations

import math
from typing import Any

import torch
from brevitas.backport.fx import GraphModule, Node
from brevitas.graph.utils import set_module
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.fx.trace import called_module, describe, free_name

LARGEST_SIDE = 2048
"""Of the rows and columns that are picked for windows of unequal size."""


class PickedPixels(nn.Module):
    """Rows and columns of (N, C, H, W) by their numbers, which may come several times."""

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: list[int], columns: list[int]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows), persistent=False)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, rows, columns)."""
        return x.index_select(2, self.rows).index_select(3, self.columns)


def fix_adaptive_pooling(model: GraphModule, *, averages: bool) -> None:
    """Give adaptive pooling the windows that it has at this image size; modules keep their names.

    From (H, W) to the same size it becomes nothing, to a divisor AvgPool2d or MaxPool2d, to a multiple a
    nearest-neighbour enlargement. Windows of unequal size, as of torchvision's VGG, get an equal one: an average over
    two and one over three pixels are averages over six, in which each pixel comes three times or twice. An average to
    (1, 1) stays; without ``averages`` all do, since a float network keeps its answers bit for bit.

    UsageError names a pooling whose windows would become too large.
    """
    for node in list(model.graph.nodes):
        pool = called_module(model, node)
        if not isinstance(pool, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            continue
        is_average = isinstance(pool, nn.AdaptiveAvgPool2d)
        before, after = node.all_input_nodes[0].meta["shape"][-2:], node.meta["shape"][-2:]
        if is_average and (not averages or after == (1, 1)):
            continue
        sizes = list(zip(before, after, strict=True))
        windows: Any = nn.AvgPool2d if is_average else nn.MaxPool2d
        if before == after:
            fixed: nn.Module = nn.Identity()
        elif all(old % new == 0 for old, new in sizes):
            fixed = windows(tuple(old // new for old, new in sizes))
        elif all(new % old == 0 for old, new in sizes):
            fixed = nn.UpsamplingNearest2d(size=after)
        else:
            picked = [_picked(*pair, is_average=is_average) for pair in sizes]
            if max(map(len, picked)) > LARGEST_SIDE:
                raise UsageError(
                    f"{describe(model, node)} pools {before[0]}x{before[1]} to {after[0]}x{after[1]} in windows of "
                    "unequal size, which have no small common one; use images whose size makes one a multiple of the "
                    "other"
                )
            _pick_first(model, node, PickedPixels(*picked))
            fixed = windows(tuple(len(side) // new for side, new in zip(picked, after, strict=True)))
        set_module(model, fixed, str(node.target))
    model.graph.lint()
    model.recompile()


def _picked(old: int, new: int, *, is_average: bool) -> list[int]:
    """The numbers of the rows in each of ``new`` windows, repeated so that all windows get one size."""
    windows = [range(old * place // new, -(-old * (place + 1) // new)) for place in range(new)]
    size = math.lcm(*map(len, windows)) if is_average else max(map(len, windows))
    # A maximum takes any number once more; an average takes all equally often.
    return [window[place * len(window) // size] for window in windows for place in range(size)]


def _pick_first(model: GraphModule, node: Node, pixels: PickedPixels) -> None:
    name = free_name(model, f"{node.target}_windows")
    set_module(model, pixels, name)
    (source,) = node.all_input_nodes
    with model.graph.inserting_before(node):
        picked = model.graph.call_module(name, (source,))
    shape = (*source.meta["shape"][:2], len(pixels.rows), len(pixels.columns))
    picked.meta = {**source.meta, "shape": shape, "sizes": (None, *shape[1:])}
    node.replace_input_with(source, picked)
