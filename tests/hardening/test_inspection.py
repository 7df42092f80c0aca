"""What is measured inside a network, against closed forms and against one image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.hardening.monitor import Monitor, inspect_network
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec, build_model


class Line(nn.Module):
    """Logits (-s, s) with s = scale * the sum of the 2 x 2 pixels over 1/2: everything is known in closed form."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        s = self.scale * (x.flatten(1) - 0.5).sum(dim=1)
        return torch.stack([-s, s], dim=1)


def test_a_line_has_the_values_of_its_formulas() -> None:
    levels, scale = torch.tensor([0.25, 0.5, 0.75]), 0.5
    x = levels.view(3, 1, 1, 1).expand(3, 1, 2, 2).clone()
    found = inspect_network(Line(scale), x, torch.ones(3, dtype=torch.int64))
    s = [scale * 4 * (level - 0.5) for level in (0.25, 0.5, 0.75)]
    assert found.feature_norm is None  # no pooling, no features
    assert found.logit_margin == pytest.approx(sum(2 * value for value in s) / 3, abs=1e-6)
    # d CE / d s = -2 (1 - p), p the label's share; each of 4 pixels moves s by `scale`, so the norm doubles it.
    norms = [2 * (1 - 1 / (1 + math.exp(-2 * value))) * scale * 2 for value in s]
    assert found.input_gradient_norm == pytest.approx(sum(norms) / 3, rel=1e-5)  # float32
    assert found.zero_gradients == 0.0


def test_saturated_images_have_a_gradient_of_exactly_zero() -> None:
    # At s = 800 the label's share is exactly 1 in float32; at s = -800 the loss is as steep as it can be.
    x = torch.tensor([0.75, 0.25]).view(2, 1, 1, 1).expand(2, 1, 2, 2).clone()
    found = inspect_network(Line(800.0), x, torch.ones(2, dtype=torch.int64))
    assert found.zero_gradients == 0.5
    assert found.input_gradient_norm == pytest.approx(2 * 800 * 2 / 2, rel=1e-6)


def network(bits: int) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelSpec("resnet8", bits, bits, 10, 1, 8, "digits", 0.1, tuple("0123456789")))
    calibrate(model, torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)), from_scratch=True)
    return model


# Batches of one and of four may round differently in float32, and a quantizer makes a step of a difference on a tie: so
# the quantized network is compared in the same batches.
@pytest.mark.parametrize(("bits", "batch_size"), [(32, 4), (4, 1)])
def test_a_network_counts_as_image_by_image(bits: int, batch_size: int) -> None:
    model = network(bits).eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (9, 1, 8, 8), generator=generator) / 255
    y = torch.randint(0, 10, (9,), generator=generator)
    found = inspect_network(model, x, y, batch_size=batch_size)
    features, margins, norms = [], [], []
    pooled: list[Tensor] = []
    handle = model.get_submodule("avgpool").register_forward_hook(lambda _, __, out: pooled.append(out.flatten(1)))
    for image, label in zip(torch.split(x, 1), torch.split(y, 1), strict=True):
        image = image.clone().requires_grad_()
        logits = model(image)
        functional.cross_entropy(logits, label).backward()  # type: ignore[no-untyped-call]
        assert image.grad is not None
        norms.append(image.grad.norm().item())
        features.append(pooled[-1].norm().item())
        rest = [value for place, value in enumerate(logits[0].tolist()) if place != int(label)]
        margins.append(logits[0, int(label)].item() - max(rest))
    handle.remove()
    # float32 sums of a thousand terms in two orders
    assert found.feature_norm == pytest.approx(sum(features) / 9, rel=1e-4)
    assert found.logit_margin == pytest.approx(sum(margins) / 9, rel=1e-4, abs=1e-5)
    assert found.input_gradient_norm == pytest.approx(sum(norms) / 9, rel=1e-4)
    assert found.zero_gradients == sum(norm == 0 for norm in norms) / 9


def test_looking_leaves_no_trace() -> None:
    model = network(4).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    random = torch.get_rng_state()
    monitor = Monitor(x, torch.zeros(5, dtype=torch.int64), epsilon=None, batch_size=5, seed=0)
    first = monitor.inspect(model, batch_size=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert monitor.inspect(model, batch_size=2) == first
    # Running statistics, not the batch's: with the batch's the images beside one would count.
    assert monitor.inspect(model, batch_size=5).logit_margin == pytest.approx(first.logit_margin, rel=1e-4, abs=1e-5)
