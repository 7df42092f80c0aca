"""Proof of one file: parity with the folded network, which layers run as integers, and accuracy under attack counted on
its answers.

onnxruntime cannot load QONNX. There qonnx's own executor must agree on a hundred images, and everything else is counted
on the QCDQ file of the same network, which the record says.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from robustq.data import to_float
from robustq.evaluation.evaluate import Evaluation, evaluate
from robustq.evaluation.suites import RECHECK
from robustq.export.formats import build
from robustq.export.parity import Agreement, compare, logits_of, parity
from robustq.export.qonnx_file import execute
from robustq.export.session import Layers, OnnxModel, optimised_layers
from robustq.models.spec import ModelSpec

EXECUTOR_IMAGES = 100
"""How many images qonnx's executor is asked about; it takes seconds for them."""

_RUNS = {
    "integer": ("optimised", "unoptimised", "exact"),
    # onnxruntime refuses exact products for files whose nodes share zero points, as Brevitas' QCDQ does at 8 bits.
    "qcdq": ("optimised", "unoptimised"),
}


@dataclass(frozen=True)
class Proof:
    """What was found about a file.

    Args:
        judged_file: the format that onnxruntime ran: the file's own, or ``qcdq`` in a QONNX file's stead.
        agreements: way of running -> agreement with the folded network.
        layers: of the optimised graph.
        must_be_integer: whether the format promises integer convolutions.
    """

    judged_file: str
    agreements: dict[str, Agreement]
    layers: Layers
    must_be_integer: bool

    @property
    def shortfalls(self) -> list[str]:
        """What does not hold, in words; empty when everything does."""
        found = [
            f"{run}: {agreement.different_top1} of {agreement.images} images get another class"
            if not agreement.same_answers
            else f"{run}: logits differ by {agreement.mean_difference:.1e} of their range in the mean"
            for run, agreement in self.agreements.items()
            if not agreement.holds
        ]
        if self.must_be_integer and self.layers.float_convolutions:
            count, first = len(self.layers.float_convolutions), self.layers.float_convolutions[0]
            found.append(f"{count} convolutions left in float: {first}, ...")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The keys ``parity``, ``integer_layers``, ``float_layers`` and ``judged_file``."""
        return {
            "parity": {run: agreement.to_dict() for run, agreement in self.agreements.items()},
            "integer_layers": list(self.layers.integer),
            "float_layers": list(self.layers.in_float),
            "judged_file": self.judged_file,
        }


def prove(path: Path, format_name: str, folded: nn.Module, spec: ModelSpec, images: Tensor) -> Proof:
    """Parity and layers of the file at ``path``.

    Args:
        path: the .onnx file.
        format_name: what it was written as.
        folded: the reference, on the CPU.
        spec: what it is.
        images: uint8 (N, C, H, W), real test images.
    """
    x = to_float(images)
    if format_name != "qonnx":
        agreements = parity(path, folded, x, runs=_RUNS[format_name])
        return Proof(format_name, agreements, optimised_layers(path), format_name == "integer")
    few = x[:EXECUTOR_IMAGES]
    executed = compare(logits_of(folded, few, label="parity: PyTorch"), execute(onnx.load(path), few))
    with tempfile.TemporaryDirectory() as folder:
        stand_in = _write_stand_in(Path(folder), folded, spec)
        agreements = parity(stand_in, folded, x, runs=_RUNS["qcdq"])
        return Proof("qcdq", {"qonnx_executor": executed, **agreements}, optimised_layers(stand_in), False)


def attack_file(
    path: Path,
    format_name: str,
    folded: nn.Module,
    spec: ModelSpec,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    device: torch.device,
    seed: int,
) -> Evaluation:
    """Accuracy under the re-check suite: images found on the folded network's gradients, counted on onnxruntime's
    answers.

    Args:
        path, format_name, spec: the file.
        folded: its differentiable twin; moved to ``device``.
        images, labels: uint8 (N, C, H, W) and int64 (N,).
        epsilon: radius in [0, 1].
        device: where the attacks run; onnxruntime runs on the CPU.
        seed: of the random starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        judged = _write_stand_in(Path(folder), folded, spec) if format_name == "qonnx" else path
        return evaluate(
            OnnxModel(judged),
            folded.to(device),
            images,
            labels,
            attacks=RECHECK,
            epsilon=epsilon,
            device=device,
            seed=seed,
        )


def _write_stand_in(folder: Path, folded: nn.Module, spec: ModelSpec) -> Path:
    path = folder / "stand-in.onnx"
    onnx.save(build("qcdq", folded, spec), path)
    return path
