"""model.pt: weights and spec in one file, written whole or not at all, read without running code from it."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from robustq.errors import ModelFileError, RobustqError, UsageError
from robustq.files import atomic_file
from robustq.models.quant.binary import SignNorm
from robustq.models.quant.quantizers import FLOAT_BITS
from robustq.models.resnet import SIGN_NORMS
from robustq.models.spec import ARCHITECTURES, ModelSpec, build_model
from robustq.models.state_dict import COUNTER, find_state_dicts, is_bare_state_dict
from robustq.seals import seal
from robustq.torch_file import read_checkpoint

FORMAT = "robustq-model"
VERSION = 1

LARGEST_LOG_THRESHOLD = 32.0
"""Of activations, as a natural logarithm; float32 overflows at 88."""


class _Sink:
    """A file for torch.save that keeps the error of a failed write.

    On a full disk torch's zip writer raises an assertion of its own (``unexpected pos 64 vs 0``) instead.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save`` into a file that takes its name when it is whole (:func:`robustq.files.atomic_file`).

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    with atomic_file(path) as file:
        sink = _Sink(file)
        try:
            torch.save(content, sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            if sink.error is not None:
                raise sink.error from error
            raise
        seal(file)


def save_model(path: Path, model: nn.Module, spec: ModelSpec, *, info: dict[str, Any] | None = None) -> None:
    """Write ``model``, its ``spec``, and ``info``: plain values such as accuracies, recipe and versions.

    numpy's numbers and arrays, paths and subclasses of str become plain values; otherwise reading the file would need
    code.

    Raises:
        UsageError: ``info`` holds something else than numbers, text, lists, dicts and tensors.
    """
    save_state(path, model.state_dict(), spec, info=info)


def save_state(path: Path, state: dict[str, Tensor], spec: ModelSpec, *, info: dict[str, Any] | None = None) -> None:
    """As :func:`save_model`, for a state dict."""
    save_atomically(content_of(state, spec, info=info), path)


def content_of(state: dict[str, Tensor], spec: ModelSpec, *, info: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a model file; UsageError as :func:`save_model`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec.to_dict(),
        "state": {name: value.detach().cpu() for name, value in state.items()},
        "info": _plain(info or {}, "info"),
    }


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {_plain(key, where): _plain(inner, f"{where}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, where) for inner in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, str | PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | float | Tensor):
        return value
    raise UsageError(
        f"{where} is a {type(value).__name__}, which a model file cannot hold; give numbers, text or lists"
    )


def load_model(path: Path, *, custom_model: str | None = None) -> tuple[nn.Module, ModelSpec, dict[str, Any]]:
    """The network of a robustq model file, its spec, and its info; in eval mode, on the CPU.

    Args:
        path: the file.
        custom_model: the ``module:function`` whose code the user allows to run, for a custom network.

    Raises:
        ModelFileError: as :func:`read_checkpoint`; also for a bare state dict (use :func:`load_weights`), a file of
            another version, weights that do not fit the spec, or a network whose code is not allowed.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{path}: {_describe_foreign(content)}")
    if content.get("version") != VERSION:
        raise ModelFileError(
            f"{path}: is version {content.get('version')!r} of the format, this robustq reads {VERSION}; update robustq"
        )
    try:
        spec = ModelSpec.from_dict(content.get("spec"))
        _check_sizes(spec, content.get("state"))
        model = build_model(spec, custom_model=custom_model)
    except RobustqError as error:  # an unknown architecture or width is an error of the file here, not of the caller
        raise ModelFileError(f"{path}: {error}") from error
    _load_state(model, content.get("state"), path)
    info = content.get("info")
    return model, spec, info if isinstance(info, dict) else {}


def describe_state_dict(state: dict[str, Tensor], path: Path) -> tuple[str, int, int]:
    """(architecture, classes, channels) of a bare float state dict, from its names and shapes.

    Raises:
        ModelFileError: no known architecture has these names; the nearest one is given with the differences.
    """
    names = set(state)
    differences = {}
    for architecture in ARCHITECTURES:
        if not {"conv1.weight", "fc.weight"} <= names:
            break
        if state["conv1.weight"].dim() != 4 or state["fc.weight"].dim() != 2:
            break
        channels, classes = state["conv1.weight"].shape[1], state["fc.weight"].shape[0]
        spec = ModelSpec(architecture, FLOAT_BITS, FLOAT_BITS, classes, channels, 32, "", None, ())
        with torch.device("meta"):  # without memory: a file may claim any number of classes
            expected = build_model(spec).state_dict()
        if _shapes(expected) == _shapes(state):
            return architecture, classes, channels
        ours, theirs = _shapes(expected), _shapes(state)
        wrong = [name for name in ours if ours[name] != theirs.get(name)]
        differences[architecture] = wrong + sorted(theirs.keys() - ours.keys())
    if not differences:
        raise ModelFileError(
            f"{path}: is a bare state dict of an unknown architecture (no conv1.weight and fc.weight); known: "
            f"{', '.join(ARCHITECTURES)}; name another one: --arch torchvision:NAME, --arch timm:NAME or "
            "--model MODULE:FUNCTION"
        )
    nearest = min(differences, key=lambda name: len(differences[name]))
    shown = ", ".join(differences[nearest][:3])
    raise ModelFileError(
        f"{path}: is a bare state dict of an unknown architecture; nearest: {nearest}, "
        f"which differs in {len(differences[nearest])} entries ({shown}, ...); name another one: "
        "--arch torchvision:NAME, --arch timm:NAME or --model MODULE:FUNCTION"
    )


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Counters of batches aside, which some checkpoints lack."""
    return {name: value.shape for name, value in state.items() if not name.endswith(COUNTER)}


def load_weights(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy weights into a network of the same architecture at any width.

    Calibration sets activation scales, also those in ``state``, and BatchNorms in front of signs, which only binary
    networks have. Entries that a custom network's forward never uses (auxiliary heads) are left out.

    Raises:
        ModelFileError: a weight is missing, left over or of another shape.
    """
    own = model.state_dict()
    unused = getattr(model, "meta", {}).get("unused_entries", ())
    norms = {name for name, module in model.named_modules() if isinstance(module, SignNorm)}
    own_signs = {name for name in own if name.rpartition(".")[0] in norms}
    full = {name: value for name, value in own.items() if _is_threshold(name) or (name in own_signs - state.keys())}
    for name, value in state.items():
        layer = name.rpartition(".")[0].rpartition(".")[2]
        if not _is_threshold(name) and name not in unused and (name in own or layer not in SIGN_NORMS):
            full[name] = value
    _load_state(model, full, path)


def _is_threshold(name: str) -> bool:
    return name.endswith("log_threshold")


def _check_sizes(spec: ModelSpec, state: Any) -> None:
    """Refuse a spec of more classes or channels than any weight has, before a network of that size is built."""
    if not is_bare_state_dict(state):
        raise ModelFileError("holds no weights; train or copy it again")
    largest = max(size for value in state.values() for size in (1, *value.shape))
    for name, wanted in (("classes", spec.classes), ("channels", spec.channels)):
        if wanted > largest:
            raise ModelFileError(
                f"weights do not fit the spec, which says {name} = {wanted} (no weight has more than {largest})"
            )


def _load_state(model: nn.Module, state: Any, path: Path) -> None:
    own = model.state_dict()
    wrong = [name for name in own if name not in state or own[name].shape != state[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise ModelFileError(f"{path}: weights do not fit the spec in {len(wrong)} entries ({wrong[0]}, ...)")
    check_finite(state, path)
    for name, value in state.items():
        if _is_threshold(name) and value.abs() > LARGEST_LOG_THRESHOLD:
            raise ModelFileError(f"{path}: {name} is {float(value):g}, out of range; use another checkpoint")
    model.load_state_dict(state)


def check_finite(state: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that hold NaN or Inf, and negative variances of BatchNorm.

    Raises:
        ModelFileError: one does; it is named.
    """
    negative = [name for name, value in state.items() if name.endswith("running_var") and bool((value < 0).any())]
    if negative:
        raise ModelFileError(f"{path}: {negative[0]} holds a negative variance; use an earlier checkpoint")
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ModelFileError(f"{path}: {broken[0]} holds NaN or Inf; use an earlier checkpoint")


def _describe_foreign(content: Any) -> str:
    if find_state_dicts(content):
        return (
            "is a bare state dict, without the spec that this needs; harden it first (robustq harden FILE --data NAME)"
        )
    return f"holds a {type(content).__name__} that robustq did not write; save model.state_dict() and harden that"
