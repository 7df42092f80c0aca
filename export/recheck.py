"""Checks of one file: parity with the folded network, integer layers, and accuracy under attack of its answers.

onnxruntime cannot load QONNX. There qonnx's executor must agree on a hundred images, and the QCDQ file of the same
network (``judged_file``) is checked in its place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from robustq.attacks.base import Model
from robustq.data import to_float
from robustq.evaluation.accuracy import wilson_interval
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import evaluate
from robustq.evaluation.suites import RECHECK, NamedAttack
from robustq.export.first_difference import compare_layers
from robustq.export.formats import FORMATS, build
from robustq.export.integer_layers import Layers, optimised_layers
from robustq.export.parity import MAX_DRIFT, RUNS, Agreement, bound_of, compare, logits_of, parity
from robustq.export.qonnx_file import execute
from robustq.export.runtime_limits import not_for
from robustq.export.session import OnnxModel, load_limited
from robustq.models.spec import ModelSpec

QONNX_EXECUTOR = "qonnx_executor"  # the run by the qonnx package, beside those of robustq.export.parity.RUNS
EXECUTOR_IMAGES = 100  # qonnx's executor takes seconds for them
TWIN = "the twin of the file"
STAND_IN = "qcdq"  # the format that onnxruntime runs in place of QONNX
SEARCHED_IMAGES = 8  # in the search for the first differing layer


@dataclass(frozen=True)
class Proof:
    """Results of the checks of a file.

    ``on_ties`` are runs whose answers or logits differ by more than the bounds, but through rounding ties alone: in the
    images furthest apart every layer computes from the file's values what the file does, but for values on a tie,
    either code of which is right. They agree where the ties change at most ``max_drift`` of the answers.
    """

    judged_file: str  # the format that onnxruntime ran: the file's own, or ``qcdq`` for QONNX
    agreements: dict[str, Agreement]  # run -> agreement with the folded network
    layers: Layers  # of the optimised graph
    must_be_integer: bool  # the format promises integer convolutions
    first_difference: str | None = None  # the first layer that differs, in words; None where parity holds
    on_ties: tuple[str, ...] = ()
    not_for: tuple[str, ...] = ()  # runtimes and settings in which the file may not be used, in sentences
    compared_with: str = "the folded network"
    max_drift: float = MAX_DRIFT  # share of the answers, with 95% confidence

    @property
    def parity_failures(self) -> list[str]:
        """The runs whose answers differ from the network's, and the first difference, in words; empty if all agree."""
        found = [
            f"{run}: {each.failure}{', through rounding ties' if run in self.on_ties else ''}"
            for run, each in self.agreements.items()
            if not self._agrees(run)
        ]
        if found and self.first_difference is not None:
            found.append(self.first_difference)
        return found

    @property
    def shortfalls(self) -> list[str]:
        """Checks that failed, in words."""
        found = self.parity_failures
        if self.must_be_integer and self.layers.float_convolutions:
            count, first = len(self.layers.float_convolutions), self.layers.float_convolutions[0]
            found.append(f"{count} convolutions left in float: {first}, ...")
        return found

    @property
    def equal_in(self) -> list[str]:
        """Runtimes, with versions, in which this file gave the network's answers."""
        executor = self.agreements.get(QONNX_EXECUTOR)
        if executor is not None:  # the other runs are of the QCDQ file
            name = f"qonnx executor {version('qonnx')} ({executor.images} images)"
            return [name] if self._agrees(QONNX_EXECUTOR) else []
        agreeing = [run for run in self.agreements if self._agrees(run)]
        images = max((self.agreements[run].images for run in agreeing), default=0)
        name = f"onnxruntime {version('onnxruntime')} ({', '.join(agreeing)}; {images:,} images)"
        return [name] if agreeing else []

    def _agrees(self, run: str) -> bool:
        agreement = self.agreements[run]
        if agreement.holds or run not in self.on_ties:
            return agreement.holds
        return (
            agreement.same_answers or wilson_interval(agreement.different_top1, agreement.images)[0] <= self.max_drift
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "equal_in": self.equal_in,
            "parity": {run: agreement.to_dict() for run, agreement in self.agreements.items()},
            "first_difference": self.first_difference,
            "on_ties": list(self.on_ties),
            "integer_layers": list(self.layers.integer),
            "float_layers": list(self.layers.in_float),
            "judged_file": self.judged_file,
            "not_for": list(self.not_for),
            "compared_with": self.compared_with,
        }


def prove(
    path: Path,
    format_name: str,
    folded: nn.Module,
    spec: ModelSpec,
    images: Tensor,
    *,
    unfolded: nn.Module | None = None,
    max_drift: float = MAX_DRIFT,
) -> Proof:
    """Parity and layers of the .onnx file at ``path``.

    Args:
        folded: the reference, on the CPU.
        images: uint8 (N, C, H, W), real test images.
        unfolded: the reference of a QONNX file that kept BatchNorm.
        max_drift: share of the answers that rounding ties may change, where they explain all differences.
    """
    model, x, agreements = load_limited(path), to_float(images), {}
    limits = tuple(not_for(model, spec))
    runs_itself = bool(FORMATS[format_name].runs)
    if not runs_itself:
        few = x[:EXECUTOR_IMAGES]
        expected = logits_of(folded if unfolded is None else unfolded, few, label="parity: PyTorch")
        # Among so few images one rounding tie weighs much: the wider bound, at every width.
        agreements[QONNX_EXECUTOR] = compare(expected, execute(model, few))
    with tempfile.TemporaryDirectory() as folder:
        judged = path if runs_itself else _write_stand_in(Path(folder), folded, spec)
        chosen = FORMATS[judged_format := format_name if runs_itself else STAND_IN]
        measured = parity(judged, folded, x, runs=chosen.runs, bound=bound_of(spec))
        found, on_ties = _find_differences(judged, folded, x, measured)
        layers = optimised_layers(judged)
    agreements |= measured
    promise = chosen.promises_integers
    return Proof(judged_format, agreements, layers, promise, found, on_ties, limits, max_drift=max_drift)


def prove_alone(path: Path, format_name: str, twin: nn.Module, spec: ModelSpec, images: Tensor) -> Proof:
    """Layers of an .onnx file without its network, and the agreement of its runs with its twin.

    The twin computes what the file says; whether the file says what its network does remains open.

    Args:
        twin: torch's computation of the same graph, on the CPU: (N, C, H, W) in [0, 1] -> logits.
        images: uint8 (N, C, H, W).
    """
    model, x, chosen = load_limited(path), to_float(images), FORMATS[format_name]
    limits = tuple(not_for(model, spec))
    if not chosen.runs:
        few = x[:EXECUTOR_IMAGES]
        agreement = compare(logits_of(twin, few, label="parity: the twin"), execute(model, few))
        nothing = Layers((), (), ())
        return Proof(format_name, {QONNX_EXECUTOR: agreement}, nothing, False, not_for=limits, compared_with=TWIN)
    # The wider bound at every width: no search tells which differences come from rounding ties.
    agreements = parity(path, twin, x, runs=chosen.runs)
    layers = optimised_layers(path)
    return Proof(format_name, agreements, layers, chosen.promises_integers, not_for=limits, compared_with=TWIN)


def _find_differences(
    path: Path, folded: nn.Module, x: Tensor, agreements: dict[str, Agreement]
) -> tuple[str | None, tuple[str, ...]]:
    """The first layer that differs, in words, where parity fails; and the runs that rounding ties explain."""
    words: str | None = None
    on_ties = []
    for run in [run for run, agreement in agreements.items() if not agreement.holds]:
        apart = logits_of(OnnxModel(path, **RUNS[run]), x, label="search") - logits_of(folded, x, label="search")
        worst = apart.abs().amax(dim=1).nan_to_num(torch.inf).argsort(descending=True)[:SEARCHED_IMAGES]
        found = compare_layers(path, folded, x[worst], optimise=RUNS[run]["optimise"])
        if found.fault is not None:
            words = words or f"first in {found.fault}"
        elif found.on_ties:
            on_ties.append(run)
        else:
            words = words or f"{run}: all inner values are equal, the logits are not"
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
    file_alone: nn.Module | None = None,
    judge: Callable[[Path], Model] = OnnxModel,
) -> Evaluation:
    """Accuracy under attack of the file's answers; ``folded`` gives the gradients.

    Args:
        folded: moved to ``device``, where the attacks run; onnxruntime runs on the CPU.
        images, labels: uint8 (N, C, H, W) and int64 (N,).
        attacks: none for clean accuracy alone.
        epsilon: radius in [0, 1].
        seed: of the random starts.
        judge: opens the file that is judged.
        file_alone: the file's twin, on ``device``, for a second count through the file alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        judged = path if FORMATS[format_name].runs else _write_stand_in(Path(folder), folded, spec)
        network, file = folded.to(device), judge(judged)
        options: dict[str, Any] = {"attacks": attacks, "epsilon": epsilon, "device": device, "seed": seed}
        return evaluate(file, network, images, labels, file_alone=file_alone, **options)


def _write_stand_in(folder: Path, folded: nn.Module, spec: ModelSpec) -> Path:
    path = folder / "stand-in.onnx"
    onnx.save(build(STAND_IN, folded, spec), path)
    return path
