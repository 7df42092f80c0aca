"""Sums over an epoch's batches, for its row in metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Totals:
    """Sums of the loss, its terms and the right answers, kept on the device so that no batch waits for the host.

    Args:
        device: where the batches are.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._device = device

    def add(self, loss: Tensor, terms: dict[str, Tensor], logits: Tensor, y: Tensor) -> None:
        """Count one batch: scalar means ``loss`` and ``terms``, ``logits`` (B, K), labels ``y`` (B,)."""
        values = {"loss": loss.detach(), **terms}
        for name, value in values.items():
            self._add(name, value * len(y))
        self._add("train_accuracy", (logits.argmax(dim=1) == y).sum())
        self._count += len(y)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value

    def means(self) -> dict[str, float]:
        """Means over the images so far, by name."""
        return {name: value.item() / self._count for name, value in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums as they stand."""
        return {"count": self._count, "sums": dict(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        self._count = int(state["count"])
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}
