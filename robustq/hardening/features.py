"""Logits and an inner feature of one forward pass, taken by hooks from any network."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.state_dict import feature_layer_of

FEATURES: tuple[str, ...] = ("pooled", "unpooled", "conv", "logits")


class FeatureTap:
    """Calls a network and returns one of its features beside the logits.

    Args:
        model: a network whose global pooling is known (:func:`robustq.models.state_dict.feature_layer_of`):
            ``avgpool`` in our networks, found in the graph of a custom model.
        feature: ``pooled``: the input of global pooling, average-pooled (B, C); ``unpooled``: the same tensor,
            flattened (B, C*H*W); ``conv``: the output of the last convolution, flattened; ``logits``: the logits.

    Raises:
        UsageError: an unknown feature, or a network without the layer.
    """

    def __init__(self, model: nn.Module, feature: str) -> None:
        if feature not in FEATURES:
            raise UsageError(f"features = '{feature}' is unknown; known: {', '.join(FEATURES)}")
        self.model = model
        self.feature = feature
        # Hooks stay as long as the tap: a compiled network ignores hooks that come and go.
        self._captured = captured = _Captured()
        if feature in ("pooled", "unpooled"):
            layer = feature_layer_of(model)
            if layer is None:
                raise UsageError(
                    f"the network has no pooling to take '{feature}' features in front of; "
                    "name a layer they enter with --feature-layer"
                )
            pooling = model.get_submodule(layer)
            handle = pooling.register_forward_pre_hook(lambda _, inputs: captured.set(inputs[0]))
        elif feature == "conv":
            # A projection shortcut is registered last but runs beside its block's second convolution.
            named = model.named_modules()
            convolutions = [one for name, one in named if isinstance(one, nn.Conv2d) and "downsample" not in name]
            if not convolutions:
                raise UsageError(f"{type(model).__name__} has no convolution to take '{feature}' features from")
            handle = convolutions[-1].register_forward_hook(lambda _, __, output: captured.set(output))
        else:
            return
        weakref.finalize(self, handle.remove)

    @classmethod
    def of_pooling(cls, model: nn.Module) -> FeatureTap | None:
        """The tap of ``pooled`` features; None where the global pooling is not known."""
        return None if feature_layer_of(model) is None else cls(model, "pooled")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> logits (B, K) and features (B, D), both with gradient."""
        captured = self._captured
        captured.active = True
        try:
            logits = self.model(x)
            feature = captured.tensor
        finally:
            captured.active, captured.tensor = False, None
        if self.feature == "logits":
            return logits, logits
        assert feature is not None  # every forward pass runs the layer and its hook
        if feature.dtype == torch.bfloat16:  # of a step in that precision
            feature = feature.float()
        if self.feature == "pooled":
            return logits, feature.mean(dim=(2, 3))
        return logits, feature.flatten(1)


@dataclass
class _Captured:
    """The tensor that a hook saw last during a call of its tap."""

    active: bool = False
    tensor: Tensor | None = None

    def set(self, tensor: Any) -> None:
        if self.active:
            self.tensor = tensor
