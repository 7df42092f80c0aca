"""robustq.evaluate: torch modules, callables and onnxruntime sessions give the same counts and the lines of attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import robustq
from robustq.errors import UsageError
from robustq.evaluation.accuracy import correct
from tests.evaluation.nets import HardPixels, trained
from tests.models.small_nets import digits

EPSILON = 32 / 255


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        x, y = digits("train")
        self.weight = nn.Parameter(
            torch.stack([x[y == digit].float().mean(dim=0).flatten() / 255 for digit in range(10)])
        )

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T - 0.5 * self.weight.square().sum(dim=1)


def session(model: Linear, batch: int | str, kind: int = TensorProto.FLOAT) -> Any:
    """The linear model as a file; uint8 inputs are divided by 255."""
    weight = model.weight.detach()
    constants = {"w": weight.T, "b": -0.5 * weight.square().sum(dim=1), "full": torch.tensor(255.0)}
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["cast", "full"], ["unit"]) if kind == TensorProto.UINT8 else None,
        helper.make_node("Flatten", ["unit" if kind == TensorProto.UINT8 else "cast"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"]),
    ]
    graph = helper.make_graph(
        [node for node in nodes if node is not None],
        "linear",
        [helper.make_tensor_value_info("x", kind, [batch, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in constants.items()],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(file)
    return ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])


def few(count: int = 30) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[:count], labels[:count]


@pytest.mark.parametrize("kind", ["module", "callable", "session", "session of seven images", "session of uint8"])
def test_every_kind_of_model_is_judged(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Linear()
    judges: dict[str, Any] = {
        "module": model,
        "callable": lambda x: model(x).detach().numpy(),
        "session": session(model, "batch"),
        "session of seven images": session(model, 7),
        "session of uint8": session(model, "batch", TensorProto.UINT8),
    }
    images, labels = few()
    gradient_model = None if kind == "module" else model
    found = robustq.evaluate(
        judges[kind], images, labels, epsilon=EPSILON, suite="recheck", gradient_model=gradient_model
    )
    # The judge's own answers to the images of the result are the count.
    right = correct(model, found.evaluation.x_adv / 255, labels, batch_size=30)
    assert int((right & found.evaluation.clean).sum()) == round(30 * found["robust_accuracy"])
    assert 0.0 <= found["robust_accuracy"] < found["clean_accuracy"]
    assert found["judge"] == ("pytorch" if kind == "module" else "callable" if kind == "callable" else "onnxruntime")
    printed = capsys.readouterr().out
    assert printed.startswith("clean ") and f"at most {found['robust_accuracy']:.1%}" in printed
    assert model.weight.grad is None and model.training


def test_numpy_and_float_images_are_those_of_uint8_tensors() -> None:
    images, labels = few()
    settings: dict[str, Any] = {"epsilon": EPSILON, "suite": "recheck", "show": False}
    first = robustq.evaluate(Linear(), images, labels, **settings)
    for other in (images.numpy(), images / 255, (images.numpy() / 255).astype(np.float32)):
        again = robustq.evaluate(Linear(), other, labels.numpy(), **settings)
        assert torch.equal(again.evaluation.x_adv, first.evaluation.x_adv)


def test_rounding_is_attacked_with_other_gradients_and_a_session_alone_without() -> None:
    images, labels = few(20)
    hard = robustq.evaluate(HardPixels(trained("natural"), 16), images, labels, epsilon="48/255", show=False)
    assert "apgd-ce (pass-through)" in hard["attacks"]
    assert hard["robust_accuracy"] <= 0.05
    alone = robustq.evaluate(session(Linear(), "batch"), images, labels, epsilon=EPSILON, show=False)
    assert list(alone["attacks"]) == ["uniform noise", "corners", "square", "rays"]
    assert alone["verdict"] == "not judged"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": torch.rand(5, 1, 8, 8)}, "images are float32 and not uint8 pixels"),
        ({"images": torch.zeros(5, 64, dtype=torch.uint8)}, r"images have shape \(5, 64\)"),
        ({"labels": torch.zeros(4)}, "5 images and 4 labels"),
        ({"suite": "none"}, "unknown suite 'none'"),
        ({"epsilon": 8}, r"epsilon 8 is outside \[0, 1\]"),
        ({"images": torch.zeros(5, 1, 8, 9, dtype=torch.uint8)}, "cannot take images of shape"),
    ],
)
def test_bad_input_is_one_line(changed: dict[str, Any], message: str) -> None:
    images, labels = few(5)
    with pytest.raises(UsageError, match=message) as raised:
        robustq.evaluate(Linear(), **{"images": images, "labels": labels, "epsilon": EPSILON, **changed})
    assert "\n" not in str(raised.value)
