"""Model loading for attacks: judge and differentiable network of a model file, an export folder or a lone .onnx."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from torch import nn

from robustq.attacks.base import Model
from robustq.checkpoint import load_model
from robustq.data import load_dataset
from robustq.errors import ModelFileError, UsageError
from robustq.evaluation.target import AS_TRAINED, Target
from robustq.export.bundle import open_bundle
from robustq.export.formats import FORMATS
from robustq.export.session import OnnxModel, load_limited
from robustq.files import check_attackable
from robustq.hardening.features import FeatureTap
from robustq.models.quant.backward_rules import RULES, STRAIGHT_THROUGH, activation_quantizers, under_rule
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import FLOAT_BITS
from robustq.models.spec import ARCHITECTURES, ModelSpec
from robustq.progress import note
from robustq.tables import parse_bounded
from robustq.twin.deployed import TwinOnImages, judge_of
from robustq.twin.inputs import SPEC, find_form
from robustq.twin.network import load_twin
from robustq.twin.registry import DIALECTS

LARGE = 64  # image side above which other architectures are those for photographs
DYNAMIC = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
"""Operations with a scale of the whole batch: an image's answer depends on the other images of its batch."""


@dataclass(frozen=True)
class OpenedModel:
    """A model file, an export folder or a lone .onnx, ready to be attacked."""

    path: Path  # as given
    network: nn.Module | None  # as trained, on the CPU, in eval mode; None of a lone .onnx
    gradient_model: nn.Module  # gives the gradients, on the device; of a folder the folded network, else the twin
    judge: Model  # gives the answers that count
    deployed: Path | None  # the .onnx for onnxruntime
    spec: ModelSpec
    checkpoint: Path  # the model.pt, or the lone .onnx
    failures: list[str]  # failed checks of the deployed file's export, a line each

    @property
    def judge_name(self) -> str:
        """As results name it."""
        return "pytorch" if self.deployed is None else "onnxruntime"

    @property
    def label(self) -> str:
        """Name of the network for results; of a file that robustq did not write, the file's."""
        return self.spec.label if self.network is not None or self.spec.class_names else self.path.stem

    @property
    def control_spec(self) -> ModelSpec:
        """Spec of other networks for the same task: of the same architecture if it is known."""
        if self.network is not None or self.spec.architecture in ARCHITECTURES:
            return self.spec
        small = self.spec.image_size <= LARGE
        return replace(self.spec, architecture="resnet20" if small else "resnet18", layer_bits=(), feature_layer=None)

    def target(self) -> Target:
        """The target of attacks, without surrogates."""
        model = self.gradient_model
        if isinstance(model, TwinOnImages):
            rules, features = model.gradient_models(AS_TRAINED), model.features
        else:
            rules, features = _gradient_models(model), FeatureTap.of_pooling(model)
        return Target(
            judge=self.judge,
            gradient_models=rules,
            features=features,
            image_by_image=self.deployed is not None and is_dynamic(self.deployed, checked=self.network is None),
        )


def open_attackable(
    model: Path | str,
    *,
    own_model: str | None = None,
    device: torch.device,
    data: str | None = None,
    pixels: str | None = None,
    layout: str | None = None,
) -> OpenedModel:
    """Open a .pt of robustq, an export folder or a lone .onnx; RobustqError if it cannot be read or attacked.

    Args:
        data: of a lone .onnx that does not name its data.
        pixels, layout: of a lone .onnx, as :func:`robustq.twin.inputs.find_form`.
    """
    path = check_attackable(Path(model))
    if path.suffix == ".onnx" and path.is_file():
        return _open_file(path, data=data, pixels=pixels, layout=layout, device=device)
    if pixels is not None or layout is not None:
        raise UsageError(f"{path}: --input and --layout are for a lone .onnx; leave them out")
    deployed, checkpoint, failures = None, path, []
    if path.is_dir():
        bundle = open_bundle(path)
        if bundle.format in FORMATS and not FORMATS[bundle.format].runs:
            raise ModelFileError(
                f"{path}: holds QONNX, which onnxruntime cannot run; attack the same model as --format integer or qcdq"
            )
        deployed, checkpoint, failures = bundle.onnx, bundle.model, bundle.failures
        log_failures(failures)
    network, spec, _ = load_model(checkpoint, own_model=own_model)
    gradient_model = frozen(fold(network, spec) if deployed is not None else network, device)
    judge = OnnxModel(deployed, classes=spec.classes) if deployed else gradient_model
    return OpenedModel(path, network, gradient_model, judge, deployed, spec, checkpoint, failures)


def _open_file(
    path: Path, *, data: str | None, pixels: str | None, layout: str | None, device: torch.device
) -> OpenedModel:
    twin = load_twin(path)
    form = find_form(path, twin.graph, pixels=pixels, layout=layout)
    gradient_model = TwinOnImages(twin, form)
    runs = not any("Quant" in node.operator and node.operator.startswith(DIALECTS) for node in twin.graph.nodes)
    judge = judge_of(path, form) if runs else gradient_model
    if not runs:
        note("judge   the twin: onnxruntime cannot run QONNX")
    spec = _spec_of(path, gradient_model, data)
    frozen(gradient_model, device)
    return OpenedModel(path, None, gradient_model, judge, path if runs else None, spec, path, [])


def _spec_of(path: Path, network: TwinOnImages, data: str | None) -> ModelSpec:
    """The spec in the metadata of a file of robustq, or what file and data tell of another."""
    graph, form = network.twin.graph, network.form
    stored = graph.metadata.get(SPEC)
    if stored is not None:
        try:
            return ModelSpec.from_dict(parse_bounded(stored, json.loads))
        except (ValueError, ModelFileError) as error:
            raise ModelFileError(f"{path}: its metadata {SPEC} cannot be read ({error})") from error
    if data is None:
        raise UsageError(f"{path}: does not name its data; add --data NAME, FOLDER or FILE.npz")
    resized = data == "imagenet" or Path(data).is_dir()
    loaded = load_dataset(data, image_size=form.image_size if resized else None)
    channels, side = form.channels or loaded.channels, form.image_size or loaded.image_size
    with torch.no_grad():
        classes = network(torch.zeros(1, channels, side, side)).shape[1]
    bits = 8 if network.twin.quantizes else FLOAT_BITS
    return ModelSpec(path.stem, bits, bits, classes, channels, side, loaded.name, None, ())


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
