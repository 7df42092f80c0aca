"""Every width in every format: what the file holds, what it says of itself, and how onnxruntime runs it."""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import robustq
from robustq.errors import ExportError, ModelFileError, UsageError
from robustq.export.formats import FORMATS, build, check_format
from robustq.export.lowering.own_parameters import own_parameters
from robustq.export.lowering.quantized_moves import quantized_moves
from robustq.export.lowering.unsigned_activations import unsigned_activations
from robustq.export.session import OnnxModel, optimised_layers
from robustq.export.torch_export import INPUT, OPSET, OUTPUT
from robustq.models.spec import ModelSpec
from tests.export import hand_made as hm
from tests.export.exported import SLOW_WIDTH, WIDTHS, exported, net, parsed, written
from tests.models.small_nets import small_spec

CONVOLUTIONS, ADDITIONS = 9, 3  # of a ResNet-8
BITS = [*WIDTHS, pytest.param(SLOW_WIDTH, marks=pytest.mark.slow)]
EVERY_FILE = [
    *((bits, name) for bits in WIDTHS for name in FORMATS),
    *(pytest.param(SLOW_WIDTH, name, marks=pytest.mark.slow) for name in FORMATS),
]


# --- what may be written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_float_network_is_refused(name: str) -> None:
    with pytest.raises(
        ExportError, match=rf"^a 32-bit \(float\) network cannot be written as {name}; quantize it first"
    ):
        check_format(name, small_spec(32))


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", ["", "onnx", "QONNX", "float"])
def test_an_unknown_format_is_refused(name: str, bits: int) -> None:
    with pytest.raises(UsageError, match=rf"^unknown format '{name}'; known: qonnx, qcdq, integer$"):
        check_format(name, small_spec(bits))


@pytest.mark.parametrize(("bits", "name"), EVERY_FILE)
def test_every_width_has_every_format(bits: int, name: str) -> None:
    check_format(name, small_spec(bits))


# --- what a file holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "name"), EVERY_FILE)
def test_a_file_says_what_it_is(bits: int, name: str) -> None:
    about = {entry.key: entry.value for entry in parsed(bits, name).metadata_props}
    assert about.keys() == {"robustq.version", "robustq.format", "robustq.spec"}
    assert about["robustq.format"] == name
    assert about["robustq.version"] == robustq.__version__
    assert ModelSpec.from_dict(json.loads(about["robustq.spec"])) == small_spec(bits)


@pytest.mark.parametrize(("bits", "name"), EVERY_FILE)
def test_one_input_and_one_output_with_a_free_batch_axis(bits: int, name: str) -> None:
    graph = parsed(bits, name).graph
    (given,), (answered,) = graph.input, graph.output  # no initializer is an input: nothing would fuse
    if name != "qonnx":  # whose clean-up calls them global_in and global_out
        assert (given.name, answered.name) == (INPUT, OUTPUT)
    dimensions = [dimension.dim_value for dimension in given.type.tensor_type.shape.dim]
    assert dimensions == [0, 1, 8, 8] and given.type.tensor_type.shape.dim[0].dim_param
    assert given.type.tensor_type.elem_type == answered.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert answered.type.tensor_type.shape.dim[1].dim_value == 10


@pytest.mark.parametrize(("bits", "name"), EVERY_FILE)
def test_layers_and_opset(bits: int, name: str) -> None:
    model = parsed(bits, name)
    counts = hm.counts(model)
    assert (counts["Conv"], counts["Add"], counts["Gemm"]) == (CONVOLUTIONS, ADDITIONS, 1)
    assert "BatchNormalization" not in counts and "ReduceMean" not in counts
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
    quantizers = counts.get("Quant", 0) if name == "qonnx" else counts["DequantizeLinear"]
    # Ten layers with a weight and a bias, and 1 + 1 + 3 * 3 + 2 + 1 activations; integer wraps Flatten once more.
    assert quantizers == 20 + 14 + (name == "integer")
    assert ("Quant" in counts) == (name == "qonnx")


def constants_of(model: onnx.ModelProto, operation: str, place: int) -> list[hm.Array]:
    """The constant at the end of input ``place`` (through DequantizeLinear and Clip) of every such node, in order."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == operation:
            name = node.input[place]
            while name in made_by:
                name = made_by[name].input[0]
            found.append(np.asarray(numpy_helper.to_array(tensors[name])))
    return found


def steps(layer: Any) -> int:
    """How many steps of the bias make one of the accumulator, in networks of one width."""
    bits = int(layer.quant_weight().bit_width)
    return {8: 1, 4: 18, 3: 42, 2: 127}[bits]


@pytest.mark.parametrize("name", ["qcdq", "integer"])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_the_folded_networks_codes_and_biases_are_int32(bits: int, name: str) -> None:
    model, folded = parsed(bits, name), net(bits).folded
    layers = [layer for layer in folded.modules() if isinstance(layer, torch.nn.Conv2d)]
    stored = constants_of(model, "Conv", 1)
    assert len(stored) == len(layers) == CONVOLUTIONS
    assert {each.dtype.name for each in stored} == {"int8"}
    # The same codes, whatever the order: the exporter writes a shortcut where the forward takes it. The integer file
    # counts them in the steps of the bias.
    codes = [layer.quant_weight().int().numpy() * (1 if name == "qcdq" else steps(layer)) for layer in layers]  # type: ignore[operator]
    for each in stored:
        assert any(each.shape == code.shape and np.array_equal(each, code) for code in codes)
    for each in constants_of(model, "Conv", 2) + constants_of(model, "Gemm", 2):
        assert each.dtype == np.int32


@pytest.mark.parametrize("bits", BITS)
def test_pixels_enter_as_uint8_over_255(bits: int) -> None:
    """So that a device may skip the quantizer and feed its pixels as they are."""
    for name in ("qcdq", "integer"):
        model = parsed(bits, name)
        (first,) = (node for node in model.graph.node if INPUT in node.input)
        assert first.op_type == "QuantizeLinear"
        assert hm.constant(model, first.input[1]) == np.float32(1 / 255)
        zero_point = hm.constant(model, first.input[2])
        assert zero_point == 0 and zero_point.dtype == np.uint8


def test_int8_activations_only_before_the_pass() -> None:
    def types(model: onnx.ModelProto) -> set[str]:
        nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        return {hm.constant(model, node.input[2]).dtype.name for node in nodes}

    assert types(parsed(4, "qcdq")) == {"int8", "uint8"}
    assert types(parsed(4, "integer")) == {"uint8"}


@pytest.mark.parametrize("name", ["qonnx", "integer"])
def test_exporting_changes_nothing_and_repeats_itself(name: str) -> None:
    made = net(4)
    folded = copy.deepcopy(made.folded)
    before = copy.deepcopy(folded.state_dict())
    with torch.no_grad():
        logits = folded(made.x)
        first = build(name, folded, made.spec)
        assert torch.equal(folded(made.x), logits)
    assert all(torch.equal(value, before[key]) for key, value in folded.state_dict().items())
    assert not folded.training
    assert first.SerializeToString() == exported(4, name)


def test_the_spec_is_the_one_given_without_the_folder_of_the_data() -> None:
    made = net(4)
    spec = dataclasses.replace(made.spec, epsilon=0.1, class_names=tuple("abcdefghij"), data="some/private/place/signs")
    about = {entry.key: entry.value for entry in build("qcdq", made.folded, spec).metadata_props}
    assert ModelSpec.from_dict(json.loads(about["robustq.spec"])) == dataclasses.replace(spec, data="signs")


# --- what onnxruntime makes of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm_defaults", [False, True], ids=["x86", "arm"])
@pytest.mark.parametrize("bits", BITS)
def test_integer_runs_every_layer_as_integers(tmp_path: Path, bits: int, arm_defaults: bool) -> None:
    path = written(tmp_path, bits, "integer")
    operations = hm.optimised_operations(path, arm_defaults=arm_defaults)
    assert (operations["QLinearConv"], operations["QLinearAdd"], operations["QGemm"]) == (CONVOLUTIONS, ADDITIONS, 1)
    assert not {"Conv", "FusedConv", "NhwcFusedConv", "Add", "Gemm", "FusedGemm", "GlobalAveragePool"} & set(operations)
    # Pixels in, logits out: the only float tensors left.
    assert operations["QuantizeLinear"] == 1 and operations["DequantizeLinear"] <= 1
    layers = optimised_layers(path, arm_defaults=arm_defaults)
    assert layers.in_float == () and layers.float_convolutions == ()
    assert len(layers.integer) == CONVOLUTIONS + ADDITIONS + 2  # pooling and classifier


def test_qcdq_falls_back_to_float_at_arm_defaults(tmp_path: Path) -> None:
    """Why the int8 activations are shifted: every convolution that ends in a residual branch stays in float."""
    path = written(tmp_path, 8, "qcdq")
    on_x86, on_arm = optimised_layers(path), optimised_layers(path, arm_defaults=True)
    assert on_x86.float_convolutions == ()
    assert len(on_arm.float_convolutions) == 3 + 2  # the second of each block, and the shortcuts
    assert sum("Add" in name for name in on_arm.in_float) == ADDITIONS


def test_qcdq_leaves_the_classifier_in_float(tmp_path: Path) -> None:
    """Why Flatten is wrapped."""
    assert optimised_layers(written(tmp_path, 8, "qcdq")).in_float == ("/fc/Gemm",)


@pytest.mark.parametrize("bits", [4, 2])
def test_qcdq_leaves_narrow_convolutions_in_float(tmp_path: Path, bits: int) -> None:
    """Why accumulators are made to count as their biases do; the first layer's do so already."""
    assert len(optimised_layers(written(tmp_path, bits, "qcdq")).float_convolutions) == CONVOLUTIONS - 1


@pytest.mark.parametrize("name", ["qcdq", "integer"])
def test_any_batch(tmp_path: Path, name: str) -> None:
    model, x = OnnxModel(written(tmp_path, 4, name)), net(4).x
    together = model(x[:7])
    assert together.shape == (7, 10)
    # Each image by itself: the same integers; float32 sums of the classifier may run in another order.
    alone = torch.cat([model(x[place : place + 1]) for place in range(7)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="onnxruntime rewrites weights only on x86")
def test_exact_products_need_parameters_of_their_own(tmp_path: Path) -> None:
    def load(model: onnx.ModelProto) -> OnnxModel:
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return OnnxModel(path, exact=True)

    shared = parsed(8, "qcdq")
    reason = "Attempt to replace the existing tensor"
    with pytest.raises(ModelFileError) as caught:
        load(shared)
    assert reason in str(caught.value.__cause__)
    assert own_parameters(shared) > 0
    load(shared)
    # The other two passes do not do it.
    lowered = parsed(8, "qcdq")
    unsigned_activations(lowered)
    quantized_moves(lowered)
    with pytest.raises(ModelFileError) as caught:
        load(lowered)
    assert reason in str(caught.value.__cause__)


@pytest.mark.parametrize("bits", BITS)
def test_each_pass_keeps_every_answer(bits: int) -> None:
    """On the real graph, unoptimised, bit for bit."""
    x = net(bits).images[:16].numpy().astype(np.float32) / 255
    model = parsed(bits, "qcdq")

    def answered(model: onnx.ModelProto) -> bytes:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {INPUT: x})
        return bytes(logits.tobytes())

    before = answered(model)
    for lower, count in ((unsigned_activations, 5), (quantized_moves, 1)):
        assert lower(model) == count
        assert answered(model) == before
        assert lower(model) == 0
    assert own_parameters(model) > 0 and own_parameters(model) == 0
    assert answered(model) == before


# --- ResNet-20 -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", [*WIDTHS, SLOW_WIDTH])
def test_a_resnet20_runs_as_integers(tmp_path: Path, bits: int) -> None:
    path = written(tmp_path, bits, "integer", architecture="resnet20")
    for arm_defaults in (False, True):
        operations = hm.optimised_operations(path, arm_defaults=arm_defaults)
        assert (operations["QLinearConv"], operations["QLinearAdd"], operations["QGemm"]) == (21, 9, 1)
        assert optimised_layers(path, arm_defaults=arm_defaults).in_float == ()
