"""recheck: check an export folder again, with its model.pt or through the file alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustq.attacks.base import Model
from robustq.checkpoint import load_model
from robustq.errors import ModelFileError, UsageError
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import evaluate, find_suite
from robustq.evaluation.suites import RECHECK
from robustq.export.bundle import MODEL, Bundle, open_bundle
from robustq.export.formats import FORMATS, check_format
from robustq.export.machines import Machine, compare_results, read_result, this_machine
from robustq.export.recheck import Proof, attack_file, prove, prove_alone
from robustq.export.runtimes.registry import ONNXRUNTIME, check_installed, find_runtime, open_judge
from robustq.export.targets.schema import Tolerances
from robustq.export.targets.tolerances import (
    InRuntime,
    accuracies,
    answers_in,
    check_runs,
    differences,
    tolerances_of,
)
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec
from robustq.progress import note
from robustq.recipe import parse_epsilon
from robustq.seals import sha256
from robustq.workflow import Result
from robustq.workflow.attack import attack_model
from robustq.workflow.export import RECHECK_SUITE
from robustq.workflow.open_file import open_lone_file, twin_of_export
from robustq.workflow.open_model import frozen, log_failures
from robustq.workflow.setup import data_for, log_evaluation, pick_device, radius_of, with_images


@dataclass(frozen=True, eq=False, kw_only=True)
class RecheckResult(Result):
    """Result of recheck.

    Args:
        bundle: the export folder.
        judge: ``onnxruntime`` or another runtime; ``pytorch`` for the twin of a QONNX file without model.pt.
        file_failures: checks that failed at the export.
        not_compared: comparisons that need what is not in the folder, in words.
        proof: parity and integer layers of the file.
        machine, sha256: where it was checked, and the hash of the .onnx.
        runtime: answers in another runtime than onnxruntime.
        network: accuracies of the PyTorch model under the same suite, if one was asked for.
        tolerances: of the target, where they were applied.
        comparison: with another result, in sentences.
        shortfalls: failed checks, in words.
        evaluation: accuracy under attack of the file.
    """

    FLAT = ("proof", "evaluation")
    OPTIONAL = ("runtime", "network", "tolerances", "comparison")

    bundle: Path
    format: str
    label: str
    data: str
    suite: str = RECHECK_SUITE
    judge: str
    seed: int
    size_bytes: int
    file_failures: tuple[str, ...]
    not_compared: tuple[str, ...]
    proof: Proof
    shortfalls: tuple[str, ...]
    machine: Machine
    sha256: str
    runtime: InRuntime | None = None
    network: dict[str, Any] | None = None
    tolerances: Tolerances | None = None
    comparison: tuple[str, ...] | None = None
    evaluation: Evaluation


def recheck_bundle(
    bundle: Path | str,
    *,
    epsilon: float | str | None = None,
    images: int = 1000,
    runtime: str | None = None,
    suite: str | None = None,
    compare: Path | str | None = None,
    data: str | None = None,
    custom_model: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> RecheckResult:
    """Check an export folder again: hashes, parity, layers, and accuracy under attack of the deployed file.

    The attacks run with the gradients of model.pt, and once more with those of the file alone. A folder without its
    model.pt is checked through the file alone.

    Args:
        bundle: path of an export folder, with or without its model.pt.
        runtime: that judges the file, such as ``"openvino"`` (docs/runtimes.md); None: that of the folder's target if
            it is installed, else onnxruntime.
        suite: such as ``"standard"``: attacks of the file, and of model.pt in PyTorch beside it; the accuracies may
            differ by the tolerance of the folder's target. None: the suite recheck on the file alone.
        compare: path of another result (``recheck --out``), of another machine, say.
        epsilon: radius in units of pixel / 255: a number in [0, 1] or a text such as ``"8/255"``; None: that of the
            model, else 8/255.
        images: number of test images for all checks, evenly spaced; 0: all.
        data: data set: a known name (``"cifar10"``), a folder of images or an .npz file; None: the model's.
        custom_model: ``module:function`` that built the network, if it is a custom model; its code is run.
        skip_bad_images: leave out image files that cannot be read, with a warning.
        seed: of the random starts.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"`` for attack generation; None: a GPU if there is one.

    Returns:
        the results of the checks; ``shortfalls`` names those that failed.

    Raises:
        UsageError: an unknown device or suite, a runtime that is not installed, a value out of range, or ``compare`` is
            no result of a re-check.
        ModelFileError: no export folder, or files that do not match.
        DataError: data that are missing, broken or unfit for the model.
        OutOfMemoryError: the images do not fit; a number that does is named.
    """
    place = pick_device(device)
    wanted_radius = None if epsilon is None else parse_epsilon(epsilon)
    if images < 0:
        raise UsageError(f"--images {images} is negative; give a number, or 0 for all")
    other = None if compare is None else read_result(Path(compare))
    if suite is not None:
        find_suite(suite)
    if runtime is not None:
        check_installed(runtime)
    opened = open_bundle(Path(bundle))
    log_failures(opened.failures)
    runtime = runtime or _runtime_of(opened)
    check_runs(opened, runtime)
    if opened.model is None:
        if suite is not None:
            raise UsageError(f"{opened.path}: has no model.pt to compare with; leave --suite out, or attack the file")
        subject = _alone(opened, place, runtime)
    else:
        subject = _with_model(opened, opened.model, custom_model, place, runtime)
    spec = subject.spec
    loaded = data_for(spec, data, opened.model or opened.onnx, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    fit = partial(with_images, model=subject.gradient_model, images=x, device=place)
    proof = fit(lambda: subject.prove(x))
    shortfalls, tolerances = list(proof.shortfalls), tolerances_of(opened)
    in_runtime = None
    if runtime != ONNXRUNTIME:
        in_runtime = fit(lambda: answers_in(runtime, opened.onnx, subject.reference, x))
        note(f"judge   {in_runtime.sentence}")
        shortfalls += in_runtime.failures(tolerances)
    radius = radius_of(spec, wanted_radius)
    log_evaluation(spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
    network: Evaluation | None = None
    if suite is None:
        found = fit(lambda: subject.attack(x, y, epsilon=radius, device=place, seed=seed))
    else:
        count = partial(_by_suite, suite=suite, epsilon=radius, images=images, data=data, custom_model=custom_model)
        count = partial(count, skip_bad_images=skip_bad_images, seed=seed, device=device)
        found = count(opened.path, runtime=None if runtime == ONNXRUNTIME else runtime)
        network = count(opened.path / MODEL, runtime=None)
        shortfalls += differences(found, network, tolerances)
    result = RecheckResult(
        bundle=opened.path.absolute(),
        format=opened.format,
        label=spec.label,
        data=loaded.name,
        judge=subject.judge,
        seed=seed,
        size_bytes=opened.onnx.stat().st_size,
        file_failures=tuple(opened.failures),
        not_compared=subject.not_compared,
        proof=proof,
        shortfalls=tuple(shortfalls),
        suite=suite or RECHECK_SUITE,
        machine=this_machine(),
        sha256=sha256(opened.onnx),
        runtime=in_runtime,
        network=None if network is None else accuracies(network),
        tolerances=tolerances if in_runtime is not None or network is not None else None,
        evaluation=found,
    )
    return result if other is None else replace(result, comparison=tuple(compare_results(result, other)))


def _runtime_of(opened: Bundle) -> str:
    """The runtime of the folder's target if it is installed, else onnxruntime."""
    name = (opened.record.get("target") or {}).get("runtime")
    if name is None or name == ONNXRUNTIME:
        return ONNXRUNTIME
    runtime = find_runtime(name)
    if runtime.version() is None:
        note(f"note    {name}, the runtime of the target, is not installed ({runtime.install}): onnxruntime judges")
        return ONNXRUNTIME
    return str(name)


def _by_suite(model: Path, **options: Any) -> Evaluation:
    """Accuracies of a file or a model under a suite, without networks beside it."""
    return attack_model(model, train_surrogates=False, **options).evaluation


@dataclass(frozen=True)
class _Subject:
    """The checks of a folder, with what they need."""

    spec: ModelSpec
    judge: str
    gradient_model: Model
    reference: nn.Module  # on the CPU: the folded network, or the twin
    prove: Callable[[Tensor], Proof]
    attack: Callable[..., Evaluation]
    not_compared: tuple[str, ...] = ()


def _with_model(opened: Bundle, model: Path, custom_model: str | None, device: torch.device, runtime: str) -> _Subject:
    network, spec, _ = load_model(model, custom_model=custom_model)
    check_format(opened.format, spec)
    folded = fold(network, spec)
    kept = network.eval() if opened.record.get("batch_norm") == "keep" else None

    judge = partial(open_judge, runtime)

    def attack(x: Tensor, y: Tensor, **options: Any) -> Evaluation:
        twin, notes = twin_of_export(opened.onnx, spec, device)
        found = attack_file(opened.onnx, opened.format, folded, spec, x, y, file_alone=twin, judge=judge, **options)
        return replace(found, notes=[*notes, *found.notes])

    proof = partial(prove, opened.onnx, opened.format, folded, spec, unfolded=kept, max_drift=opened.max_drift)
    return _Subject(spec, runtime, folded, folded, proof, attack)


def _alone(opened: Bundle, device: torch.device, runtime: str) -> _Subject:
    file = open_lone_file(opened.onnx, runtime=runtime)
    twin = file.twin
    if twin is None:
        raise ModelFileError(f"{opened.path}: has no model.pt, and its file gives no gradients; export the model again")
    check_format(opened.format, file.spec)
    missing = ["answers of the network in PyTorch: model.pt is not in the folder"]
    if not FORMATS[opened.format].runs:
        missing.append("answers in onnxruntime, which cannot load QONNX: the twin of the file is judged")

    def attack(x: Tensor, y: Tensor, **options: Any) -> Evaluation:
        return evaluate(file.judge, frozen(twin, options["device"]), x, y, attacks=RECHECK, **options)

    return _Subject(
        file.spec,
        runtime if file.in_onnxruntime else "pytorch",
        frozen(twin, device),
        twin if device.type == "cpu" else deepcopy(twin).cpu(),
        partial(prove_alone, opened.onnx, opened.format, twin, file.spec),
        attack,
        tuple(missing),
    )
