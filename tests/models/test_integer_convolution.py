"""Convolutions of codes: exact sums, layers that keep their own convolution, gradients, and an unchanged network."""

from __future__ import annotations

import copy
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import Tensor, nn

from robustq.hardening.methods.method import attack_generation, only_input_gradients
from robustq.models.quant import integer_convolution
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.integer_convolution import IntegerConvolutions, convolve_codes, is_available
from robustq.models.quant.quantizers import ActQuant, BranchQuant, QuantReLU, WeightQuant
from robustq.models.quant.shared_weights import SharedWeights
from robustq.models.spec import ModelSpec, build_model

needs_instructions = pytest.mark.skipif(not is_available(), reason="a CPU with VNNI instructions")


def network(bits: int, architecture: str = "resnet8", size: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelSpec(architecture, bits, bits, 10, 3, size, "cifar10", None, ()))
    calibrate(model, images(size), from_scratch=True)
    return model.to(memory_format=torch.channels_last).train()


def images(size: int = 16, count: int = 8) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), generator=draws).float() / 255.0


SHAPES = [
    # channels in, out, kernel, stride, padding, dilation, groups, largest code, largest weight
    (3, 16, 3, 1, 1, 1, 1, 255, 127),
    (16, 32, 3, 2, 1, 1, 1, 3, 1),
    (64, 64, 3, 1, 1, 1, 1, 255, 127),
    (8, 8, 3, 1, 1, 1, 8, 15, 7),
    (16, 8, 3, 1, 2, 2, 2, 7, 3),
]


@needs_instructions
@pytest.mark.parametrize("zero_point", [0, 1, 128])
@pytest.mark.parametrize("case", SHAPES)
def test_sums_are_exact(case: tuple[int, ...], zero_point: int) -> None:
    inside, outside, kernel, stride, padding, dilation, groups, code, weight = case
    draws = torch.Generator().manual_seed(2)
    codes = torch.randint(0, code + 1, (5, inside, 12, 12), generator=draws).to(torch.uint8)
    shape = (outside, inside // groups, kernel, kernel)
    weights = torch.randint(-weight, weight + 1, shape, generator=draws).to(torch.int8)
    weights[0], codes[0] = weight, code  # the largest sum there can be
    scale, scales = torch.tensor(0.0371), torch.rand(outside, generator=draws) + 0.01
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    exact = nn.functional.conv2d(codes.double() - zero_point, weights.double(), None, *geometry)
    how = (*geometry, zero_point)
    ones = convolve_codes(codes, torch.ones(()), weights, torch.ones(outside), *how)
    assert torch.equal(ones.double(), exact)
    found = convolve_codes(codes, scale, weights, scales, *how)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    # The sum to float32, the product of the scales, and their product: one rounding each.
    torch.testing.assert_close(
        found.double(), exact * scale.double() * scales.double().reshape(-1, 1, 1), rtol=3 * 2.0**-24, atol=0
    )
    promised = convolve_codes(codes.to("meta"), scale.to("meta"), weights.to("meta"), scales.to("meta"), *how)
    assert promised.shape == found.shape and promised.stride() == found.stride()


def test_what_does_not_lie_on_one_grid_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = {"weight_quant": WeightQuant, "weight_bit_width": 4, "bias": False}
            self.first, self.second, self.third = (QuantReLU(bit_width=4) for _ in range(3))
            self.behind_change = qnn.QuantConv2d(3, 3, 3, padding=1, **options)
            self.signed = qnn.QuantIdentity(act_quant=BranchQuant, return_quant_tensor=False)
            self.wide = qnn.QuantIdentity(act_quant=ActQuant, bit_width=9, return_quant_tensor=False)
            self.off, self.dropout = qnn.QuantIdentity(act_quant=None, return_quant_tensor=False), nn.Dropout(0.5)
            self.twice, self.behind_signed, self.behind_sum, self.behind_wide, self.behind_dropout, self.fine = (
                qnn.QuantConv2d(3, 3, 3, padding=1, **options) for _ in range(6)
            )
            self.mirrored = qnn.QuantConv2d(3, 3, 3, padding=1, padding_mode="reflect", **options)
            self.broad = qnn.QuantConv2d(3, 3, 3, padding=1, **options | {"weight_bit_width": 16})
            self.own_input = qnn.QuantConv2d(3, 3, 3, padding=1, input_quant=ActQuant, input_bit_width=4, **options)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.first(x), self.second(x)
            y: Tensor = self.twice(one) + self.twice(two) + self.behind_signed(self.signed(x))
            y = y + self.behind_sum(one + two) + self.behind_wide(self.wide(x))
            y = y + self.behind_dropout(self.dropout(one)) + self.broad(one) + self.own_input(one) + self.off(one)
            y = y + self.mirrored(one) + self.fine(one)
            y = y + self.behind_change(self.third(x).mul_(2.0))
            return y

    model = Odd().train()
    torch.manual_seed(0)
    found = IntegerConvolutions(model, images()[:2])
    drawn = torch.rand(1)
    assert [layer._conv for layer in found._layers] == [model.behind_signed, model.fine]
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))  # dropout drew from a copy
    # Off, it hands on the very tensor.
    assert [layer._conv for layer in IntegerConvolutions(model.eval(), images()[:2])._layers] == [
        model.behind_signed,
        model.behind_dropout,
        model.fine,
    ]


def test_to_look_at_a_network_changes_nothing_of_it() -> None:
    model = network(4)
    model.get_submodule("bn1").eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    IntegerConvolutions(model, images()[:2])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    weights, layers = SharedWeights(model), IntegerConvolutions(model, images()[:2])
    with pytest.raises(KeyError), weights.quantized_once(), layers.in_place():
        raise KeyError
    assert not any({"inner_forward_impl", "quant_weight"} & vars(module).keys() for module in model.modules())


@needs_instructions
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_a_pass_in_whole_numbers(bits: int) -> None:
    """Each layer on the inputs that it gets: the exact sum, where float32 rounds in every addition; and the gradient of
    its input, rounded to bfloat16 on the way.
    """
    model = network(bits)
    layers = IntegerConvolutions(model, images()[:2])
    seen: dict[Any, tuple[Tensor, Tensor]] = {}
    handles = [
        layer._conv.register_forward_hook(lambda conv, inputs, y: seen.__setitem__(conv, (inputs[0].detach(), y)))
        for layer in layers._layers
    ]
    with SharedWeights(model).quantized_once(), layers.in_place():
        with torch.no_grad(), attack_generation(model, "separate"):
            model(images())
        kept = dict(seen)
        for conv, (x, y) in kept.items():
            weight = conv.quant_weight().value
            exact = nn.functional.conv2d(x.double(), weight.double(), None, conv.stride, conv.padding)
            # Scales times codes of inputs and weights were rounded once each before they entered float64.
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=2.0**-21 * exact.abs().max().item())
            with only_input_gradients(model):
                leaf, same = x.clone().requires_grad_(), x.clone().requires_grad_()
                upstream = torch.randn_like(y)
                (of_leaf,) = torch.autograd.grad(conv(leaf), leaf, upstream)
                plain = nn.functional.conv2d(same, weight, None, conv.stride, conv.padding)
                (expected,) = torch.autograd.grad(plain, same, upstream)
            assert of_leaf.dtype == torch.float32
            # Gradient, weights, and the sum: one rounding to 8 bits each, of terms that partly cancel.
            assert (of_leaf - expected).square().mean() < (2.0**-7 * expected.square().mean().sqrt()) ** 2
    for handle in handles:
        handle.remove()
    assert len(kept) == len(layers) > 0


@needs_instructions
def test_weights_that_were_changed_in_place_are_packed_anew() -> None:
    codes, weights = torch.ones(1, 2, 3, 3, dtype=torch.uint8), torch.ones(2, 2, 1, 1, dtype=torch.int8)
    how = ([1, 1], [0, 0], [1, 1], 1)
    first = convolve_codes(codes, torch.ones(()), weights, torch.ones(2), *how)
    weights.mul_(3)
    assert torch.equal(convolve_codes(codes, torch.ones(()), weights, torch.ones(2), *how), 3 * first)


@needs_instructions
def test_where_weights_learn_nothing_is_different() -> None:
    model = network(4)
    weights, layers = SharedWeights(model), IntegerConvolutions(model, images()[:2])
    found = []
    for integers in (False, True):
        model.zero_grad()
        with weights.quantized_once():
            if integers:
                with layers.in_place():
                    model(images()).square().mean().backward()
            else:
                model(images()).square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


@pytest.mark.parametrize("fault", [RuntimeError, AttributeError, TypeError, None])
def test_another_kernel_is_not_trusted(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(codes: Tensor, scale: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        if fault is not None:
            raise fault
        return nn.functional.conv2d(codes.float(), weights.float(), padding=1).clamp(-32768, 32767)  # sums in 16 bits

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True}, raising=False)
    monkeypatch.setattr(integer_convolution, "convolve_codes", other)
    is_available.cache_clear()
    assert not is_available()
    is_available.cache_clear()
