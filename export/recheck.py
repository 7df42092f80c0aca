"""Proof of one file: parity with the folded network, which layers run as integers, and accuracy under attack counted on
its answers.

onnxruntime cannot load QONNX. There qonnx's own executor must agree on a hundred images, and everything else is counted
on the QCDQ file of the same network, which the record says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from robustq.data import to_float
from robustq.evaluation.result import Evaluation
from robustq.evaluation.robust_accuracy import evaluate
from robustq.evaluation.suites import RECHECK, NamedAttack
from robustq.export.first_difference import first_difference
from robustq.export.formats import FORMATS, build
from robustq.export.parity import RUNS, Agreement, bound_of, compare, logits_of, parity
from robustq.export.qonnx_file import execute
from robustq.export.session import Layers, OnnxModel, optimised_layers
from robustq.models.spec import ModelSpec

QONNX_EXECUTOR = "qonnx_executor"
"""The run of a QONNX file by the qonnx package, beside the names of :data:`robustq.export.parity.RUNS`."""

EXECUTOR_IMAGES = 100
"""How many images qonnx's executor is asked about; it takes seconds for them."""

STAND_IN = "qcdq"
"""What onnxruntime runs in a QONNX file's stead."""

SEARCHED_IMAGES = 8
"""How many images the search for the first differing layer looks at: it keeps every value within the network."""


@dataclass(frozen=True)
class Proof:
    """What was found about a file.

    Args:
        judged_file: the format that onnxruntime ran: the file's own, or ``qcdq`` in a QONNX file's stead.
        agreements: way of running -> agreement with the folded network.
        layers: of the optimised graph.
        must_be_integer: whether the format promises integer convolutions.
        first_difference: where file and network part, in words; None where parity holds.
        on_ties: ways of running whose logits differ by more than the bound, where most images agree and each of those
            furthest apart was followed through the network to a value on a rounding tie: either code of it is right.
    """

    judged_file: str
    agreements: dict[str, Agreement]
    layers: Layers
    must_be_integer: bool
    first_difference: str | None = None
    on_ties: tuple[str, ...] = ()

    @property
    def parity_failures(self) -> list[str]:
        """In which runs the answers are not the network's, and where they part; empty when all agree."""
        found = [
            f"{run}: {agreement.different_top1} of {agreement.images} images get another class"
            if not agreement.same_answers
            else f"{run}: logits differ by {agreement.mean_difference:.1e} of their range in the mean, "
            f"more than {agreement.bound:.0e}"
            for run, agreement in self.agreements.items()
            if not self._agrees(run)
        ]
        if found and self.first_difference is not None:
            found.append(self.first_difference)
        return found

    @property
    def shortfalls(self) -> list[str]:
        """What does not hold, in words; empty when everything does."""
        found = self.parity_failures
        if self.must_be_integer and self.layers.float_convolutions:
            count, first = len(self.layers.float_convolutions), self.layers.float_convolutions[0]
            found.append(f"{count} convolutions left in float: {first}, ...")
        return found

    @property
    def equal_in(self) -> list[str]:
        """Runtimes with their versions that were asked here and gave this file the network's answers."""
        executor = self.agreements.get(QONNX_EXECUTOR)
        if executor is not None:  # the other runs are of the file that stands in
            name = f"qonnx executor {version('qonnx')} ({executor.images} images)"
            return [name] if self._agrees(QONNX_EXECUTOR) else []
        agreeing = [run for run in self.agreements if self._agrees(run)]
        images = max((self.agreements[run].images for run in agreeing), default=0)
        name = f"onnxruntime {version('onnxruntime')} ({', '.join(agreeing)}; {images:,} images)"
        return [name] if agreeing else []

    def _agrees(self, run: str) -> bool:
        agreement = self.agreements[run]
        return agreement.holds or (agreement.same_answers and run in self.on_ties)

    def to_dict(self) -> dict[str, Any]:
        """The keys ``parity equal_in first_difference on_ties integer_layers float_layers judged_file``."""
        return {
            "equal_in": self.equal_in,
            "parity": {run: agreement.to_dict() for run, agreement in self.agreements.items()},
            "first_difference": self.first_difference,
            "on_ties": list(self.on_ties),
            "integer_layers": list(self.layers.integer),
            "float_layers": list(self.layers.in_float),
            "judged_file": self.judged_file,
        }


def prove(
    path: Path,
    format_name: str,
    folded: nn.Module,
    spec: ModelSpec,
    images: Tensor,
    *,
    unfolded: nn.Module | None = None,
) -> Proof:
    """Parity and layers of the file at ``path``.

    Args:
        path: the .onnx file.
        format_name: what it was written as.
        folded: the reference, on the CPU.
        spec: what it is.
        images: uint8 (N, C, H, W), real test images.
        unfolded: the reference of a QONNX file that kept BatchNorm.
    """
    x, bound, chosen = to_float(images), bound_of(spec), FORMATS[format_name]
    if chosen.runs:
        agreements = parity(path, folded, x, runs=chosen.runs, bound=bound)
        found, on_ties = _where(path, folded, x, agreements)
        return Proof(format_name, agreements, optimised_layers(path), chosen.promises_integers, found, on_ties)
    few = x[:EXECUTOR_IMAGES]
    expected = logits_of(folded if unfolded is None else unfolded, few, label="parity: PyTorch")
    # Of so few images one with a value on a rounding tie weighs much: the wider bound, at every width.
    executed = compare(expected, execute(onnx.load(path), few))
    with tempfile.TemporaryDirectory() as folder:
        stand_in = _write_stand_in(Path(folder), folded, spec)
        agreements = parity(stand_in, folded, x, runs=FORMATS[STAND_IN].runs, bound=bound)
        found, on_ties = _where(stand_in, folded, x, agreements)
        agreements = {QONNX_EXECUTOR: executed, **agreements}
        return Proof(STAND_IN, agreements, optimised_layers(stand_in), False, found, on_ties)


def _where(
    path: Path, folded: nn.Module, x: Tensor, agreements: dict[str, Agreement]
) -> tuple[str | None, tuple[str, ...]]:
    """In words, the first layer in which a file that fails parity differs; and the runs that ties explain."""
    failing = [run for run, agreement in agreements.items() if not agreement.holds]
    words: str | None = None
    on_ties = []
    for run in failing:
        ways = RUNS[run]
        apart = logits_of(OnnxModel(path, **ways), x, label="search") - logits_of(folded, x, label="search")
        worst = apart.abs().amax(dim=1).nan_to_num(torch.inf).argsort(descending=True)[:SEARCHED_IMAGES]
        # One by one: a tie in one image would hide a fault in another that lies in a later layer.
        found = [first_difference(path, folded, x[place : place + 1], optimise=ways["optimise"]) for place in worst]
        fault = next((each for each in found if each is not None and not each.on_ties), None)
        # A tie hides a fault behind it in the same image. But ties come to some images and a fault to nearly all: only
        # where most images agree do ties explain the rest.
        few = 2 * agreements[run].images_apart <= agreements[run].images
        if few and fault is None and any(each is not None for each in found):
            on_ties.append(run)
        words = words or (f"first in {fault}" if fault is not None else None)
        if all(each is None for each in found):
            words = words or f"{run}: every value within is the network's, the logits are not"
    return words, tuple(on_ties)


def attack_file(
    path: Path,
    format_name: str,
    folded: nn.Module,
    spec: ModelSpec,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Sequence[NamedAttack] = RECHECK,
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
        attacks: the re-check suite, or none to count clean accuracy alone.
        epsilon: radius in [0, 1].
        device: where the attacks run; onnxruntime runs on the CPU.
        seed: of the random starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        judged = path if FORMATS[format_name].runs else _write_stand_in(Path(folder), folded, spec)
        return evaluate(
            OnnxModel(judged),
            folded.to(device),
            images,
            labels,
            attacks=attacks,
            epsilon=epsilon,
            device=device,
            seed=seed,
        )


def _write_stand_in(folder: Path, folded: nn.Module, spec: ModelSpec) -> Path:
    path = folder / "stand-in.onnx"
    onnx.save(build(STAND_IN, folded, spec), path)
    return path
