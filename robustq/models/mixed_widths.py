"""Bit widths of single layers: layer name -> bits, in place of the network's widths.

The name of a convolution or linear layer sets the width of its weights, the name of an activation layer
(``layer1.0.relu1``) that of its codes. Works on any network of Brevitas layers, before calibration.
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
from robustq.models.layers import same_shape, weight_quantizer
from robustq.models.quant.folded_layers import BiasQuant, FixedScaling
from robustq.models.quant.quantizers import learned_thresholds
from robustq.tables import read_table

WEIGHT_BITS = (8, 4, 3, 2, 1)
ACT_BITS = (8, 4, 3, 2)


def adjustable_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Layer name -> allowed widths, for every layer whose width may be set.

    Branches of residual sums, pooled features and pixels stay 8 bit, binary activations 1 bit.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, qnn.QuantConv2d | qnn.QuantLinear):
            found[name] = WEIGHT_BITS
        elif isinstance(module, qnn.QuantReLU) and learned_thresholds(module):
            found[name] = ACT_BITS
    return found


def set_layer_bits(model: nn.Module, layer_bits: Mapping[str, int]) -> None:
    """Rebuild the quantizers of the named layers in place; weights stay.

    UsageError names all layers that do not exist (with the nearest name) or cannot have their width.
    """
    known, errors = adjustable_layers(model), []
    for name, bits in layer_bits.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            errors.append(f"no layer '{name}' whose width can be set" + (f" (nearest: {near[0]})" if near else ""))
        elif bits not in known[name]:
            errors.append(f"{name} = {bits}: choose one of {', '.join(map(str, known[name]))}")
    if errors:
        raise UsageError("bits per layer: " + "; ".join(errors))
    for name, bits in layer_bits.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, qnn.QuantReLU):
            # As Brevitas changes a width: the injector with one value changed, and a new quantizer from it.
            module.act_quant.quant_injector = module.act_quant.quant_injector.let(bit_width=bits)
            module.act_quant.init_tensor_quant()
        else:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _with_weight_bits(module, bits))


def _with_weight_bits(layer: Any, bits: int) -> Any:
    """A new layer of the same type with the same weights."""
    folded = isinstance(layer.weight_quant.tensor_quant.scaling_impl, FixedScaling)
    options = {"bias_quant": BiasQuant if folded else None, **weight_quantizer(bits, folded=folded)}
    made = same_shape(layer, type(layer), bias=layer.bias is not None, **options)
    with torch.no_grad():
        made.weight.copy_(layer.weight)
        if layer.bias is not None:
            made.bias.copy_(layer.bias)
    return made


def read_layer_bits(path: Path) -> dict[str, int]:
    """The table of a TOML file: ``"layer1.0.conv1" = 8``, one line a layer.

    UsageError for no such file, no TOML, no entries, or values that are not integers (all are named).
    """
    bits = _flat(read_table(path, tomllib.loads, error=UsageError))
    if not bits:
        raise UsageError(f'--bits-per-layer {path} names no layer; write lines such as "layer1.0.conv1" = 8')
    wrong = [f"{name} = {value!r}" for name, value in bits.items() if type(value) is not int]
    if wrong:
        raise UsageError(f"--bits-per-layer {path}: bits must be integers ({', '.join(wrong)})")
    return bits


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names: ``layer1.0.conv1 = 8`` without quotes is a table of tables in TOML."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= {f"{name}.{rest}": bits for rest, bits in _flat(value).items()}
        else:
            found[name] = value
    return found
