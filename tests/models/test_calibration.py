"""Calibrated thresholds against brute force, in network order, with everything else left as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustq.data import to_float
from robustq.models.quant.calibration import best_threshold, calibrate
from robustq.models.quant.quantizers import LearnedThreshold, learned_thresholds
from robustq.models.spec import build_model
from tests.models.small_nets import digits, perturb_batch_norm, small_spec


def samples(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(20, 50, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "heavy": normal**5,
        "uniform": torch.rand(1000, generator=generator),
        "tiny": normal * 1e-7,
    }[kind]


def mean_squared_error(values: Tensor, threshold: float, *, bits: int, signed: bool) -> float:
    """In float64 numpy, from the definition."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = threshold / (2 ** (bits - 1) if signed else high)
    x = values.numpy().astype(np.float64)
    return float(np.mean((np.clip(np.round(x / scale), low, high) * scale - x) ** 2))


@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "uniform", "tiny"])
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (2, False), (8, True)])
def test_best_threshold_against_brute_force(bits: int, signed: bool, kind: str) -> None:
    values = samples(kind)
    largest = values.abs().max().item()
    candidates = [step / 50 * largest for step in range(1, 51)]
    errors = [mean_squared_error(values, candidate, bits=bits, signed=signed) for candidate in candidates]
    found = best_threshold(values, bit_width=bits, signed=signed).item()
    place = min(range(50), key=lambda index: abs(candidates[index] - found))
    assert found == pytest.approx(candidates[place], rel=1e-6)  # a float32 grid
    # Neighbours that differ by less than float32's rounding of the mean may change places.
    assert errors[place] <= min(errors) * (1 + 1e-4)


# --- whole networks --------------------------------------------------------------------------------------------------


def fresh(bits: int, *, perturb: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(small_spec(bits))
    if perturb:
        perturb_batch_norm(model, seed=0)
    return model


def images() -> Tensor:
    return to_float(digits()[0][:40])


def values_at_thresholds(model: nn.Module, x: Tensor) -> dict[str, tuple[LearnedThreshold, Tensor]]:
    """Layer name -> (its threshold, the tensor that it quantizes) in one eval forward of the model."""
    found: dict[str, tuple[LearnedThreshold, Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        own = [t for key, t in learned_thresholds(module).items() if key.startswith("act_quant.")]
        if not own:
            continue

        def hook(layer: nn.Module, inputs: tuple[Any, ...], name: str = name, own: LearnedThreshold = own[0]) -> None:
            is_relu = type(layer).__name__ == "QuantReLU"
            found[name] = (own, inputs[0].relu() if is_relu else inputs[0].clone())

        handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("bits", [8, 2])
def test_each_threshold_is_the_best_for_what_the_quantized_network_feeds_it(bits: int) -> None:
    model = fresh(bits)
    calibrate(model, images())
    found = values_at_thresholds(model, images())
    assert len(found) == len(learned_thresholds(model)) == 1 + 3 * 3 + 2 + 1  # stem, blocks, shortcuts, pooled
    for name, (threshold, values) in found.items():
        best = best_threshold(values, bit_width=threshold.bit_width, signed=threshold.signed).item()
        assert threshold.log_threshold.item() == pytest.approx(math.log(best), abs=1e-6), name  # one float32 rounding


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_mode_weights_and_statistics_stay(mode: str, from_scratch: bool) -> None:
    model = fresh(4)
    model.train(mode != "eval")
    if mode == "mixed":  # frozen statistics in a network that trains
        model.get_submodule("layer2.0.bn1").eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    calibrate(model, images(), from_scratch=from_scratch)
    assert [module.training for module in model.modules()] == modes
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith("log_threshold") for name in changed)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_from_scratch_does_not_look_at_the_running_statistics() -> None:
    thresholds = []
    for mean in (0.0, 1000.0):
        model = fresh(4, perturb=False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.fill_(mean)
        calibrate(model, images(), from_scratch=True)
        thresholds.append([threshold.log_threshold.item() for threshold in learned_thresholds(model).values()])
        calibrate(model, images())
        thresholds.append([threshold.log_threshold.item() for threshold in learned_thresholds(model).values()])
    scratch_0, running_0, scratch_1000, running_1000 = thresholds
    assert scratch_0 == scratch_1000
    assert running_0 != running_1000 and running_0 != scratch_0


def test_dead_activations_get_a_threshold_of_one() -> None:
    model = fresh(4, perturb=False)
    with torch.no_grad():
        weight = model.get_parameter("conv1.weight")
        weight.zero_()
    calibrate(model, images())
    assert all(threshold.log_threshold.item() == 0.0 for threshold in learned_thresholds(model).values())
    assert model(images()).isfinite().all()
