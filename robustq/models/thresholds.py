"""BatchNorm in front of a sign, and what is left of it in a folded network: one threshold per channel.

The sign of gain * x + shift only asks on which side of a threshold x lies (XNOR-Net's and FINN's folding,
arXiv:1612.07119 section 4.2.2). Where x is a quantized tensor the threshold lies half-way between two of its codes, so
that no rounding can move an answer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SignNorm(nn.BatchNorm2d):
    """BatchNorm whose output meets nothing but a sign."""


class ChannelThresholds(nn.Module):
    """direction * x - threshold per channel, whose sign is that of the BatchNorm it replaces.

    Directions are +1, -1 (negative gamma), or 0 (a channel that is constant over all codes).

    Args:
        channels: C.
    """

    direction: Tensor
    threshold: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("direction", torch.ones(channels, 1, 1))
        self.register_buffer("threshold", torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) values of the quantized tensor -> the same shape; at least 0 where the sign is +1."""
        value = getattr(x, "value", x)
        signed: Tensor = self.direction * value - self.threshold
        return signed

    @torch.no_grad()
    def set_affine(self, gain: Tensor, shift: Tensor, *, scale: float, lowest: int, highest: int) -> None:
        """Take the signs of gain * scale * code + shift for every code from ``lowest`` to ``highest``.

        Args:
            gain, shift: (C,) float64, of the BatchNorm.
            scale: of the quantized tensor that enters.
            lowest, highest: its codes.
        """
        codes = torch.arange(lowest, highest + 1, dtype=torch.float64)
        positive = gain.reshape(-1, 1) * (codes * scale) + shift.reshape(-1, 1) >= 0  # monotone along the codes
        count = positive.sum(dim=1)
        rising, falling = positive[:, -1] & ~positive[:, 0], positive[:, 0] & ~positive[:, -1]
        direction = rising.double() - falling.double()
        first_positive = highest + 1 - count  # of a rising channel
        last_positive = lowest + count - 1  # of a falling one
        threshold = torch.where(rising, (first_positive - 0.5) * scale, -(last_positive + 0.5) * scale)
        constant = torch.where(positive[:, 0], -1.0, 1.0).double()
        threshold = torch.where(direction == 0, constant, threshold)
        self.direction.copy_(direction.reshape(-1, 1, 1))
        self.threshold.copy_(threshold.reshape(-1, 1, 1))
