"""robustq bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import robustq
from robustq.cli.options import Reading, rare, run_job, with_groups


@with_groups
def bench(
    *,
    files: Annotated[list[str], typer.Argument(help=".onnx files, export folders or zoo:NAME.")],
    float_file: Annotated[
        str | None,
        typer.Option(
            "--float",
            metavar="FILE.onnx",
            help="Float file to compare with. Default: the same architecture with random weights.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.", min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Seconds for each file and batch size.", min=0.01, max=3600)] = 3.0,
    batch: Annotated[int, typer.Option(help="Images of a batch for the throughput.", min=1, max=100_000)] = 64,
    image_size: Annotated[
        int | None, rare(help="Side of the images, for files that leave it open.", min=1, max=4096)
    ] = None,
    options: Reading,
) -> None:
    """Time deployed files in onnxruntime on this machine, beside a float file.

    The files take turns, so that other work on the machine meets all of them alike: compare them within one run.

    Examples:
      robustq bench export-out/resnet20-w4a4-odgq-integer
      robustq bench int8.onnx int4.onnx --float float.onnx --threads 4
    """
    from robustq.report.bench import bench_lines

    names = [Path(file).as_posix() if not file.startswith("zoo:") else file for file in files]
    run_job(
        lambda: robustq.bench_files(
            *names, float_file=float_file, threads=threads, seconds=seconds, batch=batch, image_size=image_size
        ),
        options.as_json,
        bench_lines,
        out=options.out,
    )
