"""Every width in every format: the content of the file, its metadata, and how onnxruntime runs it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

import robustq
from robustq.errors import ExportError, UsageError
from robustq.export.formats import build, check_format
from robustq.export.integer_layers import optimised_layers
from robustq.export.qonnx_file import execute
from robustq.export.session import OnnxModel
from robustq.export.torch_export import INPUT, OPSET, OUTPUT
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec, build_model
from tests.export import hand_made as hm
from tests.export.exported import INTEGER, QUANTIZED, SLOW_WIDTH, exported, net, parsed, written
from tests.models.small_nets import small_spec

CONVOLUTIONS = 9  # of a ResNet-8
THREE_BITS = pytest.param(SLOW_WIDTH, marks=pytest.mark.slow)
FILES = [
    *((32, "float"), (8, "qcdq"), (8, "integer")),
    *((bits, name) for bits in (4, 1) for name in QUANTIZED),
    pytest.param(SLOW_WIDTH, "packed", marks=pytest.mark.slow),
]


def additions(bits: int) -> int:
    """Residual sums of a ResNet-8: binary blocks have a shortcut around each convolution."""
    return 6 if bits == 1 else 3


@pytest.mark.parametrize(
    ("name", "bits", "options", "line"),
    [
        ("integer", 32, {}, r"a 32-bit \(float\) network cannot be written as integer; write it as float, or quantize"),
        ("float", 8, {}, "resnet8-w8a8 is quantized, and float holds 32-bit networks"),
        ("QONNX", 4, {}, "unknown format 'QONNX'; known: qonnx, qcdq, integer, packed, float$"),
        ("integer", 4, {"pixels": "int8"}, "--input int8 is not known to integer; choose float or uint8$"),
        ("packed", 4, {"batch_norm": "keep"}, "--batch-norm keep is not known to packed; choose fold$"),
        ("integer", 4, {"consumer": "finn"}, "--for finn goes with --format qonnx, not with integer$"),
        ("qonnx", 4, {"consumer": "hls4ml", "batch_norm": "keep"}, "--for hls4ml folds BatchNorm into fixed-point mul"),
        ("qonnx", 1, {"consumer": "hls4ml"}, "resnet8-w1a1: --for hls4ml holds no layers of 1 bit; harden with --bits"),
    ],
)
def test_networks_and_options_that_a_format_refuses(name: str, bits: int, options: dict[str, Any], line: str) -> None:
    with pytest.raises((ExportError, UsageError), match=f"^{line}"):
        check_format(name, small_spec(bits), **options)


@pytest.mark.parametrize(("bits", "name"), FILES)
def test_metadata_and_ends_of_a_file(bits: int, name: str) -> None:
    check_format(name, small_spec(bits))
    model = parsed(bits, name)
    about = {entry.key.removeprefix("robustq."): entry.value for entry in model.metadata_props}
    assert about["format"] == name and about["bits"] == f"weights {bits}, activations {bits}"
    assert about["data"] == "digits" and json.loads(about["classes"]) == list("0123456789")
    assert about["input"].startswith("float32 (N, C, H, W) in [0, 1]")
    assert json.loads(about["made_with"])["torch"] == torch.__version__.split("+")[0]
    assert about["version"] == robustq.__version__
    assert ModelSpec.from_dict(json.loads(about["spec"])) == small_spec(bits)
    (given,), (answered,) = model.graph.input, model.graph.output  # no initializer is an input: nothing would fuse
    if name != "qonnx":  # whose clean-up calls them global_in and global_out
        assert (given.name, answered.name) == (INPUT, OUTPUT)
    dimensions = [dimension.dim_value for dimension in given.type.tensor_type.shape.dim]
    assert dimensions == [0, 1, 8, 8] and given.type.tensor_type.shape.dim[0].dim_param
    assert given.type.tensor_type.elem_type == answered.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(("bits", "name"), FILES)
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
    # 1 + 1 + 3 * 6 + 2 + 1 + 1; integer files wrap Flatten once more. Branches of sums with a zero point are quantized
    # twice: those of convolutions without a ReLU (of an 8-bit stem, in binary networks of integer files only).
    again = (3 if name in INTEGER else 0) if bits == 1 else 5
    activations = (24 if bits == 1 else 14) + (again if name != "qonnx" else 0)
    assert made == 20 + activations + (name in INTEGER)
    binary = {"qonnx": "BipolarQuant", "qcdq": "Sub"}.get(name, "Less")
    wanted = {"BipolarQuant": 6 + 6, "Sub": 6, "Less": 6}[binary] if bits == 1 else 0  # QONNX' weights are bipolar, too
    assert counts.get(binary, 0) == wanted
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


@pytest.mark.parametrize(("bits", "steps"), [(8, 1), (4, 18), (1, 127)])  # of the bias in one of the accumulator
def test_weights_are_the_folded_networks_codes_and_biases_are_int32(bits: int, steps: int) -> None:
    model, folded = parsed(bits, "integer"), net(bits).folded
    layers = [layer for layer in folded.modules() if isinstance(layer, torch.nn.Conv2d)]
    stored = constants_of(model, "Conv", 1)
    assert len(stored) == len(layers) == CONVOLUTIONS
    assert {each.dtype.name for each in stored} == {"int8"}
    factors = [1 if int(layer.quant_weight().bit_width) == 8 else steps for layer in layers]  # type: ignore[operator]
    codes = [layer.quant_weight().int().numpy() * one for layer, one in zip(layers, factors, strict=True)]  # type: ignore[operator]
    if bits == 1:  # weights of negated channels are negated
        stored, codes = [np.abs(each) for each in stored], [np.abs(code) for code in codes]
    for each in stored:  # in any order: the exporter writes a shortcut where the forward takes it
        assert any(each.shape == code.shape and np.array_equal(each, code) for code in codes)
    for each in constants_of(model, "Conv", 2) + constants_of(model, "Gemm", 2):
        assert each.dtype == np.int32


def test_exporting_changes_nothing_and_repeats_itself() -> None:
    made = net(4)
    folded = copy.deepcopy(made.folded)
    before = copy.deepcopy(folded.state_dict())
    assert build("integer", folded, made.spec).SerializeToString() == exported(4, "integer")
    assert all(torch.equal(value, before[key]) for key, value in folded.state_dict().items())
    assert not folded.training


def test_the_spec_is_the_one_given_without_the_folder_of_the_data() -> None:
    made = net(4)
    spec = dataclasses.replace(made.spec, epsilon=0.1, class_names=tuple("abcdefghij"), data="some/private/place/signs")
    about = {entry.key: entry.value for entry in build("qcdq", made.folded, spec).metadata_props}
    assert ModelSpec.from_dict(json.loads(about["robustq.spec"])) == dataclasses.replace(spec, data="signs")


# --- in onnxruntime --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm_defaults", [False, True], ids=["x86", "arm"])
@pytest.mark.parametrize(("bits", "name"), [(8, "integer"), (4, "packed"), (1, "integer"), (1, "packed"), *FILES[-1:]])
def test_integer_files_run_every_layer_as_integers(tmp_path: Path, bits: int, name: str, arm_defaults: bool) -> None:
    path = written(tmp_path, bits, name)
    operations = hm.optimised_operations(path, arm_defaults=arm_defaults)
    counted = (operations["QLinearConv"], operations["QLinearAdd"], operations["QGemm"])
    assert counted == (CONVOLUTIONS, additions(bits), 1)
    assert not {"Conv", "FusedConv", "NhwcFusedConv", "Add", "Gemm", "FusedGemm", "GlobalAveragePool"} & set(operations)
    assert not {"Gather", "Mul", "Sub"} & set(operations)  # weights are unpacked when the file is loaded
    # Pixels in, logits out: the only float tensors left, but for the last ReLU of a binary network.
    assert operations["QuantizeLinear"] == 1 + (bits == 1) and operations["DequantizeLinear"] <= 1
    layers = optimised_layers(path, arm_defaults=arm_defaults)
    assert layers.in_float == () and layers.float_convolutions == ()
    assert len(layers.integer) == CONVOLUTIONS + additions(bits) + 2  # pooling and classifier


def answers(model: onnx.ModelProto | bytes, x: hm.Array, level: str = "ORT_DISABLE_ALL") -> bytes:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    content = model if isinstance(model, bytes) else model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return bytes(session.run(None, {INPUT: x})[0].tobytes())


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("bits", [4, 1, THREE_BITS])
def test_packed_files_give_the_integer_files_answers_at_every_level(bits: int, level: str) -> None:
    x = net(bits).x[:20].numpy()
    assert answers(exported(bits, "packed"), x, level) == answers(exported(bits, "integer"), x, level)


@pytest.mark.parametrize(("bits", "name"), [(32, "float"), (8, "qcdq"), (4, "integer"), (1, "packed")])
def test_uint8_pixels_get_the_same_answers(tmp_path: Path, bits: int, name: str) -> None:
    made = net(bits)
    path = tmp_path / "uint8.onnx"
    onnx.save(build(name, made.folded, made.spec, pixels="uint8"), path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"
    (found,) = session.run(None, {INPUT: made.images.numpy()})
    expected = OnnxModel(written(tmp_path, bits, name))(made.x)
    assert torch.equal(torch.from_numpy(found), expected)
    assert torch.equal(OnnxModel(path)(made.x), expected)  # which feeds 255 times the pixels
    if name in INTEGER:
        assert optimised_layers(path).in_float == ()


@pytest.mark.parametrize("bits", [4, 1])
def test_qonnx_has_annotated_tensors_and_may_keep_batch_norm(bits: int) -> None:
    made, model = net(bits), parsed(bits, "qonnx")
    annotated = {each.tensor_name for each in model.graph.quantization_annotation}
    assert annotated >= {output for node in model.graph.node for output in node.output}
    kept = build("qonnx", made.model, made.spec)
    # Binary blocks have one in front of each binary activation as well.
    assert hm.counts(kept)["BatchNormalization"] == CONVOLUTIONS + (6 if bits == 1 else 0)
    few = made.x[:10]
    with torch.no_grad():
        torch.testing.assert_close(execute(kept, few), made.model(few), rtol=0, atol=2e-5)  # float sums of tens


def test_qcdq_convolutions_are_integers_at_arm_defaults(tmp_path: Path) -> None:
    """The classifier stays in float, since QCDQ files do not wrap Flatten."""
    path = written(tmp_path, 8, "qcdq")
    for arm_defaults in (False, True):
        layers = optimised_layers(path, arm_defaults=arm_defaults)
        assert layers.in_float == ("/fc/Gemm",)
        assert sum("Add" in name for name in layers.integer) == additions(8)


@pytest.mark.parametrize(
    ("architecture", "bits", "share"),
    [("resnet20", 4, 6.0), ("resnet20", 1, 12.0), pytest.param("resnet18", 1, 20.0, marks=pytest.mark.slow)],
)
def test_packed_files_are_small(architecture: str, bits: int, share: float) -> None:
    spec = small_spec(bits, architecture=architecture, channels=3, image_size=32)
    plain = dataclasses.replace(spec, weight_bits=32, act_bits=32)
    sizes = []
    for name, one in (("float", plain), ("packed", spec)):
        torch.manual_seed(0)
        sizes.append(len(build(name, fold(build_model(one).eval(), one), one).SerializeToString()))
    assert sizes[0] / sizes[1] >= share
