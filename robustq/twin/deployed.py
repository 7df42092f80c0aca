"""A deployed file as attacks use it: a runtime as the judge, the twin for gradients, both on images in [0, 1]."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from robustq.attacks.base import Model
from robustq.attacks.feature_space import Features
from robustq.errors import ModelFileError
from robustq.evaluation.target import one_by_one
from robustq.export.runtimes.engine import RuntimeModel
from robustq.export.runtimes.registry import ONNXRUNTIME, open_judge
from robustq.export.session import OnnxModel
from robustq.models.quant.backward_rules import RULES, STRAIGHT_THROUGH
from robustq.twin.inputs import ImageForm
from robustq.twin.network import Twin

_SAME, _MANY = 1e-3, 1e-2

POOLINGS = ("GlobalAveragePool", "com.microsoft.QLinearGlobalAveragePool", "ReduceMean", "GlobalMaxPool")


class TwinOnImages(nn.Module):
    """The twin with the input form of its file: (B, C, H, W) in [0, 1] -> logits (B, K)."""

    def __init__(self, twin: Twin, form: ImageForm) -> None:
        super().__init__()
        self.twin = twin
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.twin(self.form.apply(x))
        return logits

    def under_rule(self, rule: str) -> TwinOnImages:
        """The same network under another backward rule."""
        return TwinOnImages(self.twin.under_rule(rule), self.form)

    def gradient_models(self, first: str) -> dict[str, Model]:
        """One model per backward rule; the rule of training is called ``first``."""
        others = [rule for rule in RULES if rule != STRAIGHT_THROUGH] if self.twin.quantizes else []
        return {first: self, **{rule: self.under_rule(rule) for rule in others}}

    @property
    def features(self) -> Features | None:
        """Images -> logits, and the output of the last global pooling; None without one."""
        found = [node.outputs[0] for node in self.twin.nodes if node.operator in POOLINGS]
        return partial(self._with_feature, name=found[-1]) if found else None

    def _with_feature(self, x: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
        logits, feature = self.twin.with_values(self.form.apply(x), [name])
        return logits, feature.flatten(1)


def judge_of(path: Path, form: ImageForm, *, classes: int | None = None, runtime: str = ONNXRUNTIME) -> Model:
    """The file in a runtime on the CPU: (B, C, H, W) in [0, 1] -> float32 logits (B, K) on the CPU.

    Its limits have been checked: by its twin, or by :func:`robustq.export.session.load_limited`.

    Args:
        classes: K of a file that answers with classes; its logits are 1 for the class and 0 for all others.
        runtime: one of :data:`robustq.export.runtimes.registry.RUNTIMES`.

    Raises:
        ModelFileError: the runtime cannot load the file.
    """
    model = open_judge(runtime, path, prepare=form.apply, checked=True)
    judge = model if classes is None else partial(_classes_as_logits, model, classes)
    return one_by_one(judge) if form.single else judge


def _classes_as_logits(model: OnnxModel | RuntimeModel, classes: int, x: Tensor) -> Tensor:
    found = model.values(x, None)[0].reshape(-1)
    if len(found) != len(x) or not 0 <= int(found.min()) <= int(found.max()) < classes:
        raise ModelFileError(
            f"the file answers {len(x)} images with {len(found)} values, not with a class of {classes} each"
        )
    return one_hot(found.long(), classes).float()


@torch.no_grad()
def first_difference(path: Path, network: TwinOnImages, x: Tensor) -> str | None:
    """The first node whose values differ from those of onnxruntime without optimisations, with the difference.

    Nodes differ if over 1% of their values are more than 1e-3 of their range, with 0 in it, apart: few codes differ by
    rounding.

    Args:
        path: the file.
        network: its twin, on the CPU.
        x: (B, C, H, W) in [0, 1], a few images: all values are kept in memory.
    """
    twin, images = network.twin, network.form.apply(x)
    nodes = {name: node for node in twin.nodes for name in node.outputs if name}
    model = onnx.load(path)
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes if name not in known)
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "values.onnx"
        onnx.save(model, wide)
        session = OnnxModel(wide, optimise=False, prepare=network.form.apply, checked=True)
        expected = session.values(x, list(nodes))
    for (name, node), wanted, found in zip(nodes.items(), expected, twin.values(images, list(nodes)), strict=True):
        values = wanted.float()
        if values.numel() == found.numel() == 1:  # a scale of dynamic quantization is one for each image in the twin
            found = found.reshape(values.shape)
        if values.shape != found.shape:
            return f"{node}: shape {tuple(found.shape)} instead of {tuple(values.shape)}"
        span = float(values.clamp_min(0.0).max() - values.clamp_max(0.0).min()) if values.numel() else 0.0
        apart = (values - found.float()).abs() > _SAME * span
        if float(apart.float().mean()) > _MANY:
            return f"{node}: {float(apart.float().mean()):.1%} of the values of '{name}' differ"
    return None
