"""A custom model, module:function, through train, harden, export, recheck and attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import robustq
from robustq.errors import ModelFileError

CODE = """
from torch import nn
from torch.nn import functional


class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.dw = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pw = nn.Conv2d(12, 24, 1)
        self.fc = nn.Linear(24, num_classes)

    def forward(self, x):
        x = (x - 0.5) / 0.25
        x = functional.relu6(self.bn(self.stem(x)))
        x = x + self.dw(x)
        x = functional.relu(functional.max_pool2d(self.pw(x), 2))
        return self.fc(x.mean((2, 3)))


def build(num_classes):
    return Small(num_classes)
"""

FAST = ("epochs=1", "monitor_images=32", "calibration_images=64")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder with the code and two runs, the name of the model, and the results of train and harden."""
    folder = tmp_path_factory.mktemp("own")
    name = f"small_nets_{abs(hash(str(folder))):x}"
    (folder / f"{name}.py").write_text(CODE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own = f"{name}:build"
        trained = robustq.train_model(data="digits", custom_model=own, overrides=FAST, out=Path("float"))
        hardened = robustq.harden_model(
            trained["checkpoint"], bits=4, custom_model=own, overrides=(*FAST, "train_images=256"), out=Path("hard")
        )
    return folder, own, trained, hardened


@pytest.fixture
def here(runs: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The current folder is the one with the code; the name of the network."""
    monkeypatch.chdir(runs[0])
    own: str = runs[1]
    return own


def test_export_recheck_and_attack(runs: Any, here: str) -> None:
    bundle = robustq.export_model(
        runs[3]["checkpoint"], custom_model=here, images=60, recheck=False, out=Path("bundle")
    )
    assert bundle["shortfalls"] == []
    assert bundle["float_layers"] == ["/Sub", "/Div"]
    for again in (
        robustq.recheck_bundle(bundle["bundle"], custom_model=here, images=30),
        robustq.attack_model(bundle["bundle"], custom_model=here, images=30, suite="recheck"),
    ):
        assert again["judge"] == "onnxruntime" and 0.0 <= again["robust_accuracy"] <= again["clean_accuracy"]
    with pytest.raises(ModelFileError, match=f"add --model {here} to run that code"):
        robustq.recheck_bundle(bundle["bundle"], images=30)


def test_a_state_dict_of_a_custom_model(runs: Any, here: str, tmp_path: Path) -> None:
    content = torch.load(runs[2]["checkpoint"], weights_only=True)
    torch.save(content["state"], tmp_path / "weights.pt")
    with pytest.raises(ModelFileError, match="unknown architecture"):
        robustq.harden_model(tmp_path / "weights.pt", bits=4, data="digits")
    found = robustq.harden_model(
        tmp_path / "weights.pt",
        bits=8,
        data="digits",
        custom_model=here,
        feature_layer="dw",
        overrides=(*FAST, "train_images=256"),
        checks=False,  # one epoch has left it near chance
        out=tmp_path / "hard",
    )
    spec = torch.load(found["checkpoint"], weights_only=True)["spec"]
    assert spec["feature_layer"] == "dw" and spec["architecture"] == here
