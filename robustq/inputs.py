"""Files that a command is given, looked at before anything heavy is loaded: torch alone takes seconds."""

from __future__ import annotations

from pathlib import Path

from robustq.errors import ModelFileError


def check_model_file(path: Path) -> Path:
    """Return ``path`` when a file with content lies there.

    Raises:
        ModelFileError: it is missing, a folder (of a run or an export: the file in it is named) or empty.
    """
    if not path.exists():
        raise ModelFileError(
            f"{path}: no such file; give a model.pt, best.pt or last.pt that robustq or torch.save wrote"
        )
    if path.is_dir():
        inside = [path / name for name in ("best.pt", "last.pt", "model.pt") if (path / name).is_file()]
        raise ModelFileError(f"{path}: is a folder; give the .pt file in it" + (f": {inside[0]}" if inside else ""))
    if path.stat().st_size == 0:
        raise ModelFileError(f"{path}: is empty (0 bytes); copy or train it again")
    return path


def check_export_folder(path: Path) -> Path:
    """Return ``path`` when it is a folder.

    Raises:
        ModelFileError: nothing is there, or a file.
    """
    if not path.exists():
        raise ModelFileError(f"{path}: no such folder; give the folder that 'robustq export' wrote")
    if not path.is_dir():
        if path.suffix == ".onnx":
            raise ModelFileError(
                f"{path}: is a lone .onnx, without the model.pt whose gradients find the attacks; "
                "give the export folder that it lies in"
            )
        raise ModelFileError(f"{path}: is not an export folder; give the folder that 'robustq export' wrote")
    return path


def check_attackable(path: Path) -> Path:
    """Return ``path`` when it may be a model file or an export folder.

    Raises:
        ModelFileError: nothing is there, or a run folder (the file to give is named).
    """
    if path.is_dir():
        if (path / "best.pt").is_file() and not any(path.glob("*.onnx")):
            raise ModelFileError(
                f"{path}: is a run folder, not an export folder; give the model in it: {path / 'best.pt'}"
            )
        return path
    return check_export_folder(path) if path.suffix == ".onnx" and path.exists() else check_model_file(path)
