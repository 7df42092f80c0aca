"""Logits and an inner feature of one forward pass, taken by hooks so that any network can be aligned."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.state_dict import feature_layer_of

FeatureName = Literal["pooled", "unpooled", "conv", "logits"]
FEATURES: tuple[str, ...] = ("pooled", "unpooled", "conv", "logits")


class FeatureTap:
    """Calls a network and returns one of its features beside the logits.

    Args:
        model: a network whose global pooling is known (:func:`robustq.models.state_dict.feature_layer_of`):
            ``avgpool`` in our networks, found on the graph of a user's own.
        feature: ``pooled``: the tensor that enters global pooling, average-pooled (B, C); ``unpooled``: the same
            tensor, flattened (B, C*H*W); ``conv``: the last convolution's own output, flattened; ``logits``: the
            answers themselves.

    Raises:
        UsageError: an unknown feature, or a network without the layer.
    """

    def __init__(self, model: nn.Module, feature: str) -> None:
        if feature not in FEATURES:
            raise UsageError(f"features = '{feature}' is unknown; known: {', '.join(FEATURES)}")
        self.model = model
        self.feature = feature
        modules = dict(model.named_modules())
        layer = feature_layer_of(model)
        self._pooling = None if layer is None else modules[layer]
        if feature in ("pooled", "unpooled") and self._pooling is None:
            raise UsageError(
                f"the network has no pooling to take '{feature}' features in front of; "
                "name a layer they enter with --feature-layer"
            )
        # A projection shortcut is registered after its block's second convolution but runs beside it, not last.
        convolutions = [m for name, m in modules.items() if isinstance(m, nn.Conv2d) and "downsample" not in name]
        self._last_conv = convolutions[-1] if convolutions else None
        if feature == "conv" and self._last_conv is None:
            raise UsageError(f"{type(model).__name__} has no convolution to take '{feature}' features from")

        self._caught = _Caught()
        if feature in ("pooled", "unpooled") and self._pooling is not None:
            hook = self._pooling.register_forward_pre_hook(_entering(self._caught))
        elif feature == "conv" and self._last_conv is not None:
            hook = self._last_conv.register_forward_hook(_leaving(self._caught))
        else:
            return
        weakref.finalize(self, hook.remove)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> logits (B, K) and features (B, D), both with gradient."""
        caught = self._caught
        caught.wanted = True
        try:
            logits = self.model(x)
            feature = caught.tensor
        finally:
            caught.wanted, caught.tensor = False, None
        if self.feature == "logits":
            return logits, logits
        assert feature is not None  # every pass goes through the layer, and past its hook
        if feature.dtype == torch.bfloat16:  # as a step in that precision has it
            feature = feature.float()
        if self.feature == "pooled":
            return logits, feature.mean(dim=(2, 3))
        return logits, feature.flatten(1)


@dataclass
class _Caught:
    """What a hook has seen while somebody wanted it; the last time, where a layer is called more than once.

    Hooks stay where they are as long as their tap: a compiled network does not see those that come and go.
    """

    wanted: bool = False
    tensor: Tensor | None = None


def _entering(caught: _Caught) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if caught.wanted:
            caught.tensor = inputs[0]

    return hook


def _leaving(caught: _Caught) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        if caught.wanted:
            caught.tensor = output

    return hook
