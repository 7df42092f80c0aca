"""What an attack spends: forward passes and gradients, counted per image, whatever the attack.

    model = Counted(network, images=len(x))
    x_adv = apgd(model, x, y, epsilon=8 / 255)
    model.gradient_steps.sum()

An attack that goes on with some of its images says so by `asked_about`, which changes nothing for other models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from robustq.errors import UsageError

Answer = TypeVar("Answer")
Other = TypeVar("Other")


class Counted(Generic[Answer]):
    """A model that counts what it is asked; its answers and gradients are those of the model inside.

    A pass counts as a gradient step when autograd watches the images, which attacks let it do for nothing else.

    Args:
        model: images -> logits, or any other callable on images.
        images: N, how many images the attack is given.

    Attributes:
        queries: (N,) int64, forward passes without gradient.
        gradient_steps: (N,) int64, forward passes with gradient.
    """

    def __init__(self, model: Callable[[Tensor], Answer], *, images: int) -> None:
        self.model = model
        self.queries = torch.zeros(images, dtype=torch.int64)
        self.gradient_steps = torch.zeros(images, dtype=torch.int64)
        self._rows = torch.arange(images)

    def __call__(self, x: Tensor) -> Answer:
        """(n, C, H, W) -> the model's answer; n is N, or as many as `for_rows` named.

        Raises:
            UsageError: another number of images.
        """
        if len(x) != len(self._rows):
            raise UsageError(
                f"the model was asked about {len(x)} images and counts {len(self._rows)}; an attack that goes on with "
                "some of its images calls asked_about(model, rows)"
            )
        spent = self.gradient_steps if x.requires_grad and torch.is_grad_enabled() else self.queries
        spent[self._rows] += 1
        return self.model(x)

    def for_rows(self, rows: Tensor) -> Counted[Answer]:
        """The same counters, for some of the images: indices (n,) into those of this one, or a bool mask."""
        part = self.sharing(self.model)
        part._rows = self._rows[rows.cpu()]
        return part

    def sharing(self, model: Callable[[Tensor], Other]) -> Counted[Other]:
        """Another callable on the same counters, such as the same network's features."""
        other = Counted(model, images=0)
        other.queries, other.gradient_steps, other._rows = self.queries, self.gradient_steps, self._rows
        return other


def asked_about(model: Callable[[Tensor], Answer], rows: Tensor) -> Callable[[Tensor], Answer]:
    """The model to ask about these rows of the batch: counted as theirs where the model counts, else the model."""
    return model.for_rows(rows) if isinstance(model, Counted) else model
