"""Jobs with another runtime as the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

import robustq
from robustq.errors import UsageError
from robustq.export.runtimes import registry
from robustq.export.runtimes.engine import Opening
from robustq.workflow.open_model import open_attackable

FEW: dict[str, Any] = {"images": 20, "epsilon": 16 / 255, "device": "cpu"}


class Negated:
    """onnxruntime with the opposite logits."""

    version = "1.0"
    calls = 0

    def __init__(self, opening: Opening) -> None:
        self.session = onnxruntime.InferenceSession(str(opening.path), providers=["CPUExecutionProvider"])

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        Negated.calls += 1
        found: NDArray[Any] = -self.session.run(None, {self.session.get_inputs()[0].name: images})[0]
        return np.ascontiguousarray(found)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def negated(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = registry.Runtime("opposite logits", Negated, lambda: "1.0", "pip install negated")
    monkeypatch.setitem(registry.RUNTIMES, "negated", runtime)


@pytest.fixture(scope="module")
def folder(digits_w4a4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    robustq.export_model(
        digits_w4a4, format_name="packed", images=20, recheck=False, max_drift=1.0, device="cpu", out=out
    )
    return out


@pytest.mark.parametrize("alone", [False, True])
def test_the_runtime_is_the_judge_of_attack(folder: Path, alone: bool) -> None:
    model = next(folder.glob("*.onnx")) if alone else folder
    usual = robustq.attack_model(folder, suite="recheck", **{**FEW, "epsilon": 0.0})
    assert usual.runtime is None and "runtime" not in usual.to_dict() and usual.judge == "onnxruntime"
    # A lone file must be right more often than by chance.
    if alone:
        with pytest.raises(UsageError, match="answers are right, no more than by chance"):
            robustq.attack_model(model, suite="recheck", runtime="negated", **{**FEW, "epsilon": 0.0})
        return
    found = robustq.attack_model(model, suite="recheck", runtime="negated", **{**FEW, "epsilon": 0.0})
    assert found.judge == "negated" and found["runtime"]["different"] == found["runtime"]["images"] == 20
    assert found["clean_accuracy"] != usual["clean_accuracy"]
    assert "answers 20 of 20 clean images otherwise than onnxruntime" in found["notes"][0]


def test_attacks_without_gradient_ask_the_runtime(folder: Path) -> None:
    target = open_attackable(folder, runtime="negated", device=torch.device("cpu")).target()
    before = Negated.calls
    target.query_model(torch.zeros(1, 1, 8, 8))
    assert target.query_model is target.judge and Negated.calls == before + 1


def test_a_model_file_has_no_runtime(digits_w4a4: Path) -> None:
    with pytest.raises(UsageError, match="is judged in PyTorch; write the file that negated runs: robustq export"):
        robustq.attack_model(digits_w4a4, runtime="negated", **FEW)
