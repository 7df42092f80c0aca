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
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

import robustq
from robustq.errors import ExportError, ModelFileError, UsageError
from robustq.export.formats import build, check_format
from robustq.export.lowering.constants import folded_constants, own_constants
from robustq.export.lowering.integer_signs import integer_signs
from robustq.export.lowering.quantized_moves import quantized_moves
from robustq.export.lowering.unsigned_activations import unsigned_activations
from robustq.export.qonnx_file import execute
from robustq.export.session import OnnxModel, optimised_layers
from robustq.export.torch_export import INPUT, OPSET, OUTPUT, export_qcdq
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec, build_model
from tests.export import hand_made as hm
from tests.export.exported import INTEGER, QUANTIZED, RUNNABLE, SLOW_WIDTH, WIDTHS, exported, net, parsed, written
from tests.models.small_nets import small_spec

CONVOLUTIONS = 9  # of a ResNet-8
BITS = [*WIDTHS, pytest.param(SLOW_WIDTH, marks=pytest.mark.slow)]
EVERY_FILE = [
    (32, "float"),
    *((bits, name) for bits in WIDTHS for name in QUANTIZED),
    *(pytest.param(SLOW_WIDTH, name, marks=pytest.mark.slow) for name in QUANTIZED),
]


def additions(bits: int) -> int:
    """Residual sums of a ResNet-8: binary blocks have a shortcut around each convolution."""
    return 6 if bits == 1 else 3


# --- what may be written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_float_network_is_refused(name: str) -> None:
    with pytest.raises(
        ExportError, match=rf"^a 32-bit \(float\) network cannot be written as {name}; write it as float, or quantize"
    ):
        check_format(name, small_spec(32))


@pytest.mark.parametrize("bits", [8, 1])
def test_float_refuses_a_quantized_network(bits: int) -> None:
    with pytest.raises(ExportError, match=rf"^resnet8-w{bits}a{bits} is quantized, and float holds 32-bit networks"):
        check_format("float", small_spec(bits))


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", ["", "onnx", "QONNX", "int8"])
def test_an_unknown_format_is_refused(name: str, bits: int) -> None:
    with pytest.raises(UsageError, match=rf"^unknown format '{name}'; known: qonnx, qcdq, integer, packed, float$"):
        check_format(name, small_spec(bits))


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("qonnx", {"pixels": "uint8"}, "--input uint8 is not known to qonnx; choose float"),
        ("integer", {"pixels": "int8"}, "--input int8 is not known to integer; choose float or uint8"),
        ("packed", {"batch_norm": "keep"}, "--batch-norm keep is not known to packed; choose fold"),
        ("qonnx", {"batch_norm": "drop"}, "--batch-norm drop is not known to qonnx; choose fold or keep"),
    ],
)
def test_an_option_that_a_format_does_not_have_is_refused(name: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_format(name, small_spec(4), **options)
    assert str(caught.value) == line


@pytest.mark.parametrize(("bits", "name"), EVERY_FILE)
def test_every_width_has_every_format(bits: int, name: str) -> None:
    check_format(name, small_spec(bits))


# --- what a file holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "name"), EVERY_FILE)
def test_a_file_says_what_it_is(bits: int, name: str) -> None:
    about = {entry.key: entry.value for entry in parsed(bits, name).metadata_props}
    assert about["robustq.format"] == name
    assert about["robustq.bits"] == f"weights {bits}, activations {bits}"
    assert about["robustq.data"] == "digits" and json.loads(about["robustq.classes"]) == list("0123456789")
    assert about["robustq.input"].startswith("float32 (N, C, H, W) in [0, 1]")
    assert json.loads(about["robustq.made_with"])["torch"] == torch.__version__.split("+")[0]
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
    assert (counts["Conv"], counts["Gemm"]) == (CONVOLUTIONS, 1)
    # Three bits are the sum of two parts of each weight that is packed: the large ones, 7 of 9 convolutions.
    assert counts["Add"] == additions(bits) + (7 if (bits, name) == (3, "packed") else 0)
    assert "BatchNormalization" not in counts and "ReduceMean" not in counts
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
    if name == "float":
        assert not {"Quant", "QuantizeLinear", "DequantizeLinear"} & set(counts)
        return
    made = counts.get("Quant", 0) + counts.get("BipolarQuant", 0) if name == "qonnx" else counts["DequantizeLinear"]
    # Ten layers with a weight and a bias; 1 + 1 + 3 * 3 + 2 + 1 activations, in binary networks
    # 1 + 1 + 3 * 6 + 2 + 1 + 1; integer files wrap Flatten once more.
    # Branches of sums with a zero point are quantized twice: those of convolutions without a ReLU (of an 8-bit stem, in
    # binary networks), in binary networks of integer files only.
    again = (3 if name in INTEGER else 0) if bits == 1 else 5
    activations = (24 if bits == 1 else 14) + (again if name != "qonnx" else 0)
    assert made == 20 + activations + (name in INTEGER)
    assert ("Quant" in counts) == (name == "qonnx")
    signs = {"qonnx": "BipolarQuant", "qcdq": "Sub"}.get(name, "Less")
    wanted = {"BipolarQuant": 6 + 6, "Sub": 6, "Less": 6}[signs] if bits == 1 else 0  # QONNX' weights are bipolar, too
    assert counts.get(signs, 0) == wanted
    assert ("Gather" in counts) == (name == "packed" and bits < 8)


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
    return {8: 1, 4: 18, 3: 42, 2: 127, 1: 127}[bits]


@pytest.mark.parametrize("name", ["qcdq", "integer"])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_the_folded_networks_codes_and_biases_are_int32(bits: int, name: str) -> None:
    model, folded = parsed(bits, name), net(bits).folded
    layers = [layer for layer in folded.modules() if isinstance(layer, torch.nn.Conv2d)]
    stored = constants_of(model, "Conv", 1)
    assert len(stored) == len(layers) == CONVOLUTIONS
    assert {each.dtype.name for each in stored} == {"int8"}
    # The same codes, whatever the order: the exporter writes a shortcut where the forward takes it. They count in the
    # steps of the bias.
    codes = [layer.quant_weight().int().numpy() * steps(layer) for layer in layers]  # type: ignore[operator]
    if name == "integer" and bits == 1:  # where a sign was turned, so were the weights that it meets
        stored, codes = [np.abs(each) for each in stored], [np.abs(code) for code in codes]
    for each in stored:
        assert any(each.shape == code.shape and np.array_equal(each, code) for code in codes)
    for each in constants_of(model, "Conv", 2) + constants_of(model, "Gemm", 2):
        assert each.dtype == np.int32


@pytest.mark.parametrize("bits", BITS)
def test_pixels_enter_as_uint8_over_255(bits: int) -> None:
    """So that a device may skip the quantizer and feed its pixels as they are."""
    for name in RUNNABLE:
        model = parsed(bits, name)
        (first,) = (node for node in model.graph.node if INPUT in node.input)
        assert first.op_type == "QuantizeLinear"
        assert hm.constant(model, first.input[1]) == np.float32(1 / 255)
        zero_point = hm.constant(model, first.input[2])
        assert zero_point == 0 and zero_point.dtype == np.uint8


def test_int8_activations_only_of_signs() -> None:
    def types(model: onnx.ModelProto) -> set[str]:
        nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        return {hm.constant(model, node.input[2]).dtype.name for node in nodes}

    assert types(parsed(1, "qcdq")) == {"int8", "uint8"}
    assert types(parsed(4, "qcdq")) == types(parsed(4, "integer")) == types(parsed(1, "integer")) == {"uint8"}


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
@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("bits", BITS)
def test_integer_files_run_every_layer_as_integers(tmp_path: Path, bits: int, name: str, arm_defaults: bool) -> None:
    path = written(tmp_path, bits, name)
    operations = hm.optimised_operations(path, arm_defaults=arm_defaults)
    counted = (operations["QLinearConv"], operations["QLinearAdd"], operations["QGemm"])
    assert counted == (CONVOLUTIONS, additions(bits), 1)
    assert not {"Conv", "FusedConv", "NhwcFusedConv", "Add", "Gemm", "FusedGemm", "GlobalAveragePool"} & set(operations)
    assert not {"Gather", "Mul", "Sub"} & set(operations)  # weights are unpacked when the file is loaded
    # Pixels in, logits out: the only float tensors left, but for the last rectifier of a binary network.
    assert operations["QuantizeLinear"] == 1 + (bits == 1) and operations["DequantizeLinear"] <= 1
    layers = optimised_layers(path, arm_defaults=arm_defaults)
    assert layers.in_float == () and layers.float_convolutions == ()
    assert len(layers.integer) == CONVOLUTIONS + additions(bits) + 2  # pooling and classifier


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("bits", BITS)
def test_packed_files_give_the_integer_files_answers_at_every_level(tmp_path: Path, bits: int, level: str) -> None:
    x = net(bits).x[:20].numpy()

    def answered(name: str) -> bytes:
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession(exported(bits, name), options, providers=["CPUExecutionProvider"])
        return bytes(session.run(None, {INPUT: x})[0].tobytes())

    assert answered("packed") == answered("integer")


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("bits", [8, 1])
def test_uint8_pixels_get_the_same_answers(tmp_path: Path, bits: int, name: str) -> None:
    made = net(bits)
    path = tmp_path / "uint8.onnx"
    onnx.save(build(name, made.folded, made.spec, pixels="uint8"), path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"
    (answers,) = session.run(None, {INPUT: made.images.numpy()})
    expected = OnnxModel(written(tmp_path, bits, name))(made.x)
    assert torch.equal(torch.from_numpy(answers), expected)
    assert torch.equal(OnnxModel(path)(made.x), expected)  # which feeds 255 times the pixels
    assert "QuantizeLinear" not in [each.op_type for each in onnx.load(path).graph.node if INPUT in each.input]
    if name in INTEGER:
        assert optimised_layers(path).in_float == ()


def test_a_float_network_takes_uint8_pixels_too(tmp_path: Path) -> None:
    made = net(32)
    path = tmp_path / "uint8.onnx"
    onnx.save(build("float", made.folded, made.spec, pixels="uint8"), path)
    assert torch.equal(OnnxModel(path)(made.x), OnnxModel(written(tmp_path, 32, "float"))(made.x))


@pytest.mark.parametrize("bits", BITS)
def test_qonnx_has_annotated_tensors_and_may_keep_batch_norm(bits: int) -> None:
    made, model = net(bits), parsed(bits, "qonnx")
    annotated = {each.tensor_name for each in model.graph.quantization_annotation}
    assert annotated >= {output for node in model.graph.node for output in node.output}
    kept = build("qonnx", made.model, made.spec)
    counts = hm.counts(kept)
    # Binary blocks have one in front of each sign as well.
    assert counts["BatchNormalization"] == CONVOLUTIONS + (6 if bits == 1 else 0)
    few = made.x[:20]
    with torch.no_grad():
        torch.testing.assert_close(execute(kept, few), made.model(few), rtol=0, atol=2e-5)  # float sums of tens


def test_qcdq_convolutions_are_integers_at_arm_defaults(tmp_path: Path) -> None:
    """Residual branches are uint8 there too: with int8 ones five convolutions stayed in float."""
    path = written(tmp_path, 8, "qcdq")
    for arm_defaults in (False, True):
        layers = optimised_layers(path, arm_defaults=arm_defaults)
        assert layers.float_convolutions == ()
        assert sum("Add" in name for name in layers.integer) == additions(8)


def test_qcdq_leaves_the_classifier_in_float(tmp_path: Path) -> None:
    """Why Flatten is wrapped."""
    assert optimised_layers(written(tmp_path, 8, "qcdq")).in_float == ("/fc/Gemm",)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("bits", BITS)
def test_biases_count_in_the_accumulators_step(bits: int, name: str) -> None:
    """Before 1.27 onnxruntime adds their codes to the accumulator without a look at their scale."""
    model = parsed(bits, name)
    folded_constants(model)
    made_by = {output: node for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == CONVOLUTIONS + 1
    for node in layers:
        sources = [made_by[source] for source in node.input]
        if sources[0].op_type == "Flatten":  # in front of the classifier
            sources[0] = made_by[sources[0].input[0]]
        entering, weight, bias = (hm.constant(model, source.input[1]) for source in sources)
        np.testing.assert_allclose(bias, np.squeeze(entering * weight), rtol=1e-6)  # float32 rounding


@pytest.mark.parametrize("name", RUNNABLE)
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

    made = net(8)
    shared = export_qcdq(made.folded, made.spec)
    reason = "Attempt to replace the existing tensor"
    with pytest.raises(ModelFileError) as caught:
        load(shared)
    assert reason in str(caught.value.__cause__)
    assert own_constants(shared) > 0
    load(shared)
    # The other two passes do not do it.
    lowered = export_qcdq(made.folded, made.spec)
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
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {INPUT: x})
        return bytes(logits.tobytes())

    before = answered(model)
    counts = (15, 1, 6) if bits == 1 else (0, 1, 0)  # int8 activations are those of signs
    for lower, count in zip((unsigned_activations, quantized_moves, integer_signs), counts, strict=True):
        assert lower(model) == count
        assert answered(model) == before
        assert lower(model) == 0
    own_constants(model)
    assert own_constants(model) == 0 and answered(model) == before


# --- ResNet-20 and ResNet-18 -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("bits", [*WIDTHS, SLOW_WIDTH])
def test_a_resnet20_runs_as_integers(tmp_path: Path, bits: int, name: str) -> None:
    path = written(tmp_path, bits, name, architecture="resnet20")
    for arm_defaults in (False, True):
        operations = hm.optimised_operations(path, arm_defaults=arm_defaults)
        sums = 18 if bits == 1 else 9
        assert (operations["QLinearConv"], operations["QLinearAdd"], operations["QGemm"]) == (21, sums, 1)
        assert optimised_layers(path, arm_defaults=arm_defaults).in_float == ()


@pytest.mark.parametrize(("bits", "share"), [(4, 6.0), (1, 12.0)])
def test_a_packed_resnet20_is_small(bits: int, share: float) -> None:
    spec = small_spec(bits, architecture="resnet20", channels=3, image_size=32)
    assert _float_bytes(spec) / _packed_bytes(spec) >= share


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "share"), [(4, 7.4), (1, 20.0)])
def test_a_packed_resnet18_is_small(bits: int, share: float) -> None:
    spec = dataclasses.replace(
        small_spec(bits, architecture="resnet18", channels=3, image_size=64), classes=1000, class_names=()
    )
    assert _float_bytes(spec) / _packed_bytes(spec) >= share


def _float_bytes(spec: ModelSpec) -> int:
    plain = dataclasses.replace(spec, weight_bits=32, act_bits=32)
    return len(build("float", fold(build_model(plain).eval(), plain), plain).SerializeToString())


def _packed_bytes(spec: ModelSpec) -> int:
    torch.manual_seed(0)
    return len(build("packed", fold(build_model(spec).eval(), spec), spec).SerializeToString())
