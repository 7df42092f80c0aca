"""The quickstart for real: what the first page promises, counted on the deployed file."""

from __future__ import annotations

from pathlib import Path

import pytest

import robustq
from robustq.export.bundle import open_bundle


@pytest.mark.slow
def test_quickstart_hardens_and_the_deployed_file_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = robustq.quickstart(seed=0, device="cpu", out=tmp_path / "out")
    rows = {row["model"]: row for row in result["rows"]}
    undeployed = ["float-natural", "w4a4-natural", "w4a4-ptq", "w4a4-hardened"]
    assert list(rows) == [*undeployed, "deployed-integer", "deployed-packed"]
    assert set(result["steps"]) == {"train", "harden", "export", "recheck"}
    deployed, natural = rows["deployed-integer"], rows["w4a4-natural"]
    # The radius must be one at which an undefended network falls, else robustness would cost nothing.
    assert natural["worst_case"] < 0.20
    assert deployed["clean"] >= 0.95
    assert deployed["worst_case"] >= natural["worst_case"] + 0.25
    # Deploying changes little: bias rounding may turn a few of 359 images.
    assert deployed["worst_case"] == pytest.approx(rows["w4a4-hardened"]["worst_case"], abs=0.03)
    assert result["shortfalls"] == []
    assert result["steps"]["recheck"]["float_layers"] == []
    # The packed file gives the same answers in less than half of the bytes.
    packed = rows["deployed-packed"]
    assert all(packed[key] == deployed[key] for key in ("clean", "fgsm", "pgd20", "margin_pgd40"))
    assert 2 * packed["size_bytes"] < deployed["size_bytes"]
    for name in ("qonnx", "qcdq", "integer", "packed"):
        assert open_bundle(tmp_path / "out" / f"export-{name}").format == name
    for row in result["rows"]:
        assert row["size_bytes"] > 1000
        assert row["worst_case"] <= min(row["fgsm"], row["pgd20"], row["margin_pgd40"]) <= row["clean"] + 1e-9
