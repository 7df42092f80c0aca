"""The pass that packs narrow weights, against unpacking by hand and by onnxruntime."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustq.export.lowering.packed_weights import SMALLEST, fields_of, pack, packed_weights, parts_of
from tests.export import hand_made as hm

CODES = {
    1: np.array([-1, 1]),
    2: np.arange(-1, 2),
    3: np.arange(-3, 4),
    4: np.arange(-7, 8),
    5: np.arange(-15, 16),
    7: np.arange(-63, 64),
}
FACTORS = {1: 127, 2: 127, 3: 42, 4: 18, 5: 8, 7: 2}


def weights(bits: int, shape: tuple[int, ...], *, factor: int) -> hm.Array:
    drawn = np.random.default_rng(0).choice(CODES[bits], shape)
    drawn.flat[:2] = CODES[bits][0], CODES[bits][-1]  # both ends, or fewer bits would do
    return (drawn * factor).astype(np.int8)


def layer(codes: hm.Array) -> onnx.ModelProto:
    return hm.model(
        [hm.dequantize("codes", "w", "s"), hm.node("Gemm", ["x", "w"], "y", transB=1)],
        {"codes": codes, "s": np.float32(0.5)},
        x=["n", codes.shape[1]],
        outputs={"y": 2},
    )


@pytest.mark.parametrize("bits", CODES)
@pytest.mark.parametrize("shape", [(64, 16), (33, 37)])  # whole bytes, and a last one to be filled up
@pytest.mark.parametrize("whole", [False, True])
def test_the_same_weights_in_so_many_bits(bits: int, shape: tuple[int, int], whole: bool) -> None:
    codes = weights(bits, shape, factor=1 if whole else FACTORS[bits])
    before = layer(codes)
    after = copy.deepcopy(before)
    assert packed_weights(after) == 1
    onnx.checker.check_model(after, full_check=True)
    stored = [tensor for tensor in after.graph.initializer if "packed" in tensor.name]
    held = sum(onnx.numpy_helper.to_array(tensor).size for tensor in stored)
    assert codes.size * bits / 8 <= held < codes.size * bits / 8 + len(stored)
    assert not [tensor for tensor in after.graph.initializer if tensor.name == "codes"]
    # The identity matrix reads the weights out.
    assert hm.same_answers(before, after, np.eye(shape[1], dtype=np.float32))
    assert packed_weights(after) == 0


@pytest.mark.parametrize("bits", [3, 7])
def test_parts_are_added_in_a_type_that_old_onnxruntimes_add(bits: int) -> None:
    model = layer(weights(bits, (64, 16), factor=FACTORS[bits]))
    packed_weights(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    added = [types[name] for node in inferred.node if node.op_type == "Add" for name in node.input]
    assert len(added) == 2 * (len(parts_of(bits)) - 1)
    assert set(added) == {onnx.TensorProto.INT32}  # bytes from 1.23 on


def test_layers_share_what_bytes_unpack_to() -> None:
    codes = weights(4, (64, 64), factor=18)
    constants = {"one": codes, "two": codes[::-1].copy(), "three": (codes // 18).astype(np.int8), "s": np.float32(1)}
    nodes = [hm.dequantize(name, f"w_{name}", "s") for name in ("one", "two", "three")]
    inputs = ["x", "a", "b"]
    nodes += [
        hm.node("MatMul", [inputs[place], f"w_{name}"], [*inputs, "y"][place + 1])
        for place, name in enumerate(("one", "two", "three"))
    ]
    model = hm.model(nodes, constants, x=["n", 64], outputs={"y": 2})
    assert packed_weights(model) == 3
    tables = [tensor for tensor in model.graph.initializer if tensor.name.startswith("bytes_of_4")]
    assert len(tables) == 2  # with and without the factor of 18


@pytest.mark.parametrize(
    "codes",
    [
        weights(4, (31, 33), factor=1),  # one short of SMALLEST
        np.arange(-128, 128, dtype=np.int8).repeat(8).reshape(64, 32),  # takes 8 bits
    ],
)
def test_what_would_not_shrink_stays(codes: hm.Array) -> None:
    assert codes.size < SMALLEST or np.unique(codes).size == 256
    model = layer(codes)
    before = model.SerializeToString()
    assert packed_weights(model) == 0
    assert model.SerializeToString() == before


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(-128, 127), min_size=1, max_size=40))
def test_fields_say_what_the_codes_were(numbers: list[int]) -> None:
    codes = np.array(numbers, np.int8)
    fields = fields_of(codes)
    assert fields.values.max() < 2**fields.bits
    back = fields.factor * (fields.values.astype(int) * fields.stride + fields.offset)
    assert back.tolist() == numbers


@pytest.mark.parametrize(("bits", "parts"), [(1, [1]), (2, [2]), (3, [2, 1]), (4, [4]), (6, [4, 2]), (7, [4, 2, 1])])
def test_parts_divide_a_byte(bits: int, parts: list[int]) -> None:
    assert parts_of(bits) == parts


def test_the_most_significant_field_comes_first() -> None:
    assert pack(np.array([1, 0, 1, 1, 0, 0, 0, 1, 1], np.uint8), 1).tolist() == [0b10110001, 0b10000000]
    assert pack(np.array([1, 15], np.uint8), 4).tolist() == [0x1F]


def test_all_weights_alike_need_one_bit() -> None:
    fields = fields_of(np.full((4, 4), -7, np.int8))
    assert fields.bits == 1 and not fields.values.any()
    assert fields_of(np.zeros((4, 4), np.int8)).bits == 1
