"""BatchNorm folded into weights and biases: the network that integer arithmetic can run, and the reference for parity.

With one scale per output channel the fold is exact for the weights: codes stay, a channel's scale is multiplied by
|gamma| / sigma, and a negative gamma flips the signs of the codes. Only the bias is rounded, to an int32 in steps that
are an integer fraction of the accumulator's (input scale * weight scale). A BatchNorm in front of a sign becomes one
threshold per channel, exactly.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustq.errors import ExportError
from robustq.models.batch_norm import norm_inputs
from robustq.models.fx.factory import is_custom
from robustq.models.quant.binary import ChannelThresholds, SignNorm
from robustq.models.resnet import PaddedShortcut
from robustq.models.spec import ModelSpec, build_model

LARGEST_BIAS_CODE = 2**30
"""Larger bias codes would leave the int32 accumulator no room: such a channel becomes constant."""

CONSTANT_BIAS_CODE = 2**24
"""The bias code of a constant channel: float32 counts up to it exactly."""

SMALL_BIAS_CODE = 2**20
"""Below this, float32 divides a bias by its scale and finds the code again."""

NO_BIAS_SCALE = 1e-30
"""Scale of a binary channel that is all zero: its signs cannot be 0, so their unit has to be."""


@dataclass(frozen=True)
class Affine:
    """y = gain * x + shift per channel, in float64."""

    gain: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Grid:
    """The values of a quantized tensor: scale * code, for codes from lowest to highest."""

    scale: float
    lowest: int
    highest: int

    @classmethod
    def of(cls, scale: float, *, bits: int, signed: bool) -> Grid:
        """The grid of a quantizer; the two codes of one bit are -1 and +1."""
        lowest = -(2 ** (bits - 1)) if signed else 0
        return cls(scale, lowest, 1 if bits == 1 else lowest + 2**bits - 1)

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return max(-self.lowest, self.highest)


def fold(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The network without BatchNorm that answers as ``model`` in eval mode, up to the rounding of biases.

    A channel whose bias code would pass :data:`LARGEST_BIAS_CODE` (gamma near zero, dead weights) becomes constant:
    zero weight codes and a scale that can hold its bias. That drops at most 2^24 of 2^30 steps, 1.6% of the bias.
    Binary weights cannot be zero: there the bias gets the largest code, beside which a sum of 2^13 signs is nothing.

    Args:
        model: a network built from ``spec``; stays as it was.
        spec: of ``model``.

    Returns:
        The folded network, in eval mode, on the CPU.

    Raises:
        ExportError: a BatchNorm does not follow a convolution of its own, or float32 cannot hold a folded weight or
            scale; the layer is named.
    """
    if is_custom(spec.architecture):
        # Imported here: graphs load sympy, which takes as long as torch.
        from robustq.models.fx.fold import fold_graph

        graph: nn.Module = fold_graph(model, fold_layer=fold_layer)
        _check_finite(graph)
        return graph
    example = torch.zeros(1, spec.channels, spec.image_size, spec.image_size, device=next(model.parameters()).device)
    affines = _affines(model, example)
    folded = build_model(spec, folded=True)
    names = folded.state_dict().keys()
    own = {name: value.detach().cpu() for name, value in model.state_dict().items() if name in names}
    folded.load_state_dict(own, strict=False)
    grids = {} if spec.widths.is_float else _input_grids(folded, example.cpu())
    with torch.no_grad():
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear | SignNorm | PaddedShortcut):
                continue
            target: Any = folded.get_submodule(name)
            grid = grids.get(name)
            if isinstance(layer, SignNorm):
                assert grid is not None  # a binary network is quantized
                affine = _affine(layer)
                target.set_affine(affine.gain, affine.shift, scale=grid.scale, lowest=grid.lowest, highest=grid.highest)
                continue
            if isinstance(layer, PaddedShortcut):
                if grid is not None:  # a convolution with weights 0 and 1, and with bias 0 in any unit
                    target.bias_quant.tensor_quant.scaling_impl.scale.fill_(grid.scale)
            elif grid is None:
                _fold_float(layer, affines.get(name, _identity(layer)), target)
            else:
                _fold_quantized(layer, affines.get(name, _identity(layer)), target, grid)
            if grid is not None:
                target.set_input_scale(grid.scale, largest_code=grid.largest)
    _check_finite(folded)
    return folded.eval()


def fold_layer(layer: Any, norm: _BatchNorm | None, target: Any, quantizer: Any) -> None:
    """Fill one layer of a folded custom network: see :class:`robustq.models.fx.fold.FoldLayer`."""
    affine = _identity(layer)
    if norm is not None:
        outer = _affine(norm)
        affine = Affine(outer.gain, outer.shift + outer.gain * affine.shift)  # BatchNorm scales the layer's bias too
    if quantizer is None:
        _fold_float(layer, affine, target)
        return
    signed = bool(quantizer.is_signed)
    grid = Grid.of(quantizer.scale().item(), bits=int(quantizer.bit_width()), signed=signed)
    _fold_quantized(layer, affine, target, grid)


def bias_steps(largest_weight: int, input_grid: Grid) -> int:
    """Steps of the bias in one of the accumulator (input scale * weight scale).

    The integer file multiplies its int8 weight codes by this number, which makes the accumulator's step as fine as the
    bias'. It is the largest that fits in 127 and keeps two products of an activation and a weight within 2^15 - 1,
    where onnxruntime's AVX2 kernels saturate.
    """
    span = input_grid.highest - input_grid.lowest  # of the codes as uint8
    return max(min(127 // largest_weight, (2**15 - 1) // (2 * span * largest_weight)), 1)


def _check_finite(folded: nn.Module) -> None:
    for name, layer in folded.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not all(
            bool(tensor.isfinite().all()) for tensor in [*layer.parameters(), *layer.buffers()]
        ):
            raise ExportError(
                f"{name}: float32 cannot hold its weights or scales once BatchNorm is folded in; look for a huge "
                "weight or a variance near 0 in the BatchNorms before and behind it"
            )


def _identity(layer: nn.Conv2d | nn.Linear) -> Affine:
    count = layer.weight.shape[0]
    bias = torch.zeros(count) if layer.bias is None else layer.bias.detach().cpu()
    return Affine(torch.ones(count, dtype=torch.float64), bias.double())


def _affine(norm: _BatchNorm) -> Affine:
    assert norm.running_var is not None and norm.running_mean is not None  # our networks always track statistics
    gain = norm.weight.detach().cpu().double() / (norm.running_var.cpu().double() + norm.eps).sqrt()
    return Affine(gain, norm.bias.detach().cpu().double() - norm.running_mean.cpu().double() * gain)


def _affines(model: nn.Module, example: Tensor) -> dict[str, Affine]:
    """Convolution name -> the BatchNorm after it."""
    found: dict[str, Affine] = {}
    for name, conv in norm_inputs(model, example):
        norm: Any = model.get_submodule(name)
        if isinstance(norm, SignNorm):
            continue
        if conv is None or conv in found:
            raise ExportError(f"{name} does not follow a convolution of its own; such a BatchNorm cannot be folded")
        found[conv] = _affine(norm)
    return found


def _input_grids(folded: nn.Module, example: Tensor) -> dict[str, Grid]:
    """Layer name -> grid of its quantized input."""
    grids: dict[str, Grid] = {}

    def record(name: str, x: Any) -> None:
        grids[name] = Grid.of(float(x.scale), bits=int(x.bit_width), signed=bool(x.signed))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in folded.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear | ChannelThresholds):
                hook = module.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
                hooks.enter_context(hook)
        folded(example)
    return grids


def _fold_float(layer: nn.Conv2d | nn.Linear, affine: Affine, target: nn.Module) -> None:
    weight = layer.weight.detach().cpu().double()
    shaped = affine.gain.reshape(-1, *[1] * (weight.dim() - 1))
    target.weight.copy_(weight * shaped)  # type: ignore[operator]
    target.bias.copy_(affine.shift)  # type: ignore[operator]


def _fold_quantized(layer: Any, affine: Affine, target: Any, grid: Grid) -> None:
    quantized = layer.quant_weight()
    # Not Brevitas' int(), which fails for a binary layer of one sign.
    codes = (quantized.value / quantized.scale).round().detach().cpu().double()
    shape = (-1, *[1] * (codes.dim() - 1))
    bits = int(quantized.bit_width)
    largest_weight = 1 if bits == 1 else 2 ** (bits - 1) - 1
    # A linear layer may be exported as MatMul and Add, whose weights no lowering pass multiplies; onnxruntime (1.32)
    # fuses both into a QGemm without a look at the unit of the bias.
    steps = 1 if isinstance(layer, nn.Linear) else bias_steps(largest_weight, grid)
    scale = quantized.scale.detach().cpu().double().flatten().expand(codes.shape[0]) * affine.gain.abs()
    bias_codes = affine.shift.abs() * steps / (grid.scale * scale)
    # Below this the accumulator's scale is no normal float32: it would lose digits or become 0, and the codes NaN.
    smallest = torch.finfo(torch.float32).tiny * steps / min(grid.scale, 1.0)
    constant = (bias_codes > LARGEST_BIAS_CODE) | (scale < smallest)
    codes[constant] = 1.0 if bits == 1 else 0.0
    bias_code = LARGEST_BIAS_CODE if bits == 1 else CONSTANT_BIAS_CODE
    holds_bias = affine.shift.abs() * steps / (grid.scale * bias_code)
    nothing = torch.full_like(scale, NO_BIAS_SCALE if bits == 1 else 1.0)
    scale = torch.where(constant, torch.where(holds_bias >= smallest, holds_bias, nothing), scale)
    stored_scale = scale.float().reshape(shape)
    target.weight_quant.tensor_quant.scaling_impl.scale.copy_(stored_scale)
    target.bias_quant.tensor_quant.scaling_impl.scale.copy_(grid.scale * scale / steps)
    signs = torch.where(constant, 1.0, affine.gain.sign()).reshape(shape)
    target.weight.copy_((codes * signs).float() * stored_scale)
    target.bias.copy_(_on_grid(affine.shift.float(), target.bias_quant.tensor_quant.scaling_impl.scale))


def _on_grid(bias: Tensor, scale: Tensor) -> Tensor:
    """Biases (C,) float32 as multiples of ``scale``, also when float32 divides them by it.

    A code of millions times its scale, divided by the scale, may come out half a step off; exporters take that for a
    float bias. Then a neighbouring code is used, 1e-7 of the bias away.
    """
    codes = (bias / scale).round()
    for step in (1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8):
        moved = codes + step
        stays = codes * scale / scale == codes
        codes = torch.where(stays | (moved * scale / scale != moved), codes, moved)
    return torch.where(codes.abs() < SMALL_BIAS_CODE, bias, codes * scale)
