"""Export bundle: the folder that is deployed. It holds one .onnx, its model.pt, and bundle.json with the checks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustq.errors import ModelFileError
from robustq.export.parity import MAX_DRIFT
from robustq.files import check_export_folder
from robustq.seals import sha256
from robustq.tables import misfit, read_table

MODEL = "model.pt"
RECORD = "bundle.json"
FAILED = ".failed.onnx"
"""Suffix of a file whose answers are not those of its network."""

_SHAPE = {
    "format": str,
    "sha256": dict,
    "label?": str,
    "data?": str,
    "max_drift?": int | float,
    **{f"{key}?": [str] for key in ("integer_layers", "float_layers", "shortfalls", "equal_in", "not_for")},
    "target?": {
        "name": str,
        "runtime?": str,
        "tolerances": dict.fromkeys(("different_answers", "accuracy"), int | float),
    },
    "recheck?": {
        **dict.fromkeys(("clean_accuracy", "robust_accuracy", "epsilon"), int | float),
        **dict.fromkeys(("clean_interval", "interval"), (int | float, int | float)),
        "images": int,
        "verdict": str,
        "flags": [{"name": str, "text": str}],
    },
}
"""Entries of bundle.json that are read, in the form of :func:`robustq.tables.misfit`; it holds more."""


@dataclass(frozen=True)
class Bundle:
    """An export folder on disk."""

    path: Path
    onnx: Path
    model: Path | None  # model.pt; None where it was removed
    record: dict[str, Any]

    @property
    def format(self) -> str:
        """The format of the .onnx."""
        return str(self.record["format"])

    @property
    def max_drift(self) -> float:
        """Share of the answers that rounding ties may change; older folders do not name it."""
        kept = self.record.get("max_drift")
        return MAX_DRIFT if kept is None else float(kept)

    @property
    def failures(self) -> list[str]:
        """A line for each check that the file did not pass at export, with the file's name in front."""
        return [f"{self.onnx.name}: {fall}" for fall in self.record.get("shortfalls") or ()]


def open_bundle(path: Path) -> Bundle:
    """Read an export folder.

    Raises:
        ModelFileError: not a folder, not exactly one .onnx beside bundle.json, a broken record, or a file whose sha256
            is not the recorded one. model.pt may have been removed.
    """
    check_export_folder(path)
    found = sorted(path.glob("*.onnx"))
    if len(found) != 1:
        raise ModelFileError(
            f"{path}: holds {len(found)} .onnx files, an export folder holds one; export the model again"
        )
    if not (path / RECORD).exists():
        raise ModelFileError(f"{path}: has no {RECORD} beside {found[0].name}; export the model again")
    record = read_table(path / RECORD, error=ModelFileError)
    wrong = misfit(record, _SHAPE)
    if wrong is not None:
        raise ModelFileError(f"{path / RECORD}: {wrong} is missing or has another form; export the model again")
    digests = record["sha256"]
    own = digests.get(RECORD)  # older folders have none
    intact = own is None or own == _digest((path / RECORD).read_text(encoding="utf-8"), own)
    if not intact or not digests.keys() <= {found[0].name, MODEL, RECORD}:
        raise ModelFileError(f"{path / RECORD}: was changed since the export (its sha256 differs); export again")
    model = path / MODEL if (path / MODEL).exists() else None
    for file in (found[0], *([] if model is None else [model])):
        if digests.get(file.name) != sha256(file):
            raise ModelFileError(
                f"{file}: is not the file that {RECORD} speaks of (its sha256 differs); export the model again"
            )
    return Bundle(path, found[0], model, record)


def write_record(folder: Path, record: dict[str, Any], *files: Path) -> None:
    """Write bundle.json with the digests of ``files`` and its own."""
    blank = "0" * 64
    digests = {**{file.name: sha256(file) for file in files}, RECORD: blank}
    text = json.dumps({**record, "sha256": digests}, indent=2) + "\n"
    (folder / RECORD).write_text(text.replace(blank, _digest(text, blank)), encoding="utf-8")


def _digest(text: str, own: object) -> str:
    """SHA-256 of the text of bundle.json, without its ``own`` digest in it."""
    return hashlib.sha256(text.replace(str(own), "").encode()).hexdigest()
