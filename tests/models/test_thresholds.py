"""BatchNorm in front of a sign against its thresholds, for every code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustq.models.thresholds import ChannelThresholds

NUMBERS = st.one_of(st.floats(-4.0, 4.0), st.sampled_from([0.0, 1e-12, -1e-12, 1e-300, 5e-324, -1.0, 1.0]))


def signs(gain: Tensor, shift: Tensor, scale: float, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """(of the formula, of the thresholds), (C, codes)."""
    codes = torch.arange(lowest, highest + 1, dtype=torch.float64)
    expected = gain.reshape(-1, 1) * (codes * scale) + shift.reshape(-1, 1) >= 0
    layer = ChannelThresholds(len(gain))
    layer.set_affine(gain, shift, scale=scale, lowest=lowest, highest=highest)
    x = (codes.float() * torch.tensor(scale).float()).reshape(1, 1, 1, -1).expand(1, len(gain), 1, -1)
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
    assert layer.direction.item() == direction
    if direction:
        # Half-way between codes 5 and 6: no rounding of the value that is compared can reach it.
        assert abs(layer.threshold.item()) == pytest.approx(0.55, abs=1e-6)
