"""Logits of an ONNX file by IREE, compiled for this CPU. Protocol: benchmarks/runtimes.py. Layers are not reported."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import iree.runtime
import numpy as np

TOOLS = Path(sys.executable).parent
TARGET = (
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
)


def main() -> None:
    """Compile and run the file; exit with the reason if IREE refuses it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("images")
    parser.add_argument("logits")
    parser.add_argument("--setting", choices=["default"], default="default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        imported, compiled = str(Path(folder) / "model.mlir"), str(Path(folder) / "model.vmfb")
        _tool("iree-import-onnx", arguments.file, "--opset-version", "17", "-o", imported)
        _tool("iree-compile", imported, *TARGET, "-o", compiled)
        module = iree.runtime.load_vm_flatbuffer_file(compiled, driver="local-task")
        names = module.vm_module.function_names
        (function,) = [name for name in names if not name.startswith("__") and "$" not in name]
        logits = module[function](np.load(arguments.images)).to_host()
        np.save(arguments.logits, logits)
    print(json.dumps({"version": version("iree-base-compiler"), "integer_layers": None, "float_layers": None}))


def _tool(name: str, *arguments: str) -> None:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.strip().splitlines()
        sys.exit(f"{name}: {faults[0].split('error: ')[-1] if faults else f'exit status {done.returncode}'}")


if __name__ == "__main__":
    main()
