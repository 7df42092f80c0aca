"""Logits at the start of a single-step attack, which both the attack and the loss use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustq.hardening.methods.method import attack_generation, batch_norm_mode


class StartLogits:
    """Logits at the start, computed once where BatchNorm allows it.

    In eval mode BatchNorm's backward pass needs the running statistics of its forward pass, which the training pass
    changes in between: the logits are then computed again behind that pass.

    Args:
        batch_norm: mode of BatchNorm in the pass of the start (:data:`.settings.BATCH_NORM_MODES`).
        differentiated: whether the loss has a gradient through these logits.
    """

    def __init__(self, model: nn.Module, batch_norm: str, *, differentiated: bool = True) -> None:
        self.model, self.batch_norm, self.differentiated = model, batch_norm, differentiated
        self._start = torch.empty(0)
        self._logits: Tensor | None = None

    @property
    def keeps_graph(self) -> bool:
        """Whether one pass serves attack and loss."""
        return self.differentiated and self.batch_norm != "eval"

    def gradient(self, start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of ``loss`` of the logits (B, K) with respect to the images ``start`` (B, C, H, W)."""
        start = start.detach().requires_grad_()
        mode = batch_norm_mode if self.keeps_graph else attack_generation
        with mode(self.model, self.batch_norm):
            logits = self.model(start)
            (gradient,) = torch.autograd.grad(loss(logits), start, retain_graph=self.keeps_graph)
        self._start = start.detach()
        self._logits = logits if self.keeps_graph else None if self.differentiated else logits.detach()
        return gradient

    def take(self) -> Tensor:
        """The logits for the loss. The first call gives those of :meth:`gradient`, so the weights must be the same. If
        they have a gradient, further calls compute them again (with ``train`` also the running statistics).
        """
        logits = self._logits
        if logits is None:
            with batch_norm_mode(self.model, self.batch_norm):
                logits = self.model(self._start)
        elif self.differentiated:
            self._logits = None  # its graph allows one backward pass
        return logits
