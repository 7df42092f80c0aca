"""Defensive Quantization, DQ in the ODG-Q paper's tables (Lin et al. 2019, arXiv:1904.08444).

Cross-entropy of clean images + beta / 2 * the sum over the layers of ||W W^T - I||_F^2, W the layer's weights as a
matrix with a row per output channel: nearly orthonormal layers do not amplify a perturbation. There are no adversarial
images, so an epoch costs little more than natural training (9.2 against 8.1 s in the paper's tables).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustq.hardening.methods.method import LossOutput, Method
from robustq.hardening.methods.settings import MethodSettings, number


@dataclass(frozen=True, kw_only=True)
class DqSettings(MethodSettings):
    """The ``[dq]`` table of a recipe.

    Args:
        orthogonality_weight: beta. The ODG-Q paper does not give it; the default is that of Parseval networks
            (arXiv:1704.08847), where the term comes from.
    """

    method = "dq"

    orthogonality_weight: float = number(3e-4, low=0, high=1000)


def orthogonality(model: nn.Module) -> Tensor:
    """Sum over all convolutions and linear layers of ||G - I||_F^2, G the smaller Gram matrix of W; a scalar.

    The penalties of W W^T and W^T W differ by |rows - columns| and have the same gradient; the smaller matrix can
    become I and is cheaper. Each group of a grouped convolution is a matrix of its own. W are the trained weights,
    before quantization.
    """
    penalties = []
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        rows = layer.weight.reshape(groups, layer.weight.shape[0] // groups, -1)
        wide = rows.shape[1] <= rows.shape[2]
        gram = rows @ rows.transpose(1, 2) if wide else rows.transpose(1, 2) @ rows
        penalties.append((gram - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)).square().sum())
    return torch.stack(penalties).sum()


class Dq(Method):
    """Natural training with an orthogonality penalty; the network must have a convolution or a linear layer.

    best.pt is chosen by clean accuracy.
    """

    settings: DqSettings

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
        """Cross-entropy + beta / 2 * the penalty."""
        logits = self.model(x_adv)
        task, penalty = self.cross_entropy(logits, y), orthogonality(self.model)
        return LossOutput.of(task, logits, weight=self.settings.orthogonality_weight / 2, orthogonality=penalty)
