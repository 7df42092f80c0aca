"""robustq --version: its own version and those that a result depends on, without loading any of them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

PACKAGES = ("torch", "torchvision", "brevitas", "onnx", "onnxruntime", "qonnx", "numpy")


def version_lines() -> list[str]:
    """Robustq's version, then Python's and those of the packages below it."""
    below = [f"{name} {_version(name)}" for name in PACKAGES]
    return [f"robustq {_version('robustq')}", " · ".join([f"python {platform.python_version()}", *below])]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def show_version(wanted: bool) -> None:
    """The option's callback: print and stop."""
    if wanted:
        typer.echo("\n".join(version_lines()))
        raise typer.Exit
