"""Folding: exact weight codes, biases within half an accumulator step, and channels that are nothing but their bias."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from robustq.data import to_float
from robustq.errors import ExportError
from robustq.models import spec as spec_module
from robustq.models.layers import Layers
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folded_layers import LARGEST_BIAS_CODE, Grid, bias_steps
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec, build_model
from tests.models.small_nets import digits, perturb_batch_norm, perturbed, small_spec

CHANNELS = 8


class OneConv(nn.Module):
    """pixels - 8-bit stem - ReLU - the convolution under test with its BatchNorm - ReLU - pooling - fc."""

    def __init__(self, layers: Layers, channels: int, classes: int) -> None:
        super().__init__()
        self.pixels = layers.pixels()
        self.stem = layers.conv(channels, 4, kernel_size=1, outer=True)
        self.stem_bn = layers.batch_norm(4)
        self.stem_relu = layers.relu()
        self.conv = layers.conv(4, CHANNELS, kernel_size=3)
        self.bn = layers.batch_norm(CHANNELS)
        self.relu = layers.relu()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.pooled = layers.pooled()
        self.fc = layers.linear(CHANNELS, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_relu(self.stem_bn(self.stem(self.pixels(x))))
        x = self.relu(self.bn(self.conv(x)))
        logits: Tensor = self.fc(torch.flatten(self.pooled(self.pool(getattr(x, "value", x))), 1))
        return logits


@pytest.fixture(scope="module", autouse=True)
def one_conv() -> Iterator[None]:
    """Make the architecture known, since ``fold`` builds by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spec_module.ARCHITECTURES, "one-conv", OneConv)
        yield


def one_conv_spec(bits: int) -> ModelSpec:
    return dataclasses.replace(small_spec(bits), architecture="one-conv")


def images() -> Tensor:
    return to_float(digits()[0][:16])


def one_conv_model(bits: int) -> Any:
    return copy.deepcopy(_one_conv_model(bits))


@functools.cache
def _one_conv_model(bits: int) -> Any:
    torch.manual_seed(0)
    model: Any = build_model(one_conv_spec(bits))
    perturb_batch_norm(model, seed=0)
    calibrate(model, images())
    return model


def parameters_of(conv: Any) -> tuple[Tensor, Tensor]:
    """(codes, scale per channel) of a quantized layer."""
    quantized = conv.quant_weight()
    return quantized.int().double(), quantized.scale.detach().double().flatten()


def bias_scale(conv: Any) -> Tensor:
    """(C,) float64 steps that the biases of a folded layer count in."""
    scale: Tensor = conv.quant_bias().scale.detach().double()
    return scale


def gain_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.detach().double() - norm.running_mean.double() * gain


def conv_outputs(model: Any, folded: Any) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's output before folding, the convolution's after it (N, C, H, W), and the scale that enters."""
    with torch.no_grad():
        # The stem's own bias rounding is not under test: both convolutions get the codes of the folded stem.
        entered = folded.stem_relu(folded.stem(folded.pixels(images())))
        unfolded = model.bn(model.conv(entered.value))
        after = folded.conv(entered)
    return unfolded.double(), getattr(after, "value", after).double(), entered.scale.double()


# --- biases ----------------------------------------------------------------------------------------------------------


def check_half_step(model: Any, bits: int) -> None:
    """The folded convolution differs from convolution - BatchNorm by at most half a step of the bias per channel."""
    folded: Any = fold(model, one_conv_spec(bits))
    unfolded, after, _ = conv_outputs(model, folded)
    step = bias_scale(folded.conv)
    # float32: sums of 36 products and a bias, each rounded to 2^-24 of the largest magnitude on the way, in two
    # networks. That magnitude is the BatchNorm's: subtracting a mean and adding a bias can cancel.
    gain, shift = gain_and_shift(model.bn)
    mean = (model.bn.running_mean.double() * gain).abs()
    size = torch.maximum(unfolded.abs().amax(dim=(0, 2, 3)), torch.maximum(shift.abs(), mean))
    bound = 0.5 * step + 64 * 2.0**-24 * size
    assert ((after - unfolded).abs().amax(dim=(0, 2, 3)) <= bound).all()


# No shrinking: each example folds a network, and a failure would take minutes.
@settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
@given(
    bits=st.sampled_from([8, 4, 3, 2]),
    gammas=st.lists(
        st.one_of(st.floats(-3.0, 3.0, width=32), st.sampled_from([0.0, 1e-8, -1e-20, 1e-40, -1e-45])),
        min_size=CHANNELS,
        max_size=CHANNELS,
    ),
    variances=st.lists(
        st.one_of(st.floats(2.0**-10, 100.0, width=32), st.just(0.0)), min_size=CHANNELS, max_size=CHANNELS
    ),
    shifts=st.lists(st.one_of(st.floats(-2.0, 2.0, width=32), st.just(0.0)), min_size=CHANNELS, max_size=CHANNELS),
)
def test_any_batch_norm_folds(bits: int, gammas: list[float], variances: list[float], shifts: list[float]) -> None:
    model = one_conv_model(bits)
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor(gammas))
        model.bn.running_var.copy_(torch.tensor(variances))
        model.bn.bias.copy_(torch.tensor(shifts))
        model.bn.running_mean.copy_(torch.tensor(shifts).flip(0))
    folded: Any = fold(model, one_conv_spec(bits))
    assert all(value.isfinite().all() for value in folded.state_dict().values())
    gain, _ = gain_and_shift(model.bn)
    codes, _ = parameters_of(model.conv)
    folded_codes, _ = parameters_of(folded.conv)
    constant = folded_codes.flatten(1).eq(0).all(dim=1)
    # A negative gamma flips the codes.
    assert torch.equal(folded_codes[~constant], (codes * gain.sign().reshape(-1, 1, 1, 1))[~constant])
    # Only a channel that BatchNorm all but switches off may lose its codes: a bias of 2^30 steps, or no scale at all.
    assert (gain.abs()[constant] < 1e-5).all()
    check_half_step(model, bits)


# --- channels that are nothing but their bias ------------------------------------------------------------------------


def with_channel(model: Any, channel: int, **values: float) -> Any:
    """A copy with gamma, beta, mean, var or the whole weight of one channel of the convolution set."""
    changed = copy.deepcopy(model)
    places = {
        "gamma": changed.bn.weight,
        "beta": changed.bn.bias,
        "mean": changed.bn.running_mean,
        "var": changed.bn.running_var,
        "weight": changed.conv.weight,
    }
    with torch.no_grad():
        for name, value in values.items():
            places[name][channel] = value
    return changed


OFF = [
    pytest.param({"gamma": 0.0, "beta": 0.7}, 0.7, id="zero gamma"),
    pytest.param({"gamma": 1e-45, "beta": 0.0, "mean": 0.0}, 0.0, id="gamma below float32's range, no bias"),
    pytest.param({"gamma": 0.0, "beta": 1e-42, "mean": 0.0}, 0.0, id="bias below float32's range"),
    pytest.param({"gamma": 1.0, "beta": 0.7, "mean": 0.0, "weight": 0.0}, 0.7, id="dead weights"),
    pytest.param({"gamma": 1.0, "beta": 0.5, "mean": 0.5, "var": 1.0, "weight": 0.0}, None, id="dead weights, mean"),
]


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize(("values", "output"), OFF)
def test_a_switched_off_channel_is_its_bias(values: dict[str, float], output: float | None, bits: int) -> None:
    model = with_channel(one_conv_model(bits), 3, **values)
    folded: Any = fold(model, one_conv_spec(bits))
    assert all(value.isfinite().all() for value in folded.state_dict().values())
    codes, scale = parameters_of(folded.conv)
    assert torch.equal(codes[3], torch.zeros_like(codes[3]))
    assert (scale > 0).all()
    unfolded, after, _ = conv_outputs(model, folded)
    if output is not None:
        # 2^24 whole steps hold the bias to half a step; float32 rounds it once more.
        assert (after[:, 3] - output).abs().max() <= 2.0**-23 * abs(output) + 1e-30
    assert (after[:, 3] - unfolded[:, 3]).abs().max() <= 1e-6
    bias_code = (after[0, 3, 0, 0] / bias_scale(folded.conv)[3]).abs().item()
    assert bias_code <= 2**30
    if output and values.get("weight") is None:
        assert bias_code == pytest.approx(2**24, abs=2)  # the scale's own float32 rounding
    # The neighbours are folded as ever.
    others = [channel for channel in range(CHANNELS) if channel != 3]
    signs = gain_and_shift(model.bn)[0].sign().reshape(-1, 1, 1, 1)
    assert torch.equal(codes[others], (parameters_of(model.conv)[0] * signs)[others])


# --- whole networks --------------------------------------------------------------------------------------------------


def test_float_folding_is_exact_up_to_float_rounding() -> None:
    spec = small_spec(32)
    model = perturbed(spec)
    with torch.no_grad():
        before, after = model(images()), fold(model, spec)(images())
    # Weights in float64, rounded once; then nine layers of float32 sums, each right to about 1e-6.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * before.std().item())


@pytest.mark.parametrize(("bits", "mode"), [(32, "train"), (4, "eval"), (4, "mixed")])
def test_the_model_stays_as_it_was(bits: int, mode: str) -> None:
    model = perturbed(small_spec(bits)).train(mode != "eval")
    if mode == "mixed":
        model.get_submodule("bn1").eval()
    before, modes = copy.deepcopy(model.state_dict()), {module: module.training for module in model.modules()}
    folded = fold(model, small_spec(bits))
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()  # nothing is shared
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Brevitas makes one stateless clamp for all quantizers of the process: the folded network's eval() reaches it too.
    shared = set(folded.modules())
    own = [module for module in model.modules() if module not in shared]
    assert len(own) > 20 and all(module.training == modes[module] for module in own)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- refused ---------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """Two BatchNorms that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.one(x) + self.two(x)
        return summed


@pytest.mark.parametrize(
    ("layer", "replacement", "named"),
    [
        ("pixels", lambda old: nn.Sequential(nn.BatchNorm2d(1), old), r"pixels\.0"),
        ("bn1", lambda old: nn.Sequential(old, nn.BatchNorm2d(16)), r"bn1\.1"),
        ("bn1", lambda old: Sum(), r"bn1\.two"),
    ],
)
def test_a_batch_norm_without_a_convolution_of_its_own_is_refused(layer: str, replacement: Any, named: str) -> None:
    model = perturbed(small_spec(4))
    setattr(model, layer, replacement(model.get_submodule(layer)))
    with pytest.raises(ExportError, match=rf"^{named} does not follow a convolution of its own; .*cannot be folded$"):
        fold(model, small_spec(4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- what folding changes in a whole network -------------------------------------------------------------------------


def check_every_layer(model: Any, folded: Any) -> None:
    """In float64, on each layer's inputs in the folded network: half a step of the bias, and nothing else."""
    # Codes as float32 rounds them: in float64 a weight next to a tie may get another one.
    convolutions: list[tuple[str, Any]] = [(n, one) for n, one in model.named_modules() if isinstance(one, nn.Conv2d)]
    weights = {name: layer.quant_weight().value.double() for name, layer in convolutions}
    model, folded = copy.deepcopy(model).double(), folded.double()
    entered: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for name, module in folded.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, x, name=name: entered.__setitem__(name, x[0]))
            module.register_forward_hook(lambda _, x, y, name=name: left.__setitem__(name, getattr(y, "value", y)))
    norms = {"conv1": "bn1", "conv2": "bn2", "downsample.0": "downsample.1"}
    with torch.no_grad():
        folded(images().double())
        for name, x in entered.items():
            if name not in weights:  # a padded shortcut, which is a convolution only when folded
                continue
            own = next(key for key in norms if name.endswith(key))
            norm = model.get_submodule(name[: -len(own)] + norms[own])
            layer = model.get_submodule(name)
            unfolded = norm(functional.conv2d(x.value, weights[name], stride=layer.stride, padding=layer.padding))
            conv: Any = folded.get_submodule(name)
            step = bias_scale(conv)
            bound = 0.5 * step
            if int(conv.quant_weight().bit_width) == 1:
                # A channel that is its bias and still convolves signs: as many as enter, 127 steps each at most, every
                # activation at most 255 codes; beside 2^30 steps of bias.
                sums = conv.weight[0].numel() * 127 * 255 * step
                off = conv.quant_bias().int().abs() == LARGEST_BIAS_CODE
                bound = torch.where(off, sums, bound)
            bound = bound.reshape(-1, 1, 1)
            # Beside it, the float32 in which folding stored the weights' scale: 2^-24 of the sum of magnitudes.
            size = (unfolded - unfolded.mean(dim=(0, 2, 3), keepdim=True)).abs().amax(dim=(0, 2, 3), keepdim=True)
            slack = 2.0**-20 * (size + unfolded.abs().amax(dim=(0, 2, 3), keepdim=True)) + 1e-12
            assert ((left[name] - unfolded).abs() <= bound + slack).all(), name


@settings(max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
@example(architecture="resnet8", widths=(4, 4), seed=0, special=[])
@example(architecture="resnet8", widths=(1, 1), seed=0, special=[(3, 0.0), (5, -1e-12)])
@example(architecture="resnet20-a", widths=(3, 3), seed=0, special=[])
@given(
    architecture=st.just("resnet8"),
    widths=st.tuples(st.sampled_from([8, 4, 3, 2, 1]), st.sampled_from([8, 4, 3, 2, 1])),
    seed=st.integers(0, 2**16),
    special=st.lists(
        st.tuples(st.integers(0, 15), st.sampled_from([0.0, 1e-9, -1e-9, 1e-20, -0.5, -3.0])), min_size=2, max_size=6
    ),
)
def test_folding_changes_nothing_but_the_rounding_of_biases(
    architecture: str, widths: tuple[int, int], seed: int, special: list[tuple[int, float]]
) -> None:
    spec = small_spec(4, architecture=architecture)
    spec = dataclasses.replace(spec, weight_bits=widths[0], act_bits=widths[1])
    torch.manual_seed(seed)
    model = build_model(spec)
    perturb_batch_norm(model, seed=seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for channel, gamma in special:
                    module.weight[channel] = gamma
    calibrate(model, images())
    check_every_layer(model, fold(model, spec))


@pytest.mark.parametrize(
    ("largest_weight", "lowest", "highest", "steps"),
    [
        (127, 0, 255, 1),
        (7, 0, 15, 18),
        (1, 0, 3, 127),
        (1, -1, 1, 127),
        (7, 0, 255, 9),  # 2 * 255 * 7 * 9 = 32,130: one step more would pass 2^15 - 1
        (1, 0, 255, 64),
    ],
)
def test_how_many_steps_fit(largest_weight: int, lowest: int, highest: int, steps: int) -> None:
    assert bias_steps(largest_weight, Grid(0.1, lowest, highest)) == steps
    assert largest_weight * steps <= 127
    if steps > 1:
        assert 2 * (highest - lowest) * largest_weight * steps < 2**15


def test_scales_past_float32_are_refused_by_the_name_of_the_layer() -> None:
    with pytest.raises(ExportError, match=r"^conv: float32 cannot hold its weights or scales"):
        fold(with_channel(one_conv_model(4), 3, gamma=3e38, var=0.0), one_conv_spec(4))
