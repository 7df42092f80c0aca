"""Post-training quantization: what bias correction restores, what it leaves alone, and the run folder it ends in."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import robustq
from robustq.checkpoint import load_model
from robustq.data import load_dataset, to_float
from robustq.hardening.methods.ptq import correct_biases
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.resnet import ResNet
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe.schema import TRAINING_KEYS

IMAGES = 256


def images() -> Tensor:
    return to_float(load_dataset("digits").train.take(IMAGES)[0])


def calibrated(digits_float: Path, bits: int) -> tuple[nn.Module, nn.Module, ModelSpec]:
    """The float network, its calibrated twin of ``bits`` bits, and the twin's spec."""
    network, spec, _ = load_model(digits_float)
    wanted = replace(spec, weight_bits=bits, act_bits=bits)
    twin = build_model(wanted)
    twin.load_state_dict(network.state_dict(), strict=False)
    calibrate(twin, images())
    return network, twin, wanted


def channel_means(model: nn.Module, x: Tensor) -> Tensor:
    """(16,) mean over images and places of what leaves the first BatchNorm."""
    assert isinstance(model, ResNet)
    with torch.no_grad():
        mean: Tensor = model.bn1(model.conv1(model.pixels(x))).mean(dim=(0, 2, 3))
    return mean


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_first_layer_s_mean_is_the_float_one_again(digits_float: Path, bits: int) -> None:
    network, twin, _ = calibrated(digits_float, bits)
    x = images()
    expected, before = channel_means(network, x), channel_means(twin, x)
    correct_biases(twin, x)
    after = channel_means(twin, x)
    # Rounding moved the means; what is left is the float32 error of means over 16,384 values of magnitude 1.
    assert (before - expected).abs().max() > 1e-4
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)


def test_every_layer_gets_the_mean_error_on_the_float_output_of_those_before(digits_float: Path) -> None:
    """Reference: the rule written out for the second convolution, without Brevitas' mode."""
    _, twin, _ = calibrated(digits_float, 4)
    x = images()
    plain: Any = copy.deepcopy(twin)
    correct_biases(twin, x)
    with torch.no_grad():
        entering = functional.conv2d(plain.pixels(x), plain.conv1.weight, padding=1)
        entering = plain.relu(plain.bn1(entering))
        conv: Any = plain.get_submodule("layer1.0.conv1")
        shift = functional.conv2d(entering, conv.weight, padding=1) - functional.conv2d(
            entering, conv.quant_weight().value, padding=1
        )
        expected = plain.get_submodule("layer1.0.bn1").running_mean - shift.mean(dim=(0, 2, 3))
    # float32 sums over 16,384 values in another order.
    torch.testing.assert_close(twin.get_submodule("layer1.0.bn1").running_mean, expected, rtol=0, atol=2e-6)


def test_nothing_but_means_and_the_last_bias_moves(digits_float: Path) -> None:
    _, twin, _ = calibrated(digits_float, 4)
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    twin.train()
    twin.get_submodule("bn1").eval()
    modes = {name: module.training for name, module in twin.named_modules()}
    count = correct_biases(twin, images())
    assert count == 10
    moved = {name for name, value in twin.state_dict().items() if not torch.equal(value, before[name])}
    assert twin.state_dict().keys() == before.keys()
    assert moved == {name for name in before if name.endswith("running_mean")} | {"fc.bias"}
    assert modes == {name: module.training for name, module in twin.named_modules()}


def test_a_float_network_does_not_change(digits_float: Path) -> None:
    network, _, _ = load_model(digits_float)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert correct_biases(network, images()) == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.slow
def test_a_quantized_run_is_one_like_any_other(
    digits_float: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = robustq.harden_model(digits_float, bits=4, recipe="ptq", device="cpu")
    folder = Path(result["run"])
    assert folder == tmp_path / "runs" / "resnet8-w4a4-ptq"
    assert {file.name for file in folder.iterdir()} == {"best.pt", "last.pt", "config.json", "result.json"}
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["bits"], result["method"], result["epochs"], result["best_epoch"]) == (4, "ptq", 0, 0)
    assert result["test_images"] == 359
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"]["settings"] == {"bias_correction": True} and not set(TRAINING_KEYS) & set(config["recipe"])
    # An undefended network must not become what a bare export ships.
    assert not (tmp_path / "runs" / "last-hardened").exists()
    model, spec, info = load_model(folder / "best.pt")
    assert spec.weight_bits == 4 and info["method"] == "ptq"
    assert info["holdout_clean_accuracy"] == result["holdout_clean_accuracy"]
    # The corrected network is what is exported: the integer file has the answers of the folded network, which are the
    # network's own but for biases rounded to the accumulator's steps.
    bundle = robustq.export_model(result["checkpoint"], images=60, recheck=False, device="cpu")
    assert bundle["shortfalls"] == [] and bundle["float_layers"] == []
    folded = fold(model, spec)
    x = images()[:100]
    with torch.no_grad():
        assert (folded(x).argmax(dim=1) == model(x).argmax(dim=1)).float().mean() >= 0.97


def test_a_quantized_network_is_calibrated_anew(digits_w4a4: Path, tmp_path: Path) -> None:
    """At the same width too: what its training made of the scales belongs to weights that bias correction moves."""
    network, spec, _ = load_model(digits_w4a4)
    options: dict[str, Any] = {"recipe": "ptq", "device": "cpu", "overrides": ("ptq.bias_correction=false",)}
    result = robustq.harden_model(digits_w4a4, out=tmp_path / "run", **options)
    found = load_model(Path(result["checkpoint"]))[0].state_dict()
    assert torch.equal(found["bn1.running_mean"], network.state_dict()["bn1.running_mean"])  # calibration alone
    scales = [name for name in found if name.endswith("log_threshold")]
    assert scales and any(not torch.equal(found[name], network.state_dict()[name]) for name in scales)
    assert result["bits"] == spec.weight_bits
