"""Weights quantized once for all passes of a training step: between two steps of the optimiser they do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import nn


class SharedWeights:
    """The quantized weights of one network.

    Args:
        model: any network; layers that are not Brevitas' stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._answers = [
            _Answer(module)
            for module in model.modules()
            if isinstance(module, QuantWeightBiasInputOutputLayer) and module.weight_quant.is_quant_enabled
        ]

    @contextmanager
    def quantized_once(self) -> Iterator[None]:
        """Within it every layer answers with the weights as they are quantized now.

        All passes share one graph from the weights to what they became, so that only one backward pass may go through
        it; a pass in which the weights ask for no gradient gets them without it.
        """
        try:
            with torch.enable_grad():
                for answer in self._answers:
                    answer.quantize()
            yield
        finally:
            for answer in self._answers:
                answer.withdraw()


class _Answer:
    """What one layer answers with. It lives as long as the layer does: a compiled network would be compiled anew for an
    object that it has not seen.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._quantized: Any = None
        self._plain: Any = None

    def quantize(self) -> None:
        self._quantized = self._layer.quant_weight()
        self._plain = self._quantized.detach()
        self._layer.quant_weight = self

    def withdraw(self) -> None:
        vars(self._layer).pop("quant_weight", None)  # it hid the method of its class
        self._quantized = self._plain = None

    def __call__(self, quant_input: Any = None) -> Any:
        wanted = self._layer.weight.requires_grad and torch.is_grad_enabled()
        return self._quantized if wanted else self._plain
