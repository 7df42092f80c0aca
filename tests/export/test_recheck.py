"""The proof of a file: parity in every run, its layers, and accuracy counted on its answers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustq.evaluation.accuracy import predict
from robustq.export.integer_layers import Layers
from robustq.export.parity import Agreement
from robustq.export.recheck import EXECUTOR_IMAGES, Proof, attack_file, prove
from robustq.export.session import OnnxModel
from tests.export.exported import INTEGER, net, with_ties, written

RUNS = ["optimised", "unoptimised", "exact"]
FAST = [
    (32, "float"),
    (8, "qcdq"),
    (8, "integer"),
    (4, "qonnx"),
    (4, "packed"),
    (1, "qcdq"),
    (1, "packed"),
]
SLOW = [(8, "qonnx"), (1, "qonnx"), (8, "packed"), (3, "packed"), (2, "packed"), (2, "qcdq")]


def check_proof(proof: Proof, bits: int, name: str, images: int) -> None:
    assert proof.shortfalls == []
    assert list(proof.agreements) == (["qonnx_executor", *RUNS] if name == "qonnx" else RUNS)
    for run, agreement in proof.agreements.items():
        assert agreement.images == (min(images, EXECUTOR_IMAGES) if run == "qonnx_executor" else images)
        assert agreement.different_top1 <= 1
        # Where a value sits on a rounding tie single codes differ: now and then at 8 bits, hardly ever below (on which
        # networks depends on the processor that trained them), and the proof says so. Nothing else may differ.
        tied = bits > 4 or run == "qonnx_executor" or run in proof.on_ties
        assert agreement.mean_difference <= (1e-3 if tied else 1e-4)
    assert proof.judged_file == ("qcdq" if name == "qonnx" else name)
    assert proof.first_difference is None
    assert bool(proof.not_for) == (bits < 32)  # every quantized file has a runtime that it is not for
    assert proof.must_be_integer == (name in INTEGER)
    if name in INTEGER:
        assert proof.layers.in_float == () and proof.layers.float_convolutions == ()


@pytest.mark.parametrize(("bits", "name"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)])
def test_every_file_agrees_with_the_folded_network(tmp_path: Path, bits: int, name: str) -> None:
    made = net(bits)
    path = written(tmp_path, bits, name)
    before = path.read_bytes()
    proof = prove(path, name, made.folded, made.spec, made.images)
    check_proof(proof, bits, name, len(made.images))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_resnet18_agrees_with_its_file(tmp_path: Path) -> None:
    """Its stem and max pooling are in no other architecture."""
    made = net(4, architecture="resnet18")
    path = written(tmp_path, 4, "integer", architecture="resnet18")
    check_proof(prove(path, "integer", made.folded, made.spec, made.images[:40]), 4, "integer", 40)


def negated(folded: nn.Module) -> nn.Module:
    """The twin with the opposite logits."""
    twin: Any = copy.deepcopy(folded)
    with torch.no_grad():
        twin.fc.weight.neg_()
        twin.fc.bias.neg_()
    made: nn.Module = twin
    return made


@pytest.mark.parametrize("name", ["qonnx", "packed"])
def test_another_networks_file_falls_short(tmp_path: Path, name: str) -> None:
    made = net(4)
    proof = prove(written(tmp_path, 4, name), name, negated(made.folded), made.spec, made.images[:30])
    # Of a QONNX file only qonnx's executor reads the file itself.
    wrong = ["qonnx_executor"] if name == "qonnx" else RUNS
    where = [] if name == "qonnx" else ["first in 10 of 10 values of logits differ"]
    assert proof.shortfalls == [*(f"{run}: 30 of 30 images get another class" for run in wrong), *where]


def test_a_fault_that_changes_no_answer_falls_short(tmp_path: Path) -> None:
    """Every logit is shifted alike, so that no answer changes."""
    made = net(8)
    twin: Any = copy.deepcopy(made.folded)
    with torch.no_grad():
        twin.fc.bias.add_(0.01 * made.folded(made.x).std() * 10)
    proof = prove(written(tmp_path, 8, "packed"), "packed", twin, made.spec, made.images[:60])
    assert all(each.same_answers for each in proof.agreements.values())
    assert proof.on_ties == () and len([fall for fall in proof.shortfalls if "logits differ by" in fall]) == 3
    assert proof.shortfalls[-1] == "first in 10 of 10 values of logits differ"


def test_rounding_ties_may_change_few_answers(tmp_path: Path) -> None:
    """Every layer is right, and codes on ties carry on to other answers: allowed up to a share."""
    made = net(2)
    other = with_ties(made.folded)
    images = made.images[:100]
    with torch.no_grad():
        reference, answers = made.folded(made.x[:100]), other(made.x[:100])
    changed = int((answers.argmax(1) != reference.argmax(1)).sum())
    path = written(tmp_path, 2, "integer")
    none, all_ = (prove(path, "integer", other, made.spec, images, max_drift=share) for share in (0.0, 1.0))
    assert changed > 1 and all_.on_ties == none.on_ties == tuple(RUNS) and all_.shortfalls == []
    assert none.shortfalls[0] == f"optimised: {changed} of 100 images get another class, through rounding ties"


@pytest.mark.parametrize(("changed", "agrees"), [(2, True), (28, True), (29, False)])
def test_the_share_that_ties_may_change_is_counted_with_confidence(changed: int, agrees: bool) -> None:
    """Wilson's interval of 28 of 1,000 begins at 1.94%, that of 29 at 2.03%."""
    proof = Proof("integer", {"exact": agreement(changed)}, Layers((), (), ()), True, on_ties=("exact",))
    assert (proof.shortfalls == []) == agrees


def agreement(different: int) -> Agreement:
    return Agreement(images=1000, different_top1=different, max_difference=0.1, mean_difference=1e-4)


def test_shortfalls_and_json() -> None:
    layers = Layers(("a",), ("b", "c", "d"), ("b", "c"))
    proof = Proof("integer", {"optimised": agreement(1), "exact": agreement(7)}, layers, True, not_for=("x: y",))
    assert proof.shortfalls == ["exact: 7 of 1000 images get another class", "2 convolutions left in float: b, ..."]
    assert Proof("qcdq", {"optimised": agreement(1)}, layers, must_be_integer=False).shortfalls == []
    stored = json.loads(json.dumps(proof.to_dict()))
    assert stored.pop("equal_in")[0].startswith("onnxruntime ")
    assert stored == {
        "parity": {"optimised": agreement(1).to_dict(), "exact": agreement(7).to_dict()},
        "first_difference": None,
        "on_ties": [],
        "integer_layers": ["a"],
        "float_layers": ["b", "c", "d"],
        "judged_file": "integer",
        "not_for": ["x: y"],
        "compared_with": "the folded network",
    }


@pytest.mark.parametrize("name", ["qonnx", "integer"])
def test_accuracy_is_counted_on_the_files_answers(tmp_path: Path, name: str) -> None:
    """The twin that finds the images answers wrongly throughout; clean accuracy is the file's all the same."""
    made = net(4)
    path, images = written(tmp_path, 4, name), made.images[:4]
    judged = path if name != "qonnx" else written(tmp_path, 4, "qcdq")
    labels = predict(OnnxModel(judged), images.float() / 255, batch_size=4)
    # In place of a QONNX file, the QCDQ file of the twin is judged.
    twin = negated(made.folded) if name != "qonnx" else copy.deepcopy(made.folded)
    options: dict[str, Any] = {"epsilon": 4 / 255, "device": torch.device("cpu"), "seed": 0}
    found = attack_file(path, name, twin, made.spec, images, labels, **options)
    assert found.clean_accuracy == 1.0
    assert found.twin_agreement == (1.0 if name == "qonnx" else 0.0)
    assert list(found.attacked) == ["fgsm", "pgd20", "margin_pgd40"]
    assert found.images == 4 and found.epsilon == 4 / 255
