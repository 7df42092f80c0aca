"""AWP, adversarial weight perturbation (Wu, Xia & Wang 2020, arXiv:2004.05884).

With v_l = gamma ||w_l|| g_l / ||g_l|| for each layer l, g the gradient of the loss at w (section 4.1, with one step, as
in the paper's experiments), w <- (w + v) - lr * gradient(w + v) - v: the gradient is taken at w + v, the rest of the
optimizer's step at w.

As in the authors' code, only the weights of convolutions and linear layers are perturbed, the images are generated once
at w, and the pass for v does not update BatchNorm's running statistics. v ascends the method's own loss: the
cross-entropy for PGD training and the sum of both terms for TRADES, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustq.models.batch_norm import batch_statistics

TINY = 1e-20
"""Added to ||g||, so that v = 0 for a layer without gradient; small enough for products in float32."""


@contextmanager
def adversarial_weights(model: nn.Module, loss: Callable[[], Tensor], *, gamma: float) -> Iterator[None]:
    """Within it ``model`` has the weights w + v; afterwards the same bits as before.

    Args:
        model: in train mode.
        loss: scalar loss of the batch at the current weights, with gradient.
        gamma: ||v_l|| / ||w_l||; the paper: 0.005 for TRADES, 0.01 for PGD training.
    """
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    with batch_statistics(model):
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.add_(gradient * (gamma * weight.norm() / (gradient.norm() + TINY)))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
