"""model.pt: weights and spec in one file, written whole or not at all, read without running any code from it."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from robustq.errors import ModelFileError, RobustqError
from robustq.models.quantizers import FLOAT_BITS
from robustq.models.spec import ARCHITECTURES, ModelSpec, build_model
from robustq.outputs import file_when_whole

FORMAT = "robustq-model"
VERSION = 1


class _Sink:
    """A file for torch.save that remembers why a write failed: torch's zip writer answers a full disk with an internal
    assertion of its own (``unexpected pos 64 vs 0``) in place of the error.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.fault: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.fault = self.fault or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save`` into a file that takes its name when it is whole (:func:`robustq.outputs.file_when_whole`).

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    with file_when_whole(path) as file:
        sink = _Sink(file)
        try:
            torch.save(content, sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            if sink.fault is not None:
                raise sink.fault from error
            raise


def save_model(path: Path, model: nn.Module, spec: ModelSpec, *, info: dict[str, Any] | None = None) -> None:
    """Write ``model`` and its ``spec``; ``info`` holds plain values worth keeping (accuracies, recipe, versions)."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    content = {"format": FORMAT, "version": VERSION, "spec": spec.to_dict(), "state": state, "info": info or {}}
    save_atomically(content, path)


def read_checkpoint(path: Path) -> Any:
    """What ``torch.load(weights_only=True)`` gives: tensors and plain containers, never code.

    Raises:
        ModelFileError: the file is missing, a folder, empty, truncated, not a torch file, or a pickle that needs code.
    """
    if not path.exists():
        raise ModelFileError(
            f"{path}: no such file; give a model.pt, best.pt or last.pt that robustq or torch.save wrote"
        )
    if path.is_dir():
        raise ModelFileError(f"{path}: is a folder; give the .pt file in it")
    if path.stat().st_size == 0:
        raise ModelFileError(f"{path}: is empty (0 bytes); the program that wrote it was probably cut off")
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] != b"\x80":
            raise pickle.UnpicklingError("neither a zip archive nor a pickle (which torch wrote before 1.6)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write, then refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            raise ModelFileError(
                f"{path}: holds more than weights, and loading it would run code; "
                "save the weights alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise ModelFileError(f"{path}: is not a torch file (no checkpoint could be read from it)") from error
    except Exception as error:  # torch.load has no error of its own: IndexError, struct.error, AssertionError, ...
        first = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise ModelFileError(f"{path}: is broken or truncated ({first}); copy or train it again") from error


def load_model(path: Path) -> tuple[nn.Module, ModelSpec, dict[str, Any]]:
    """The network of a robustq model file, its spec, and its info; in eval mode, on the CPU.

    Raises:
        ModelFileError: as :func:`read_checkpoint`; also for a bare state dict (use :func:`load_weights`), a file of
            another version, or weights that do not fit the spec.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{path}: {_foreign(content)}")
    if content.get("version") != VERSION:
        raise ModelFileError(
            f"{path}: is version {content.get('version')!r} of the format, this robustq reads {VERSION}; update robustq"
        )
    try:
        spec = ModelSpec.from_dict(content.get("spec"))
        model = build_model(spec)
    except RobustqError as error:  # an unknown architecture or width is the file's fault here, not the caller's
        raise ModelFileError(f"{path}: {error}") from error
    _load_state(model, content.get("state"), path)
    info = content.get("info")
    return model, spec, info if isinstance(info, dict) else {}


def is_bare_state_dict(content: Any) -> bool:
    """Whether ``content`` is what ``torch.save(model.state_dict())`` writes."""
    return isinstance(content, dict) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def describe_state_dict(state: dict[str, Tensor], path: Path) -> tuple[str, int, int]:
    """(architecture, classes, channels) of a bare float state dict, read from its names and shapes.

    Raises:
        ModelFileError: no known architecture has these names; the nearest one is named with what differs.
    """
    names = set(state)
    differences = {}
    for architecture in ARCHITECTURES:
        if not {"conv1.weight", "fc.weight"} <= names:
            break
        if state["conv1.weight"].dim() != 4 or state["fc.weight"].dim() != 2:
            break
        channels, classes = state["conv1.weight"].shape[1], state["fc.weight"].shape[0]
        expected = build_model(_float_spec(architecture, classes, channels)).state_dict()
        if {n: v.shape for n, v in expected.items()} == {n: v.shape for n, v in state.items()}:
            return architecture, classes, channels
        wrong = [n for n in expected if n not in names or expected[n].shape != state[n].shape]
        differences[architecture] = wrong + sorted(names - set(expected))
    if not differences:
        raise ModelFileError(
            f"{path}: is a bare state dict of an unknown architecture (no conv1.weight and fc.weight); "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    nearest = min(differences, key=lambda name: len(differences[name]))
    shown = ", ".join(differences[nearest][:3])
    raise ModelFileError(
        f"{path}: is a bare state dict of an unknown architecture; nearest: {nearest}, "
        f"which differs in {len(differences[nearest])} entries ({shown}, ...)"
    )


def load_weights(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy float weights into a network of the same architecture at any width; activation scales are left to
    calibration.

    Raises:
        ModelFileError: a weight is missing, left over or of another shape.
    """
    thresholds = {name for name in model.state_dict() if name.endswith("log_threshold")}
    kept = {name: value for name, value in state.items() if name not in thresholds}
    full = {**{name: model.state_dict()[name] for name in thresholds}, **kept}
    _load_state(model, full, path)


def _load_state(model: nn.Module, state: Any, path: Path) -> None:
    if not is_bare_state_dict(state):
        raise ModelFileError(f"{path}: holds no weights; train or copy it again")
    own = model.state_dict()
    wrong = [name for name in own if name not in state or own[name].shape != state[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise ModelFileError(f"{path}: weights do not fit the spec in {len(wrong)} entries ({wrong[0]}, ...)")
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ModelFileError(f"{path}: {broken[0]} holds NaN or Inf; use an earlier checkpoint")
    model.load_state_dict(state)


def _float_spec(architecture: str, classes: int, channels: int) -> ModelSpec:
    return ModelSpec(architecture, FLOAT_BITS, FLOAT_BITS, classes, channels, 32, "", None, ())


def _foreign(content: Any) -> str:
    if is_bare_state_dict(content):
        return (
            "is a bare state dict, without the spec that this needs; harden it first (robustq harden FILE --data NAME)"
        )
    return f"holds a {type(content).__name__} that robustq did not write; save model.state_dict() and harden that"
