"""BatchNorm in front of a sign, and what is left of it in a folded network: one threshold per channel.

The sign of gain * x + shift only asks on which side of a threshold x lies (XNOR-Net's and FINN's folding,
arXiv:1612.07119 section 4.2.2). Where x is a quantized tensor the threshold lies half-way between two of its codes, so
that no rounding can move an answer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALLEST_GAIN, LARGEST_GAIN = 1e-12, 1e12
"""Bounds of gain * scale: of what one code adds in front of a sign."""


class SignNorm(nn.BatchNorm2d):
    """BatchNorm whose output meets nothing but a sign."""


class ChannelThresholds(nn.Module):
    """gain * x - threshold per channel, whose sign is that of the BatchNorm it replaces.

    Gains are the BatchNorm's own, so that the gradient which a sign cuts off at 1 is cut off where it was; 0 where a
    channel has one sign over all codes.

    Args:
        channels: C.
    """

    gain: Tensor
    threshold: Tensor
    step: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(channels, 1, 1))
        self.register_buffer("threshold", torch.zeros(channels, 1, 1))
        self.register_buffer("step", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) values of the quantized tensor -> the same shape; at least 0 where the sign is +1."""
        value = getattr(x, "value", x)
        signed: Tensor = self.gain * value - self.threshold
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
        first_positive = highest + 1 - count  # of a rising channel
        last_positive = lowest + count - 1  # of a falling one
        boundary = torch.where(rising, first_positive - 0.5, last_positive + 0.5) * scale
        # A gain that float32 or a product in it cannot hold would lose the sign; only its size is the gradient's.
        held = gain.sign() * gain.abs().clamp(min=SMALLEST_GAIN / scale, max=LARGEST_GAIN / scale)
        varies = rising | falling
        constant = torch.where(positive[:, 0], -1.0, 1.0).double()
        self.gain.copy_(torch.where(varies, held, 0.0).reshape(-1, 1, 1))
        self.threshold.copy_(torch.where(varies, held * boundary, constant).reshape(-1, 1, 1))
        self.step.fill_(scale)

    def first_codes(self) -> tuple[Tensor, Tensor]:
        """The same signs as comparisons of codes: x is on its channel's upper side from a code on.

        Returns:
            (C,) int64 first code of the upper side, and (C,) bool, whether the sign there is +1. A constant channel is
            on its upper side from the lowest int64 on.
        """
        gain, threshold = self.gain.flatten().double(), self.threshold.flatten().double()
        varies = gain != 0
        boundary = threshold / torch.where(varies, gain, 1.0) / self.step.double()
        lowest = torch.iinfo(torch.int64).min
        first = torch.where(varies, (boundary + 0.5).round(), 0.0).long()
        return torch.where(varies, first, lowest), torch.where(varies, gain > 0, threshold < 0)
