"""Small networks that are far from their initialisation, for the tests of models, checkpoints and export.

A freshly made network hides faults: its BatchNorm is the identity, and it puts every image into one class, so that a
wrong file would still agree with it on every top-1 answer.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.checkpoint import load_weights
from robustq.data import load_dataset, to_float
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec, build_model

NAMES = tuple("0123456789")


def small_spec(bits: int, *, architecture: str = "resnet8", channels: int = 1, image_size: int = 8) -> ModelSpec:
    return ModelSpec(architecture, bits, bits, 10, channels, image_size, "digits", None, NAMES)


@functools.cache
def digits(split: str = "test") -> tuple[Tensor, Tensor]:
    """uint8 (N, 1, 8, 8) and int64 (N,): ``test`` has about 360 images, ``train`` about 1,290."""
    dataset = load_dataset("digits")
    images, labels = (dataset.test if split == "test" else dataset.train).take(0)
    return images.cpu(), labels.cpu()


def perturb_batch_norm(model: nn.Module, *, seed: int) -> None:
    """Gammas of both signs, shifted means, variances from 0.2 to 2."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.weight[::3] *= -1
                module.bias.normal_(0.0, 0.3, generator=generator)
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.2, 2.0, generator=generator)


def perturbed(spec: ModelSpec) -> nn.Module:
    """An untrained 8x8 network in eval mode with a BatchNorm that does something, calibrated."""
    torch.manual_seed(0)
    model = build_model(spec)
    perturb_batch_norm(model, seed=0)
    calibrate(model, to_float(digits()[0][:40]))
    return model


def trained(spec: ModelSpec, *, seed: int = 0) -> nn.Module:
    """An 8x8 network in eval mode that has learned the digits (above 85% right, binary: 60%), some gammas negative."""
    return copy.deepcopy(_trained(spec, seed))


@functools.cache
def _trained(spec: ModelSpec, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(spec)
    if spec.widths.is_float:
        perturb_batch_norm(model, seed=seed)
        _train(model, steps=100, lr=0.1)
    else:
        plain = _trained(small_spec(32, architecture=spec.architecture), seed)
        load_weights(model, plain.state_dict(), Path("float twin"))
        calibrate(model, to_float(digits("train")[0][:300]))
        # Calibrated thresholds are simple fractions of one another, so that averages of four codes fall exactly on ties
        # of the next quantizer, where onnxruntime's integer pooling may round the other way. Training moves them apart.
        _train(model, steps=10, lr=0.02)
    return model


def _train(model: nn.Module, *, steps: int, lr: float) -> None:
    images, labels = digits("train")
    x = to_float(images)
    optimiser = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimiser.zero_grad()
        functional.cross_entropy(model(x[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    model.eval()
