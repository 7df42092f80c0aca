"""Size and latency of deployed files of every width and format against the float file, in one run.

    python -m benchmarks.export [--architecture resnet20] [--image-size 32] [--classes 10] [--bits 8 4 3 2 1]
                                [--formats integer packed] [--batches 1 64] [--rounds 15] [--seconds 0.2]

The float file is onnxruntime's best: BatchNorm folded, all graph optimisations. Sessions have one thread. A round runs
each file for at least the given time. Printed: median latency, and the median over rounds of float / file within one
round. The networks are untrained and calibrated on noise; times do not depend on the weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import nn

from benchmarks.output import head, make_parser, row
from robustq.export.formats import build
from robustq.export.integer_layers import optimised_layers
from robustq.export.session import OnnxModel
from robustq.export.timing import cpu_name
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec, build_model


def main() -> None:
    """Write the files, time them, print a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2, 1])
    parser.add_argument("--formats", nargs="+", default=["integer", "packed"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="least time of one file in one round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (options.classes, 3, options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "float": _write(Path(folder), ModelSpec(options.architecture, 32, 32, *shape, "noise", None, ()), "float")
        }
        for bits in options.bits:
            for name in options.formats:
                spec = ModelSpec(options.architecture, bits, bits, *shape, "noise", None, ())
                files[f"w{bits}a{bits} {name}"] = _write(Path(folder), spec, name)
        print(f"{options.architecture}, {options.image_size} x {options.image_size} pixels, {options.classes} classes")
        print(f"onnxruntime {ort.__version__}, one thread, {cpu_name()}; {options.rounds} rounds")
        columns = (f"batch {batch}: ms a batch, float / this" for batch in options.batches)
        head("file", "bytes, float / this", "layers in float", *columns)
        timed = [_time(files, batch, options) for batch in options.batches]
        whole = files["float"].stat().st_size
        for name, path in files.items():
            in_float = "" if name == "float" else f"{len(optimised_layers(path).in_float)}"
            cells = [f"{each[name][0]:.2f}, {each[name][1]:.2f}" for each in timed]
            size = path.stat().st_size
            row(name, f"{size:,}, {whole / size:.2f}", in_float, *cells)


def _write(folder: Path, spec: ModelSpec, format_name: str) -> Path:
    torch.manual_seed(0)
    model = build_model(spec)
    noise = torch.rand(8, spec.channels, spec.image_size, spec.image_size)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(noise)  # statistics that fit, or activations would grow from layer to layer
    calibrate(model.eval(), noise)
    path = folder / f"{spec.label}-{format_name}.onnx"
    onnx.save(build(format_name, fold(model, spec), spec), path)
    return path


def _time(files: dict[str, Path], batch: int, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """File -> (median ms a batch, median of float / file)."""
    x = torch.rand(batch, 3, options.image_size, options.image_size)
    sessions = {name: OnnxModel(path, threads=1) for name, path in files.items()}
    for session in sessions.values():
        session(x)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(options.rounds):
        for name, session in sessions.items():
            seconds[name].append(_seconds_a_call(session, x, options.seconds))
    plain = seconds["float"]
    return {
        name: (
            1000 * statistics.median(values),
            statistics.median(one / other for one, other in zip(plain, values, strict=True)),
        )
        for name, values in seconds.items()
    }


def _seconds_a_call(session: OnnxModel, x: torch.Tensor, least: float) -> float:
    calls, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < least or calls < 3:
        session(x)
        calls += 1
    return spent / calls


if __name__ == "__main__":
    main()
