"""Each quantizer against its plain formula, its gradients against their closed form; no forward changes anything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.layers import Layers
from robustq.models.quant.quantizers import LearnedThreshold, Widths, learned_thresholds
from tests.models.small_nets import perturbed, small_spec

QUANTIZED = (8, 4, 3, 2)


def layers(bits: int, *, folded: bool = False) -> Layers:
    return Layers(Widths(bits, bits), folded=folded)


def conv_with(weight: Tensor, bits: int) -> Any:
    conv = layers(bits).conv(weight.shape[1], weight.shape[0], kernel_size=weight.shape[2])
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.copy_(weight)
    return conv


def random_weight() -> Tensor:
    """(6, 4, 3, 3), each channel of another magnitude."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return weight * torch.tensor([1e-6, 1e-3, 0.1, 1.0, 30.0, 1e4]).reshape(6, 1, 1, 1)


def threshold_of(layer: nn.Module) -> LearnedThreshold:
    (threshold,) = learned_thresholds(layer).values()
    return threshold


def scale_of(layer: nn.Module, steps: int) -> Tensor:
    """The threshold / steps in float32, as the layer divides them."""
    return threshold_of(layer).log_threshold.detach().exp() / torch.tensor(float(steps))


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", QUANTIZED)
def test_weights_are_symmetric_narrow_range_with_one_scale_per_channel(bits: int) -> None:
    weight = random_weight()
    quantized = conv_with(weight, bits).quant_weight()
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / largest
    codes = (weight / scale).round()
    # Exact: the same float32 operations.
    assert torch.equal(quantized.scale.expand_as(scale), scale)
    assert torch.equal(quantized.int().float(), codes)
    assert torch.equal(quantized.value, codes * scale)
    for channel in quantized.int():
        assert channel.abs().max() == largest
        assert len(channel.unique()) <= 2**bits - 1


def test_ties_of_weights_round_to_even() -> None:
    # The largest magnitude 7 makes the scale of a 4-bit channel exactly 1.
    weight = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 0.0]).reshape(1, 1, 3, 3)
    expected = torch.tensor([7.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 6.0, 0.0]).reshape(1, 1, 3, 3)
    assert torch.equal(conv_with(weight, 4).quant_weight().value, expected)


def test_the_gradient_passes_straight_through_the_weights() -> None:
    # 3 bits, codes -3..3. The channel's largest magnitude also sets the scale, so its gradient is another one.
    weight = torch.tensor([3.0, 0.4, -1.2, 2.2]).reshape(1, 1, 2, 2)
    conv = conv_with(weight, 3)
    (conv.quant_weight().value * torch.tensor([0.0, 5.0, -2.0, 0.0]).reshape(1, 1, 2, 2)).sum().backward()
    gradient = conv.weight.grad.flatten()
    assert torch.equal(gradient[1:], torch.tensor([5.0, -2.0, 0.0]))
    # d scale / d w_max = 1/3, and d y / d scale = code - w / scale for each of the others: 5 * -0.4 and -2 * 0.2.
    assert gradient[0].item() == pytest.approx((5 * (0 - 0.4) - 2 * (-1 + 1.2)) / 3, rel=1e-5)  # float32


# --- activations -----------------------------------------------------------------------------------------------------


def spread() -> Tensor:
    """(3, 2, 40, 40) from -2 to 3 in steps of 1/1920: inside and outside of every threshold used here, on all codes."""
    return torch.linspace(-2.0, 3.0, 9600).reshape(3, 2, 40, 40)


@pytest.mark.parametrize("threshold", [0.3, 1.7])
@pytest.mark.parametrize("bits", QUANTIZED)
def test_activations_are_unsigned_codes_of_the_relu(bits: int, threshold: float) -> None:
    layer = layers(bits).relu()
    threshold_of(layer).set_threshold(threshold)
    largest = 2**bits - 1
    scale = scale_of(layer, largest)
    assert scale.item() == pytest.approx(threshold / largest, rel=1e-6)  # exp(log(t)) in float32
    y = layer(spread())
    assert torch.equal(y, (spread().clamp_min(0.0) / scale).round().clamp(0, largest) * scale)  # exact: same operations
    assert len(y.unique()) == 2**bits


@pytest.mark.parametrize("threshold", [0.3, 1.7])
def test_branches_are_signed_8_bit(threshold: float) -> None:
    layer = layers(2).branch()
    threshold_of(layer).set_threshold(threshold)
    scale = scale_of(layer, 128)
    y = layer(spread())
    assert torch.equal(y, (spread() / scale).round().clamp(-128, 127) * scale)  # exact: same operations
    assert (y / scale).round().aminmax() == (-128.0, 127.0)


def test_between_pixels_the_nearest_wins_and_outside_they_clip() -> None:
    levels = torch.tensor([-30.0, -0.6, 0.4, 0.6, 99.4, 99.6, 254.6, 255.4, 300.0])
    quantized = layers(4, folded=True).pixels()((levels / 255).reshape(1, 1, 3, 3))
    assert quantized.int().flatten().tolist() == [0, 0, 0, 1, 99, 100, 255, 255, 255]


# --- levels -----------------------------------------------------------------------------------------------------------

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
WIDTHS = st.sampled_from([8, 4, 3, 2, 1])


def contents(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return {
        "normal": x,
        "heavy": x**5,
        "tiny": x * 1e-20,
        "huge": x * 1e20,
        "sparse": x * (torch.rand(shape, generator=generator) < 0.1),
        "zero": x * 0.0,
        "equal": torch.ones(shape) * 0.3,
    }[kind]


KINDS = st.sampled_from(["normal", "heavy", "tiny", "huge", "sparse", "zero", "equal"])


@SETTINGS
@given(
    bits=WIDTHS, kind=KINDS, out=st.integers(1, 6), into=st.integers(1, 6), kernel=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_levels_of_weights(bits: int, kind: str, out: int, into: int, kernel: int, seed: int) -> None:
    conv: Any = layers(bits).conv(into, out, kernel_size=kernel)
    with torch.no_grad():
        conv.weight.copy_(contents(kind, (out, into, kernel, kernel), seed))
    quantized = conv.quant_weight()
    assert quantized.value.isfinite().all()
    for codes in (quantized.value / quantized.scale).round():  # int() refuses a binary layer of one sign
        assert len(codes.unique()) <= (2 if bits == 1 else 2**bits - 1)
        assert codes.abs().max() <= max(2 ** (bits - 1) - 1, 1)


@SETTINGS
@given(
    bits=WIDTHS, kind=KINDS, shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    threshold=st.floats(1e-3, 1e3), seed=st.integers(0, 999),
)  # fmt: skip
def test_levels_of_activations(bits: int, kind: str, shape: tuple[int, ...], threshold: float, seed: int) -> None:
    layer: Any = layers(bits).sign() if bits == 1 else layers(bits).relu()
    if bits > 1:
        threshold_of(layer).set_threshold(threshold)
    y = layer(contents(kind, shape, seed))
    assert y.isfinite().all() and y.shape == shape
    assert len(y.unique()) <= 2**bits
    assert y.min() >= (-1 if bits == 1 else 0)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of (layer(x) * upstream).sum() with respect to x and to the logarithm of the threshold."""
    x = x.clone().requires_grad_()
    (layer(x) * upstream).sum().backward()
    gradient = threshold_of(layer).log_threshold.grad
    assert x.grad is not None and gradient is not None
    return x.grad, gradient


CASES = [pytest.param("relu", bits, id=f"relu{bits}") for bits in QUANTIZED] + [pytest.param("branch", 8, id="branch")]


def case(kind: str, bits: int) -> tuple[nn.Module, int, int, int]:
    """(layer with threshold 1.3, lowest code, highest code, steps in a threshold)."""
    layer = layers(bits).relu() if kind == "relu" else layers(bits).branch()
    threshold_of(layer).set_threshold(1.3)
    return (layer, 0, 2**bits - 1, 2**bits - 1) if kind == "relu" else (layer, -128, 127, 128)


@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_the_threshold_gradient_has_its_closed_form(kind: str, bits: int) -> None:
    """By the scale: code - x / scale inside, the end of the range outside; d scale / d log threshold is the scale."""
    layer, low, high, steps = case(kind, bits)
    upstream = torch.rand(spread().shape, generator=torch.Generator().manual_seed(1))
    _, gradient = gradients(layer, spread(), upstream)
    scale = scale_of(layer, steps).double()
    x = spread().double().clamp_min(0.0) if kind == "relu" else spread().double()
    codes = (x / scale).round()
    slope = torch.where(codes < low, low, torch.where(codes > high, high, codes - x / scale))
    per_image, largest_code = 2 * 40 * 40, high
    expected = (upstream * slope).sum() * scale / (per_image * largest_code) ** 0.5
    # float32: code - x / scale keeps 1e-5 of a code, and the sum of 9,600 terms 1e-5 of itself.
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_threshold_of_zero_becomes_a_small_positive_one() -> None:
    threshold = LearnedThreshold(4, signed=False)
    threshold.set_threshold(0.0)
    assert threshold(torch.zeros(1, 1)).item() == pytest.approx(1e-6, rel=1e-5)  # exp(log(t)) in float32


# --- state -----------------------------------------------------------------------------------------------------------

BATCH_NORM_STATE = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bits", [8, 2])
def test_no_forward_changes_the_model(bits: int, grad: bool, mode: str) -> None:
    model = perturbed(small_spec(bits))
    model.train(mode == "train")
    before = copy.deepcopy(model.state_dict())
    for number in range(3):
        x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(number)) * (number + 1)
        with torch.set_grad_enabled(grad):
            logits = model(x)
        if grad:
            logits.sum().backward()
    after = model.state_dict()
    assert list(after) == list(before)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(mode == "train" and name.endswith(BATCH_NORM_STATE) for name in changed)
    assert bool(changed) == (mode == "train")


# --- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [-4, 0, 5, 64])
def test_a_width_outside_the_table_is_refused(bits: int) -> None:
    with pytest.raises(
        UsageError, match=rf"^weight bits {bits} are not in the table; choose one of 32, 8, 4, 3, 2, 1$"
    ):
        Widths(bits, 4)
    with pytest.raises(UsageError, match=rf"^activation bits {bits} are not in the table"):
        Widths(4, bits)


@pytest.mark.parametrize(("weights", "activations"), [(32, 4), (1, 32)])
def test_float_goes_with_float_only(weights: int, activations: int) -> None:
    with pytest.raises(UsageError, match=f"weight bits {weights} with activation bits {activations}"):
        Widths(weights, activations)
