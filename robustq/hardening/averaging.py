"""Exponential moving average of the weights, evaluated and saved in their place.

The average along a run lies in a flatter region than its end and is more robust (arXiv:1803.05407; for adversarial
training arXiv:2010.03593, section 5.1). BatchNorm's running statistics cannot be averaged; those of the averaged
weights are estimated on training images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from robustq.data import Batch
from robustq.hardening.state import restore

IMAGES = 4096
"""Training images for BatchNorm's statistics; more changes a channel's mean by less than 1/64 of its deviation."""


class WeightAverage:
    """a <- d a + (1 - d) w after each optimizer step, d = min(decay, (1 + t) / (10 + t)) at step t.

    The smaller d of the first steps reduces the share of the initial weights, which matters in short runs.

    ``torch.optim.swa_utils.AveragedModel`` copies the network, and with it Brevitas' quantizers, which state dicts and
    calibration then do not find (see :func:`robustq.hardening.state.restore`).

    Learned activation thresholds are averaged too, as logarithms. ``decay`` in (0, 1) is d of a long run.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._averages = {name: value.detach().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        weights = dict(model.named_parameters())
        torch._foreach_lerp_([self._averages[name] for name in weights], list(weights.values()), 1.0 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module, batches: Iterable[Batch]) -> Iterator[None]:
        """Within it ``model`` has the averaged weights, and BatchNorm the mean statistics of the augmented training
        images in ``batches``; afterwards the same bits as before. The model's mode does not change.
        """
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        try:
            with torch.no_grad():
                for name, value in model.named_parameters():
                    value.copy_(self._averages[name])
            update_bn((batch.x for batch in batches), model)
            yield
        finally:
            restore(model, before)

    def state_dict(self) -> dict[str, Any]:
        """The averages and the number of steps."""
        return {"steps": self.steps, "averages": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.steps = int(state["steps"])
        for name, value in self._averages.items():
            value.copy_(state["averages"][name])
