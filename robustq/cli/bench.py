"""robustq bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import robustq
from robustq.cli.options import Reading, Runtime, rare, run_job, with_groups
from robustq.errors import UsageError


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
    threads: Annotated[int, typer.Option(help="Threads of the runtime.", min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="Seconds for each file and batch size.", min=0.01, max=3600)] = 3.0,
    batch: Annotated[int, typer.Option(help="Images of a batch for the throughput.", min=1, max=100_000)] = 64,
    image_size: Annotated[
        int | None, rare(help="Side of the images, for files that leave it open.", min=1, max=4096)
    ] = None,
    runtime: Runtime = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Export folders: count and time every format in every runtime that is installed, on the kit's images.",
        ),
    ] = False,
    options: Reading,
) -> None:
    """Time deployed files in onnxruntime or in the --runtime on this machine, beside a float file.

    The files take turns, so that other work on the machine meets all of them alike: compare them within one run.

    Examples:
      robustq bench export-out/resnet20-w4a4-odgq-integer
      robustq bench int8.onnx int4.onnx --float float.onnx --threads 4
      robustq bench --all export-out/resnet20-w4a4-odgq-integer
    """
    from robustq.report.bench import all_lines, bench_lines

    names = [Path(file).as_posix() if not file.startswith("zoo:") else file for file in files]
    if everything:
        unused = {"--float": float_file, "--runtime": runtime, "--image-size": image_size}
        typed = [name for name, value in unused.items() if value is not None]
        if typed:
            raise UsageError(f"{typed[0]} has no effect with --all; leave it out")
        run_job(
            lambda: robustq.bench_everything(*names, threads=threads, seconds=seconds, batch=batch),
            options.as_json,
            all_lines,
            out=options.out,
        )
        return
    chosen = {} if runtime is None else {"runtime": runtime}
    run_job(
        lambda: robustq.bench_files(
            *names,
            float_file=float_file,
            threads=threads,
            seconds=seconds,
            batch=batch,
            image_size=image_size,
            **chosen,
        ),
        options.as_json,
        bench_lines,
        out=options.out,
    )
