"""A keeper without a disk: it writes and reads the states as a file would, in memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch


class MemoryCheckpointer:
    """Keeps the last state as bytes, counts what it got, and calls `on_save` after each one."""

    def __init__(self, on_save: Callable[[dict[str, Any], bool, bool], None] | None = None) -> None:
        self._on_save = on_save
        self.bytes = b""
        self.saved: list[tuple[int, int, bool, bool]] = []
        """(epochs ended, steps since, epoch_ended, is_best) of each save."""

    def save(self, state: dict[str, Any], *, epoch_ended: bool, is_best: bool) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        self.bytes = file.getvalue()
        self.saved.append((state["standing"]["epoch"], state["standing"]["step"], epoch_ended, is_best))
        if self._on_save is not None:
            self._on_save(state, epoch_ended, is_best)

    def load(self) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(io.BytesIO(self.bytes), weights_only=True)
        return state
