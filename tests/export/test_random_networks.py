"""Random networks: widths, depths, strides, sizes and broken channels; their files agree.

A thousand user networks take half an hour by hand: ``python -m benchmarks.random_networks --seeds 1000``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from robustq.errors import ExportError
from robustq.export.formats import FORMATS, build
from robustq.export.parity import bound_of, parity
from robustq.export.session import optimised_layers
from robustq.models import spec as specs
from robustq.models.layers import Layers
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.resnet import ResNet
from robustq.models.spec import ModelSpec, build_model
from tests.export.random_nets import outcome

Drawn = tuple[ModelSpec, dict[str, Any], list[tuple[int, str]], int]
"""Specification, shape, broken channels (channel number, kind), and a seed."""

IMAGES = 100
BITS = [8, 4, 3, 2, 1]


SPECIAL = {
    "negative gamma": ("weight", -0.8),
    "zero gamma": ("weight", 0.0),
    "tiny gamma": ("weight", 1e-9),
    "vanishing gamma": ("weight", -1e-20),
    "huge gamma": ("weight", -1e6),
    "zero variance": ("running_var", 0.0),
    "dead relu": ("bias", -50.0),
}
"""Name -> tensor of a BatchNorm, and the value of one channel."""


@st.composite
def networks(draw: st.DrawFn) -> Drawn:
    stages = draw(st.integers(1, 3))
    shape = {
        "blocks": tuple(draw(st.integers(1, 2)) for _ in range(stages)),
        "widths": tuple(draw(st.sampled_from([1, 3, 8, 12])) for _ in range(stages)),
        "large_images": draw(st.booleans()),
    }
    widths = draw(st.sampled_from(BITS)), draw(st.sampled_from(BITS))
    classes = draw(st.integers(2, 7))
    channels, side = draw(st.sampled_from([1, 3])), draw(st.sampled_from([7, 9, 12]))
    spec = ModelSpec("random", *widths, classes, channels, side, "x", None, ())
    special = draw(st.lists(st.tuples(st.integers(0, 11), st.sampled_from(sorted(SPECIAL))), max_size=5))
    return spec, shape, special, draw(st.integers(0, 2**16))


def network(spec: ModelSpec, special: list[tuple[int, str]], seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build_model(spec)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.2, 2.0, generator=generator)
                for channel, kind in special:
                    tensor, value = SPECIAL[kind]
                    getattr(module, tensor)[channel % len(module.weight)] = value
        calibrate(model, random_images(spec, seed)[:20])
        for threshold in learned_thresholds(model).values():
            # Off the simple fractions of one another that calibration finds: their ties are no fault of a file's.
            threshold.log_threshold.add_(0.01 * torch.randn((), generator=generator))
    return model


def random_images(spec: ModelSpec, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (IMAGES, spec.channels, spec.image_size, spec.image_size)
    return torch.randint(0, 256, shape, generator=generator).float() / 255


def check(folder: Path, drawn: Drawn, name: str) -> None:
    spec, shape, special, seed = drawn

    def architecture(layers: Layers, channels: int, classes: int) -> nn.Module:
        return ResNet(layers, channels=channels, classes=classes, **shape)

    with mock.patch.dict(specs.ARCHITECTURES, {"random": architecture}):
        model = network(spec, special, seed)
        path = folder / "net.onnx"
        try:
            folded = fold(model, spec)
            onnx.save(build(name, folded, spec), path)
        except ExportError as error:
            assert any(layer in str(error) for layer, _ in model.named_modules() if layer)  # the layer is named
            return
        agreements = parity(path, folded, random_images(spec, seed), runs=FORMATS[name].runs, bound=bound_of(spec))
        for run, agreement in agreements.items():
            assert agreement.holds, (run, agreement)
        if FORMATS[name].promises_integers:
            assert optimised_layers(path).float_convolutions == ()


EXPLORE = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.slow
@settings(max_examples=12, **EXPLORE)  # type: ignore[arg-type]
@given(drawn=networks(), name=st.sampled_from(["qcdq", "integer", "packed"]))
def test_random_networks_agree_with_their_files(tmp_path: Path, drawn: Drawn, name: str) -> None:
    check(tmp_path, drawn, name)


@pytest.mark.parametrize("seed", range(2))
def test_a_random_user_network_agrees_with_its_file_or_is_refused(tmp_path: Path, seed: int) -> None:
    found = outcome(seed, "packed", tmp_path)
    assert found == "equal" or re.match(r"refused: [\w.]+: ", found), found


@pytest.mark.slow
def test_random_user_networks_agree_with_their_files(tmp_path: Path) -> None:
    outcomes = [outcome(seed, ("qcdq", "integer", "packed")[seed % 3], tmp_path) for seed in range(100, 118)]
    assert not [found for found in outcomes if found.startswith("WRONG")]
    assert outcomes.count("equal") >= 5


def test_equal_layers_of_one_weight_keep_weights_of_their_own(tmp_path: Path) -> None:
    # Hypothesis found it: onnxruntime refused a file in which two shortcuts shared their only weight.
    spec = ModelSpec("random", 8, 8, 2, 1, 7, "x", None, ())
    check(tmp_path, (spec, {"blocks": (1, 1, 1), "widths": (1, 1, 1), "large_images": False}, [], 0), "packed")


@pytest.mark.parametrize("bits", [8, 3, 1])
def test_a_network_with_every_kind_of_broken_channel(tmp_path: Path, bits: int) -> None:
    spec = ModelSpec("random", bits, bits, 5, 3, 9, "x", None, ())
    kinds = [kind for kind in SPECIAL if kind != "huge gamma"]  # which may be refused
    check(tmp_path, (spec, {"blocks": (1, 1), "widths": (6, 8)}, list(enumerate(kinds)), bits), "packed")
