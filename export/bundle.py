"""Export bundle: the folder that is deployed. It holds one .onnx, its model.pt, and bundle.json with the checks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustq.errors import ModelFileError
from robustq.files import check_export_folder, sha256

MODEL = "model.pt"
RECORD = "bundle.json"
FAILED = ".failed.onnx"
"""Suffix of a file whose answers are not those of its network."""


@dataclass(frozen=True)
class Bundle:
    """An export folder on disk."""

    path: Path
    onnx: Path
    model: Path
    record: dict[str, Any]

    @property
    def format(self) -> str:
        """The format of the .onnx."""
        return str(self.record["format"])

    @property
    def failures(self) -> list[str]:
        """A line for each check that the file did not pass at export, with the file's name in front."""
        found = self.record.get("shortfalls")
        return [f"{self.onnx.name}: {fall}" for fall in found] if isinstance(found, list) else []


def open_bundle(path: Path) -> Bundle:
    """Read an export folder.

    Raises:
        ModelFileError: not a folder, not exactly one .onnx beside model.pt and bundle.json, a broken record, or a file
            whose sha256 is not the recorded one.
    """
    check_export_folder(path)
    found = sorted(path.glob("*.onnx"))
    if len(found) != 1:
        raise ModelFileError(
            f"{path}: holds {len(found)} .onnx files, an export folder holds one; export the model again"
        )
    for name in (MODEL, RECORD):
        if not (path / name).is_file():
            raise ModelFileError(f"{path}: has no {name} beside {found[0].name}; export the model again")
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelFileError(f"{path / RECORD}: is not valid JSON; export the model again") from error
    if not isinstance(record, dict) or "format" not in record or not isinstance(record.get("sha256"), dict):
        raise ModelFileError(f"{path / RECORD}: does not say format and sha256; export the model again")
    for file in (found[0], path / MODEL):
        if record["sha256"].get(file.name) != sha256(file):
            raise ModelFileError(
                f"{file}: is not the file that {RECORD} speaks of (its sha256 differs); export the model again"
            )
    return Bundle(path, found[0], path / MODEL, record)


def write_record(folder: Path, record: dict[str, Any], *files: Path) -> None:
    """Write bundle.json with the digests of ``files``."""
    digests = {file.name: sha256(file) for file in files}
    (folder / RECORD).write_text(json.dumps({**record, "sha256": digests}, indent=2) + "\n", encoding="utf-8")
