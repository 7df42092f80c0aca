"""Logits of a QONNX file by hls4ml's C simulation, compiled with g++. Needs hls4ml only.

Protocol: benchmarks/runtimes.py. Settings: io_stream, io_parallel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, where "import hls4ml" would find this file

import numpy as np
import onnx


def convert(model: onnx.ModelProto, folder: str, io: str) -> Any:
    """hls4ml's model with its default configuration."""
    import hls4ml  # type: ignore[import-not-found]

    config = hls4ml.utils.config_from_onnx_model(model, granularity="name", backend="Vitis")
    return hls4ml.converters.convert_from_onnx_model(
        model, hls_config=config, backend="Vitis", io_type=io, output_dir=folder
    )


def main() -> None:
    """Convert, compile, run."""
    parser = argparse.ArgumentParser(description="Logits of a QONNX file by hls4ml's compiled C simulation.")
    for name in ("file", "images", "logits"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--setting", default="io_stream", choices=("io_stream", "io_parallel"))
    chosen = parser.parse_args()
    images = np.load(chosen.images)
    # hls4ml prints to stdout.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        try:
            converted = convert(onnx.load(chosen.file), folder, chosen.setting)
            converted.compile()
            found = converted.predict(np.ascontiguousarray(images))
        except Exception as error:
            sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
        layers = sum("weight_t" in layer.types for layer in converted.get_layers())
    np.save(chosen.logits, found.reshape(len(images), -1).astype(np.float32))
    print(json.dumps({"version": f"hls4ml {version('hls4ml')}", "integer_layers": layers, "float_layers": None}))


if __name__ == "__main__":
    main()
