"""Weights that are quantized once for all passes of a training step: only the optimizer changes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import nn


class SharedWeights:
    """The quantized weights of one network; layers other than Brevitas' stay as they are."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            _QuantizedOnce(module)
            for module in model.modules()
            if isinstance(module, QuantWeightBiasInputOutputLayer) and module.weight_quant.is_quant_enabled
        ]

    def quantized_once(self) -> AbstractContextManager[None]:
        """Quantize all weights now and use the result in every pass inside the `with`.

        The passes share one graph from the weights to their quantized values, so only one backward pass may go through
        it. Passes without gradients for the weights get the values detached.
        """
        return replaced(self._layers)


@contextmanager
def replaced(replacements: Sequence[Any]) -> Iterator[None]:
    """Put objects in the place of methods of layers inside the `with`: each has ``begin`` and ``end``.

    They live as long as their layers: torch.compile would recompile the network for new objects.
    """
    try:
        for replacement in replacements:
            replacement.begin()
        yield
    finally:
        for replacement in replacements:
            replacement.end()


class _QuantizedOnce:
    """Replaces ``quant_weight`` of one layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._quantized: Any = None
        self._detached: Any = None

    @torch.enable_grad()
    def begin(self) -> None:
        self._quantized = self._layer.quant_weight()
        self._detached = self._quantized.detach()
        self._layer.quant_weight = self

    def end(self) -> None:
        vars(self._layer).pop("quant_weight", None)  # it hid the method of the class
        self._quantized = self._detached = None

    def __call__(self, quant_input: Any = None) -> Any:
        recorded = self._layer.weight.requires_grad and torch.is_grad_enabled()
        return self._quantized if recorded else self._detached
