"""A target and its TOML file. Nothing heavy is imported: ``robustq export --targets`` is fast."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from robustq.errors import UsageError
from robustq.tables import read_table

CHECKERS = {"onnx": "onnx.checker", "qonnx": "the qonnx executor"}
"""Checker of a format, for a target whose runtime is not installed -> its name in results."""

LAYOUTS = ("nchw",)
"""Layouts of the images that exported files have."""

INPUTS = ("float", "uint8")

KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "": {"summary": (str,)},
    "file": {
        "format": (str,),
        "opset": (int,),
        "containers": (list,),
        "input": (str,),
        "layout": (str,),
        "consumer": (str, type(None)),
    },
    "check": {"checker": (str,), "runtime": (str, type(None)), "replay": (list, type(None))},
    "tolerances": {"different_answers": (float, int), "accuracy": (float, int)},
}
"""Table -> key -> types; None: it may be missing."""


@dataclass(frozen=True)
class Tolerances:
    """Bounds of a re-check, both shares of the images in [0, 1].

    Args:
        different_answers: images with another class than the network gives them.
        accuracy: difference of the clean, and of the robust accuracy, of file and network.
    """

    different_answers: float = 0.001
    accuracy: float = 0.01

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return dict(vars(self))

    def allowed(self, images: int) -> int:
        """Images that may get another class; from a hundred on it is one at least, for a rounding tie."""
        return max(int(images * self.different_answers), 1 if images >= 100 else 0)


@dataclass(frozen=True)
class Target:
    """What a device or a tool takes.

    Args:
        name, summary: of the target, and a phrase.
        format, consumer, input, layout: of the file; ``consumer`` as ``--for``, or None.
        opset: the highest opset that the runtime reads.
        containers: types of stored tensors that it reads, by numpy's names.
        runtime: of the re-check, a name of :data:`robustq.export.runtimes.registry.RUNTIMES`; None: no runtime that
            installs here.
        replay: other runtimes in which the same adversarial images are counted.
        checker: of the format, where the runtime is not installed: a key of :data:`CHECKERS`.
        tolerances: of the re-check.
    """

    name: str
    summary: str
    format: str
    opset: int
    containers: tuple[str, ...]
    input: str
    layout: str
    consumer: str | None
    runtime: str | None
    replay: tuple[str, ...]
    checker: str
    tolerances: Tolerances


def target_names() -> list[str]:
    """Names of the targets that come with robustq, sorted."""
    folder = resources.files("robustq.export.targets")
    return sorted(one.name.removesuffix(".toml") for one in folder.iterdir() if one.name.endswith(".toml"))


def find_target(name: str | Path) -> Target:
    """A target by its name, or from a .toml file.

    Raises:
        UsageError: no such target or file, or the file's first fault, in one line.
    """
    text = str(name)
    if text.endswith(".toml"):
        path = Path(text)
        return _parsed(path.stem, text, read_table(path, tomllib.loads, error=UsageError))
    if text not in target_names():
        raise UsageError(f"unknown target '{text}'; known: {', '.join(target_names())}, or a .toml file")
    content = resources.files("robustq.export.targets").joinpath(f"{text}.toml").read_text(encoding="utf-8")
    return _parsed(text, text, tomllib.loads(content))


def _parsed(name: str, place: str, table: Mapping[str, Any]) -> Target:
    fault = _fault(table)
    if fault is not None:
        raise UsageError(f"{place}: {fault}")
    file, check = table["file"], table["check"]
    return Target(
        name=name,
        summary=table["summary"],
        format=file["format"],
        opset=file["opset"],
        containers=tuple(file["containers"]),
        input=file["input"],
        layout=file["layout"],
        consumer=file.get("consumer"),
        runtime=check.get("runtime"),
        replay=tuple(check.get("replay") or ()),
        checker=check["checker"],
        tolerances=Tolerances(**{key: float(value) for key, value in table["tolerances"].items()}),
    )


def _fault(table: Mapping[str, Any]) -> str | None:
    """The first fault, in words."""
    known = {*KEYS[""], *(name for name in KEYS if name)}
    for key in table:
        if key not in known:
            return f"unknown key '{key}'; known: {', '.join(sorted(known))}"
    for name, keys in KEYS.items():
        inner = table if not name else table.get(name)
        if not isinstance(inner, dict):
            return f"has no table [{name}]"
        for key in inner if name else ():
            if key not in keys:
                return f"unknown key '{key}' in [{name}]; known: {', '.join(keys)}"
        for key, kinds in keys.items():
            place = f"{key} in [{name}]" if name else key
            value = inner.get(key)
            if value is None and type(None) not in kinds:
                return f"{place} is missing"
            if not isinstance(value, kinds) or isinstance(value, bool):
                return f"{place} = {value!r} is no {' or '.join(kind.__name__ for kind in kinds[:1])}"
            if isinstance(value, list) and not all(isinstance(one, str) for one in value):
                return f"{place} holds other things than names"
    return _wrong_value(table)


def _wrong_value(table: Mapping[str, Any]) -> str | None:
    choices = (("file", "layout", LAYOUTS), ("file", "input", INPUTS), ("check", "checker", tuple(CHECKERS)))
    for name, key, known in choices:
        if table[name][key] not in known:
            return f"{key} = '{table[name][key]}' in [{name}] is not known; choose {' or '.join(known)}"
    for key, value in table["tolerances"].items():
        if not 0 <= value <= 1:
            return f"{key} = {value} in [tolerances] is no share; give a number from 0 to 1"
    return None
