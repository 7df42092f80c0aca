"""A file against its target: its form, its answers in the target's runtime, and adversarial images in the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from robustq.data import to_float
from robustq.errors import ModelFileError, UsageError
from robustq.evaluation.accuracy import predict, wilson_interval
from robustq.export.parity import Agreement, compare, logits_of
from robustq.export.qonnx_file import execute
from robustq.export.runtimes.registry import RUNTIMES, find_runtime, open_judge
from robustq.export.targets.schema import CHECKERS, Target

BATCH = 100


@dataclass(frozen=True)
class Replayed:
    """Images that were found before, in another runtime.

    Args:
        runtime, version: where they were counted.
        images, clean_right, robust_right: all; right without attack; right without attack and on the adversarial one.
        different: clean images with another class than in the runtime for which the images were found.
        refused: why the runtime gave no answers; the counts are None then.
    """

    runtime: str
    version: str
    images: int
    clean_right: int | None = None
    robust_right: int | None = None
    different: int | None = None
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the shares and their 95% intervals."""
        found: dict[str, Any] = asdict(self)
        for name, right in (("clean", self.clean_right), ("robust", self.robust_right)):
            found[f"{name}_accuracy"] = None if right is None else right / self.images
            found[f"{name}_interval"] = None if right is None else list(wilson_interval(right, self.images))
        return found


@dataclass(frozen=True)
class TargetCheck:
    """The result for a file.

    Args:
        target: what it was checked against.
        in_runtime: whether the target's runtime ran it; else the format's checker read it.
        by: runtime or checker, with its version.
        agreement: with the network in the runtime; None of a checker that does not compute.
        failures: in words.
        missing: how the target's runtime is installed, where it is not.
    """

    target: Target
    in_runtime: bool
    by: str
    agreement: Agreement | None
    failures: tuple[str, ...]
    missing: str | None = None

    @property
    def sentence(self) -> str:
        """Which of the two checks happened."""
        if self.in_runtime and self.agreement is not None:
            same = self.agreement.images - self.agreement.different_top1
            return f"re-checked in {self.by}: {same} of {self.agreement.images} answers are those of the network"
        why = (
            "no runtime of it installs here"
            if self.missing is None
            else f"its runtime is not installed ({self.missing})"
        )
        if self.agreement is None:
            return f"not run: {why}; the file was read by {self.by}"
        same = self.agreement.images - self.agreement.different_top1
        return f"{why}; checked by {self.by}: {same} of {self.agreement.images} answers are those of the network"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.target.name,
            "summary": self.target.summary,
            "runtime": self.target.runtime,
            "checked": "runtime" if self.in_runtime else "checker",
            "by": self.by,
            "text": self.sentence,
            "agreement": None if self.agreement is None else self.agreement.to_dict(),
            "tolerances": self.target.tolerances.to_dict(),
            "failures": list(self.failures),
        }


def check_names(target: Target) -> None:
    """UsageError for a runtime that robustq does not know."""
    for name in (*([] if target.runtime is None else [target.runtime]), *target.replay):
        find_runtime(name)


def installed_runtime(target: Target) -> str | None:
    """The target's runtime, if it is installed."""
    name = target.runtime
    return name if name is not None and find_runtime(name).version() is not None else None


def check_file(
    target: Target, path: Path, network: nn.Module, images: Tensor, *, executed: Agreement | None = None
) -> TargetCheck:
    """Check the form of the file at ``path``, and its answers where the target's runtime or checker computes.

    Args:
        network: the reference, on the CPU.
        images: uint8 (N, C, H, W).
        executed: agreement of a QONNX file in the qonnx executor, which takes minutes; None: it runs here.
    """
    failures = _form_faults(target, onnx.load(path))
    name = installed_runtime(target)
    if name is not None:
        by = f"{name} {RUNTIMES[name].version()}"
        x = to_float(images)
        expected = logits_of(network, x, label="target: PyTorch")
        try:
            answers = logits_of(open_judge(name, path), x, label=f"target: {name}")
        except ModelFileError as error:
            return TargetCheck(target, True, by, None, (*failures, str(error)))
        agreement = compare(expected, answers)
        return TargetCheck(target, True, by, agreement, (*failures, *_differences(target, by, agreement)))
    missing = None if target.runtime is None else find_runtime(target.runtime).install
    if target.checker == "qonnx":
        few = to_float(images[:BATCH])
        by = f"{CHECKERS['qonnx']} {version('qonnx')}"
        if executed is None:
            executed = compare(logits_of(network, few, label="target: PyTorch"), execute(onnx.load(path), few))
        return TargetCheck(target, False, by, executed, (*failures, *_differences(target, by, executed)), missing)
    by = f"{CHECKERS['onnx']} {onnx.__version__}"
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and shape inference raise types of their own
        failures = (*failures, f"{by}: {str(error).splitlines()[0]}")
    return TargetCheck(target, False, by, None, failures, missing)


def _differences(target: Target, by: str, found: Agreement) -> tuple[str, ...]:
    if found.different_top1 <= target.tolerances.allowed(found.images):
        return ()
    share = target.tolerances.different_answers
    return (f"{by}: {found.different_top1} of {found.images} images get another class, more than {share:.2%}",)


def _form_faults(target: Target, model: onnx.ModelProto) -> tuple[str, ...]:
    """Opset, types of stored tensors, and type of the input."""
    faults = []
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    if opset > target.opset:
        faults.append(f"the file has opset {opset}, {target.name} reads {target.opset} at most")
    kinds = {helper.tensor_dtype_to_np_dtype(one.data_type).name for one in model.graph.initializer}
    if kinds - set(target.containers):
        faults.append(f"the file stores {', '.join(sorted(kinds - set(target.containers)))}, which {target.name} lacks")
    wanted = TensorProto.UINT8 if target.input == "uint8" else TensorProto.FLOAT
    if model.graph.input[0].type.tensor_type.elem_type != wanted:
        faults.append(f"the file does not take {target.input} images")
    return tuple(faults)


def replay(
    names: Sequence[str], path: Path, images: Tensor, labels: Tensor, x_adv: Tensor, *, first: Tensor
) -> tuple[Replayed, ...]:
    """Count clean and adversarial images in each of the runtimes ``names`` that is installed.

    Args:
        path: the file.
        images, labels, x_adv: uint8 (N, C, H, W), int64 (N,), uint8 (N, C, H, W).
        first: int64 (N,), the classes of the clean images in the runtime for which ``x_adv`` was found.
    """
    found = []
    for name in names:
        number = RUNTIMES[name].version()
        if number is None:
            continue
        try:
            judge = open_judge(name, path)
            clean, attacked = (predict(judge, to_float(one), batch_size=BATCH) for one in (images, x_adv))
        except (ModelFileError, UsageError) as error:
            found.append(Replayed(name, number, len(images), refused=str(error)))
            continue
        right = clean == labels
        kept = right & (attacked == labels)
        different = int((clean != first).sum())
        found.append(Replayed(name, number, len(images), int(right.sum()), int(kept.sum()), different))
    return tuple(found)
