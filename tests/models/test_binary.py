"""One bit: signs, gradients and thresholds against their formulas, and binary layers that float weights fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.core.quant import ClampedBinaryQuant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustq.checkpoint import load_weights
from robustq.data import to_float
from robustq.models.quant.binary import BinaryActQuant, BinaryWeightQuant, ChannelThresholds, FusedSign
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import build_model
from tests.models.small_nets import digits, perturb_batch_norm, small_spec


def conv() -> Any:
    torch.manual_seed(0)
    return qnn.QuantConv2d(3, 5, 3, bias=False, weight_quant=BinaryWeightQuant)


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def images(count: int = 16) -> Tensor:
    return to_float(digits()[0][:count])


# --- quantizers ------------------------------------------------------------------------------------------------------


def test_weights_are_alpha_times_their_sign() -> None:
    layer = conv()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = 0.0
    weight = layer.weight.detach()
    alpha = weight.abs().mean(dim=(1, 2, 3), keepdim=True)
    quantized = layer.quant_weight()
    # The mean may be summed in another order: one float32 rounding or two.
    torch.testing.assert_close(quantized.value, alpha * sign(weight), rtol=1e-6, atol=0)
    assert torch.equal(quantized.int().float(), sign(weight))  # +1 at 0
    assert all(len(channel.unique()) == 2 for channel in quantized.value)
    assert int(quantized.bit_width) == 1


def test_the_gradient_of_weights_passes_the_sign_and_the_mean() -> None:
    """D (alpha sign(w))_j / d w_i = [i = j] + sign(w_i) sign(w_j) / n."""
    layer = conv()
    upstream = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    (layer.quant_weight().value * upstream).sum().backward()
    signs = sign(layer.weight.detach())
    through_alpha = signs * (upstream * signs).sum(dim=(1, 2, 3), keepdim=True) / 27
    torch.testing.assert_close(layer.weight.grad, upstream + through_alpha, rtol=1e-5, atol=1e-6)  # float32 sums


def soft_sign(x: Tensor) -> Tensor:
    """Bi-Real Net's piecewise polynomial in a sign's place (arXiv:1808.00278, equation 6)."""
    return torch.where(x < -1, -1, torch.where(x < 0, 2 * x + x**2, torch.where(x < 1, 2 * x - x**2, 1)))


def test_activations_are_signs_with_the_gradient_of_the_polynomial() -> None:
    layer = qnn.QuantIdentity(act_quant=BinaryActQuant)
    x = torch.tensor([-3.0, -1.001, -1.0, -0.5, -1e-30, -0.0, 0.0, 0.4, 1.0, 1.001, 3.0], requires_grad=True)
    upstream = torch.arange(1.0, 12.0)
    y = layer(x)
    (y * upstream).sum().backward()
    assert torch.equal(y, sign(x.detach()))
    exact = x.detach().double().requires_grad_()
    (soft_sign(exact) * upstream).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and exact.grad is not None
    torch.testing.assert_close(x.grad, exact.grad.float(), rtol=0, atol=2e-6)  # float32 of 2 - 2 |x|, times up to 11
    assert x.grad.count_nonzero() == 5


class StockBinaryActQuant(BinaryActQuant):
    tensor_quant = ClampedBinaryQuant


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_fused_sign_has_brevitas_own_values(layout: torch.memory_format) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:9] = torch.tensor([1.0, -1.0, 1.0000001, -1.0000001, 0.0, -0.0, 1e-40, torch.inf, -torch.inf])
    found = []
    for quantizer, kind in ((BinaryActQuant, FusedSign), (StockBinaryActQuant, ClampedBinaryQuant)):
        layer = qnn.QuantIdentity(act_quant=quantizer, return_quant_tensor=True)
        assert type(layer.act_quant.fused_activation_quant_proxy.tensor_quant) is kind
        answer = layer(x.clone().contiguous(memory_format=layout))
        found.append((answer.value, answer.scale, answer.zero_point, answer.bit_width))
    for fused, stock in zip(*found, strict=True):
        torch.testing.assert_close(fused, stock, rtol=0, atol=0)


# --- thresholds -------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.floats(-4.0, 4.0), st.sampled_from([0.0, 1e-12, -1e-12, 1e-300, 5e-324, -1.0, 1.0]))


def both_signs(gain: Tensor, shift: Tensor, scale: float, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
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
    expected, found = both_signs(gain, shift, scale, *codes)
    assert torch.equal(found, expected)


def test_gradients_are_the_batch_norms() -> None:
    """A sign clips the same gradients as in training; scaled thresholds would switch gradients off."""
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


# --- networks --------------------------------------------------------------------------------------------------------


def binary_layers(model: nn.Module) -> dict[str, int]:
    return {
        name: int(module.quant_weight().bit_width)  # type: ignore[operator]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


@pytest.mark.parametrize(("architecture", "blocks", "shortcuts"), [("resnet8", 3, 2), ("resnet18", 8, 3)])
def test_inner_convolutions_are_binary_and_outer_ones_8_bit(architecture: str, blocks: int, shortcuts: int) -> None:
    model = build_model(small_spec(1, architecture=architecture, channels=3))
    bits = binary_layers(model)
    eight = {name for name, width in bits.items() if width == 8}
    assert eight == {"conv1", "fc", *(name for name in bits if "downsample" in name)}
    assert len(eight) == 2 + shortcuts
    assert sum(width == 1 for width in bits.values()) == 2 * blocks
    assert set(bits.values()) == {1, 8}


def test_float_weights_fit_and_calibration_gives_every_norm_the_statistics_of_the_images() -> None:
    torch.manual_seed(0)
    plain, binary = build_model(small_spec(32)), build_model(small_spec(1))
    perturb_batch_norm(plain, seed=0)
    load_weights(binary, plain.state_dict(), Path("plain.pt"))
    own = binary.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in plain.state_dict().items())
    entered: dict[str, Tensor] = {}
    calibrate(binary, images(64))
    for name, module in binary.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs, name=name: entered.__setitem__(name, inputs[0]))
    with torch.no_grad():
        binary(images(64))
    norms = dict(binary.named_modules())
    assert len(entered) == 1 + 4 * 3 + 2
    for name, x in entered.items():
        norm: Any = norms[name]
        # The thresholds of the layers before were set in the same pass: float32 sums of the same values.
        torch.testing.assert_close(norm.running_mean, x.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, x.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
