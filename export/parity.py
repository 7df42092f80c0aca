"""Parity of a file with the folded PyTorch network, on real images, in each way onnxruntime may run the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustq.export.session import OnnxModel
from robustq.models.spec import ModelSpec
from robustq.progress import bar

BATCH = 200

LARGEST_MEAN_DIFFERENCE = 1e-3
"""Bound at 8 bits, as a share of the logit range. On a rounding tie a correct file may take the other code; files of
slightly wrong networks exceed 5e-3."""

NARROW_BITS, LARGEST_NARROW_MEAN_DIFFERENCE = 4, 1e-4
"""Bound up to this width, where values hardly meet ties."""

MAX_DRIFT = 0.02
"""Share of the answers that folding BatchNorm, or rounding ties, may change; more come from broken running statistics,
or from a network whose answers hang on single codes."""

APART = 1e-4
"""Share of the logit range: a larger difference of one image's logits needs an inner value on a rounding tie."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of one run with the reference; differences of logits are shares of the reference's logit range."""

    images: int  # compared
    different_top1: int  # images put into another class
    max_difference: float
    mean_difference: float
    images_apart: int = 0  # with a logit that differs by more than APART
    bound: float = LARGEST_MEAN_DIFFERENCE  # the largest mean difference that holds

    @property
    def same_answers(self) -> bool:
        """At most one image in a thousand gets another class; one is allowed from a hundred images on, for ties."""
        return self.different_top1 <= max(self.images // 1000, 1 if self.images >= 100 else 0)

    @property
    def holds(self) -> bool:
        """The same answers, and logits that agree in the mean, since other networks may give the same answers."""
        return self.same_answers and self.mean_difference <= self.bound

    @property
    def failure(self) -> str:
        """The bound that is exceeded, in words."""
        if not self.same_answers:
            return f"{self.different_top1} of {self.images} images get another class"
        return f"logits differ by {self.mean_difference:.1e} of their range in the mean, more than {self.bound:.0e}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        finite = {name: None if math.isnan(value) else value for name, value in asdict(self).items()}
        return {**finite, "same_answers": self.same_answers, "holds": self.holds}


@torch.no_grad()
def logits_of(model: Callable[[Tensor], Tensor], x: Tensor, *, label: str) -> Tensor:
    """(N, C, H, W) -> (N, K) on the CPU, in batches."""
    parts = []
    with bar(label, len(x)) as progress:
        for part in torch.split(x, BATCH):
            parts.append(model(part).detach().cpu())
            progress.advance(len(part))
    return torch.cat(parts)


def compare(reference: Tensor, answers: Tensor, *, bound: float = LARGEST_MEAN_DIFFERENCE) -> Agreement:
    """Agreement of two (N, K) logit tensors, the first being the reference."""
    # argmax would take a NaN for a class.
    is_nan = (answers.isnan() | reference.isnan()).any(dim=1)
    span = (reference.max() - reference.min()).clamp_min(1e-12)
    difference = (answers - reference).abs() / span
    return Agreement(
        images=len(reference),
        different_top1=int((is_nan | (answers.argmax(dim=1) != reference.argmax(dim=1))).sum()),
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        images_apart=int((~(difference.amax(dim=1) <= APART)).sum()),
        bound=bound,
    )


RUNS: dict[str, dict[str, Any]] = {
    "optimised": {"optimise": True},
    "unoptimised": {"optimise": False},
    "exact": {"optimise": True, "exact": True},
}
"""Runs: as on a device; graph as written; optimised with exact 8-bit products on every x86 CPU."""


def bound_of(spec: ModelSpec) -> float:
    """The largest mean difference of a correct file of such a network."""
    widest = max(spec.weight_bits, spec.act_bits, *dict(spec.layer_bits).values())
    return LARGEST_NARROW_MEAN_DIFFERENCE if widest <= NARROW_BITS else LARGEST_MEAN_DIFFERENCE


def parity(
    path: Path, folded: nn.Module, x: Tensor, *, runs: tuple[str, ...], bound: float = LARGEST_MEAN_DIFFERENCE
) -> dict[str, Agreement]:
    """Compare the file with the folded network on ``x`` (N, C, H, W) float32 in [0, 1], in each of ``runs``."""
    reference = logits_of(folded, x, label="parity: PyTorch")
    found = {}
    for run in runs:
        model = OnnxModel(path, classes=reference.shape[1], **RUNS[run])
        found[run] = compare(reference, logits_of(model, x, label=f"parity: {run}"), bound=bound)
    return found


def drift(model: nn.Module, folded: nn.Module, x: Tensor) -> Agreement:
    """Agreement of the folded network with the unfolded one."""
    return compare(logits_of(model, x, label="drift: unfolded"), logits_of(folded, x, label="drift: folded"))
