"""IREE: the file is compiled for this CPU when it is opened."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from robustq.errors import ModelFileError
from robustq.export.runtimes.engine import Opening

LOWEST_OPSET = 17
"""iree-import-onnx converts files of an older opset to this one."""

LONGEST_COMPILATION = 600.0
"""Seconds for each of the two steps."""

TARGET = (
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
)


class Iree:
    """See :class:`.engine.Engine`. One thread: the driver ``local-sync``; else ``local-task``."""

    def __init__(self, opening: Opening) -> None:
        import iree.runtime

        self.version = version("iree-base-runtime")
        model = onnx.load(opening.path, load_external_data=False)
        opset = max([LOWEST_OPSET, *(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))])
        with tempfile.TemporaryDirectory() as folder:
            imported, compiled = str(Path(folder) / "model.mlir"), str(Path(folder) / "model.vmfb")
            _tool("iree-import-onnx", str(opening.path), "--opset-version", str(opset), "-o", imported)
            _tool("iree-compile", imported, *TARGET, "-o", compiled)
            content = Path(compiled).read_bytes()
        config = iree.runtime.Config("local-sync" if opening.threads == 1 else "local-task")
        module = iree.runtime.load_vm_module(iree.runtime.VmModule.copy_buffer(config.vm_instance, content), config)
        names = [name for name in module.vm_module.function_names if not name.startswith("__") and "$" not in name]
        self._function = module[names[0]]

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """See the protocol."""
        found = self._function(images)
        array: NDArray[Any] = (found[0] if isinstance(found, tuple) else found).to_host()
        return array

    def close(self) -> None:
        """Nothing was started."""


def _tool(name: str, *arguments: str) -> None:
    """Run a tool of IREE's compiler. ModelFileError with its first complaint."""
    try:
        done = subprocess.run(
            [str(Path(sys.executable).parent / name), *arguments],
            capture_output=True,
            text=True,
            timeout=LONGEST_COMPILATION,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ModelFileError(f"{name}: {error}") from error
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.strip().splitlines()
        raise ModelFileError(f"{name}: {faults[0].split('error: ')[-1][:300] if faults else done.returncode}")
