"""Files of random custom networks, and of ResNets with every kind of broken channel, agree with their networks.

A thousand custom networks take half an hour: ``python -m benchmarks.random_networks --seeds 1000``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import torch
from torch import nn

from robustq.export.formats import FORMATS, build
from robustq.export.integer_layers import optimised_layers
from robustq.export.parity import bound_of, parity
from robustq.models import spec as specs
from robustq.models.layers import Layers
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.resnet import ResNet
from robustq.models.spec import ModelSpec, build_model
from tests.export.random_nets import outcome, random_images
from tests.models.small_nets import perturb_batch_norm

BROKEN = [*(("weight", gamma) for gamma in (-0.8, 0.0, 1e-9, -1e-20)), ("running_var", 0.0), ("bias", -50.0)]
"""Tensors of a BatchNorm, and the value of one channel each."""


@pytest.mark.parametrize("seed", range(2))
def test_a_random_network_agrees_with_its_file_or_is_refused(tmp_path: Path, seed: int) -> None:
    found = outcome(seed, "packed", tmp_path)
    assert found == "equal" or re.match(r"refused: [\w.]+: ", found), found


@pytest.mark.slow
def test_random_networks_agree_with_their_files(tmp_path: Path) -> None:
    outcomes = [outcome(seed, ("qcdq", "integer", "packed")[seed % 3], tmp_path) for seed in range(100, 121)]
    assert not [found for found in outcomes if found.startswith("WRONG")]
    assert outcomes.count("equal") >= 5


@pytest.mark.parametrize(
    ("bits", "shape", "side", "name"),
    [
        ((8, 8), {"blocks": (1, 1), "widths": (6, 8)}, 9, "packed"),
        ((3, 3), {"blocks": (1,), "widths": (3,)}, 12, "packed"),
        ((1, 1), {"blocks": (1, 2), "widths": (8, 12)}, 7, "packed"),
        ((1, 4), {"blocks": (1, 1), "widths": (3, 8)}, 9, "integer"),
        ((4, 1), {"blocks": (1, 1), "widths": (8, 3)}, 9, "qcdq"),
        # onnxruntime refused a file in which two shortcuts shared their only weight.
        ((8, 8), {"blocks": (1, 1, 1), "widths": (1, 1, 1)}, 7, "packed"),
        ((2, 8), {"blocks": (1, 1), "widths": (8, 12), "large_images": True}, 12, "packed"),
    ],
)
def test_a_resnet_with_every_kind_of_broken_channel(
    tmp_path: Path, bits: tuple[int, int], shape: dict[str, Any], side: int, name: str
) -> None:
    spec, path = ModelSpec("random", *bits, 5, 3, side, "x", None, ()), tmp_path / "net.onnx"

    def architecture(layers: Layers, channels: int, classes: int) -> nn.Module:
        return ResNet(layers, channels=channels, classes=classes, **{"large_images": False, **shape})

    torch.manual_seed(0)
    x = random_images(100, 3, side)
    with mock.patch.dict(specs.ARCHITECTURES, {"random": architecture}):
        model = build_model(spec)
        perturb_batch_norm(model, seed=0)
        with torch.no_grad():
            for norm in [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]:
                for channel, (tensor, value) in enumerate(BROKEN[: norm.num_features // 2]):
                    getattr(norm, tensor)[channel] = value
            calibrate(model, x[:20])
            for threshold in learned_thresholds(model).values():
                # Calibrated thresholds are simple fractions of one another, which makes ties.
                threshold.log_threshold.add_(0.01 * torch.randn(()))
        folded = fold(model, spec)
        onnx.save(build(name, folded, spec), path)
        agreements = parity(path, folded, x, runs=FORMATS[name].runs, bound=bound_of(spec))
    assert all(agreement.holds for agreement in agreements.values()), agreements
    if FORMATS[name].promises_integers:
        assert optimised_layers(path).float_convolutions == ()
