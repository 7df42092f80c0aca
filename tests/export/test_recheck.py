"""The proof of a file: parity in every way of running it, its layers, and accuracy counted on its answers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustq.evaluation.accuracy import predict
from robustq.export.first_difference import Difference
from robustq.export.parity import Agreement
from robustq.export.recheck import EXECUTOR_IMAGES, Proof, attack_file, prove
from robustq.export.session import Layers, OnnxModel
from tests.export.exported import INTEGER, QUANTIZED, net, written

RUNS = {
    "qonnx": ["qonnx_executor", "optimised", "unoptimised", "exact"],
    "qcdq": ["optimised", "unoptimised", "exact"],
    "integer": ["optimised", "unoptimised", "exact"],
    "packed": ["optimised", "unoptimised", "exact"],
    "float": ["optimised", "unoptimised", "exact"],
}
SLOW = {(3, name) for name in RUNS} | {(2, "qonnx"), (8, "qonnx"), (8, "packed"), (2, "packed")}
PAIRS = [(32, "float"), *((bits, name) for bits in (8, 4, 3, 2, 1) for name in QUANTIZED)]


def check_proof(proof: Proof, bits: int, name: str, images: int) -> None:
    assert proof.shortfalls == []
    assert list(proof.agreements) == RUNS[name]
    for run, agreement in proof.agreements.items():
        assert agreement.images == (min(images, EXECUTOR_IMAGES) if run == "qonnx_executor" else images)
        assert agreement.different_top1 <= 1
        # Where a value sits on a rounding tie single codes differ: now and then at 8 bits, hardly ever below (on which
        # networks depends on the processor that trained them), and the proof says so. Nothing else may differ.
        tied = bits > 4 or run == "qonnx_executor" or run in proof.on_ties
        assert agreement.mean_difference <= (1e-3 if tied else 1e-4)
    assert proof.judged_file == ("qcdq" if name == "qonnx" else name)
    assert proof.first_difference is None
    assert proof.must_be_integer == (name in INTEGER)
    if name in INTEGER:
        assert proof.layers.in_float == () and proof.layers.float_convolutions == ()


@pytest.mark.parametrize(
    ("bits", "name"),
    # qonnx's executor takes its time.
    [pytest.param(*pair, marks=[pytest.mark.slow] if pair in SLOW else []) for pair in PAIRS],
)
def test_every_file_agrees_with_the_folded_network(tmp_path: Path, bits: int, name: str) -> None:
    made = net(bits)
    path = written(tmp_path, bits, name)
    before = path.read_bytes()
    proof = prove(path, name, made.folded, made.spec, made.images)
    check_proof(proof, bits, name, len(made.images))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet20", "resnet18"])
@pytest.mark.parametrize(("bits", "name"), PAIRS)
def test_every_larger_file_agrees_with_the_folded_network(
    tmp_path: Path, bits: int, name: str, architecture: str
) -> None:
    made = net(bits, architecture=architecture)
    path = written(tmp_path, bits, name, architecture=architecture)
    check_proof(prove(path, name, made.folded, made.spec, made.images), bits, name, len(made.images))


def negated(folded: nn.Module) -> nn.Module:
    """The twin that likes best what ``folded`` likes least."""
    twin = copy.deepcopy(folded)
    fc = twin.get_submodule("fc")
    assert isinstance(fc, nn.Linear)
    with torch.no_grad():
        fc.weight.neg_()
        fc.bias.neg_()
    return twin


@pytest.mark.parametrize("name", QUANTIZED)
def test_another_networks_file_falls_short(tmp_path: Path, name: str) -> None:
    made = net(4)
    proof = prove(written(tmp_path, 4, name), name, negated(made.folded), made.spec, made.images[:30])
    # Of a QONNX file only qonnx's executor reads the file itself.
    wrong = ["qonnx_executor"] if name == "qonnx" else RUNS[name]
    where = [] if name == "qonnx" else ["first in 10 of 10 values of logits differ"]
    assert proof.shortfalls == [*(f"{run}: 30 of 30 images get another class" for run in wrong), *where]


@pytest.mark.parametrize("tied", [False, True])
def test_a_fault_in_every_image_falls_short_though_ties_stand_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Every logit is shifted alike, so that no answer changes; even if each image met a tie first."""
    made = net(8)
    twin: Any = copy.deepcopy(made.folded)
    with torch.no_grad():
        twin.fc.bias.add_(0.01 * made.folded(made.x).std() * 10)
    if tied:
        on_tie = Difference("relu", 1, 1, on_ties=True)
        monkeypatch.setattr("robustq.export.recheck.first_difference", lambda *_, **__: on_tie)
    proof = prove(written(tmp_path, 8, "packed"), "packed", twin, made.spec, made.images[:60])
    assert all(each.same_answers for each in proof.agreements.values())
    assert proof.on_ties == () and len([fall for fall in proof.shortfalls if "logits differ by" in fall]) == 3


def agreement(different: int) -> Agreement:
    return Agreement(images=1000, different_top1=different, max_difference=0.1, mean_difference=1e-4)


def test_shortfalls_are_said_in_words() -> None:
    layers = Layers(("a",), ("b", "c", "d"), ("b", "c"))
    proof = Proof("integer", {"optimised": agreement(1), "exact": agreement(7)}, layers, must_be_integer=True)
    assert proof.shortfalls == [
        "exact: 7 of 1000 images get another class",
        "2 convolutions left in float: b, ...",
    ]
    allowed = Proof("qcdq", {"optimised": agreement(1)}, layers, must_be_integer=False)
    assert allowed.shortfalls == []


def test_what_json_gets() -> None:
    proof = Proof("integer", {"exact": agreement(7)}, Layers(("a",), ("b",), ()), must_be_integer=True)
    assert json.loads(json.dumps(proof.to_dict())) == {
        "parity": {"exact": agreement(7).to_dict()},
        "equal_in": [],
        "first_difference": None,
        "on_ties": [],
        "integer_layers": ["a"],
        "float_layers": ["b"],
        "judged_file": "integer",
    }


# --- accuracy under attack -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qonnx", "integer"])
def test_accuracy_is_counted_on_the_files_answers(tmp_path: Path, name: str) -> None:
    """The twin that finds the images answers wrongly throughout; clean accuracy is the file's all the same."""
    made = net(4)
    path = written(tmp_path, 4, name)
    images = made.images[:4]
    judged = path if name != "qonnx" else written(tmp_path, 4, "qcdq")
    labels = predict(OnnxModel(judged), images.float() / 255, batch_size=4)
    # Instead of a QONNX file, a stand-in is judged that is written from the twin.
    twin = negated(made.folded) if name != "qonnx" else copy.deepcopy(made.folded)
    found = attack_file(
        path,
        name,
        twin,
        made.spec,
        images,
        labels,
        epsilon=4 / 255,
        device=torch.device("cpu"),
        seed=0,
    )
    assert found.clean_accuracy == 1.0
    assert found.twin_agreement == (1.0 if name == "qonnx" else 0.0)
    assert list(found.attacked) == ["fgsm", "pgd20", "margin_pgd40"]
    assert found.images == 4 and found.epsilon == 4 / 255


@pytest.mark.slow
def test_without_a_radius_nothing_breaks_and_with_a_large_one_nothing_stays(tmp_path: Path) -> None:
    made = net(4)
    path = written(tmp_path, 4, "integer")
    images = made.images[:12]
    labels = predict(OnnxModel(path), images.float() / 255, batch_size=12)

    def robust(epsilon: float) -> float:
        return attack_file(
            path,
            "integer",
            made.folded,
            made.spec,
            images,
            labels,
            epsilon=epsilon,
            device=torch.device("cpu"),
            seed=0,
        ).robust_accuracy

    assert robust(0.0) == 1.0
    assert robust(0.5) <= 1 / 12
