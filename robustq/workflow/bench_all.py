"""bench --all: every format of a network in every runtime that is installed, on the images of its kit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from robustq.checkpoint import load_model
from robustq.data import to_float
from robustq.errors import ExportError, ModelFileError, UsageError
from robustq.evaluation.accuracy import predict
from robustq.export.bundle import Bundle, open_bundle
from robustq.export.formats import FORMATS, build, check_format
from robustq.export.kit import KIT
from robustq.export.runtimes.registry import installed_runtimes, open_judge
from robustq.export.targets.check import BATCH, Replayed, replay
from robustq.export.timing import Subject, Timing, cpu_name, time_files
from robustq.models.quant.folding import fold
from robustq.progress import note
from robustq.seals import sha256
from robustq.tables import misfit, read_table
from robustq.workflow import Result

_KIT = {"sha256": dict, "label?": str, "epsilon?": int | float}


@dataclass(frozen=True, kw_only=True)
class AllRow:
    """A format in a runtime.

    Args:
        folder, format: the export folder, and the format of the file.
        counted: clean and adversarial images; the latter were found for the folder's own file.
        timing: cost of the file; None where the runtime refuses it.
        size_bytes: of the file.
    """

    folder: str
    format: str
    counted: Replayed
    timing: Timing | None
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        timing = None if self.timing is None else self.timing.to_dict()
        place = {"folder": self.folder, "format": self.format, "size_bytes": self.size_bytes}
        return {**place, **self.counted.to_dict(), "timing": timing}


@dataclass(frozen=True, eq=False, kw_only=True)
class BenchAllResult(Result):
    """Result of bench --all.

    Args:
        rows: a format and a runtime each.
        runtimes: name -> version of those that are installed.
        left_out: formats without a row, with the reason.
        cpu, threads: name of the CPU, and threads of every runtime.
    """

    rows: tuple[AllRow, ...]
    runtimes: Mapping[str, str]
    left_out: tuple[str, ...]
    cpu: str
    threads: int


@dataclass(frozen=True)
class _Images:
    clean: Tensor  # uint8 (N, C, H, W)
    adversarial: Tensor
    labels: Tensor  # int64 (N,)


def bench_everything(
    *folders: Path | str,
    threads: int = 1,
    seconds: float = 1.0,
    batch: int = 64,
    custom_model: str | None = None,
) -> BenchAllResult:
    """Count and time every format of each folder's network in every runtime that is installed here.

    The images are those of the folder's kit: clean ones, and adversarial ones that were found for the folder's own
    file. In other formats and runtimes they are replayed: an attack on those may find more.

    Args:
        folders: export folders with their kit; without model.pt the folder's own format is the only one.
        threads: of every runtime, within one operator.
        seconds: for which each file runs, once with single images and once in batches.
        batch: images of a batch.
        custom_model: ``module:function`` that built the network, if it is a custom model; its code is run.

    Returns:
        a row per format and runtime: accuracies, bytes, milliseconds.

    Raises:
        UsageError: no folder, a number that is not over 0, or a folder without kit.
        ModelFileError: no export folder, or files that do not match.
    """
    if not folders:
        raise UsageError("no folder; name an export folder")
    if threads < 1 or batch < 1 or not seconds > 0:
        raise UsageError("--threads, --batch and --seconds must be over 0")
    opened = [open_bundle(Path(folder)) for folder in folders]
    images = [_kit_of(one) for one in opened]
    runtimes = installed_runtimes()
    rows: list[AllRow] = []
    left_out: list[str] = []
    for bundle, kit in zip(opened, images, strict=True):
        with tempfile.TemporaryDirectory() as name:
            files = _written(bundle, Path(name), custom_model, left_out)
            first = predict(open_judge("onnxruntime", bundle.onnx), to_float(kit.clean), batch_size=BATCH)
            counted: dict[str, list[Replayed]] = {}
            for form, path in files.items():
                note(f"count   {form} in {', '.join(runtimes)}")
                counted[form] = list(replay(tuple(runtimes), path, kit.clean, kit.labels, kit.adversarial, first=first))
            for place, runtime in enumerate(runtimes):
                runs = {form: path for form, path in files.items() if counted[form][place].refused is None}
                timings = _timed(runs, runtime, kit.clean, threads, seconds, batch, left_out)
                for form, path in files.items():
                    rows.append(
                        AllRow(
                            folder=str(bundle.path),
                            format=form,
                            counted=counted[form][place],
                            timing=timings.get(form),
                            size_bytes=path.stat().st_size,
                        )
                    )
    rows.sort(key=lambda row: (row.folder, row.format))
    return BenchAllResult(
        rows=tuple(rows), runtimes=runtimes, left_out=tuple(left_out), cpu=cpu_name(), threads=threads
    )


def _kit_of(bundle: Bundle) -> _Images:
    """The images of a folder's kit, checked against their hash."""
    kit = bundle.path / KIT
    if not (kit / "kit.json").exists() or not (kit / "images.npz").exists():
        raise UsageError(f"{bundle.path}: has no kit, whose images are counted; export without --no-kit")
    facts = read_table(kit / "kit.json", error=ModelFileError)
    wrong = misfit(facts, _KIT)
    if wrong is not None or facts["sha256"].get("images.npz") != sha256(kit / "images.npz"):
        raise ModelFileError(f"{kit}: was changed since the export (its sha256 differs); export again")
    try:
        with np.load(kit / "images.npz", allow_pickle=False) as archive:
            clean, attacked, labels = (torch.from_numpy(archive[name]) for name in ("clean", "adversarial", "labels"))
    except (OSError, KeyError, ValueError) as error:
        raise ModelFileError(f"{kit / 'images.npz'}: cannot be read ({error}); export again") from error
    return _Images(clean, attacked, labels)


def _written(bundle: Bundle, folder: Path, custom_model: str | None, left_out: list[str]) -> dict[str, Path]:
    """Format -> file: the folder's own, and the others of its network that some runtime can load."""
    files = {bundle.format: bundle.onnx}
    if bundle.model is None:
        left_out.append(f"{bundle.path}: has no model.pt: its own format alone")
        return files
    network, spec, _ = load_model(bundle.model, custom_model=custom_model)
    folded = fold(network, spec)
    for name, chosen in FORMATS.items():
        if name in files:
            continue
        try:
            check_format(name, spec)
            if not chosen.runs:
                raise ExportError("no runtime here loads it")
            path = folder / f"{name}.onnx"
            onnx.save(build(name, folded, spec, pixels=str(bundle.record.get("input", "float"))), path)
        except (ExportError, UsageError) as error:
            left_out.append(f"{name}: {json.dumps(str(error))[1:-1]}")
            continue
        files[name] = path
    return files


def _timed(
    files: Mapping[str, Path],
    runtime: str,
    images: Tensor,
    threads: int,
    seconds: float,
    batch: int,
    left_out: list[str],
) -> dict[str, Timing]:
    """Format -> cost in a runtime; the files take turns."""
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    subjects = [Subject(path, shape, runtime=runtime) for path in files.values()]
    if not subjects:
        return {}
    try:
        found = time_files(subjects, threads=threads, seconds=seconds, batch=batch)
    except (ModelFileError, UsageError) as error:
        left_out.append(f"times in {runtime}: {error}")
        return {}
    return dict(zip(files, found, strict=True))
