"""The smallest L-infinity change that brings a picture onto a hyperplane without leaving [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def onto_plane(points: Tensor, normal: Tensor, value: Tensor) -> Tensor:
    """Minimise ||d||_inf subject to value + <normal, d> = 0 and points + d in [0, 1] (arXiv:1907.02044, Eq. 6).

    With radius r the best change moves every coordinate towards the plane by r, or by the room it has, which makes up
    sum_i |normal_i| min(r, room_i): piecewise linear and growing in r, so that sorting the rooms gives r exactly.

    Args:
        points: (n, D) float in [0, 1].
        normal: (n, D) float.
        value: (n,) float, of the affine function at the points.

    Returns:
        (n, D): d; where the plane does not meet the cube, the change to the corner nearest to it in the sense of the
        affine function. Zero where the normal is zero.
    """
    towards = -value.sign()[:, None] * normal.sign()
    room = torch.where(towards > 0, 1.0 - points, points)
    weight = normal.abs()
    sorted_room, order = room.sort(dim=1)
    sorted_weight = weight.gather(1, order)
    # What coordinates with less room contribute, and the weight of the others.
    filled = (sorted_weight * sorted_room).cumsum(dim=1)
    before = torch.cat([torch.zeros_like(filled[:, :1]), filled[:, :-1]], dim=1)
    open_weight = sorted_weight.flip(1).cumsum(dim=1).flip(1)
    reached = before + sorted_room * open_weight
    wanted = value.abs()[:, None]
    first = (reached >= wanted).to(torch.int8).argmax(dim=1, keepdim=True)
    enough = (reached >= wanted).any(dim=1, keepdim=True)
    radius = (wanted - before.gather(1, first)) / open_weight.gather(1, first).clamp(min=1e-30)
    radius = torch.where(enough, radius, sorted_room[:, -1:]).clamp(min=0.0)
    return towards * torch.minimum(radius, room)
