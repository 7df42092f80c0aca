"""Widths of single layers: the named ones change, the others stay, and all errors come at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import nn
from torch.nn import functional

from robustq.errors import UsageError
from robustq.models.layers import weight_quantizer
from robustq.models.mixed_widths import adjustable_layers, read_layer_bits, set_layer_bits
from robustq.models.spec import ModelSpec, build_model
from tests.models.small_nets import small_spec

OWN = {"conv1": 4, "layer1.0.conv1": 8, "layer1.0.relu1": 8, "layer2.0.conv2": 1, "layer3.0.relu2": 2, "fc": 3}


def mixed(own: dict[str, int] = OWN) -> ModelSpec:
    return dataclasses.replace(small_spec(4), layer_bits=tuple(own.items()))


def widths(model: nn.Module) -> dict[str, int]:
    found = {}
    for name in adjustable_layers(model):
        module: Any = model.get_submodule(name)
        width = module.quant_weight().bit_width if hasattr(module, "weight") else module.act_quant.bit_width()
        found[name] = int(width)
    return found


@pytest.mark.parametrize("folded", [False, True])
def test_named_layers_get_their_width_and_the_others_keep_theirs(folded: bool) -> None:
    before = widths(build_model(small_spec(4), folded=folded))
    after = widths(build_model(mixed(), folded=folded))
    assert after == {**before, **OWN}
    assert before["fc"] == before["conv1"] == 8


def test_weights_stay_where_they_were() -> None:
    torch.manual_seed(0)
    plain = build_model(small_spec(4))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    set_layer_bits(plain, OWN)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_a_convolution_keeps_its_stride_padding_dilation_and_groups() -> None:
    torch.manual_seed(0)
    conv = qnn.QuantConv2d(
        4, 6, 3, stride=2, padding=3, dilation=2, groups=2, bias=True, **weight_quantizer(4, folded=False)
    )
    model = nn.Sequential(conv)
    set_layer_bits(model, {"0": 8})
    x = torch.rand(2, 4, 9, 9)
    changed: Any = model[0]
    assert int(changed.quant_weight().bit_width) == 8
    weight = changed.quant_weight().value
    expected = functional.conv2d(x, weight, conv.bias, stride=2, padding=3, dilation=2, groups=2)
    torch.testing.assert_close(model(x), expected)


def test_all_errors_come_at_once_with_the_nearest_name() -> None:
    own = {"layer1.0.conv3": 4, "layer1.0.relu1": 1, "pixels": 4, "fc": 5, "conv1": 8}
    with pytest.raises(UsageError) as caught:
        build_model(mixed(own))
    text = str(caught.value)
    assert "no layer 'layer1.0.conv3'" in text and "(nearest: layer1.0.conv" in text
    assert "layer1.0.relu1 = 1: choose one of 8, 4, 3, 2" in text
    assert "no layer 'pixels'" in text and "fc = 5: choose one of 8, 4, 3, 2, 1" in text
    assert "'conv1'" not in text and "\n" not in text


@pytest.mark.parametrize(
    "text", ['"layer1.0.conv1" = 8\n"fc" = 4\n', "[layer1.0]\nconv1 = 8\n[fc]\n", "layer1.0.conv1 = 8\nfc = 4\n"]
)
def test_names_may_be_quoted_or_not(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bits.toml"
    path.write_text(text)
    assert read_layer_bits(path)["layer1.0.conv1"] == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"conv1 = ", "is not valid TOML"),
        (b"", "names no layer"),
        (b"conv1 = 4.0\nfc = '8'\nrelu = true\n", r"integers \(conv1 = 4.0, fc = '8', relu = True\)"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bits.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_layer_bits(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
