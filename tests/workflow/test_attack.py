"""Attacking a file: how a target is opened, prepared and compiled, with the judge untouched."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from robustq.data import load_dataset, to_float
from robustq.evaluation.accuracy import correct, predict
from robustq.evaluation.run_suite import run_suite
from robustq.evaluation.target import AS_TRAINED, Target
from robustq.export.session import OnnxModel
from robustq.models.compiled import CompiledNetwork
from robustq.models.quant.backward_rules import RULES, under_rule
from robustq.workflow import prepared_target as preparing
from robustq.workflow.open_model import OpenedModel, is_dynamic, open_attackable
from robustq.workflow.prepared_target import prepared_target
from tests.evaluation.budgets import small

CPU = torch.device("cpu")


@pytest.fixture
def opened(digits_w4a4: Path) -> OpenedModel:
    return open_attackable(digits_w4a4, device=CPU)


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(preparing, "CompiledNetwork", functools.partial(CompiledNetwork, backend="eager"))


def images(count: int = 40) -> Tensor:
    return load_dataset("digits").test.take(count)[0]


def loss_gradient(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    return logits.detach(), gradient


def replaced(model: nn.Module) -> set[str]:
    """Methods of layers that something else stands for."""
    names = {"quant_weight", "inner_forward_impl", "forward"}
    return {name for module in model.modules() for name in vars(module) if name in names}


# --- opening ---------------------------------------------------------------------------------------------------------


def dynamic_file(path: Path, weight: Tensor) -> Path:
    """8 x 8 pixels -> 10 logits by one matrix; the activations' scale follows the brightest pixel of the batch."""
    codes = (weight / weight.abs().max() * 127).round().to(torch.int8).numpy()
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("DynamicQuantizeLinear", ["flat"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "weight", "zero"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(np.ascontiguousarray(codes), "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_dynamic_files_are_judged_image_by_image(tmp_path: Path) -> None:
    pixels, labels = load_dataset("digits").test.take(80)
    x = to_float(pixels)
    weight = torch.linalg.lstsq(x.flatten(1), torch.nn.functional.one_hot(labels, 10).float()).solution
    path = dynamic_file(tmp_path / "dynamic.onnx", weight)
    assert is_dynamic(path)
    judge = OnnxModel(path)
    # One image of full range stretches the scale of all the others of its batch.
    stretched = x.clone() * 0.1
    stretched[0] = 1.0
    assert not torch.equal(judge(stretched)[1:], torch.cat([judge(stretched[i : i + 1]) for i in range(1, 80)]))

    def linear(x: Tensor) -> Tensor:
        return torch.mm(x.flatten(1), weight)

    dark = (stretched * 255).round().to(torch.uint8)
    target = Target(judge, {AS_TRAINED: linear}, image_by_image=is_dynamic(path))
    found = run_suite(target, dark, labels, suite=small("recheck"), epsilon=4 / 255, device=CPU)
    assert torch.equal(found.clean, predict(judge, to_float(dark), batch_size=1) == labels)
    assert torch.equal(found.clean & correct(judge, to_float(found.x_adv), labels, batch_size=1), found.robust)
    assert "judged image by image" in " ".join(found.notes)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_model_has_a_gradient_for_each_rule_and_one_forward(
    quantized: bool, digits_w4a4: Path, digits_float: Path
) -> None:
    target = open_attackable(digits_w4a4 if quantized else digits_float, device=CPU).target()
    assert list(target.gradient_models) == ([AS_TRAINED, "pass-through", "smooth"] if quantized else [AS_TRAINED])
    x = to_float(load_dataset("digits").test.take(20)[0])
    for model in target.gradient_models.values():
        assert torch.equal(model(x), target.judge(x))
    assert target.features is not None
    logits, features = target.features(x)
    assert torch.equal(logits, target.judge(x)) and features.shape == (20, 64)


# --- attack generation -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("without_a_compiler")
def test_compiled_sources_are_another_network_than_the_judge(opened: OpenedModel) -> None:
    target, x = opened.target(), to_float(images())
    answers = opened.judge(x)
    expected = [loss_gradient(under_rule(opened.gradient_model, rule), x) for rule in RULES]
    with prepared_target(target, opened.gradient_model, images(), compiled=True) as fast:
        assert fast.judge is target.judge is opened.gradient_model
        assert replaced(opened.gradient_model) == {"quant_weight"}  # weights quantized once: the same answers
        assert torch.equal(fast.judge(x), answers)
        assert fast.proxy is not None and torch.equal(fast.proxy(x.clone()), answers)
        assert fast.gradient_models.keys() == target.gradient_models.keys()
        for source, (logits, gradient) in zip(fast.gradient_models.values(), expected, strict=True):
            ours = loss_gradient(source, x)
            torch.testing.assert_close(ours[0], logits, rtol=0.0, atol=1e-4)
            assert (ours[1].sign() == gradient.sign()).float().mean() > 0.99
    assert replaced(opened.gradient_model) == set()


def test_weights_are_quantized_once_for_every_network(opened: OpenedModel, digits_w4a4: Path) -> None:
    other = open_attackable(digits_w4a4, device=CPU).gradient_model
    target = Target(opened.gradient_model, opened.target().gradient_models, surrogates={"other": other}, control=other)
    with prepared_target(target, opened.gradient_model, images(), compiled=False) as prepared:
        assert prepared is target
        assert replaced(other) == replaced(opened.gradient_model) == {"quant_weight"}
    assert replaced(other) == replaced(opened.gradient_model) == set()
