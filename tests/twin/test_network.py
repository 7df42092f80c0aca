"""The twin of whole files: answers of onnxruntime, gradients of the network in PyTorch, and files that it refuses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from torch import Tensor
from torch.nn import functional

import robustq
from robustq.attacks.base import Model
from robustq.checkpoint import load_model
from robustq.data import load_dataset, to_float
from robustq.errors import RobustqError
from robustq.models.quant.backward_rules import RULES, SMOOTH, under_rule
from robustq.models.quant.folding import fold
from robustq.twin.deployed import TwinOnImages, first_difference, judge_of
from robustq.twin.graph import read_graph
from robustq.twin.inputs import find_form
from robustq.twin.network import Twin, load_twin
from tests.twin.files import KINDS, Net, changed, quantized, trained, write


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_dataset("digits").test.take(0)
    return to_float(x), y


@pytest.fixture(scope="module")
def net() -> Net:
    x, y = load_dataset("digits").train.take(0)
    return trained(to_float(x), y)


@pytest.fixture(scope="module")
def source(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(net, tmp_path_factory.mktemp("foreign") / "float.onnx")


def opened(path: Path, **options: Any) -> tuple[TwinOnImages, Model]:
    twin = load_twin(path)
    form = find_form(path, twin.graph, **options)
    return TwinOnImages(twin, form), judge_of(path, form)


@pytest.mark.parametrize("kind", [*KINDS, None], ids=str)
def test_a_file_of_onnxruntimes_quantizer_has_the_same_answers(
    source: Path, digits: tuple[Tensor, Tensor], tmp_path: Path, kind: tuple[str, bool, str, str] | None
) -> None:
    x, y = digits
    path = quantized(source, tmp_path / "net.onnx", x[:64], kind)
    network, judge = opened(path, pixels="unit")
    expected = torch.cat([judge(one[None]) for one in x]) if kind is None else judge(x)
    found = network(x)
    assert (expected.argmax(1) == y).float().mean() > 0.8
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.999
    # One code of the last quantizer, of 255, where a sum falls on the other side of a boundary.
    assert (found - expected).abs().max() <= 1.01 / 255 * (expected.max() - expected.min())
    assert first_difference(path, network, x[: 1 if kind is None else 8]) is None


@pytest.mark.parametrize("kind", [one for one in KINDS if one[2] == "QUInt8"], ids=str)
def test_layers_in_uint8_have_the_codes_of_onnxruntime(
    source: Path, digits: tuple[Tensor, Tensor], tmp_path: Path, kind: tuple[str, bool, str, str]
) -> None:
    x, _ = digits
    network, judge = opened(quantized(source, tmp_path / "net.onnx", x[:64], kind), pixels="unit")
    operators = {node.operator for node in network.twin.nodes}
    assert "QLinearConv" in operators and "Conv" not in operators
    # All sums are of integers; onnxruntime adds residual branches in another order, which moves few codes.
    apart = (network(x) - judge(x)).abs().amax(dim=1) > 1e-4
    assert apart.float().mean() < 0.01


class Pooled(Net):
    """With a reshape between the pooling and the quantizer behind it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x + self.inner(x))
        logits: Tensor = self.last(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def test_float_biases_signed_results_and_moves_are_those_of_onnxruntime(
    net: Net, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """As NNCF writes them: no bias is quantized, and a branch without ReLU has int8 codes."""
    x, _ = digits
    pooled = Pooled().eval()
    pooled.load_state_dict(net.state_dict())
    file = write(pooled, tmp_path / "float.onnx")
    branch = next(node.output[0] for node in onnx.load(file).graph.node if node.name == "/inner/inner.2/Conv")
    extra = {"QuantizeBias": False, "TensorQuantOverrides": {branch: [{"quant_type": QuantType.QInt8}]}}
    path = quantized(
        file,
        tmp_path / "net.onnx",
        x[:64],
        ("QDQ", True, "QUInt8", "QInt8"),
        op_types_to_quantize=["Conv", "Gemm", "Add", "Relu"],
        extra_options=extra,
    )
    network, judge = opened(path, pixels="unit")
    operators = {node.operator for node in network.twin.nodes}
    assert {"QLinearConv", "com.microsoft.QLinearGlobalAveragePool"} <= operators and "Conv" not in operators
    apart = (network(x) - judge(x)).abs().amax(dim=1) > 1e-4
    assert apart.float().mean() < 0.01


def gradient(network: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(functional.cross_entropy(network(x), y, reduction="sum"), x)
    return found


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qonnx", "qcdq", "packed")]


@pytest.mark.parametrize("format_name", ["integer", *SLOW])
def test_gradients_are_those_of_the_network_in_pytorch(
    digits_w4a4: Path, digits: tuple[Tensor, Tensor], tmp_path: Path, format_name: str
) -> None:
    x, y = (one[:100] for one in digits)
    out = tmp_path / "export"
    robustq.export_model(digits_w4a4, format_name=format_name, images=20, recheck=False, device="cpu", out=out)
    network = fold(*load_model(digits_w4a4)[:2]).requires_grad_(False)
    twin = load_twin(next(out.glob("*.onnx")))
    for rule in RULES:
        expected = gradient(under_rule(network, rule), x, y)
        found = gradient(twin.under_rule(rule), x, y)
        cosine = functional.cosine_similarity(found.flatten(1), expected.flatten(1))
        # The same codes but few on ties. Formats for runtimes round the branches of a sum twice, and the derivative of
        # the smooth rule counts both times.
        assert cosine.median() > (0.99 if rule == SMOOTH and format_name != "qonnx" else 0.999)


def test_an_input_of_pixels_and_of_another_layout_gives_the_same(source: Path, tmp_path: Path) -> None:
    x = (torch.rand(4, 1, 8, 8) * 255).round() / 255
    expected = opened(source, pixels="unit")[1](x)

    def take_pixels_last(model: onnx.ModelProto) -> None:
        (given,) = model.graph.input
        given.CopyFrom(helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 8, 8, 1]))
        nodes = [
            helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["floats", "levels"], ["unit"]),
            helper.make_node("Transpose", ["unit"], ["images"], perm=[0, 3, 1, 2]),
        ]
        model.graph.initializer.append(numpy_helper.from_array(np.array(255, dtype=np.float32), "levels"))
        for node in reversed(nodes):
            model.graph.node.insert(0, node)

    network, judge = opened(changed(source, tmp_path / "pixels.onnx", take_pixels_last))
    assert network.form.layout == "nhwc" and network.form.pixels
    torch.testing.assert_close(judge(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
    assert gradient(network, x, torch.zeros(4, dtype=torch.long)).any()

    mean, std = 0.25, 0.5
    normalised = opened(source, pixels=f"{mean}/{std}")
    torch.testing.assert_close(normalised[1]((x * std + mean).clamp(0, 1)), normalised[0]((x * std + mean).clamp(0, 1)))


def test_a_file_of_one_image_is_attacked_in_batches(
    source: Path, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, _ = digits

    def fix(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        flat = helper.make_node("Reshape", ["logits", "shape"], ["answers"])
        model.graph.node.append(flat)
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, -1]), "shape"))
        model.graph.output[0].name = "answers"

    network, judge = opened(changed(source, tmp_path / "single.onnx", fix), pixels="unit")
    torch.testing.assert_close(network(x[:5]), judge(x[:5]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ends", "factor"),
    # onnxruntime and torch saturate a sigmoid at different inputs, so that ties differ above it.
    [(["Softmax"], 20), (["Sigmoid"], 1), (["Softmax", "QuantizeLinear", "DequantizeLinear"], 20)],
    ids=str,
)
def test_a_file_that_ends_in_probabilities_has_gradients_of_its_logits(
    source: Path, digits: tuple[Tensor, Tensor], tmp_path: Path, ends: list[str], factor: int
) -> None:
    x, y = (one[:100] for one in digits)

    def confident(model: onnx.ModelProto) -> None:
        constants = [np.array(value, dtype=kind) for value, kind in ((factor, "f"), (1 / 256, "f"), (0, "u1"))]
        model.graph.initializer.extend(
            numpy_helper.from_array(one, name) for one, name in zip(constants, ("factor", "scale", "zero"), strict=True)
        )
        model.graph.node.append(helper.make_node("Mul", ["logits", "factor"], ["Mul"]))
        for before, kind in zip(["Mul", *ends], ends, strict=False):
            rest = ["scale", "zero"] if kind.endswith("Linear") else []
            model.graph.node.append(helper.make_node(kind, [before, *rest], [kind]))
        model.graph.output[0].name = ends[-1]

    network, judge = opened(changed(source, tmp_path / "net.onnx", confident), pixels="unit")
    plain = opened(source, pixels="unit")[0]
    assert (network(x).argmax(1) == judge(x).argmax(1)).all()
    assert (judge(x).amax(1) == judge(x).max()).float().mean() > 0.5 or factor == 1  # saturated
    found, expected = gradient(network, x, y), gradient(lambda images: factor * plain(images), x, y)
    if ends == ["Softmax"]:
        torch.testing.assert_close(found, expected)
    else:
        assert found.flatten(1).any(dim=1).all()


def drop_weight(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0]


def turn_round(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def loop(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Loop"


def huge(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2**40


def short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] += 1


def giant_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**20, 2**20]), "sizes"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["sizes"], ["giant"], name="giant"))


def with_node(operator: str, *shapes: tuple[int, ...], **attributes: Any) -> Any:
    """A change that puts a node in front, whose inputs are constants of a few bytes."""

    def change(model: onnx.ModelProto) -> None:
        names = [f"in{place}" for place in range(len(shapes))]
        nodes = [helper.make_node(operator, names, ["large"], name="large", **attributes)]
        for name, shape in zip(names, shapes, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.array(shape), f"{name} sizes"))
            nodes.insert(0, helper.make_node("ConstantOfShape", [f"{name} sizes"], [name]))
        for node in reversed(nodes):
            model.graph.node.insert(0, node)

    return change


def wrong_rank(model: onnx.ModelProto) -> None:
    weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, :, 0], weight.name))


def climb(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_weight, "reads .*, which no node before it writes"),
        (turn_round, "which no node before it writes"),
        (loop, "Loop '.*' is an operator that is not supported"),
        (huge, "declares .* elements"),
        (short, "cannot be read"),
        (giant_constant, "ConstantOfShape 'giant' makes a tensor of 1,099,511,627,776 elements"),
        (with_node("MatMul", (2048, 2048), (2048, 2049)), "MatMul 'large' takes 8,594,128,896 steps for one image"),
        (with_node("Gemm", (2048, 2048), (2049, 2048), transB=1), "Gemm 'large' takes 8,594,128,896 steps"),
        (with_node("MatMulInteger", (2048, 2048), (2048, 2049)), "MatMulInteger 'large' takes 8,594,128,896 steps"),
        (with_node("Conv", (1, 1, 9, 9), (1, 1, 1024, 1024), pads=[1024] * 4), "Conv 'large' takes .* steps"),
        (with_node("ConvTranspose", (1, 1, 100, 100), (1, 1, 1024, 1024)), "ConvTranspose 'large' takes .* steps"),
        (with_node("MaxPool", (1, 1, 9, 9), kernel_shape=[1024] * 2, pads=[1023] * 4), "MaxPool 'large' takes"),
        (with_node("AveragePool", (1, 1, 9, 9), kernel_shape=[1024] * 2, pads=[1023] * 4), "AveragePool 'large' takes"),
        (wrong_rank, "Conv '.*' (cannot be computed|has 2 spatial axes)"),
        (climb, "is not a readable ONNX model"),
        (two_inputs, "has 2 inputs and 1 outputs"),
    ],
)
def test_a_file_that_cannot_be_computed_is_one_line(source: Path, tmp_path: Path, change: Any, words: str) -> None:
    path = changed(source, tmp_path / "bad.onnx", change)
    with pytest.raises(RobustqError, match=words) as raised:
        load_twin(path)(torch.rand(1, 1, 8, 8))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_bytes_that_were_changed_end_in_one_line_or_another_answer(source: Path, tmp_path: Path) -> None:
    """500 seeded mutations: no other exception than robustq's own."""
    content, rng = source.read_bytes(), random.Random(0)
    path = tmp_path / "mutated.onnx"
    refused = 0
    for _ in range(500):
        mutated = bytearray(content)
        # Half of them among the first bytes, where the nodes lie; the rest is mostly weights.
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated) if rng.random() < 0.5 else 2000)] = rng.randrange(256)
        path.write_bytes(mutated)
        try:
            load_twin(path)(torch.rand(1, 1, 8, 8))
        except RobustqError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 100 < refused < 500


def test_quantizers_share_their_tensors_between_rules(source: Path) -> None:
    twin = Twin(read_graph(source))
    assert {id(one) for one in twin.under_rule("smooth").buffers()} == {id(one) for one in twin.buffers()}
    assert not twin.quantizes
