"""bench --all: formats and runtimes of an export folder, on the images of its kit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import robustq
from robustq.errors import ModelFileError, UsageError
from robustq.export.runtimes import registry
from robustq.export.timing import Timing
from robustq.report.bench import all_lines
from robustq.workflow import bench_all


def timed(subjects: list[Any], **_: Any) -> list[Timing]:
    return [Timing(1.0 + place, 2.0, 3, 4.0, 5, 6.0, 7, 8) for place in range(len(subjects))]


@pytest.fixture(scope="module")
def folder(digits_w4a4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    robustq.export_model(digits_w4a4, format_name="packed", images=60, max_drift=1.0, device="cpu", out=out)
    return out


@pytest.mark.slow
def test_every_format_in_every_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name: registry.RUNTIMES[name].version() for name in ("onnxruntime", "tract")}
    names = {name: version for name, version in names.items() if version is not None}
    monkeypatch.setattr(bench_all, "installed_runtimes", lambda: names)
    monkeypatch.setattr(bench_all, "time_files", timed)
    found = robustq.bench_everything(folder)
    assert [(row.format, row.counted.runtime) for row in found.rows] == [
        (form, name) for form in ("integer", "packed", "qcdq") for name in names
    ]
    with np.load(folder / "kit" / "images.npz") as kit:
        labels = kit["labels"]
        right = [kit[f"{kind}_answers"] == labels for kind in ("clean", "adversarial")]
    for row in found.rows:  # formats and runtimes that give the very answers
        assert (row.counted.clean_right, row.counted.robust_right) == (right[0].sum(), (right[0] & right[1]).sum())
        assert row.timing is not None and row.size_bytes > 1000
    lines = all_lines(found)
    assert "60 images of its kit" in lines[1] and lines[3].startswith("integer  onnxruntime ")
    assert any("float: " in line for line in lines) and any("qonnx: no runtime here loads it" in line for line in lines)


def test_a_changed_or_missing_kit_is_one_line(folder: Path, tmp_path: Path, digits_w4a4: Path) -> None:
    images = folder / "kit" / "images.npz"
    content = images.read_bytes()
    try:
        images.write_bytes(content + b" ")
        with pytest.raises(ModelFileError, match=r"kit: was changed since the export \(its sha256 differs\)"):
            robustq.bench_everything(folder)
    finally:
        images.write_bytes(content)
    out = tmp_path / "bare"
    robustq.export_model(digits_w4a4, images=10, recheck=False, max_drift=1.0, device="cpu", out=out)
    with pytest.raises(UsageError, match="has no kit, whose images are counted; export without --no-kit"):
        robustq.bench_everything(out)


@pytest.mark.slow
def test_other_runtimes_are_timed(folder: Path) -> None:
    if registry.RUNTIMES["tract"].version() is None:
        pytest.skip("tract has no wheel for this platform")
    found = robustq.bench_files(folder, seconds=0.05, batch=8, runtime="tract")
    assert found.runtime.startswith("tract ") and len(found.rows) == 2
    assert all(0 < row.timing.median_ms <= row.timing.p99_ms and row.timing.load_ms > 0 for row in found.rows)
    with pytest.raises(UsageError, match="unknown runtime"):
        robustq.bench_files(folder, runtime="none")
