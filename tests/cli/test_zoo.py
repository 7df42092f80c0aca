"""Networks of the zoo: whole files, and counts that their adversarial images repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import robustq
from robustq.checkpoint import load_model
from robustq.errors import ModelFileError, UsageError
from robustq.zoo import FOLDER, ZooEntry, entries, find, images_path, model_path
from tests.cli.conftest import Run

WITH_IMAGES = [entry for entry in entries() if entry.images is not None]


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_an_entry_is_whole_and_described_as_its_file(entry: ZooEntry) -> None:
    assert find(entry.name) == entry
    found = robustq.describe_file(f"zoo:{entry.name}").to_dict()
    assert (found["size_bytes"], found["sha256"]) == (entry.card["size_bytes"], entry.card["sha256"])
    spec = found["spec"] if entry.model.suffix == ".onnx" else found
    assert (spec["architecture"], spec["data"], spec["weight_bits"]) == tuple(
        entry.card[key] for key in ("architecture", "data", "weight_bits")
    )
    low, high = entry.card["interval"]
    assert 0.1 < low <= entry.card["robust_accuracy"] <= high < entry.card["clean_accuracy"]


def test_the_zoo_is_small() -> None:
    assert 0 < sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 2_000_000


@pytest.mark.parametrize("entry", WITH_IMAGES, ids=lambda entry: entry.name)
def test_adversarial_images_are_answered_as_their_card_says(entry: ZooEntry) -> None:
    found = robustq.replay_images(f"zoo:{entry.name}", f"zoo:{entry.name}", device="cpu")
    assert found.same_as_recorded == 1.0
    assert round(found.robust_accuracy * found.images) == entry.card["replayed"]["right"]


def test_half_precision_weights_are_read_as_float32() -> None:
    network, spec, _ = load_model(model_path("zoo:cifar10-resnet20-float-robust"))
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32, torch.int64}
    assert spec.data == "cifar10" and spec.widths.is_float


def test_the_command_lists_them_and_others_take_their_names(run: Run) -> None:
    listed = run("zoo")
    for entry in entries():
        assert f"zoo:{entry.name}" in listed.out
    assert [card["name"] for card in run("zoo", "--json").json["zoo"]] == [entry.name for entry in entries()]
    refused = run("harden", "zoo:cifar10-resnet20-float-robst", "--bits", "4")
    assert refused.code == 2 and "nearest: zoo:cifar10-resnet20-float-robust" in refused.err


def test_names_that_are_none_and_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_path("runs/best.pt") == Path("runs/best.pt") and images_path("a.npz") == Path("a.npz")
    with pytest.raises(UsageError, match="zoo:none is not in the zoo; nearest: zoo:"):
        model_path("zoo:none")
    with pytest.raises(UsageError, match="has no adversarial images"):
        images_path("zoo:cifar10-resnet20-float-robust")
    for path in FOLDER.glob("cifar10-resnet20-float-robust.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1] if path.suffix == ".pt" else path.read_bytes())
    monkeypatch.setattr("robustq.zoo.FOLDER", tmp_path)
    with pytest.raises(ModelFileError, match="is missing or not the file of its card"):
        model_path("zoo:cifar10-resnet20-float-robust")
