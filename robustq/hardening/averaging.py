"""An exponential moving average of the weights, judged and kept in their place.

The average of the weights along a run lies in a flatter place than its end does and is more robust (arXiv:1803.05407;
for adversarial training arXiv:2010.03593, section 5.1). BatchNorm's running statistics belong to the weights of their
moment: averaged ones would fit no network, so those of the averaged weights are estimated anew from training images.
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
"""Training images for BatchNorm's statistics; more moves a channel's mean by less than 1/64 of its deviation."""


class Average:
    """a <- d a + (1 - d) w after each step of the optimiser, d = min(decay, (1 + t) / (10 + t)) at the t-th step.

    The smaller d at first lets the average forget the weights that the run began with; without it a run that is not
    many times longer than 1 / (1 - decay) steps would be judged by them.

    ``torch.optim.swa_utils.AveragedModel`` will not do: it copies the network, and Brevitas' quantizers with it, which
    are then other objects than those that state dicts and calibration know (see
    :func:`robustq.hardening.state.restore`), for one judgement an epoch.

    Args:
        model: whose parameters are averaged, learned activation thresholds (as logarithms) included.
        decay: d of a long run, in (0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._averages = {name: value.detach().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count a step of the optimiser."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in model.named_parameters():
            self._averages[name].lerp_(value, 1.0 - decay)

    @contextmanager
    def in_place_of(self, model: nn.Module, batches: Iterable[Batch]) -> Iterator[None]:
        """``model`` has the averaged weights inside the block, and after it the bits that it had before.

        Args:
            model: in train mode or not, which stays so.
            batches: training images, augmented as in training; BatchNorm takes the mean of their batches' statistics.
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
        """Put back what :meth:`state_dict` gave."""
        self.steps = int(state["steps"])
        for name, value in self._averages.items():
            value.copy_(state["averages"][name])
