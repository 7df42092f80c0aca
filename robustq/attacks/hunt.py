"""The bookkeeping of attacks that stop at success: which images of a batch still stand, and the worst picture of each.

The convention is AutoAttack's (arXiv:2003.01690): an image that the model misclassifies without attack is left alone,
and one that broke is not attacked again, so that the cost falls as images fall.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustq.attacks.ascent import Model
from robustq.attacks.losses import margin
from robustq.attacks.spending import asked_about
from robustq.errors import UsageError

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(pictures (n, C, H, W), their rows in the batch (n,) int64) -> (n,) bool: whether each one counts as broken.

Asked only about pictures that the attacked model misclassifies. It lets the one who counts have the last word: an
evaluation counts rounded pictures, and on the deployed file. Without one the attacked model's own answer counts.
"""


class Hunt:
    """A batch under attack; asks the model once about the clean images.

    Args:
        model: images -> logits.
        x: (N, C, H, W) float in [0, 1].
        y: (N,) int64 labels.
        criterion: what counts as broken, where the model's own answer does not.
        stop: whether broken images leave the hunt.

    Attributes:
        x_adv: (N, C, H, W), per image a picture that broke it if there is one, and of these or else of all that were
            offered the one with the highest margin; the clean image itself counts as offered.
        broken: (N,) bool.
        standing: (n,) int64, the rows that are still to be attacked: all but the broken ones, and without `stop` all
            but those that were broken before the attack.
        clean_logits: (N, K).

    Raises:
        UsageError: a model with fewer than two classes, or without one row of logits per image.
    """

    @torch.no_grad()
    def __init__(
        self, model: Model, x: Tensor, y: Tensor, *, criterion: Criterion | None = None, stop: bool = True
    ) -> None:
        self.model, self.x, self.y = model, x.detach(), y
        self.criterion, self.stop = criterion, stop
        self.clean_logits = model(self.x).to(x.device)
        if self.clean_logits.ndim != 2 or len(self.clean_logits) != len(x) or self.clean_logits.shape[1] < 2:
            raise UsageError(
                f"the model answered {len(x)} images with a tensor of shape {tuple(self.clean_logits.shape)}; attacks "
                "need logits (images, classes) of at least 2 classes"
            )
        rows = torch.arange(len(x), device=x.device)
        self.x_adv = self.x.clone()
        self.margins = _margins(self.clean_logits, y)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.broken = self._breaks(rows, self.x, self.clean_logits)
        self.standing = rows[~self.broken]

    @torch.no_grad()
    def offer(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        """Take note of pictures and the model's answers to them.

        Args:
            rows: (n,) int64, of the batch, each at most once.
            x_adv: (n, C, H, W), inside the ball.
            logits: (n, K), the model's answers to them.

        Returns:
            (n,) bool, the rows that the attack goes on with.
        """
        margins = _margins(logits, self.y[rows])
        breaks = self._breaks(rows, x_adv, logits)
        before = self.broken[rows]
        better = (breaks & ~before) | ((breaks == before) & (margins > self.margins[rows]))
        taken = rows[better]
        self.x_adv[taken] = x_adv[better]
        self.margins[taken] = margins[better]
        if not bool(breaks.any()) or not self.stop:
            self.broken[rows] = before | breaks
            return torch.ones_like(breaks)
        self.broken[rows] = before | breaks
        self.standing = self.standing[~self.broken[self.standing]]
        return ~breaks

    @torch.no_grad()
    def settle(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> None:
        """Offer pictures that are the attack's answer for images that stand, whatever their margins.

        Args:
            rows, x_adv, logits: as for `offer`.
        """
        stood = ~self.broken[rows]
        self.margins[rows[stood]] = -torch.inf
        self.offer(rows, x_adv, logits)

    def model_for(self, rows: Tensor) -> Model:
        """The model to ask about these rows."""
        return asked_about(self.model, rows)

    @torch.no_grad()
    def ask(self, rows: Tensor, pictures: Tensor) -> Tensor:
        """The model's answers (n, K) to pictures (n, C, H, W), without gradient and on the images' device.

        A judge outside PyTorch answers on the CPU, wherever the images are.
        """
        return self.model_for(rows)(pictures).to(self.x.device)

    def _breaks(self, rows: Tensor, x_adv: Tensor, logits: Tensor) -> Tensor:
        wrong = misclassified(logits, self.y[rows])
        if self.criterion is None or not bool(wrong.any()):
            return wrong
        asked = wrong.clone()
        wrong[asked] = self.criterion(x_adv[asked], rows[asked]).to(wrong.device)
        return wrong


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: another class wins (the lowest of several equal ones does), or a logit is NaN.

    A model that answers NaN has not classified the image; the judge counts alike (`evaluation.accuracy.predict`).
    """
    return (logits.argmax(dim=1) != y) | logits.isnan().any(dim=1)


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    """The margin, infinite for NaN logits and for infinite ones that cancel: nothing is worse for a model."""
    return torch.nan_to_num(margin(logits, y), nan=torch.inf)
