"""Post-training quantization, the cheap way that hardening is compared with: no step of training.

Activation scales are calibrated (:mod:`robustq.models.quant.calibration`), then the biases are corrected: rounding a
layer's weights moves the mean of its outputs, and the bias takes that back (Nagel et al., arXiv:1906.04721, section
4.2), measured on images by Brevitas' ``bias_correction_mode``. Neither knows of attacks: the result is undefended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustq.models.batch_norm import norm_inputs, running_statistics


@dataclass(frozen=True)
class PtqSettings:
    """The ``[ptq]`` table of a recipe.

    Args:
        bias_correction: take the shift of each layer's mean output back; without it, calibration alone.
    """

    bias_correction: bool = True


@torch.no_grad()
def correct_biases(model: nn.Module, images: Tensor) -> int:
    """Correct the biases of a quantized network in place, layer by layer, each on the float output of those before it.

    Brevitas gives a convolution without bias one of its own. The fold into integers wants BatchNorm to hold it: the
    BatchNorm behind the convolution then subtracts that much less, which is the same network.

    Args:
        model: quantized and calibrated; its mode stays as it was.
        images: (N, C, H, W) float32 in [0, 1], on the model's device.

    Returns:
        How many layers were corrected; 0 for a float network.
    """
    from brevitas.graph.calibrate import bias_correction_mode

    layers = {name: module for name, module in model.named_modules() if hasattr(module, "quant_weight")}
    without = {name: layer for name, layer in layers.items() if layer.bias is None}
    norms = {conv: model.get_submodule(norm) for norm, conv in norm_inputs(model, images[:1]) if conv is not None}
    was_training = {module: module.training for module in model.modules()}
    with running_statistics(model):
        model.eval()
        with bias_correction_mode(model):
            model(images)
    for name, layer in without.items():
        correction: Any = layer.bias
        del layer.bias
        layer.register_parameter("bias", None)
        norm: Any = norms.get(name)
        if norm is not None and norm.running_mean is not None:
            norm.running_mean -= correction.to(norm.running_mean.dtype)
    for module, training in was_training.items():
        module.training = training
    return len(layers) - len(without.keys() - norms.keys())
