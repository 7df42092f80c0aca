"""Model loading for attacks: judge and differentiable network of a model file, an export folder or a lone .onnx."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from robustq.attacks.base import Model
from robustq.checkpoint import load_model
from robustq.data import load_dataset, to_float
from robustq.data.splits import evenly_spaced
from robustq.errors import ModelFileError, UsageError
from robustq.evaluation.accuracy import predict, wilson_interval
from robustq.evaluation.flags import TWIN_SHARE
from robustq.evaluation.target import AS_TRAINED, Target, one_by_one
from robustq.export.bundle import open_bundle
from robustq.export.formats import FORMATS
from robustq.export.runtimes.answers import RuntimeAnswers, compare_with_onnxruntime
from robustq.export.runtimes.registry import ONNXRUNTIME, check_installed, open_judge
from robustq.export.session import OnnxModel, load_limited
from robustq.files import check_attackable
from robustq.hardening.features import FeatureTap
from robustq.models.fx.factory import is_custom
from robustq.models.quant.backward_rules import RULES, STRAIGHT_THROUGH, activation_quantizers, under_rule
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import FLOAT_BITS
from robustq.models.spec import ARCHITECTURES, ModelSpec
from robustq.progress import note
from robustq.twin.deployed import TwinOnImages, first_difference
from robustq.workflow.open_file import open_lone_file
from robustq.zoo import model_path

ANSWERS = 200  # images on which a lone file is compared with its labels and its twin
LARGE = 64  # image side above which other architectures are those for photographs
DYNAMIC = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
"""Operations with a scale of the whole batch: an image's answer depends on the other images of its batch."""


@dataclass(frozen=True)
class OpenedModel:
    """A model file, an export folder or a lone .onnx, ready to be attacked."""

    path: Path  # as given
    network: nn.Module | None  # as trained, in eval mode; None of a lone .onnx
    differentiable: nn.Module | None  # on the device; of a folder the folded network, of a lone file its twin, or None
    judge: Model  # gives the answers that count
    deployed: Path | None  # the .onnx for onnxruntime
    spec: ModelSpec
    checkpoint: Path  # the model.pt, or the lone .onnx
    failures: list[str]  # failed checks of the deployed file's export, a line each
    answers_classes: bool = False  # the judge answers with classes: 1 for one of the logits, 0 for the others
    lack: str | None = None  # why nothing gives gradients
    runtime: str = ONNXRUNTIME  # that runs the deployed file
    other: Model | None = None  # onnxruntime, where another runtime judges

    @property
    def gradient_model(self) -> nn.Module:
        """The network that gives the gradients; ModelFileError without one."""
        if self.differentiable is None:
            raise ModelFileError(f"{self.path}: gives no gradients")
        return self.differentiable

    @property
    def judge_name(self) -> str:
        """As results name it."""
        return "pytorch" if self.deployed is None else self.runtime

    @property
    def label(self) -> str:
        """Name of the network for results; of a file that robustq did not write, the file's."""
        return self.spec.label if self.network is not None or self.spec.class_names else self.path.stem

    @property
    def control_spec(self) -> ModelSpec:
        """Spec of other networks for the same task: of the same architecture if it is known."""
        if self.spec.architecture in ARCHITECTURES or (self.network is not None and is_custom(self.spec.architecture)):
            return self.spec
        small = self.spec.image_size <= LARGE
        return replace(self.spec, architecture="resnet20" if small else "resnet18", layer_bits=(), feature_layer=None)

    def target(self) -> Target:
        """The target of attacks, without surrogates."""
        model = self.differentiable
        rules: dict[str, Model] = {}
        if isinstance(model, TwinOnImages):
            rules, features = model.gradient_models(AS_TRAINED), model.features
        elif model is not None:
            rules, features = _gradient_models(model), FeatureTap.of_pooling(model)
        return Target(
            judge=self.judge,
            gradient_models=rules,
            features=features if rules else None,
            image_by_image=self.deployed is not None and is_dynamic(self.deployed, checked=self.network is None),
            proxy=model if self.answers_classes else None,
        )


def open_attackable(
    model: Path | str | nn.Module,
    *,
    custom_model: str | None = None,
    device: torch.device,
    data: str | None = None,
    pixels: str | None = None,
    layout: str | None = None,
    resize: str | None = None,
    skip_bad_images: bool = False,
    runtime: str | None = None,
) -> OpenedModel:
    """Open a .pt of robustq, an export folder, a lone .onnx or a module; RobustqError if it cannot be read or attacked.

    Args:
        data: of a module, or of a lone .onnx that does not name its data.
        pixels, layout: of a lone .onnx, as :func:`robustq.twin.inputs.find_form`.
        resize, skip_bad_images: of such data.
        runtime: that judges a folder or a lone .onnx; None: onnxruntime.

    A folder without its model.pt is opened as its file alone.
    """
    about: dict[str, Any] = {"resize": resize, "skip_bad_images": skip_bad_images}
    if runtime is not None:
        check_installed(runtime)
    if isinstance(model, nn.Module):
        if runtime is not None:
            raise UsageError(f"{type(model).__name__}: a module is judged in PyTorch; leave the runtime out")
        return _open_module(model, data, device, **about)
    path = check_attackable(model_path(model))
    if path.suffix == ".onnx" and path.is_file():
        about |= {"data": data, "pixels": pixels, "layout": layout}
        return _open_file(path, path, [], device, runtime or ONNXRUNTIME, about)
    if pixels is not None or layout is not None:
        raise UsageError(f"{path}: --input and --layout are for a lone .onnx; leave them out")
    deployed, checkpoint, failures = None, path, []
    if path.is_dir():
        bundle = open_bundle(path)
        if bundle.model is None:
            note(f"note    {path} has no model.pt: its file is opened alone")
            log_failures(bundle.failures)
            return _open_file(path, bundle.onnx, bundle.failures, device, runtime or ONNXRUNTIME, {"data": data})
        if bundle.format in FORMATS and not FORMATS[bundle.format].runs:
            raise ModelFileError(
                f"{path}: holds QONNX, which onnxruntime cannot run; attack the same model as --format integer or qcdq"
            )
        deployed, checkpoint, failures = bundle.onnx, bundle.model, bundle.failures
        log_failures(failures)
    if runtime is not None and deployed is None:
        raise UsageError(f"{path}: is judged in PyTorch; write the file that {runtime} runs: robustq export {path}")
    network, spec, _ = load_model(checkpoint, custom_model=custom_model)
    gradient_model = frozen(fold(network, spec) if deployed is not None else network, device)
    if deployed is None:
        return OpenedModel(path, network, gradient_model, gradient_model, None, spec, checkpoint, failures)
    name = runtime or ONNXRUNTIME
    opened = OpenedModel(
        path,
        network,
        gradient_model,
        open_judge(name, deployed, classes=spec.classes),
        deployed,
        spec,
        checkpoint,
        failures,
        runtime=name,
    )
    return opened if name == ONNXRUNTIME else replace(opened, other=OnnxModel(deployed, classes=spec.classes))


def _open_module(module: nn.Module, data: str | None, device: torch.device, **about: Any) -> OpenedModel:
    """A copy of a module of the caller, with a spec of what the data tell."""
    name = type(module).__name__
    if data is None:
        raise UsageError(f"{name}: a module does not name its data; add data=NAME, FOLDER or FILE.npz")
    loaded = load_dataset(data, **about)
    network = frozen(deepcopy(module), device)
    shape = (loaded.classes, loaded.channels, loaded.image_size)
    spec = ModelSpec(name, FLOAT_BITS, FLOAT_BITS, *shape, loaded.name, None, loaded.class_names)
    spec = replace(spec, resize=loaded.resize, skip_bad_images=loaded.skip_bad_images)
    return OpenedModel(Path(name), network, network, network, None, spec, Path(name), [])


def _open_file(
    path: Path, file: Path, failures: list[str], device: torch.device, runtime: str, about: dict[str, Any]
) -> OpenedModel:
    """A lone file with a runtime as its judge; ``about``: arguments of :func:`open_lone_file`."""
    found = open_lone_file(file, runtime=runtime, **about)
    other = None if runtime == ONNXRUNTIME else open_lone_file(file, **about).judge
    twin = None if found.twin is None else frozen(found.twin, device)
    deployed = found.path if found.in_onnxruntime else None
    return OpenedModel(
        path,
        None,
        twin,
        found.judge,
        deployed,
        found.spec,
        found.path,
        failures,
        found.answers_classes,
        found.lack,
        runtime,
        other,
    )


def check_answers(opened: OpenedModel, x: Tensor, y: Tensor) -> None:
    """Compare a lone file with its twin, and with the labels.

    Raises:
        UsageError: it is right no more often than by chance, so that its input form or its classes are not as assumed.
    """
    place = evenly_spaced(len(x), ANSWERS)
    images, labels = to_float(x[place]), y[place]
    judge = one_by_one(opened.judge) if opened.target().image_by_image else opened.judge
    answers = predict(judge, images, batch_size=100)
    right = int((answers == labels).sum())
    if wilson_interval(right, len(labels))[0] <= 1.0 / opened.spec.classes:
        raise UsageError(
            f"{opened.path}: {right} of {len(labels)} answers are right, no more than by chance; check --input, "
            "--layout, --data and the order of its classes"
        )
    twin = opened.differentiable
    if not isinstance(twin, TwinOnImages):
        return
    device = next(twin.buffers(), labels).device
    same = float((predict(twin, images.to(device), batch_size=100).cpu() == answers).float().mean())
    note(f"twin    the same answers as the file on {same:.1%} of {len(labels)} images")
    if same < 1.0 - TWIN_SHARE and opened.deployed is not None:
        note(f"twin    first difference: {first_difference(opened.deployed, twin, images[:8])}")


def answers_in_runtime(opened: OpenedModel, x: Tensor) -> RuntimeAnswers | None:
    """Compare the judge with onnxruntime on clean images x, uint8 (N, C, H, W); None where onnxruntime judges."""
    if opened.other is None:
        return None
    judges = (opened.judge, opened.other)
    if opened.target().image_by_image:
        judges = (one_by_one(opened.judge), one_by_one(opened.other))
    found = compare_with_onnxruntime(opened.runtime, *judges, x)
    note(f"judge   {found.sentence}")
    return found


def log_failures(failures: list[str]) -> None:
    """Print the failed checks of a file's export."""
    for failure in failures:
        note(f"FAILED  {failure}")


def frozen(network: nn.Module, device: torch.device) -> nn.Module:
    """The same network in eval mode on ``device``, channels last as in training, without gradients of weights."""
    return network.eval().to(device).to(memory_format=torch.channels_last).requires_grad_(False)


def _gradient_models(network: nn.Module) -> dict[str, Model]:
    """One model per backward rule; a network without quantizers has one rule."""
    others = [rule for rule in RULES if rule != STRAIGHT_THROUGH] if activation_quantizers(network) else []
    return {AS_TRAINED: network, **{rule: under_rule(network, rule) for rule in others}}


def is_dynamic(path: Path, *, checked: bool = False) -> bool:
    """Whether an .onnx file quantizes activations with a scale of the batch; ``checked``: its limits were checked."""
    model = onnx.load(path, load_external_data=False) if checked else load_limited(path)
    return any(node.op_type in DYNAMIC for node in model.graph.node)
