"""Post-training quantization, the cheap alternative that hardening is compared with: no training step.

Activation scales are calibrated (:mod:`robustq.models.quant.calibration`), then the biases are corrected: rounding a
layer's weights shifts the mean of its outputs, and the bias compensates the shift (Nagel et al., arXiv:1906.04721,
section 4.2), measured on images by Brevitas' ``bias_correction_mode``. The result has no defence against attacks.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustq.hardening.methods.settings import MethodSettings
from robustq.models.batch_norm import running_statistics


@dataclass(frozen=True, kw_only=True)
class PtqSettings(MethodSettings):
    """The ``[ptq]`` table of a recipe.

    Args:
        bias_correction: compensate the shift of each layer's mean output; false: calibration alone.
    """

    method = "ptq"
    trains = False
    defends = False

    bias_correction: bool = True


@torch.no_grad()
def correct_biases(model: nn.Module, images: Tensor) -> int:
    """Correct the biases of a quantized network in place, layer by layer, each on the float output of those before it.

    Brevitas adds a bias to a convolution without one. Folding into integers needs it in the BatchNorm behind the
    convolution, so it is subtracted from the running mean there, which is the same network.

    Args:
        model: quantized and calibrated; its mode does not change.
        images: (N, C, H, W) float32 in [0, 1], on the model's device.

    Returns the number of corrected layers; 0 for a float network.
    """
    from brevitas.graph.calibrate import bias_correction_mode

    layers = {name: module for name, module in model.named_modules() if hasattr(module, "quant_weight")}
    without = {name: layer for name, layer in layers.items() if layer.bias is None}
    norms = norms_behind(model, images[:1])
    was_training = {module: module.training for module in model.modules()}
    with running_statistics(model):
        model.eval()
        with bias_correction_mode(model):
            model(images)
    for name, layer in without.items():
        correction: Any = layer.bias
        del layer.bias
        layer.register_parameter("bias", None)
        norm = norms.get(name)
        if norm is not None and norm.running_mean is not None:
            norm.running_mean -= correction.to(norm.running_mean.dtype)
    for module, training in was_training.items():
        module.training = training
    return len(layers) - len(without.keys() - norms.keys())


def norms_behind(model: nn.Module, example: Tensor) -> dict[str, nn.BatchNorm2d]:
    """Convolution name -> the BatchNorm whose input is its output, found by tracing one forward pass.

    ``example`` is (1, C, H, W) float32 in [0, 1]; mode and statistics of the model do not change.
    """
    made_by: dict[int, str] = {}
    keep: list[Tensor] = []  # an id is only unique while its tensor lives
    found: dict[str, nn.BatchNorm2d] = {}

    def after(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        keep.append(output)
        made_by[id(output)] = name

    def before(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made_by:
            found[made_by[id(inputs[0])]] = norm

    with ExitStack() as hooks, torch.no_grad(), running_statistics(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(partial(after, name)))
            elif isinstance(module, nn.BatchNorm2d):
                hooks.enter_context(module.register_forward_pre_hook(before))
        model(example)
    return found
