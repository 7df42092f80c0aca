"""Timing of files: turns and figures by a clock that the test moves, and real files in the command's own processes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import robustq
from robustq.errors import ModelFileError, UsageError
from robustq.export import timing
from tests.export.exported import written


class Clock:
    """A clock that stands still until something moves it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_files_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of the machine (here from second 1 on, four times slower) meets both files, and their ratio stays."""
    clock, order = Clock(), []
    monkeypatch.setattr(timing, "time", clock)

    def file(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds * (4 if clock.now > 1 else 1)

    calls = [lambda: file("fast", 1 / 128), lambda: file("slow", 1 / 32)]
    fast, slow = timing._in_turns(calls, 2.0)
    assert sum(fast) >= 2.0 and sum(slow) >= 2.0
    for place in range(0, len(order) - 16, 8):
        assert {"fast", "slow"} == set(order[place : place + 16])
    assert {*fast} == {1 / 128, 4 / 128} and {*slow} == {1 / 32, 4 / 32}


def test_figures_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    path = written(tmp_path, 4, "packed")

    class Session:
        def get_inputs(self) -> list[object]:
            return [type("Input", (), {"name": "x", "type": "tensor(float)"})]

        def run(self, _: None, inputs: dict[str, object]) -> None:
            clock.now += 0.002 + 0.001 * len(inputs["x"])  # type: ignore[arg-type]

    monkeypatch.setattr(timing, "open_timed", lambda path, threads: Session())
    monkeypatch.setattr(timing, "_load_cost", lambda subject, threads: (0.25, 1000))
    (found,) = timing.time_files([timing.Subject(path, (1, 8, 8))], seconds=1.0, batch=50)
    assert found.median_ms == pytest.approx(3.0) and found.p99_ms == pytest.approx(3.0)
    assert found.images_per_second == pytest.approx(50 / 0.052)
    assert (found.load_ms, found.memory_bytes, found.size_bytes) == (250.0, 1000, path.stat().st_size)


@pytest.mark.slow
def test_a_file_beside_its_float_network(tmp_path: Path) -> None:
    packed, integer = written(tmp_path, 4, "packed"), written(tmp_path, 4, "integer")
    found = robustq.bench_files(packed, integer, seconds=0.05, batch=8)
    assert [row.file for row in found.rows] == [str(packed), str(integer), "resnet8-float (random weights)"]
    assert found.float_file == found.rows[-1].file and found.rows[-1].latency_ratio == 1.0
    for row in found.rows:
        one = row.timing
        assert 0 < one.median_ms <= one.p99_ms and one.batch == 8 and one.images_per_second > 0 and one.load_ms > 0
    assert found.rows[0].timing.size_bytes < found.rows[1].timing.size_bytes == integer.stat().st_size


def open_size(path: Path) -> Path:
    """A foreign classifier of images of any size, one at a time."""
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["m"]), helper.make_node("Flatten", ["m"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "h", "w"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
    graph = helper.make_graph(nodes, "open", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_foreign_file_has_no_float_network(tmp_path: Path) -> None:
    path = open_size(tmp_path / "open.onnx")
    found = robustq.bench_files(path, seconds=0.01, image_size=16)
    assert found.float_file is None and found.rows[0].latency_ratio is None and found.rows[0].timing.batch == 1


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"open.onnx: leaves the size of its images open; add --image-size"):
        robustq.bench_files(open_size(tmp_path / "open.onnx"))
    with pytest.raises(ModelFileError, match="onnxruntime cannot load it"):
        robustq.bench_files(written(tmp_path, 4, "qonnx"), seconds=0.01)
    with pytest.raises(ModelFileError, match="no such file"):
        robustq.bench_files(tmp_path / "missing.onnx")
    with pytest.raises(UsageError, match="write the file that the device runs: robustq export"):
        robustq.bench_files("zoo:cifar10-resnet20-float-robust")
