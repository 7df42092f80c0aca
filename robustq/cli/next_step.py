"""The command that usually follows a finished one, complete and quoted for the shell: it can be run as printed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustq.cli.options import Judging

QONNX = "qonnx"  # which onnxruntime cannot run


def after_training(result: Mapping[str, Any], *, custom_model: str | None, data: str | None) -> str:
    """What follows train or harden: quantization of a float network, export of another one.

    Args:
        result: of the job, by the keys of ``--json``.
        custom_model: that was named, and must be named again.
        data: the place of the data, if it is not the one in the model file.
    """
    again = _again(custom_model=custom_model, data=data)
    is_float = str(result["model"]).endswith("-float")
    if "bits" not in result and is_float:
        return _command("harden", Path(result["checkpoint"]), "--bits", "4", *again)
    return _command("export", Path(result["checkpoint"]), "--format", "float" if is_float else "integer", *again)


def after_export(result: Mapping[str, Any], options: Judging) -> str | None:
    """The first of recheck and attack that the export has not done; for a file of QONNX another format of its model.

    None after an export whose file answers otherwise than its network.
    """
    if not result["equal_in"]:
        return None
    if result["format"] == QONNX:
        return _command("export", Path(result["bundle"], "model.pt"), "--format", "integer", *_repeated(options))
    command = "recheck" if result["recheck"] is None else "attack"
    return _command(command, Path(result["bundle"]), *_repeated(options))


def after_recheck(result: Mapping[str, Any], options: Judging) -> str | None:
    """The attack with masking checks; None where the file failed a check or nothing can run it."""
    if result["shortfalls"] or result["file_failures"] or result["format"] == QONNX:
        return None
    return _command("attack", Path(result["bundle"]), *_repeated(options))


def after_attack(result: Mapping[str, Any], options: Judging) -> str | None:
    """Export of an attacked model file; None of a deployed file, and of a replay."""
    is_model_file = str(result.get("model")).endswith((".pt", ".safetensors"))
    if result.get("judge") != "pytorch" or "found_on" in result or not is_model_file:
        return None
    kind = "float" if str(result["label"]).endswith("-float") else "integer"
    return _command("export", Path(result["model"]), "--format", kind, *_repeated(options))


def replay_of(result: Mapping[str, Any], options: Judging, *, form: Mapping[str, str | None]) -> str | None:
    """The command that counts the saved adversarial images again; ``form``: options of a lone .onnx, and values."""
    if not result.get("adversarial"):
        return None
    words = [word for name, value in form.items() if value is not None for word in (name, value)]
    again = _again(custom_model=options.custom_model, data=options.data, skip_bad_images=options.skip_bad_images)
    return _command("attack", Path(result["model"]), "--replay", Path(result["adversarial"]), *words, *again)


def after_quickstart(result: Mapping[str, Any]) -> str:
    """The attack with masking checks on the deployed file."""
    return _command("attack", Path(result["folder"], "export-packed"))


def after_weights(file: Path, *, custom_model: str | None) -> str:
    """What follows export --format safetensors."""
    return _command("attack", file, *_again(custom_model=custom_model))


def with_next(lines: list[str], command: str | None) -> list[str]:
    """``lines``, and the next command if there is one."""
    return lines if command is None else [*lines, f"next    {command}"]


def _repeated(options: Judging) -> list[str]:
    """The options that the next command needs as well."""
    return _again(
        custom_model=options.custom_model,
        data=options.data,
        skip_bad_images=options.skip_bad_images,
        epsilon=options.epsilon,
    )


def _again(
    *,
    custom_model: str | None = None,
    data: str | None = None,
    skip_bad_images: bool = False,
    epsilon: str | None = None,
) -> list[str]:
    words: list[str] = []
    for name, value in (("--model", custom_model), ("--data", data), ("--epsilon", epsilon)):
        words += [] if value is None else [name, value]
    return words + (["--skip-bad-images"] if skip_bad_images else [])


def _command(name: str, *words: object) -> str:
    return shlex.join(["robustq", name, *(shown(word) if isinstance(word, Path) else str(word) for word in words)])


def shown(path: Path) -> str:
    """A path below the working folder without the folders above."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
