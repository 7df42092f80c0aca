"""An export folder, and every way in which it is not one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustq.errors import ModelFileError
from robustq.export.bundle import MODEL, RECORD, open_bundle, write_record


def bundle(folder: Path) -> Path:
    """What open_bundle asks for; it reads none of the two files."""
    folder.mkdir()
    (folder / "net.onnx").write_bytes(b"onnx")
    (folder / MODEL).write_bytes(b"weights")
    write_record(folder, {"format": "integer", "parity": {"optimised": 1}}, folder / "net.onnx", folder / MODEL)
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        open_bundle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}") and "\n" not in message
    return message


def test_there_and_back(tmp_path: Path) -> None:
    path = bundle(tmp_path / "out")
    opened = open_bundle(path)
    assert (opened.path, opened.onnx, opened.model) == (path, path / "net.onnx", path / MODEL)
    assert opened.format == "integer" and opened.record["parity"] == {"optimised": 1}
    assert opened.record["sha256"].keys() == {"net.onnx", MODEL}
    assert (path / RECORD).read_text(encoding="utf-8").endswith("}\n")


def test_other_files_do_no_harm(tmp_path: Path) -> None:
    path = bundle(tmp_path / "out")
    (path / "notes.txt").write_text("mine", encoding="utf-8")
    assert open_bundle(path).format == "integer"


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "no such folder; give the folder that 'robustq export' wrote" in refusal(tmp_path / "none")


def test_a_lone_onnx(tmp_path: Path) -> None:
    path = bundle(tmp_path / "out") / "net.onnx"
    assert "is a lone .onnx, without the model.pt" in refusal(path)


def test_another_file(tmp_path: Path) -> None:
    path = bundle(tmp_path / "out") / MODEL
    assert "is not an export folder" in refusal(path)


@pytest.mark.parametrize("count", [0, 2])
def test_not_exactly_one_onnx(tmp_path: Path, count: int) -> None:
    path = bundle(tmp_path / "out")
    if count:
        (path / "other.onnx").write_bytes(b"onnx")
    else:
        (path / "net.onnx").unlink()
    assert f"holds {count} .onnx files, an export folder holds one" in refusal(path)


@pytest.mark.parametrize("name", [MODEL, RECORD])
def test_a_missing_part(tmp_path: Path, name: str) -> None:
    path = bundle(tmp_path / "out")
    (path / name).unlink()
    assert f"has no {name} beside net.onnx; export the model again" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"format": "integer"'])
def test_a_broken_record(tmp_path: Path, content: bytes) -> None:
    path = bundle(tmp_path / "out")
    (path / RECORD).write_bytes(content)
    assert f"{RECORD}: is not valid JSON" in refusal(path)


@pytest.mark.parametrize(
    "record",
    [[], "integer", None, {}, {"format": "integer"}, {"sha256": {}}, {"format": "integer", "sha256": "abc"}],
)
def test_a_record_of_something_else(tmp_path: Path, record: object) -> None:
    path = bundle(tmp_path / "out")
    (path / RECORD).write_text(json.dumps(record), encoding="utf-8")
    assert f"{RECORD}: does not say format and sha256" in refusal(path)


@pytest.mark.parametrize("name", ["net.onnx", MODEL])
def test_a_file_that_was_changed(tmp_path: Path, name: str) -> None:
    path = bundle(tmp_path / "out")
    (path / name).write_bytes((path / name).read_bytes() + b"!")
    message = refusal(path)
    assert message.startswith(f"{path / name}: is not the file that {RECORD} speaks of (its sha256 differs)")


def test_a_file_that_was_renamed(tmp_path: Path) -> None:
    path = bundle(tmp_path / "out")
    (path / "net.onnx").rename(path / "renamed.onnx")
    assert "its sha256 differs" in refusal(path)
