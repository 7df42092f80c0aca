"""BatchNorm into weights and biases: the network that integer arithmetic can run, and the reference for parity.

With one scale per output channel the fold is exact for the weights: the codes stay, a channel's scale is multiplied by
|gamma| / sigma and a negative gamma flips the codes' signs. Only the bias is rounded, to an int32 in a whole part of
the accumulator's step (input scale * weight scale). A BatchNorm in front of a sign becomes one threshold per channel,
exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustq.errors import ExportError
from robustq.models.batch_norm import running_statistics
from robustq.models.fx.factory import is_custom
from robustq.models.quant.binary import ChannelThresholds, SignNorm
from robustq.models.resnet import PaddedShortcut
from robustq.models.spec import ModelSpec, build_model

LARGEST_BIAS_CODE = 2**30
"""A bias code beyond this leaves the int32 accumulator no room; its channel is then nothing but its bias."""

CONSTANT_BIAS_CODE = 2**24
"""The bias code such a channel gets: the largest whole numbers that float32, too, counts exactly."""

SMALL_BIAS_CODE = 2**20
"""Below this float32 divides a bias by its scale without missing the code."""

NO_BIAS_SCALE = 1e-30
"""Scale of a binary channel that is nothing at all: its signs cannot be 0, so their unit has to be."""


@dataclass(frozen=True)
class Affine:
    """y = gain * x + shift per channel, in float64."""

    gain: Tensor
    shift: Tensor


def fold(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The BatchNorm-free network with the answers of ``model`` in eval mode, up to the rounding of biases.

    Channels whose bias would pass :data:`LARGEST_BIAS_CODE` (gamma near zero, dead weights) get zero codes and a scale
    that holds their bias: what the convolution could add there is at most 2^24 of those 2^30 steps, 1.6% of the bias.
    Binary weights have no zero: there the bias gets the largest code itself, and a sum of 2^13 signs beside it is
    nothing.

    Args:
        model: a network built from ``spec``; stays as it was.
        spec: what ``model`` is.

    Returns:
        The folded network, in eval mode, on the CPU.

    Raises:
        ExportError: a BatchNorm does not follow a convolution, so that it cannot be folded, or float32 cannot hold what
            folding gives; the layer is named.
    """
    if is_custom(spec.architecture):
        # Not before it is needed: reading graphs loads sympy, which takes as long as torch.
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
    entering = {} if spec.widths.is_float else _entering(folded, example.cpu())
    with torch.no_grad():
        for name, layer in model.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear | SignNorm | PaddedShortcut):
                continue
            target: Any = folded.get_submodule(name)
            if isinstance(layer, PaddedShortcut):
                if name in entering:  # a convolution with the weight 1, whose bias is 0 in whatever unit
                    target.bias_quant.tensor_quant.scaling_impl.scale.fill_(entering[name].scale)
                    target.set_input_scale(entering[name].scale, largest_code=entering[name].largest)
                continue
            if isinstance(layer, SignNorm):
                affine, grid = _affine(layer), entering[name]
                target.set_affine(affine.gain, affine.shift, scale=grid.scale, lowest=grid.lowest, highest=grid.highest)
                continue
            affine = affines.get(name, _identity(layer))
            if spec.widths.is_float:
                _fold_float(layer, affine, target)
            else:
                _fold_quantized(layer, affine, target, entering[name])
                target.set_input_scale(entering[name].scale, largest_code=entering[name].largest)
    _check_finite(folded)
    return folded.eval()


def _check_finite(folded: nn.Module) -> None:
    """Refuse layers whose folded weights or scales no float32 holds.

    Raises:
        ExportError: there is one; it is named.
    """
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
    """Convolution name -> the BatchNorm that takes its output, found by following the tensors of one forward pass."""
    made_by: dict[int, str] = {}
    keep: list[Tensor] = []  # an id is only unique while its tensor lives
    pairs: dict[str, Affine] = {}
    handles = []

    def after_conv(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            keep.append(output)
            made_by[id(output)] = name

        return hook

    def before_norm(name: str, norm: _BatchNorm) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            conv = made_by.get(id(inputs[0]))
            if conv is None or conv in pairs:
                raise ExportError(f"{name} does not follow a convolution of its own; such a BatchNorm cannot be folded")
            pairs[conv] = _affine(norm)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_conv(name)))
        elif isinstance(module, _BatchNorm) and not isinstance(module, SignNorm):
            handles.append(module.register_forward_pre_hook(before_norm(name, module)))
    try:
        with torch.no_grad(), running_statistics(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return pairs


@dataclass(frozen=True)
class Grid:
    """The values that a quantized tensor can take: scale * code, for codes from lowest to highest."""

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


def _entering(folded: nn.Module, example: Tensor) -> dict[str, Grid]:
    """Layer name -> grid of the quantized tensor that enters it."""
    grids: dict[str, Grid] = {}
    handles = []
    for name, module in folded.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | ChannelThresholds):

            def hook(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                x = inputs[0]
                grids[name] = Grid.of(float(x.scale), bits=int(x.bit_width), signed=bool(x.signed))

            handles.append(module.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            folded(example)
    finally:
        for handle in handles:
            handle.remove()
    return grids


def _fold_float(layer: nn.Conv2d | nn.Linear, affine: Affine, target: nn.Module) -> None:
    weight = layer.weight.detach().cpu().double()
    shaped = affine.gain.reshape(-1, *[1] * (weight.dim() - 1))
    target.weight.copy_(weight * shaped)  # type: ignore[operator]
    target.bias.copy_(affine.shift)  # type: ignore[operator]


def bias_steps(largest_weight: int, entering: Grid) -> int:
    """How many steps of the bias make one of the accumulator (input scale * weight scale).

    The integer file stores every weight code times this number in the 8 bits it takes anyway, which makes the
    accumulator's step as fine as the bias': as many as fit in 127, but never so many that two products of an activation
    and a weight pass 2^15 - 1, where onnxruntime's AVX2 kernels saturate.
    """
    span = entering.highest - entering.lowest  # of the codes as uint8
    return max(min(127 // largest_weight, (2**15 - 1) // (2 * span * largest_weight)), 1)


def _fold_quantized(layer: Any, affine: Affine, target: Any, entering: Grid) -> None:
    quantized = layer.quant_weight()
    # Not Brevitas' int(), which takes a binary layer of one sign for a fault.
    codes = (quantized.value / quantized.scale).round().detach().cpu().double()
    shape = (-1, *[1] * (codes.dim() - 1))
    bits = int(quantized.bit_width)
    largest_weight = 1 if bits == 1 else 2 ** (bits - 1) - 1
    # A linear layer may be written as MatMul and Add, whose weights no lowering pass multiplies, and onnxruntime (1.32)
    # makes a QGemm of both without asking in which unit the bias counts.
    steps = 1 if isinstance(layer, nn.Linear) else bias_steps(largest_weight, entering)
    scale = quantized.scale.detach().cpu().double().flatten().expand(codes.shape[0]) * affine.gain.abs()
    bias_codes = affine.shift.abs() * steps / (entering.scale * scale)
    # Below this the accumulator's scale is no normal float32: it would lose digits or become 0, and the codes NaN.
    smallest = torch.finfo(torch.float32).tiny * steps / min(entering.scale, 1.0)
    constant = (bias_codes > LARGEST_BIAS_CODE) | (scale < smallest)
    codes[constant] = 1.0 if bits == 1 else 0.0
    bias_code = LARGEST_BIAS_CODE if bits == 1 else CONSTANT_BIAS_CODE
    holds_bias = affine.shift.abs() * steps / (entering.scale * bias_code)
    nothing = torch.full_like(scale, NO_BIAS_SCALE if bits == 1 else 1.0)
    scale = torch.where(constant, torch.where(holds_bias >= smallest, holds_bias, nothing), scale)
    stored_scale = scale.float().reshape(shape)
    target.weight_quant.tensor_quant.scaling_impl.scale.copy_(stored_scale)
    target.bias_quant.tensor_quant.scaling_impl.scale.copy_(entering.scale * scale / steps)
    signs = torch.where(constant, 1.0, affine.gain.sign()).reshape(shape)
    target.weight.copy_((codes * signs).float() * stored_scale)
    target.bias.copy_(_on_grid(affine.shift.float(), target.bias_quant.tensor_quant.scaling_impl.scale))


def _on_grid(bias: Tensor, scale: Tensor) -> Tensor:
    """Biases (C,) float32 that are whole multiples of ``scale`` also when float32 divides them by it.

    A code of millions times its scale, divided by the scale, may come out half a step beside the code; exporters take
    that for a bias that was never quantized. A neighbouring code, 1e-7 of the bias away, does not.
    """
    codes = (bias / scale).round()
    for step in (1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8):
        moved = codes + step
        stays = codes * scale / scale == codes
        codes = torch.where(stays | (moved * scale / scale != moved), codes, moved)
    return torch.where(codes.abs() < SMALL_BIAS_CODE, bias, codes * scale)


def fold_layer(layer: Any, norm: _BatchNorm | None, target: Any, quantizer: Any) -> None:
    """Fill one layer of a user's own folded network: see :class:`robustq.models.fx.fold.FoldLayer`."""
    affine = _identity(layer)
    if norm is not None:
        behind = _affine(norm)
        # A bias of the layer's own passes through the BatchNorm as well.
        affine = Affine(behind.gain, behind.shift + behind.gain * affine.shift)
    if quantizer is None:
        _fold_float(layer, affine, target)
        return
    signed = bool(quantizer.is_signed)
    _fold_quantized(
        layer, affine, target, Grid.of(quantizer.scale().item(), bits=int(quantizer.bit_width()), signed=signed)
    )
