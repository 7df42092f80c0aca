"""The float network is counted as it came in, and foreign weights that answer near chance are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import robustq
from robustq.checkpoint import load_model
from robustq.data import load_dataset
from robustq.errors import UsageError
from robustq.models.spec import build_model
from robustq.report.text import training_lines
from tests.models.small_nets import small_spec

BARELY = ("epochs=1", "train_images=16", "monitor_images=16", "lr=1e-6", "calibration_images=16")
FAST = ("epochs=1", "train_images=64", "monitor_images=16")


def test_the_given_network_stands_beside_the_quantized_one(tmp_path: Path, digits_float: Path) -> None:
    model = load_model(digits_float)[0]
    torch.save({"state_dict": model.state_dict(), "best_prec1": 50.0}, tmp_path / "weights.pt")
    images, labels = load_dataset("digits").holdout.take(0)
    with torch.no_grad():
        right = int((model(images / 255.0).argmax(dim=1) == labels).sum())
    for path in (digits_float, tmp_path / "weights.pt"):
        found = robustq.harden_model(path, bits=8, recipe="ptq", data="digits", out=tmp_path / f"run-{path.stem}")
        assert found["float_holdout_accuracy"] == right / len(labels) > 0.3
        assert not found.near_chance and found.foreign == (True if path.name == "weights.pt" else None)
        lines = "\n".join(training_lines(found, next_command=""))
        assert ("may have been trained on the held-out images" in lines) == bool(found.foreign)


def test_foreign_weights_are_refused_near_chance_and_below_what_they_state(tmp_path: Path, digits_float: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(build_model(small_spec(32)).state_dict(), path)
    with pytest.raises(UsageError, match=r"near chance; name the normalisation .*; --no-checks goes on all the same"):
        robustq.harden_model(path, bits=4, data="digits")
    state = load_model(digits_float)[0].state_dict()
    state["fc.bias"][:5] = -1e3  # these classes are never answered
    torch.save({"state_dict": state, "acc": 99.0}, path)
    with pytest.raises(UsageError, match=r"where the file states 99\.0%"):
        robustq.harden_model(path, bits=4, data="digits")
    assert list(tmp_path.iterdir()) == [path]
    taken = robustq.harden_model(
        path, bits=4, recipe="natural", data="digits", overrides=FAST, checks=False, out=tmp_path / "run"
    )
    assert taken.float_holdout_accuracy is None


def test_a_run_that_ends_near_chance_says_so(tmp_path: Path) -> None:
    found = robustq.train_model(
        "natural", data="digits", architecture="resnet8", overrides=BARELY, out=tmp_path / "run"
    )
    labels = load_dataset("digits").test.labels
    assert found.near_chance and found.chance == int(labels.bincount().max()) / len(labels)
    assert found.clean_interval[0] <= found.chance
    lines = training_lines(found, next_command="")
    assert any(line.startswith("WARNING near chance (one class for all images is right on ") for line in lines)
