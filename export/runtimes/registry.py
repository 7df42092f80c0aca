"""The runtimes by name: how each opens a file, its version here, how it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from robustq.errors import UsageError
from robustq.export.runtimes.engine import Engine, Opening, RuntimeModel
from robustq.export.runtimes.iree_cpu import Iree
from robustq.export.runtimes.node import NodeJudge, version_of
from robustq.export.runtimes.openvino_cpu import OpenVino
from robustq.export.runtimes.tract_cpu import Tract
from robustq.export.session import OnnxModel

ONNXRUNTIME = "onnxruntime"


def _python_version(package: str) -> str | None:
    try:
        return version(package).split("-")[0]
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Args:
        summary: a phrase for ``--help``.
        open_engine: opens a file; None of onnxruntime, which :class:`robustq.export.session.OnnxModel` runs.
        version: of the installed package, or None.
        install: the command that installs it.
        settings: with which it opens a file, by its own names.
    """

    summary: str
    open_engine: Callable[[Opening], Engine] | None
    version: Callable[[], str | None]
    install: str
    settings: Mapping[str, str] = field(default_factory=dict)


def _pip(*packages: str) -> str:
    return f"pip install {' '.join(packages)}"


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(
        summary="the Python package",
        open_engine=None,
        version=partial(_python_version, "onnxruntime"),
        install=_pip("onnxruntime"),
    ),
    "onnxruntime-web": Runtime(
        summary="WebAssembly, in Node.js",
        open_engine=partial(NodeJudge, "onnxruntime-web"),
        version=partial(version_of, "onnxruntime-web"),
        install="npm install onnxruntime-web (needs Node.js; in this folder, or set NODE_PATH)",
    ),
    "onnxruntime-node": Runtime(
        summary="native, in Node.js",
        open_engine=partial(NodeJudge, "onnxruntime-node"),
        version=partial(version_of, "onnxruntime-node"),
        install="npm install onnxruntime-node (needs Node.js; in this folder, or set NODE_PATH)",
    ),
    "openvino": Runtime(
        summary="CPU plugin as it ships",
        open_engine=OpenVino,
        version=partial(_python_version, "openvino"),
        install=_pip("openvino"),
    ),
    "openvino-f32": Runtime(
        summary="the same without bfloat16",
        open_engine=OpenVino,
        version=partial(_python_version, "openvino"),
        install=_pip("openvino"),
        settings={"INFERENCE_PRECISION_HINT": "f32"},
    ),
    "tract": Runtime(
        summary="one thread",
        open_engine=Tract,
        version=partial(_python_version, "tract"),
        install=_pip("tract"),
    ),
    "iree": Runtime(
        summary="compiled for this CPU",
        open_engine=Iree,
        version=partial(_python_version, "iree-base-runtime"),
        install=_pip("iree-base-compiler", "iree-base-runtime"),
    ),
}
"""Name, as ``--runtime`` takes it -> runtime."""


def find_runtime(name: str) -> Runtime:
    """The runtime of that name. UsageError if there is none."""
    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime '{name}'; known: {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def check_installed(name: str) -> str:
    """The version of a runtime. UsageError, with the command that installs it, where it is unknown or missing."""
    runtime = find_runtime(name)
    found = runtime.version()
    if found is None:
        raise UsageError(f"{name} is not installed: {runtime.install}")
    return found


def installed_runtimes() -> dict[str, str]:
    """Name -> version of the runtimes that are installed here."""
    found = {name: runtime.version() for name, runtime in RUNTIMES.items()}
    return {name: one for name, one in found.items() if one is not None}


def open_judge(
    name: str,
    path: Path,
    *,
    classes: int | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
    checked: bool = False,
    threads: int = 0,
) -> OnnxModel | RuntimeModel:
    """A file in a runtime: (B, C, H, W) float32 in [0, 1] -> logits (B, K); arguments as :class:`RuntimeModel`.

    Raises:
        UsageError: the runtime is unknown or not installed.
        ModelFileError: it cannot open the file.
    """
    if find_runtime(name).open_engine is None:
        return OnnxModel(path, classes=classes, prepare=prepare, threads=threads, checked=checked)
    return open_model(name, path, classes=classes, prepare=prepare, threads=threads, checked=checked)


def open_model(name: str, path: Path, *, threads: int = 0, **options: Any) -> RuntimeModel:
    """A file in another runtime than onnxruntime; arguments and errors as :func:`open_judge`."""
    check_installed(name)
    runtime = RUNTIMES[name]
    if runtime.open_engine is None:
        raise UsageError(f"{name} has no engine of its own")
    return RuntimeModel(name, runtime.open_engine, Opening(path, threads, runtime.settings), **options)
