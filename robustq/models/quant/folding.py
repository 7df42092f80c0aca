"""BatchNorm folded into weights and biases: the network that integer arithmetic can run, and the reference for parity.

With one scale per output channel the fold is exact for the weights: codes stay, a channel's scale is multiplied by
|gamma| / sigma, and a negative gamma flips the signs of the codes. Only the bias is rounded, to an int32 in steps that
are an integer fraction of the accumulator's (input scale * weight scale). A BatchNorm in front of a sign becomes one
threshold per channel, exactly.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from robustq.errors import ExportError
from robustq.models.batch_norm import norm_inputs
from robustq.models.fx.factory import is_custom
from robustq.models.quant.binary import ChannelThresholds, SignNorm
from robustq.models.quant.folded_layers import Grid, affine, fold_layer, scale_of
from robustq.models.resnet import PaddedShortcut
from robustq.models.spec import ModelSpec, build_model


def fold(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """The network without BatchNorm that answers as ``model`` in eval mode, up to the rounding of biases.

    A channel whose bias code would pass 2^30 (gamma near zero, dead weights) becomes constant: zero weight codes and a
    scale that can hold its bias. That drops at most 2^24 of 2^30 steps, 1.6% of the bias. Binary weights cannot be
    zero: there the bias gets the largest code, beside which a sum of 2^13 signs is nothing.

    ``model`` was built from ``spec`` and stays as it was. The folded network is in eval mode, on the CPU. ExportError
    names a BatchNorm that does not follow a convolution of its own, or a layer with a folded weight or scale that
    float32 cannot hold.
    """
    if is_custom(spec.architecture):
        # Imported here: graphs load sympy, which takes as long as torch.
        from robustq.models.fx.fold import fold_graph

        folded: nn.Module = fold_graph(model)
    else:
        folded = _fold_resnet(model, spec)
    for name, layer in folded.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not all(
            bool(tensor.isfinite().all()) for tensor in [*layer.parameters(), *layer.buffers()]
        ):
            raise ExportError(
                f"{name}: float32 cannot hold its weights or scales once BatchNorm is folded in; look for a huge "
                "weight or a variance near 0 in the BatchNorms before and behind it"
            )
    return folded.eval()


@torch.no_grad()
def _fold_resnet(model: nn.Module, spec: ModelSpec) -> nn.Module:
    example = torch.zeros(1, spec.channels, spec.image_size, spec.image_size)
    norms = _norms_behind(model, example.to(next(model.parameters()).device))
    folded = build_model(spec, folded=True)
    names = folded.state_dict().keys()
    own = {name: value.detach().cpu() for name, value in model.state_dict().items() if name in names}
    folded.load_state_dict(own, strict=False)
    grids = {} if spec.widths.is_float else _input_grids(folded, example)
    for name, layer in model.named_modules():
        grid = grids.get(name)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fold_layer(layer, norms.get(name), folded.get_submodule(name), grid)
        elif isinstance(layer, SignNorm | PaddedShortcut) and grid is not None:
            target: Any = folded.get_submodule(name)
            if isinstance(layer, SignNorm):
                target.set_affine(*affine(layer), scale=grid.scale, lowest=grid.lowest, highest=grid.highest)
            else:  # a convolution with weights 0 and 1, and with bias 0 in any unit
                scale_of(target.bias_quant).fill_(grid.scale)
                target.set_input_scale(grid.scale, largest_code=max(-grid.lowest, grid.highest))
    return folded


def _norms_behind(model: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """Convolution name -> the BatchNorm behind it."""
    found: dict[str, nn.Module] = {}
    for name, conv in norm_inputs(model, example):
        norm = model.get_submodule(name)
        if isinstance(norm, SignNorm):
            continue
        if conv is None or conv in found:
            raise ExportError(f"{name} does not follow a convolution of its own; such a BatchNorm cannot be folded")
        found[conv] = norm
    return found


def _input_grids(folded: nn.Module, example: Tensor) -> dict[str, Grid]:
    """Layer name -> grid of its quantized input."""
    names: dict[nn.Module, str] = {module: name for name, module in folded.named_modules()}
    grids: dict[str, Grid] = {}

    def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        (x,) = inputs
        grids[names[layer]] = Grid.of(float(x.scale), bits=int(x.bit_width), signed=bool(x.signed))

    with ExitStack() as hooks:
        for module in names:
            if isinstance(module, nn.Conv2d | nn.Linear | ChannelThresholds):
                hooks.enter_context(module.register_forward_pre_hook(record))
        folded(example)
    return grids
