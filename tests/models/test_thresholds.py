"""BatchNorm in front of a sign against its thresholds, for every code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustq.models.quant.binary import ChannelThresholds

NUMBERS = st.one_of(st.floats(-4.0, 4.0), st.sampled_from([0.0, 1e-12, -1e-12, 1e-300, 5e-324, -1.0, 1.0]))


def signs(gain: Tensor, shift: Tensor, scale: float, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """(of the formula, of the thresholds), (C, codes)."""
    codes = torch.arange(lowest, highest + 1, dtype=torch.float64)
    expected = gain.reshape(-1, 1) * (codes * scale) + shift.reshape(-1, 1) >= 0
    layer = ChannelThresholds(len(gain))
    layer.set_affine(gain, shift, scale=scale, lowest=lowest, highest=highest)
    x = (codes.float() * torch.tensor(scale).float()).reshape(1, 1, 1, -1).expand(1, len(gain), 1, -1)
    first, upper = layer.first_codes()
    compared = torch.where(upper[:, None], codes.long() >= first[:, None], codes.long() < first[:, None])
    assert torch.equal(compared, expected)  # the integer form of the same signs
    return expected, layer(x)[0, :, 0] >= 0


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    channels=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8),
    scale=st.floats(1e-4, 10.0),
    codes=st.sampled_from([(0, 255), (-128, 127), (0, 3), (-1, 1)]),
)
def test_signs_are_those_of_the_batch_norm_for_every_code(
    channels: list[tuple[float, float]], scale: float, codes: tuple[int, int]
) -> None:
    gain, shift = torch.tensor(channels, dtype=torch.float64).T
    expected, found = signs(gain, shift, scale, *codes)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("gain", "shift", "direction"),
    [(1.0, -0.55, 1.0), (-1.0, 0.55, -1.0), (0.0, 1.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 0.0), (1.0, 99.0, 0.0)],
)
def test_directions(gain: float, shift: float, direction: float) -> None:
    layer = ChannelThresholds(1)
    pair = torch.tensor([gain], dtype=torch.float64), torch.tensor([shift], dtype=torch.float64)
    layer.set_affine(*pair, scale=0.1, lowest=0, highest=255)
    assert layer.gain.item() == pytest.approx(gain if direction else 0.0)
    first, upper = layer.first_codes()
    if direction:
        # Half-way between codes 5 and 6: no rounding of the value that is compared can reach it.
        assert layer.threshold.item() / gain == pytest.approx(0.55, abs=1e-6)
        assert (first.item(), upper.item()) == (6, gain > 0)
    else:
        assert (first.item(), upper.item()) == (torch.iinfo(torch.int64).min, gain * 0.0 + shift >= 0)


def test_gradients_are_the_batch_norms() -> None:
    """What a sign behind it cuts off stays what training cut off; a scaled threshold would switch gradients off."""
    gain, shift = torch.tensor([0.5, -3.0], dtype=torch.float64), torch.tensor([0.2, -0.1], dtype=torch.float64)
    layer = ChannelThresholds(2)
    layer.set_affine(gain, shift, scale=0.01, lowest=-128, highest=127)
    x = torch.tensor([0.31, -0.04]).reshape(1, 2, 1, 1).requires_grad_(True)
    values = layer(x)
    # A threshold lies half-way between two codes, so at most half a step of 0.01 away from where BatchNorm is 0.
    torch.testing.assert_close(values.flatten().double(), gain * x.flatten() + shift, rtol=0, atol=3.0 * 0.0051)
    values.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.flatten().double(), gain, rtol=1e-6, atol=0)
