"""N-FGSM: FGSM from an image with strong noise (de Jorge et al. 2022, arXiv:2202.01181, Algorithm 1).

eta = U(-2 epsilon, 2 epsilon); train on x + eta + epsilon sign(grad CE(x + eta)), which is not projected back into the
ball: the noise augments, and the missing projection keeps single-step training from collapsing (section 3 there).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustq.attacks.base import input_gradient
from robustq.attacks.losses import cross_entropy as per_image
from robustq.hardening.methods.method import AdversarialTraining, attack_generation
from robustq.hardening.methods.settings import MethodSettings, bn_mode, number


@dataclass(frozen=True, kw_only=True)
class NFgsmSettings(MethodSettings):
    """The ``[n-fgsm]`` table of a recipe.

    Args:
        noise_scale: k, half the width of the noise as a multiple of epsilon (the paper: 2).
        step_scale: the step as a multiple of epsilon (the paper: 1).
        batch_norm: during attack generation (:data:`.settings.BATCH_NORM_MODES`); ``train`` as in the paper's code.
    """

    method = "n-fgsm"

    noise_scale: float = number(2.0, low=0, high=1000)
    step_scale: float = number(1.0, low=0, high=1000, above=True)
    batch_norm: str = bn_mode("train")


class NFgsm(AdversarialTraining):
    """One attack step from a noisy image, then one training step; up to 3 epsilon from the clean image."""

    settings: NFgsmSettings

    def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """The noisy image plus one step; both are clamped to [0, 1], as in the paper's code."""
        uniform = self.uniform(*x.shape, like=x).to(x)
        noise = self.settings.noise_scale * self.epsilon * (2.0 * uniform - 1.0)
        noisy = (x + noise).clamp(0.0, 1.0)
        with attack_generation(self.model, self.settings.batch_norm):
            gradient = input_gradient(self.model, noisy, lambda logits: per_image(logits, y)).gradient
        return (noisy + self.settings.step_scale * self.epsilon * gradient.sign()).clamp(0.0, 1.0)
