"""Two results of recheck side by side, and whether saturation explains their difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robustq.errors import UsageError
from robustq.export.machines import ARITHMETIC, EXACT_BYTES, compare_results, read_result, saturates, this_machine

VNNI = {"cpu": "new", "architecture": "x86_64", "flags": ["avx2", "avx512_vnni"], "onnxruntime": "1.32.0"}
OLD = {"cpu": "old", "architecture": "x86_64", "flags": ["avx2"], "onnxruntime": "1.32.0"}
ARM = {"cpu": "arm", "architecture": "aarch64", "flags": ["asimd", "asimddp"], "onnxruntime": "1.32.0"}


def result(machine: dict[str, Any], *, optimised: int = 0, exact: int = 0, **entries: Any) -> dict[str, Any]:
    parity = {name: {"different_top1": count} for name, count in (("optimised", optimised), ("exact", exact))}
    found = {"sha256": "a", "machine": machine, "parity": parity, "clean_accuracy": 0.8, "robust_accuracy": 0.4}
    found |= {"suite": "recheck", "images": 1000, "epsilon": 8 / 255, "seed": 0, "data": "d", "judge": "onnxruntime"}
    return found | entries


def test_this_machine() -> None:
    found = this_machine().to_dict()
    assert set(found["flags"]) <= set(ARITHMETIC) >= EXACT_BYTES and found["cpu"]
    json.dumps(found)


def test_who_saturates() -> None:
    assert (saturates(VNNI), saturates(OLD), saturates(ARM)) == (False, True, False)
    assert saturates({**OLD, "flags": []}) is None


@pytest.mark.parametrize(
    ("here", "there", "last"),
    [
        (result(VNNI), result(VNNI), "the answers that were counted do not differ"),
        (
            result(VNNI),
            result(OLD, optimised=70, robust_accuracy=0.35),
            "u8s8 saturation explains it: the CPU there has no VNNI, and with exact products 0 instead of 70 images",
        ),
        (
            result(OLD, optimised=70),
            result(ARM),
            "u8s8 saturation explains it: the CPU here has no VNNI, and with exact products 0 instead of 70 images",
        ),
        (
            result(VNNI),
            result(OLD, optimised=70, exact=70),
            "u8s8 saturation does not explain it: the CPU there has no VNNI, but exact products change nothing (70",
        ),
        (result(VNNI), result(ARM, clean_accuracy=0.7), "u8s8 saturation does not explain it: neither CPU saturates"),
        (result(OLD), result(OLD, clean_accuracy=0.7), "u8s8 saturation does not explain it: both CPUs saturate alike"),
        (
            result(VNNI),
            result(OLD, optimised=3, sha256="b"),
            "u8s8 saturation: cannot be told from results of other files or settings",
        ),
        (
            result(VNNI),
            result({**OLD, "flags": []}, optimised=3),
            "u8s8 saturation: cannot be told, the flags of a CPU are not known",
        ),
    ],
)
def test_saturation(here: dict[str, Any], there: dict[str, Any], last: str) -> None:
    assert compare_results(here, there)[-1].startswith(last)


def test_every_difference_is_named() -> None:
    other = result(
        {**OLD, "onnxruntime": "1.20.1"}, optimised=5, sha256="b", seed=1, judge="openvino", clean_accuracy=0.7
    )
    lines = compare_results(result(VNNI), other)
    assert lines[:-1] == [
        "the files differ (sha256): the results are of two files",
        "settings differ: seed 0 here, 1 there",
        "cpu: new here, old there",
        "onnxruntime: 1.32.0 here, 1.20.1 there",
        "CPU flags here alone: avx512_vnni",
        "judge: onnxruntime here, openvino there",
        "clean accuracy: 80.0% here, 70.0% there",
        "parity optimised: 0 images with another class than the network here, 5 there",
    ]


def test_another_json_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps({**result(VNNI), "machine": {"cpu": "x"}}))
    with pytest.raises(UsageError, match="has no flags of a re-check; give a file that 'robustq recheck --out' wrote"):
        read_result(file)
    file.write_text(json.dumps(result(VNNI)))
    assert read_result(file) == result(VNNI)
