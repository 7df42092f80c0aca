"""Backward rules: the same forward pass bit for bit, gradients against their formulas, and their use in an attack."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import ImageGenerators, apgd
from robustq.attacks.losses import margin
from robustq.data import to_float
from robustq.errors import UsageError
from robustq.models.quant.backward_rules import (
    RULES,
    backward_rule,
    sign_derivative,
    staircase_derivative,
    under_rule,
)
from robustq.models.quant.binary import BinaryActQuant, BinaryWeightQuant
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import ActQuant, BranchQuant, PixelQuant
from tests.models.fx.custom_nets import folded_of, graph_of, pixels
from tests.models.small_nets import digits, perturbed, small_spec

NETWORKS = [*(f"resnet8-{bits}" for bits in (32, 4, 1)), "folded-4", "folded-1", "own-4", "own-folded-8"]


@functools.cache
def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and 40 images for it."""
    kind, bits = name.rsplit("-", 1)
    if kind.startswith("own"):
        return (graph_of if kind == "own" else folded_of)("normalising", int(bits)), to_float(pixels())
    spec = small_spec(int(bits))
    model = perturbed(spec)
    return (fold(model, spec) if kind == "folded" else model), to_float(digits()[0][:40])


def logits_and_gradient(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    weight = torch.arange(1, logits.shape[1] + 1) * torch.tensor(1.0)
    (gradient,) = torch.autograd.grad((logits * weight).sum(), leaf)
    return logits.detach(), gradient


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_is_bit_for_bit_the_same_and_all_is_restored(name: str, rule: str) -> None:
    model, x = network(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        silent = model(x)
    logits, gradient = logits_and_gradient(model, x)
    with backward_rule(model, rule):
        ruled_logits, ruled_gradient = logits_and_gradient(model, x)
        with torch.no_grad():
            assert torch.equal(model(x), silent)
    assert torch.equal(ruled_logits, logits)
    assert torch.equal(logits_and_gradient(under_rule(model, rule), x)[1], ruled_gradient)
    # Straight-through is the network's own gradient, and a float network has no other.
    same = rule == "straight-through" or name == "resnet8-32"
    assert torch.equal(ruled_gradient, gradient) is same
    assert ruled_gradient.isfinite().all()
    again = logits_and_gradient(model, x)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], gradient)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def layer_gradient(layer: nn.Module, x: Tensor, rule: str) -> Tensor:
    layer.eval()
    with backward_rule(layer, rule):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
    return gradient


def scaled(layer: Any, threshold: float) -> Any:
    layer.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.set_threshold(threshold)
    return layer


X = torch.tensor([-2.0, -0.3, 0.0, 0.1, 0.25, 0.3, 0.9, 1.45, 1.6, 7.0])


def test_relu_quantizer_of_two_bits() -> None:
    # Codes 0 .. 3 of scale 0.5: it clips at 1.5 (and rounds up to 1.75).
    layer = scaled(qnn.QuantReLU(act_quant=ActQuant, bit_width=2), 1.5)
    assert layer(X).tolist() == pytest.approx([0, 0, 0, 0, 0, 0.5, 1.0, 1.5, 1.5, 1.5])
    assert layer_gradient(layer, X, "straight-through").tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert layer_gradient(layer, X, "pass-through").tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    smooth = layer_gradient(layer, X, "smooth").tolist()
    for x, found in zip(X.tolist(), smooth, strict=True):
        u = x / 0.5
        by_hand = (1 - 0.5 * math.cos(2 * math.pi * u)) / (1 + math.exp(-(3.5 - u) / 0.5)) if x > 0 else 0.0
        assert found == pytest.approx(by_hand, abs=1e-5)


def test_signed_quantizer_has_two_ends() -> None:
    # 8 bits, codes -128 .. 127 of scale 1 / 128.
    layer = scaled(qnn.QuantIdentity(act_quant=BranchQuant), 1.0)
    assert layer_gradient(layer, X, "straight-through").tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert layer_gradient(layer, X, "pass-through").tolist() == [1] * 10
    smooth = layer_gradient(layer, X, "smooth")
    for x, found in zip(X.tolist(), smooth.tolist(), strict=True):
        u = 128 * x
        t = 255 / 16
        ends = 1 / (1 + math.exp(-(127.5 - u) / t)) / (1 + math.exp(-(u + 128.5) / t))
        assert found == pytest.approx((1 - math.cos(2 * math.pi * u) / 128) * ends, abs=1e-4)  # cos of 800 in float32


@pytest.mark.parametrize(
    ("lowest", "highest", "wave", "width"),
    [(0, 3, 0.5, 0.5), (-2, 1, 0.5, 0.5), (0, 7, 0.25, 0.5), (-8, 7, 0.125, 15 / 16), (0, 255, 1 / 128, 255 / 16)],
)
def test_the_ripple_fades_with_the_number_of_codes(lowest: int, highest: int, wave: float, width: float) -> None:
    u = torch.linspace(lowest - 1, highest + 1, 997, dtype=torch.float64)
    upper = 1 / (1 + torch.exp(-(highest + 0.5 - u) / width))
    lower = 1 / (1 + torch.exp(-(u - lowest + 0.5) / width)) if lowest else 1.0
    expected = (1 - wave * torch.cos(2 * math.pi * u)) * upper * lower
    torch.testing.assert_close(staircase_derivative(u, lowest=lowest, highest=highest), expected)


def test_sign_passes_through_or_fades_like_tanh() -> None:
    layer = qnn.QuantIdentity(act_quant=BinaryActQuant)
    torch.testing.assert_close(layer_gradient(layer, X, "straight-through"), (2 - 2 * X.abs()).clamp(min=0))
    assert layer_gradient(layer, X, "pass-through").tolist() == [1] * 10
    width = X.abs().mean() / 2
    torch.testing.assert_close(layer_gradient(layer, X, "smooth"), (1 - (X / width).tanh() ** 2) / width)


def test_width_of_a_smooth_sign_is_that_of_its_channel() -> None:
    x = (
        torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    )
    x[1, 2] = 0.0
    gradient = sign_derivative(x)
    for image in range(2):
        for channel in range(3):
            part = x[image, channel]
            t = part.abs().mean() / 2
            expected = (1 - (part / t).tanh() ** 2) / t if t > 0 else torch.zeros_like(part)
            torch.testing.assert_close(gradient[image, channel], expected)
    # A feature is a place of its own: the image is what it is compared with, as it is for (N, C, 1, 1).
    flat = x[:, :, 0, 0]
    t = flat.abs().mean(dim=1, keepdim=True) / 2
    torch.testing.assert_close(sign_derivative(flat), (1 - (flat / t).tanh() ** 2) / t)
    assert torch.equal(sign_derivative(flat[:, :, None, None]).flatten(1), sign_derivative(flat))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("function", [torch.round, torch.Tensor.floor, torch.sign])
def test_plain_rounding_inside_a_network(function: Any, rule: str) -> None:
    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = 3.0 * function(4.0 * x)
            return result

    model = Rounds()
    x = torch.tensor([[-0.3, 0.6, 1.2]])
    expected = {"straight-through": torch.zeros(1, 3), "pass-through": torch.full((1, 3), 12.0)}
    expected["smooth"] = 12.0 * sign_derivative(4 * x) if function is torch.sign else torch.full((1, 3), 12.0)
    with backward_rule(model, rule):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(out, 3.0 * function(4.0 * x))
    torch.testing.assert_close(gradient, expected[rule])
    assert torch.equal(torch.autograd.grad(model(leaf).sum(), leaf)[0], torch.zeros(1, 3))


def test_an_unknown_rule_is_refused() -> None:
    model, _ = network("resnet8-4")
    with (
        pytest.raises(UsageError, match="'clipped' is unknown; known: straight-through"),
        backward_rule(model, "clipped"),
    ):
        pass


def test_a_quantizer_of_another_kind_passes_through_but_is_not_smooth() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return (2 * x).round() / 2, torch.tensor(0.5), torch.tensor(0.0), torch.tensor(8.0)

    layer = qnn.QuantIdentity(act_quant=ActQuant, bit_width=8)
    layer.act_quant.fused_activation_quant_proxy.tensor_quant = Halves()
    assert layer_gradient(layer, X, "straight-through").tolist() == [0] * 10
    assert layer_gradient(layer, X, "pass-through").tolist() == [1] * 10
    with pytest.raises(UsageError, match="is a Halves, which has no smooth form"), backward_rule(layer, "smooth"):
        pass
    assert not any(module._forward_hooks for module in layer.modules())


def signs_only() -> nn.Module:
    """A binarised network without shortcuts that has learned the digits, in eval mode."""
    torch.manual_seed(0)
    sign = functools.partial(qnn.QuantIdentity, act_quant=BinaryActQuant)
    conv = functools.partial(qnn.QuantConv2d, bias=False, weight_quant=BinaryWeightQuant, kernel_size=3, padding=1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        pixels=qnn.QuantIdentity(act_quant=PixelQuant),
        conv1=nn.Conv2d(1, 24, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(24),
        sign1=sign(),
        conv2=conv(24, 32, stride=2),
        bn2=nn.BatchNorm2d(32),
        sign2=sign(),
        pool=nn.AvgPool2d(2),
        flat=nn.Flatten(),
        fc=nn.Linear(128, 10),
    )
    model = nn.Sequential(layers)
    images, labels = digits("train")
    x = to_float(images)
    calibrate(model, x[:200])
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for _ in range(150):
        batch = torch.randint(len(x), (64,))
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model.eval()


def test_a_binarised_network_whose_straight_through_gradient_is_useless() -> None:
    model = signs_only()
    images, y = digits()
    x, y = to_float(images)[:100], y[:100]
    streams = ImageGenerators.of(0, range(len(x)))

    def left(source: Any) -> int:
        x_adv = apgd(source, x, y, epsilon=24 / 255, steps=20, loss=margin, generator=streams)
        with torch.no_grad():
            return int((model(x_adv).argmax(dim=1) == y).sum())

    honest = {rule: left(under_rule(model, rule)) for rule in RULES}
    with torch.no_grad():
        before = model(x)
        # A sign sees no scale: the same network, with nearly every activation beyond the clip of its gradient.
        for norm in (model.bn1, model.bn2):
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight.mul_(1e4)
            norm.bias.mul_(1e4)
        assert float((model(x).argmax(dim=1) == before.argmax(dim=1)).float().mean()) >= 0.98  # but for ties at 0

    clean = int((before.argmax(dim=1) == y).sum())
    found = {rule: left(under_rule(model, rule)) for rule in RULES}
    assert clean >= 80
    # What random starts break is all that the trained gradient finds.
    assert found["straight-through"] >= clean - 10
    assert found["pass-through"] <= found["straight-through"] - 20
    # The smooth rule does not see the factor: it breaks this network like the one without it.
    assert abs(found["smooth"] - honest["smooth"]) <= 3
    assert min(found.values()) <= min(honest.values()) + 5
