"""Jobs with another runtime as the judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

import robustq
from robustq.errors import ModelFileError, UsageError
from robustq.export.bundle import MODEL, open_bundle, write_record
from robustq.export.formats import build
from robustq.export.runtimes import registry
from robustq.export.runtimes.engine import Opening
from robustq.workflow.open_model import open_attackable
from tests.export.exported import net

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


@pytest.mark.slow
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


def test_the_runtime_is_the_judge_of_recheck(folder: Path) -> None:
    few = {**FEW, "epsilon": 0.0}
    usual = robustq.recheck_bundle(folder, **few)
    assert usual.shortfalls == () and {"runtime", "network", "tolerances", "comparison"} & {*usual.to_dict()} == set()
    assert usual["machine"]["flags"] and len(usual["sha256"]) == 64
    found = robustq.recheck_bundle(folder, runtime="negated", **few)
    assert found.judge == "negated" and found["runtime"]["different"] == 20
    assert found.shortfalls == ("negated 1.0: 20 of 20 images get another class, more than 0.10%",)
    assert found["clean_accuracy"] != usual["clean_accuracy"]


@pytest.mark.slow
def test_a_suite_attacks_the_network_beside_the_file(digits_float: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "out", tmp_path / "first.json"
    robustq.export_model(digits_float, format_name="float", images=20, recheck=False, device="cpu", out=folder)
    first = robustq.recheck_bundle(folder, suite="recheck", **FEW)
    file.write_text(json.dumps(first.to_dict()), encoding="utf-8")
    network = first["network"]
    assert network["clean_accuracy"] == first["clean_accuracy"] > 0.5 and first.shortfalls == ()
    assert network["robust_accuracy"] == first["robust_accuracy"] < network["clean_accuracy"]
    worse = robustq.recheck_bundle(folder, suite="recheck", runtime="negated", compare=file, **FEW)
    assert any(one.startswith("clean accuracy: ") and "of model.pt in PyTorch" in one for one in worse.shortfalls)
    assert worse.comparison is not None and "judge: negated here, onnxruntime there" in worse.comparison
    with pytest.raises(UsageError, match="unknown suite 'hard'"):
        robustq.recheck_bundle(folder, suite="hard", **FEW)


def damaged(folder: Path, out: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of an export folder with another .onnx, whose record speaks of that file."""
    shutil.copytree(folder, out)
    opened = open_bundle(out)
    model = onnx.load(opened.onnx)
    change(model)
    onnx.save(model, opened.onnx)
    record = {key: value for key, value in opened.record.items() if key != "sha256"}
    write_record(out, record, opened.onnx, out / MODEL)
    return out


def weight_of(model: onnx.ModelProto, layer: str) -> onnx.TensorProto:
    """The stored weight bytes of the node whose name holds ``layer``."""
    makers = {name: node for node in model.graph.node for name in node.output}
    stored: dict[str, onnx.TensorProto] = {one.name: one for one in model.graph.initializer}
    node = next(one for one in model.graph.node if layer in one.name and one.op_type in ("Conv", "Gemm"))
    name = node.input[1]
    while name not in stored:
        name = makers[name].input[1 if makers[name].op_type == "Gather" else 0]
    return stored[name]


def flipped_byte(model: onnx.ModelProto) -> None:
    weight = weight_of(model, "conv1")
    content = bytearray(weight.raw_data)
    content[len(content) // 2] ^= 0xFF
    weight.raw_data = bytes(content)


def wrong_scale(model: onnx.ModelProto) -> None:
    name = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
    (scale,) = (one for one in model.graph.initializer if one.name == name)
    scale.CopyFrom(numpy_helper.from_array(np.float32(2) * numpy_helper.to_array(scale), name))


def other_network(model: onnx.ModelProto) -> None:
    made = net(4, seed=1)
    other = build("packed", made.folded, made.spec)
    del other.metadata_props[:]
    other.metadata_props.extend(model.metadata_props)
    model.CopyFrom(other)


@pytest.mark.parametrize(
    "change", [flipped_byte, *(pytest.param(one, marks=pytest.mark.slow) for one in (wrong_scale, other_network))]
)
def test_recheck_fails_on_a_changed_file(
    folder: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    shutil.copytree(folder, tmp_path / "as-it-is")
    (file,) = (tmp_path / "as-it-is").glob("*.onnx")
    model = onnx.load(file)
    change(model)
    onnx.save(model, file)
    with pytest.raises(ModelFileError, match="sha256 differs"):
        robustq.recheck_bundle(tmp_path / "as-it-is", **FEW)
    found = robustq.recheck_bundle(damaged(folder, tmp_path / "sealed", change), **{**FEW, "epsilon": 0.0})
    assert found.shortfalls, change.__name__
