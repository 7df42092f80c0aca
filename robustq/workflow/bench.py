"""bench: what deployed files cost on this machine, beside a float file of the same network."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from robustq.errors import UsageError
from robustq.export.bundle import open_bundle
from robustq.export.formats import build
from robustq.export.runtimes.registry import ONNXRUNTIME, check_installed
from robustq.export.session import load_limited
from robustq.export.timing import Subject, Timing, cpu_name, time_files
from robustq.models.fx.factory import is_custom
from robustq.models.quant.folding import fold
from robustq.models.quant.quantizers import FLOAT_BITS
from robustq.models.spec import ModelSpec, build_model
from robustq.twin.graph import Graph, read_graph
from robustq.workflow import Result
from robustq.workflow.open_file import stored_spec
from robustq.zoo import model_path


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """A file and its cost.

    Args:
        file: its path, or the name of the float network that it is compared with.
        latency_ratio: its median latency, divided by that of the float file; None without one.
    """

    file: str
    timing: Timing
    latency_ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"file": self.file, **self.timing.to_dict(), "latency_ratio": self.latency_ratio}


@dataclass(frozen=True, eq=False, kw_only=True)
class BenchResult(Result):
    """Result of bench.

    Args:
        rows: one for each file, the float file last.
        float_file: name of the float file; None if there is none.
        cpu: name of the CPU.
        threads: of onnxruntime.
    """

    rows: tuple[BenchRow, ...]
    float_file: str | None
    cpu: str
    runtime: str
    threads: int


def bench_files(
    *files: Path | str,
    float_file: Path | str | None = None,
    threads: int = 1,
    seconds: float = 3.0,
    batch: int = 64,
    image_size: int | None = None,
    runtime: str = ONNXRUNTIME,
) -> BenchResult:
    """Time files in a runtime on the CPU; they take turns with each other and with a float file.

    Args:
        files: .onnx files, export folders, or zoo:NAME.
        float_file: the .onnx of the float network. None: one of the same architecture with random weights is written,
            if the first file names an architecture that robustq builds.
        threads: of the runtime, within one operator.
        seconds: for which each file runs, once with single images and once in batches.
        batch: images of a batch.
        image_size: side of the images in pixels, for files that leave it open.
        runtime: such as ``"openvino"`` (docs/runtimes.md); all files run in it.

    Returns:
        one row per file: latency in milliseconds, images per second, load time, memory and size in bytes.

    Raises:
        UsageError: no file, a runtime that is not installed, a number that is not over 0, or a file whose image size is
            not known.
        ModelFileError: no such file, or the runtime cannot run it.
    """
    if not files:
        raise UsageError("no file to time; name an .onnx file or an export folder")
    if threads < 1 or batch < 1 or not seconds > 0:
        raise UsageError("--threads, --batch and --seconds must be over 0")
    number = check_installed(runtime)
    paths = [_onnx_of(file) for file in files]
    graphs = [read_graph(path) for path in paths]
    subjects = [_subject(path, graph, image_size) for path, graph in zip(paths, graphs, strict=True)]
    names = [str(file) for file in files]
    with tempfile.TemporaryDirectory() as folder:
        spec = stored_spec(paths[0], graphs[0])
        if float_file is not None:
            own = _onnx_of(float_file)
            subjects.append(_subject(own, read_graph(own), image_size))
            names.append(str(float_file))
        elif spec is not None and not is_custom(spec.architecture):
            path = _random_float(spec, Path(folder))
            subjects.append(_subject(path, read_graph(path), image_size))
            names.append(f"{path.stem} (random weights)")
        subjects = [replace(subject, runtime=runtime) for subject in subjects]
        timings = time_files(subjects, threads=threads, seconds=seconds, batch=batch)
    compared = len(names) > len(files)
    rows = [
        BenchRow(file=name, timing=one, latency_ratio=one.median_ms / timings[-1].median_ms if compared else None)
        for name, one in zip(names, timings, strict=True)
    ]
    return BenchResult(
        rows=tuple(rows),
        float_file=names[-1] if compared else None,
        cpu=cpu_name(),
        runtime=f"{runtime} {number}",
        threads=threads,
    )


def _onnx_of(file: Path | str) -> Path:
    path = model_path(file)
    if path.is_dir():
        return open_bundle(path).onnx
    if path.suffix == ".pt":
        raise UsageError(f"{file}: is a model file; write the file that the device runs: robustq export {file}")
    return path


def _subject(path: Path, graph: Graph, image_size: int | None) -> Subject:
    load_limited(path, side=image_size or 1)
    axes = graph.input_shape[1:]
    sides = [image_size if axis is None else axis for axis in axes]
    if None in sides:
        raise UsageError(f"{path}: leaves the size of its images open; add --image-size")
    first, second, third = (int(side or 0) for side in sides)
    return Subject(path, (first, second, third), single=graph.input_shape[0] == 1)


def _random_float(spec: ModelSpec, folder: Path) -> Path:
    """A float file of the same architecture; its weights are random, which costs the same time."""
    plain = replace(spec, weight_bits=FLOAT_BITS, act_bits=FLOAT_BITS, layer_bits=())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model(plain).eval()
    path = folder / f"{plain.label}.onnx"
    onnx.save(build("float", fold(network, plain), plain), path)
    return path
