"""BatchNorm: the statistics used inside the two contexts, everything restored after them, and its convolutions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.models.batch_norm import batch_statistics, norm_inputs, running_statistics
from robustq.models.spec import ModelSpec, build_model

Context = Callable[[nn.Module], AbstractContextManager[None]]
CONTEXTS: list[Context] = [batch_statistics, running_statistics]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.last = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(x).mean(dim=(2, 3)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for norm in (model.norm, model.last):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    model.train()
    model(images(9))
    return model


def images(seed: int) -> Tensor:
    return 3 + 2 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def expected(model: Net, x: Tensor, *, batch: bool) -> Tensor:
    def normal(x: Tensor, norm: nn.BatchNorm2d | nn.BatchNorm1d) -> Tensor:
        statistics = (None, None) if batch else (norm.running_mean, norm.running_var)
        return functional.batch_norm(x, *statistics, norm.weight, norm.bias, training=batch)

    return normal(normal(x, model.norm).mean(dim=(2, 3)), model.last)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", CONTEXTS)
def test_output_and_no_trace(context: Context, training: bool) -> None:
    model = net().train(training)
    x = images(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with context(model):
        out = model(x)
        assert model.training is training and model.drop.training is training  # only BatchNorm changes its mode
    # The same kernel with the same arguments: exact.
    assert torch.equal(out, expected(model, x, batch=context is batch_statistics))
    assert not torch.equal(out, expected(model, x, batch=context is running_statistics))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(module.training is training for module in model.modules())
    assert model.norm.track_running_stats and model.last.track_running_stats


def test_each_layer_gets_its_own_mode_back() -> None:
    # A frozen BatchNorm inside a training network stays frozen.
    model = net()
    model.norm.eval()
    model.last.track_running_stats = False
    for context in CONTEXTS:
        with context(model):
            model(images(1))
        assert not model.norm.training and model.norm.track_running_stats
        assert model.last.training and not model.last.track_running_stats


@pytest.mark.parametrize("context", CONTEXTS)
def test_modes_come_back_after_a_failure(context: Context) -> None:
    model = net()
    with pytest.raises(RuntimeError), context(model):
        model(torch.zeros(4, 7, 5, 5))
    assert model.norm.training and model.norm.track_running_stats


def test_every_norm_of_a_resnet_follows_its_convolution() -> None:
    model = build_model(ModelSpec("resnet8", 4, 4, 10, 1, 8, "digits", None, ())).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    expected = {name: name.replace("bn", "conv").replace("downsample.1", "downsample.0") for name in norms}
    assert dict(norm_inputs(model, torch.rand(1, 1, 8, 8))) == expected and len(expected) == 9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after_relu = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    assert norm_inputs(after_relu, torch.rand(1, 1, 8, 8)) == [("2", None)]
