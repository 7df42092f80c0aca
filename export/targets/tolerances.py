"""Tolerances of a re-check, applied to answers in another runtime and to accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robustq.data import to_float
from robustq.errors import UsageError
from robustq.evaluation.result import Evaluation
from robustq.export.bundle import Bundle
from robustq.export.formats import FORMATS
from robustq.export.parity import Agreement, compare, logits_of
from robustq.export.runtimes.registry import ONNXRUNTIME, check_installed, open_judge
from robustq.export.targets.schema import Tolerances

SHOWN = ("clean_accuracy", "clean_interval", "robust_accuracy", "interval", "attacks", "verdict", "seconds")


def tolerances_of(opened: Bundle) -> Tolerances:
    """Those of the target that the folder was made for, else the defaults."""
    stored = (opened.record.get("target") or {}).get("tolerances")
    return Tolerances() if stored is None else Tolerances(stored["different_answers"], stored["accuracy"])


def check_runs(opened: Bundle, runtime: str) -> None:
    """UsageError for a runtime that cannot load the folder's format."""
    if runtime != ONNXRUNTIME and opened.format in FORMATS and not FORMATS[opened.format].runs:
        raise UsageError(f"{opened.path}: holds {opened.format}, which {runtime} cannot run; leave --runtime out")


def accuracies(found: Evaluation) -> dict[str, Any]:
    """What is shown of the PyTorch model beside its file."""
    plain = found.to_dict()
    return {key: plain[key] for key in SHOWN}


def differences(file: Evaluation, network: Evaluation, tolerances: Tolerances) -> list[str]:
    """Accuracies of file and network that differ by more than the tolerance, in words."""
    pairs = {
        "clean accuracy": (file.clean_accuracy, network.clean_accuracy),
        "robust accuracy": (file.robust_accuracy, network.robust_accuracy),
    }
    return [
        f"{name}: {here:.1%} of the file, {there:.1%} of model.pt in PyTorch, more than {tolerances.accuracy:.1%} apart"
        for name, (here, there) in pairs.items()
        if abs(here - there) > tolerances.accuracy + 1e-9
    ]


@dataclass(frozen=True)
class InRuntime:
    """A file's answers in another runtime than onnxruntime.

    Args:
        name, version: of the runtime.
        agreement: with the network.
        different: images that onnxruntime puts into another class.
    """

    name: str
    version: str
    agreement: Agreement
    different: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "agreement": self.agreement.to_dict()}

    @property
    def sentence(self) -> str:
        """Both differences, with their counts."""
        images = self.agreement.images
        return (
            f"{self.name} {self.version}: {images - self.agreement.different_top1} of {images} answers are those of "
            f"the network; {self.different} differ from onnxruntime's"
        )

    def failures(self, tolerances: Tolerances) -> list[str]:
        """More other classes than allowed, in words."""
        found = self.agreement
        if found.different_top1 <= tolerances.allowed(found.images):
            return []
        name = f"{self.name} {self.version}"
        share = tolerances.different_answers
        return [f"{name}: {found.different_top1} of {found.images} images get another class, more than {share:.2%}"]


def answers_in(name: str, path: Path, reference: nn.Module, images: Tensor) -> InRuntime:
    """Compare a file in the runtime ``name`` with its network (on the CPU), and with onnxruntime.

    Args:
        images: uint8 (N, C, H, W).
    """
    x = to_float(images)
    expected = logits_of(reference, x, label="runtime: PyTorch")
    found, usual = (logits_of(open_judge(one, path), x, label=f"runtime: {one}") for one in (name, ONNXRUNTIME))
    different = int((found.argmax(dim=1) != usual.argmax(dim=1)).sum())
    return InRuntime(name, check_installed(name), compare(expected, found), different)
