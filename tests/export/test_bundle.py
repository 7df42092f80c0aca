"""An export bundle, and folders that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from robustq.errors import ModelFileError
from robustq.export.bundle import MODEL, RECORD, open_bundle, write_record


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A folder with all that open_bundle asks for; it reads neither .onnx nor model.pt."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "net.onnx").write_bytes(b"onnx")
    (folder / MODEL).write_bytes(b"weights")
    write_record(folder, {"format": "integer", "parity": {"optimised": 1}}, folder / "net.onnx", folder / MODEL)
    return folder


def test_there_and_back(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine", encoding="utf-8")  # other files do no harm
    opened = open_bundle(bundle)
    assert (opened.path, opened.onnx, opened.model) == (bundle, bundle / "net.onnx", bundle / MODEL)
    assert opened.format == "integer" and opened.record["parity"] == {"optimised": 1}
    assert opened.record["sha256"].keys() == {"net.onnx", MODEL, RECORD}


def test_a_bundle_without_its_model_is_still_checked(bundle: Path) -> None:
    (bundle / MODEL).unlink()
    assert open_bundle(bundle).model is None
    (bundle / "net.onnx").write_bytes(b"onnx!")
    with pytest.raises(ModelFileError, match="its sha256 differs"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("none", "no such folder; give the folder that 'robustq export' wrote"),
        ("net.onnx", "is a lone .onnx; give the export folder that it lies in, or robustq attack the file alone"),
        (MODEL, "is not an export folder"),
    ],
)
def test_another_path(bundle: Path, name: str, line: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_bundle(bundle / name)
    assert str(caught.value).startswith(f"{bundle / name}") and line in str(caught.value)


def record(content: object) -> Callable[[Path], object]:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / RECORD).write_bytes(text)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            lambda folder: (folder / "other.onnx").write_bytes(b"onnx"),
            "holds 2 .onnx files, an export folder holds one",
        ),
        (lambda folder: (folder / "net.onnx").unlink(), "holds 0 .onnx files"),
        (lambda folder: (folder / RECORD).unlink(), f"has no {RECORD} beside net.onnx; export the model again"),
        (lambda folder: (folder / MODEL).write_bytes(b"other"), f"{MODEL}: is not the file that {RECORD} speaks of"),
        (record(b'{"format": "integer"'), f"{RECORD}: is not valid JSON"),
        (record({"format": "integer", "sha256": "abc"}), f"{RECORD}: sha256 is missing or has another form"),
        (
            lambda folder: (folder / "net.onnx").write_bytes(b"onnx!"),
            f"net.onnx: is not the file that {RECORD} speaks of",
        ),
    ],
)
def test_a_damaged_bundle(bundle: Path, damage: Callable[[Path], object], line: str) -> None:
    damage(bundle)
    with pytest.raises(ModelFileError) as caught:
        open_bundle(bundle)
    assert str(caught.value).startswith(f"{bundle}") and line in str(caught.value) and "\n" not in str(caught.value)


def test_every_flipped_bit_of_bundle_json_is_named(bundle: Path) -> None:
    path = bundle / RECORD
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ModelFileError):
            open_bundle(bundle)


def test_a_record_without_its_own_digest_is_read(bundle: Path) -> None:
    """As older folders have it."""
    content = json.loads((bundle / RECORD).read_text())
    del content["sha256"][RECORD]
    (bundle / RECORD).write_text(json.dumps(content))
    assert open_bundle(bundle).format == "integer"
