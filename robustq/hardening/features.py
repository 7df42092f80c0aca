"""Logits and an inner feature of one forward pass, taken by hooks so that any network can be aligned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.feature_layer import feature_layer_of

FeatureName = Literal["pooled", "unpooled", "conv", "logits"]
FEATURES: tuple[str, ...] = ("pooled", "unpooled", "conv", "logits")


class FeatureTap:
    """Calls a network and returns one of its features beside the logits.

    Args:
        model: a network whose global pooling is known (:func:`robustq.models.feature_layer.feature_layer_of`):
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

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> logits (B, K) and features (B, D), both with gradient."""
        caught: list[Tensor] = []
        with self._watching(caught):
            logits = self.model(x)
        if self.feature == "logits":
            return logits, logits
        feature = caught[-1]
        if feature.dtype == torch.bfloat16:  # as a step in that precision has it
            feature = feature.float()
        if self.feature == "pooled":
            return logits, feature.mean(dim=(2, 3))
        return logits, feature.flatten(1)

    @contextmanager
    def _watching(self, caught: list[Tensor]) -> Iterator[None]:
        def entering(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            caught.append(inputs[0])

        def leaving(_: nn.Module, __: Any, output: Tensor) -> None:
            caught.append(output)

        handle = None
        if self.feature in ("pooled", "unpooled") and self._pooling is not None:
            handle = self._pooling.register_forward_pre_hook(entering)
        elif self.feature == "conv" and self._last_conv is not None:
            handle = self._last_conv.register_forward_hook(leaving)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
