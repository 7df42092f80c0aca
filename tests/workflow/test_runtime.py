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


def test_a_target_whose_runtime_answers_otherwise_fails_the_export(digits_w4a4: Path, tmp_path: Path) -> None:
    source = Path(registry.__file__).parents[1] / "targets" / "onnxruntime-small.toml"
    mine = tmp_path / "mine.toml"
    text = source.read_text(encoding="utf-8").replace('runtime = "onnxruntime"', 'runtime = "negated"')
    mine.write_text(text.replace('replay = ["onnxruntime-node"]', 'replay = ["onnxruntime"]'), encoding="utf-8")
    out = tmp_path / "out"
    found = robustq.export_model(digits_w4a4, target=mine, max_drift=1.0, out=out, **FEW)
    (failure,) = found["shortfalls"]
    assert failure == "negated 1.0: 20 of 20 images get another class, more than 0.10%"
    assert found["judge"] == "negated" and found.files[0].name.endswith(".failed.onnx") and found["kit"] is None
    first, second = found["target"]["replayed"]
    assert (first["runtime"], second["runtime"]) == ("negated", "onnxruntime") and second["different"] == 20
    assert first["clean_accuracy"] == found["recheck"]["clean_accuracy"] != second["clean_accuracy"]
    card = (out / "card.md").read_text(encoding="utf-8")
    assert "re-checked in negated 1.0: 0 of 20 answers" in card and "20 of 20 clean images with another class" in card
    with pytest.raises(UsageError, match="decides format and input; leave --format and --input out"):
        robustq.export_model(digits_w4a4, target="browser", format_name="qcdq", **FEW)
