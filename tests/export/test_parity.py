"""Agreement of two sets of logits in closed form, and of files with networks that they were or were not made from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx
import pytest
import torch

from robustq.export.parity import Agreement, compare, drift, parity
from tests.export.exported import net, parsed


def agreement(images: int, different: int) -> Agreement:
    return Agreement(images=images, different_top1=different, max_difference=0.0, mean_difference=0.0)


def test_differences_are_shares_of_the_references_range() -> None:
    reference = torch.tensor([[0.0, 1.0], [4.0, 2.0]])  # range 4
    answers = torch.tensor([[0.0, 1.0], [2.0, 3.0]])  # off by 2 and 1, and the second image changes class
    assert compare(reference, answers) == Agreement(
        images=2, different_top1=1, max_difference=0.5, mean_difference=3 / 4 / 4, images_apart=1
    )


def test_equal_and_constant_logits_do_not_differ() -> None:
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    assert compare(logits, logits.clone()) == Agreement(50, 0, 0.0, 0.0)
    assert compare(torch.ones(3, 2), torch.ones(3, 2)) == Agreement(3, 0, 0.0, 0.0)  # no range to divide by


@pytest.mark.parametrize("side", ["answers", "reference", "both"])
def test_nan_is_no_answer(side: str) -> None:
    """Argmax would call the NaN's place a class, and two NaN would agree."""
    reference = torch.tensor([[3.0, 1.0], [1.0, 3.0], [3.0, 1.0], [1.0, 3.0]])
    answers = reference.clone()
    if side != "reference":
        answers[:3, 0] = torch.nan
    if side != "answers":
        reference[:3, 0] = torch.nan
    found = compare(reference, answers)
    assert found.different_top1 == 3 and not found.holds


@pytest.mark.parametrize(("images", "different"), [(99, 0), (100, 1), (1000, 1), (1999, 1), (2000, 2), (10_000, 10)])
def test_one_image_in_a_thousand_may_differ_and_one_of_a_hundred(images: int, different: int) -> None:
    assert agreement(images, different).holds and not agreement(images, different + 1).holds


def test_what_json_gets() -> None:
    stored = json.loads(json.dumps(agreement(1000, 2).to_dict()))
    assert stored == {
        "images": 1000,
        "different_top1": 2,
        "max_difference": 0.0,
        "mean_difference": 0.0,
        "images_apart": 0,
        "bound": 1e-3,
        "same_answers": False,
        "holds": False,
    }


def test_logits_of_another_network_do_not_hold_however_alike_the_answers() -> None:
    near = Agreement(images=200, different_top1=0, max_difference=0.01, mean_difference=9e-4)
    far = Agreement(images=200, different_top1=0, max_difference=0.01, mean_difference=2e-3)
    unknown = Agreement(images=200, different_top1=0, max_difference=math.nan, mean_difference=math.nan)
    assert near.holds
    assert far.same_answers and not far.holds
    assert not unknown.holds
    assert json.loads(json.dumps(unknown.to_dict(), allow_nan=False))["max_difference"] is None


@pytest.mark.parametrize("damage", ["bias", "scale", "weight"])
def test_a_damaged_file_does_not_agree(tmp_path: Path, damage: str) -> None:
    """One constant of the classifier is turned round. Classes may stay, for want of small margins; logits do not."""
    made, model = net(4), parsed(4, "integer")
    (gemm,) = (node for node in model.graph.node if node.op_type == "Gemm")
    made_by = {output: node for node in model.graph.node for output in node.output}
    source = made_by[gemm.input[2 if damage == "bias" else 1]]
    assert source.op_type == "DequantizeLinear"
    name = source.input[1 if damage == "scale" else 0]
    name = made_by[name].input[0] if name in made_by else name  # codes of weights pass through a Clip
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values[::-1].copy(), name))
    path = tmp_path / "damaged.onnx"
    onnx.save(model, path)
    found = parity(path, made.folded, made.x, runs=("unoptimised",))["unoptimised"]
    assert found.mean_difference > 3e-3
    assert not found.holds or damage != "weight"


def test_drift_compares_unfolded_with_folded() -> None:
    made = net(8)
    found = drift(made.model, made.folded, made.x)
    assert found.images == len(made.x)
    assert found.mean_difference < 0.02  # single 8-bit codes on the other side of a tie
    assert found.mean_difference > 0.0  # the biases were rounded
    assert drift(made.folded, made.folded, made.x) == Agreement(len(made.x), 0, 0.0, 0.0)
