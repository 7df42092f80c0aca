"""Targets: their files, and checks of an exported file against them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from robustq.errors import UsageError
from robustq.export.formats import build
from robustq.export.runtimes import registry
from robustq.export.runtimes.engine import Opening
from robustq.export.targets.check import check_file, check_names, replay
from robustq.export.targets.schema import Target, find_target, target_names
from tests.export.exported import net, written
from tests.models.small_nets import digits

NAMES = ("browser", "finn", "onnxruntime-cpu", "onnxruntime-small", "openvino", "tensorrt")
SOURCE = Path(registry.__file__).parents[1] / "targets" / "browser.toml"


class Inverted:
    """onnxruntime on the negative of the images."""

    version = "1.0"

    def __init__(self, opening: Opening) -> None:
        self.session = onnxruntime.InferenceSession(str(opening.path), providers=["CPUExecutionProvider"])

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = self.session.run(None, {self.session.get_inputs()[0].name: 1 - images})[0]
        return found

    def close(self) -> None:
        pass


def target(folder: Path, **lines: str) -> Target:
    """The target browser with other lines."""
    text = SOURCE.read_text(encoding="utf-8")
    for key, line in lines.items():
        (old,) = (one for one in text.splitlines() if one.startswith(f"{key} ="))
        text = text.replace(old, line)
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return find_target(path)


@pytest.mark.parametrize("name", NAMES)
def test_targets_fit_their_own_format(tmp_path: Path, name: str) -> None:
    assert set(NAMES) <= set(target_names())
    found = find_target(name)
    check_names(found)
    made, file = net(4), tmp_path / "net.onnx"
    model = build(found.format, made.folded, made.spec, pixels=found.input, consumer=found.consumer)
    onnx.save(model, file)
    from robustq.export.targets.check import _form_faults

    assert _form_faults(found, model) == ()
    assert model.opset_import[0].version == found.opset


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"opset": "opst = 17"}, "unknown key 'opst' in [file]; known: format, opset"),
        ({"opset": 'opset = "17"'}, "opset in [file] = '17' is no int"),
        ({"layout": 'layout = "nhwc"'}, "layout = 'nhwc' in [file] is not known; choose nchw"),
        ({"checker": ""}, "checker in [check] is missing"),
        ({"accuracy": "accuracy = 1.5"}, "accuracy = 1.5 in [tolerances] is no share"),
        ({"replay": "replay = [1]"}, "replay in [check] holds other things than names"),
        ({"summary": 'summary = "x"\nextra = 1'}, "unknown key 'extra'; known: check, file, summary, tolerances"),
    ],
)
def test_faults_of_a_file_are_one_line(tmp_path: Path, lines: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        target(tmp_path, **lines)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.toml'}: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown target 'coral'; known: browser, .*, or a \.toml file"):
        find_target("coral")
    with pytest.raises(UsageError, match="unknown runtime 'tflite'"):
        check_names(target(tmp_path, runtime='runtime = "tflite"'))


def test_the_runtime_of_the_target_checks_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = net(4), written(tmp_path, 4, "packed")
    lines = {"input": 'input = "float"', "runtime": 'runtime = "onnxruntime"'}
    found = check_file(target(tmp_path, **lines), file, made.folded, made.images)
    assert found.in_runtime and found.failures == ()
    assert found.sentence.startswith("re-checked in onnxruntime ") and "200 of 200 answers" in found.sentence

    inverted = registry.Runtime("inverted", Inverted, lambda: "1.0", "pip install inverted")
    monkeypatch.setitem(registry.RUNTIMES, "inverted", inverted)
    lines["runtime"] = 'runtime = "inverted"'
    found = check_file(target(tmp_path, **lines), file, made.folded, made.images)
    (failure,) = found.failures
    assert found.agreement is not None and found.agreement.different_top1 > 100
    assert failure.startswith("inverted 1.0: ") and failure.endswith("images get another class, more than 0.10%")
    lenient = target(tmp_path, **lines, different_answers="different_answers = 1")
    assert check_file(lenient, file, made.folded, made.images).failures == ()

    missing = registry.Runtime("inverted", Inverted, lambda: None, "pip install inverted")
    monkeypatch.setitem(registry.RUNTIMES, "inverted", missing)
    found = check_file(target(tmp_path, **lines), file, made.folded, made.images)
    assert not found.in_runtime and found.to_dict()["checked"] == "checker"
    assert found.sentence.startswith(
        "not run: its runtime is not installed (pip install inverted); the file was read by"
    )


def test_a_file_of_another_form(tmp_path: Path) -> None:
    lines = {"runtime": 'runtime = "onnxruntime"', "opset": "opset = 16", "containers": 'containers = ["float32"]'}
    found = check_file(target(tmp_path, **lines), written(tmp_path, 4, "packed"), net(4).folded, net(4).images[:20])
    assert found.failures[0] == "the file has opset 17, mine reads 16 at most"
    assert found.failures[1].startswith("the file stores int32, int64, int8, uint8, which mine lacks")
    assert found.failures[2] == "the file does not take uint8 images"


def test_images_are_counted_in_each_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, file = net(4), written(tmp_path, 4, "packed")
    labels = digits()[1][:200]
    inverted = registry.Runtime("inverted", Inverted, lambda: "1.0", "pip install inverted")
    monkeypatch.setitem(registry.RUNTIMES, "inverted", inverted)
    monkeypatch.setitem(registry.RUNTIMES, "none", registry.Runtime("none", Inverted, lambda: None, ""))
    with torch.no_grad():
        classes = [made.folded(x).argmax(1) for x in (made.x, 1 - made.x)]
    first, second = replay(
        ("onnxruntime", "none", "inverted"), file, made.images, labels, 255 - made.images, first=classes[0]
    )
    right = [one == labels for one in classes]
    both = int((right[0] & right[1]).sum())
    assert (first.clean_right, first.robust_right, first.different) == (int(right[0].sum()), both, 0)
    assert (second.clean_right, second.robust_right) == (int(right[1].sum()), both)
    assert second.different == int((classes[0] != classes[1]).sum()) > 0
    assert first.to_dict()["clean_accuracy"] == int(right[0].sum()) / 200
