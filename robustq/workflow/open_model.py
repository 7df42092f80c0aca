"""Model loading for attacks: the judge and the differentiable network of a model file or an export folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from robustq.attacks.base import Model
from robustq.attacks.feature_space import Features
from robustq.checkpoint import load_model
from robustq.errors import ModelFileError, UsageError
from robustq.evaluation.target import AS_TRAINED, Target
from robustq.export.bundle import open_bundle
from robustq.export.formats import FORMATS
from robustq.export.session import OnnxModel, load_limited
from robustq.files import check_attackable
from robustq.hardening.features import FeatureTap
from robustq.models.quant.backward_rules import RULES, STRAIGHT_THROUGH, activation_quantizers, under_rule
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec
from robustq.progress import note

DYNAMIC = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
"""Operations with a scale of the whole batch: an image's answer depends on the other images of its batch."""


@dataclass(frozen=True)
class OpenedModel:
    """A model file or an export folder, ready to be attacked.

    Args:
        path: as given.
        network: as trained, on the CPU, in eval mode.
        gradient_model: the network that gives the gradients, on the device; of a deployed file the folded one.
        judge: gives the answers that count.
        deployed: the .onnx for onnxruntime, or None.
        spec: of the network.
        checkpoint: the model.pt.
        failures: failed checks of the deployed file's export, a line each.
    """

    path: Path
    network: nn.Module
    gradient_model: nn.Module
    judge: Model
    deployed: Path | None
    spec: ModelSpec
    checkpoint: Path
    failures: list[str]

    @property
    def judge_name(self) -> str:
        """As results name it."""
        return "pytorch" if self.deployed is None else "onnxruntime"

    def target(self) -> Target:
        """The target of attacks, without surrogates."""
        return Target(
            judge=self.judge,
            gradient_models=_gradient_models(self.gradient_model),
            features=_features(self.gradient_model),
            image_by_image=self.deployed is not None and is_dynamic(self.deployed),
        )


def open_attackable(model: Path | str, *, own_model: str | None = None, device: torch.device) -> OpenedModel:
    """Open a .pt of robustq, or an export folder.

    Raises:
        RobustqError: it cannot be read, or not be attacked.
    """
    path = check_attackable(Path(model))
    deployed, checkpoint, failures = None, path, []
    if path.is_dir() or path.suffix == ".onnx":
        bundle = open_bundle(path)
        if bundle.format in FORMATS and not FORMATS[bundle.format].runs:
            raise ModelFileError(
                f"{path}: holds QONNX, which onnxruntime cannot run; attack the same model as --format integer or qcdq"
            )
        deployed, checkpoint, failures = bundle.onnx, bundle.model, bundle.failures
        log_failures(failures)
    network, spec, _ = load_model(checkpoint, own_model=own_model)
    gradient_model = frozen(fold(network, spec) if deployed is not None else network, device)
    judge = OnnxModel(deployed) if deployed else gradient_model
    return OpenedModel(path, network, gradient_model, judge, deployed, spec, checkpoint, failures)


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


def is_dynamic(path: Path) -> bool:
    """Whether an .onnx file quantizes activations with a scale of the batch."""
    return any(node.op_type in DYNAMIC for node in load_limited(path).graph.node)


def _features(network: nn.Module) -> Features | None:
    """The features that training aligns, if the network has a layer for them."""
    try:
        return FeatureTap(network, "pooled")
    except UsageError:
        return None
