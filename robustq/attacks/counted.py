"""Counts of a model's queries and gradients, per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from robustq.errors import UsageError

Answer = TypeVar("Answer")
Other = TypeVar("Other")


class Counted(Generic[Answer]):
    """A model that counts its queries and gradients per image; its answers are those of the model inside.

        model = Counted(network, images=len(x))
        x_adv = apgd(model, x, y, epsilon=8 / 255)
        model.gradient_steps.sum()

    The model may be any callable on images, and ``images`` is their number N. A pass counts as a gradient step when
    autograd watches the images.

    Attributes:
        queries, gradient_steps: (N,) int64, forward passes without and with gradient, on the device of the images.
    """

    def __init__(self, model: Callable[[Tensor], Answer], *, images: int) -> None:
        self.model = model
        self._counters = _Counters(torch.zeros(images, dtype=torch.int64), torch.zeros(images, dtype=torch.int64))
        self._rows = torch.arange(images)

    @property
    def queries(self) -> Tensor:
        """Forward passes without gradient."""
        return self._counters.queries

    @property
    def gradient_steps(self) -> Tensor:
        """Forward passes with gradient."""
        return self._counters.gradient_steps

    def __call__(self, x: Tensor) -> Answer:
        """(n, C, H, W) -> the model's answer; UsageError unless n is N, or the number of rows given to `for_rows`."""
        if len(x) != len(self._rows):
            raise UsageError(
                f"the model got {len(x)} images and counts {len(self._rows)}; an attack that drops images from its "
                "batch calls model_for(model, rows)"
            )
        rows = self._rows_on(x.device)
        self._counters.move(x.device)
        counts = self.gradient_steps if x.requires_grad and torch.is_grad_enabled() else self.queries
        counts[rows] += 1
        return self.model(x)

    def for_rows(self, rows: Tensor) -> Counted[Answer]:
        """The same counters for some of the images: rows (n,) int64 of this one's, or a bool mask."""
        part = self.sharing(self.model)
        part._rows = self._rows_on(rows.device)[rows]
        return part

    def sharing(self, model: Callable[[Tensor], Other]) -> Counted[Other]:
        """Another callable with the same counters, such as the features of the same network."""
        other = Counted(model, images=0)
        other._counters, other._rows = self._counters, self._rows
        return other

    def _rows_on(self, device: torch.device) -> Tensor:
        self._rows = self._rows.to(device)
        return self._rows


@dataclass
class _Counters:
    """Counts of one batch, on the device of its images: a count on the CPU would make the host wait in each pass."""

    queries: Tensor
    gradient_steps: Tensor

    def move(self, device: torch.device) -> None:
        self.queries, self.gradient_steps = self.queries.to(device), self.gradient_steps.to(device)


def model_for(model: Callable[[Tensor], Answer], rows: Tensor) -> Callable[[Tensor], Answer]:
    """The model for these rows of the batch: a `Counted` counts them as theirs, other models stay as they are."""
    return model.for_rows(rows) if isinstance(model, Counted) else model
