"""Single layers at a bit width of their own: layer name -> bits over the network's widths.

A convolution's or linear layer's name sets the width of its weights, an activation layer's name (``layer1.0.relu1``)
that of its codes. It works on any network made of Brevitas layers, before calibration.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import torch
from torch import nn

from robustq.errors import UsageError
from robustq.models.layers import weight_quantizer
from robustq.models.quant.quantizers import BiasQuant, FixedScaling, LearnedThreshold

WEIGHT_BITS = (8, 4, 3, 2, 1)
ACT_BITS = (8, 4, 3, 2)


def adjustable_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Layer name -> the widths it may have, for every layer whose width may be set.

    Branches of residual sums, the pooled features and the pixels stay 8 bit; a binary activation keeps its two values.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, qnn.QuantConv2d | qnn.QuantLinear):
            found[name] = WEIGHT_BITS
        elif isinstance(module, qnn.QuantReLU) and _is_learned(module):
            found[name] = ACT_BITS
    return found


def set_layer_bits(model: nn.Module, layer_bits: Mapping[str, int]) -> None:
    """Rebuild the quantizers of the layers named, in place; weights stay.

    Raises:
        UsageError: a name that is no such layer (the nearest is given), or a width it cannot have; all faults at once.
    """
    if not layer_bits:
        return
    known = adjustable_layers(model)
    faults = []
    for name, bits in layer_bits.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            faults.append(f"no layer '{name}' whose width can be set" + (f" (nearest: {near[0]})" if near else ""))
        elif bits not in known[name]:
            faults.append(f"{name} = {bits}: choose one of {', '.join(map(str, known[name]))}")
    if faults:
        raise UsageError("bits per layer: " + "; ".join(faults))
    for name, bits in layer_bits.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, qnn.QuantReLU):
            # Brevitas' own way to another width: the injector with one value changed, and the quantizer made anew.
            module.act_quant.quant_injector = module.act_quant.quant_injector.let(bit_width=bits)
            module.act_quant.init_tensor_quant()
        else:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _with_weight_bits(module, bits))


def _with_weight_bits(layer: Any, bits: int) -> nn.Module:
    """The layer made anew, with the weights it had."""
    folded = isinstance(layer.weight_quant.tensor_quant.scaling_impl, FixedScaling)
    options = {"bias": layer.bias is not None, "bias_quant": BiasQuant if folded else None}
    options |= weight_quantizer(bits, folded=folded)
    if isinstance(layer, qnn.QuantLinear):
        made: Any = type(layer)(layer.in_features, layer.out_features, **options)
    else:
        made = type(layer)(  # a folded one counts whole numbers
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            **options,
        )
    with torch.no_grad():
        made.weight.copy_(layer.weight)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
    rebuilt: nn.Module = made
    return rebuilt


def read_layer_bits(path: Path) -> dict[str, int]:
    """The table of a TOML file: ``"layer1.0.conv1" = 8``, one line a layer.

    Raises:
        UsageError: no such file, no TOML, no entries, or a value that is not a whole number; all of these are named.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--bits-per-layer {path} cannot be read; give a TOML file of layer names and bits") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--bits-per-layer {path} is not valid TOML ({error})") from error
    bits = _flat(table)
    if not bits:
        raise UsageError(f'--bits-per-layer {path} names no layer; write lines such as "layer1.0.conv1" = 8')
    wrong = [f"{name} = {value!r}" for name, value in bits.items() if type(value) is not int]
    if wrong:
        raise UsageError(f"--bits-per-layer {path}: bits must be whole numbers ({', '.join(wrong)})")
    return bits


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """``layer1.0.conv1 = 8`` without quotes is a table of tables to TOML, and means the same here."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= {f"{name}.{rest}": bits for rest, bits in _flat(value).items()}
        else:
            found[name] = value
    return found


def _is_learned(module: nn.Module) -> bool:
    return any(isinstance(part, LearnedThreshold) for part in module.modules())
