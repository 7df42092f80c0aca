"""What the layers of a network are made of, read from the network itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from robustq.models.quantizers import FLOAT_BITS


def describe_layers(model: nn.Module) -> list[dict[str, Any]]:
    """One row per convolution and linear layer, in order: ``name kind shape weight_bits``."""
    return [
        {
            "name": name,
            "kind": "conv" if isinstance(layer, nn.Conv2d) else "linear",
            "shape": list(layer.weight.shape),
            "weight_bits": weight_bits(layer),
        }
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]


def weight_bits(layer: nn.Module) -> int:
    """Width of a layer's weights; 32 where nothing quantizes them."""
    quantizer: Any = getattr(layer, "weight_quant", None)
    if quantizer is None or not quantizer.is_quant_enabled:
        return FLOAT_BITS
    return int(quantizer.bit_width())
