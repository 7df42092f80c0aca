"""Normalisation inside the model: its formula, its text form, and the input quantizer after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from robustq.errors import UsageError
from robustq.models.layers import IMAGENET, Normalise, parse_normalisation
from robustq.models.spec import build_model
from tests.models.small_nets import small_spec


def test_normalised_images_are_torchvisions() -> None:
    from torchvision.transforms.v2.functional import normalize

    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Normalise(IMAGENET)(x), normalize(x, *map(list, IMAGENET)))
    assert not Normalise(IMAGENET).state_dict()


@pytest.mark.parametrize(
    ("text", "channels", "expected"),
    [
        ("none", 3, None),
        ("imagenet", 3, IMAGENET),
        ("0.5/0.25", 1, ((0.5,), (0.25,))),
        ("0.5/0.25", 3, ((0.5,) * 3, (0.25,) * 3)),
        ("0.1,0.2,0.3/1,2,3", 3, ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))),
    ],
)
def test_texts(text: str, channels: int, expected: Any) -> None:
    assert parse_normalisation(text, channels=channels) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "is not numbers"),
        ("0.5", "1 parts"),
        ("0.5,0.5/0.2,0.2", "2 and 2 numbers, the data 3 channels"),
        ("0.5/0", "deviations over 0"),
        ("nan/1", "finite means"),
        ("0.5/inf", "finite means"),
    ],
)
def test_refused_texts(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_normalisation(text, channels=3)
    assert "\n" not in str(caught.value)


def test_the_normalisation_stands_in_front_of_a_signed_quantizer() -> None:
    torch.manual_seed(0)
    spec = dataclasses.replace(small_spec(4), normalisation=((0.5,), (0.25,)))
    pixels: Any = build_model(spec).get_submodule("pixels")
    assert isinstance(pixels[0], Normalise)
    pixels[1].act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.set_threshold(2.0)
    x = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
    codes = ((x - 0.5) / 0.25 / (2.0 / 128)).round().clamp(-128, 127)
    # exp(log(2)) in float32
    torch.testing.assert_close(pixels(x), codes * (2.0 / 128), rtol=1e-6, atol=1e-6)
