"""Which tensor a FeatureTap hands out, against the network walked through by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.hardening.features import FEATURES, FeatureTap
from tests.hardening.tiny import network


def resnet8(bits: int) -> tuple[nn.Module, Tensor]:
    return network(bits), torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def walked(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The last convolution's output and the tensor that enters avgpool, by calling the layers one after the other."""
    module = model.get_submodule
    for name in ("pixels", "conv1", "bn1", "relu", "layer1", "layer2"):
        x = module(name)(x)
    shortcut = module("layer3.0.downsample")(x)
    for name in ("conv1", "bn1", "relu1", "conv2"):
        x = module(f"layer3.0.{name}")(x)
    conv = x
    for name in ("bn2", "branch"):
        x = module(f"layer3.0.{name}")(x)
    return conv, module("layer3.0.relu2")(x + shortcut)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_is_its_tensor(feature: str, bits: int) -> None:
    model, x = resnet8(bits)
    conv, before_pooling = walked(model, x)
    assert before_pooling.shape == (5, 64, 2, 2)
    expected = {
        "pooled": before_pooling.mean(dim=(2, 3)),
        "unpooled": before_pooling.flatten(1),
        "conv": conv.flatten(1),
        "logits": model(x),
    }[feature]
    logits, features = FeatureTap(model, feature)(x)
    # The same layers on the same input: exact.
    assert torch.equal(logits, model(x))
    assert torch.equal(features, expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(FeatureTap(model, feature)(x)[1].square().sum(), x)
    assert bool(gradient.any())


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1))
        return logits


@pytest.mark.parametrize(("feature", "lacking"), [("pooled", "pooling"), ("unpooled", "pooling"), ("conv", "convol")])
def test_a_network_without_the_layer_is_refused(feature: str, lacking: str) -> None:
    with pytest.raises(UsageError, match=f"(Perceptron|the network) has no .*{lacking}.*'{feature}'"):
        FeatureTap(Perceptron(), feature)
