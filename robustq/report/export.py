"""Lines of export and recheck: file, parity, layers, limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustq.report.targets import check_lines
from robustq.report.text import Result, attack_lines, named_layers, scientific, size, with_interval

BYTE = 8
"""Bits that each weight takes in a file that is not packed."""


def export_lines(result: Result) -> list[str]:
    """Lines of export."""
    drift = result["drift"]
    lines = [
        f"file    {result['files'][0]}  ({size(result['size_bytes'])})",
        *_width_notes(result),
        f"drift   folding BatchNorm changed the class of {drift['different_top1']} of {drift['images']:,} images "
        f"(mean {scientific(drift['mean_difference'])} of the logit range)",
    ]
    if not drift["same_answers"]:  # more than one answer in a thousand
        lines.append(
            "WARNING these answers differ from those of model.pt: biases are rounded to int32 (docs/formats.md)"
        )
    lines += _proof_lines(result)
    lines += [f"float   {named_layers(result['stay_in_float'])}"] if result["stay_in_float"] else []
    if result["recheck"] is not None:
        lines += attack_lines(result["recheck"])
    if result.get("target"):
        lines += check_lines(result["target"])
    lines += [f"equal   answers proved in {runtime}" for runtime in result["equal_in"]]
    if not result["equal_in"]:
        lines.append("equal   answers proved in no runtime: do not use this file")
    lines += not_for_lines(result)
    lines.append(f"card    {result['bundle']}/card.html")
    if result["kit"]:
        lines.append(f"kit     check on the device: python3 {result['bundle']}/{result['kit']}/check.py")
    return lines


def _width_notes(result: Result) -> list[str]:
    """A line on formats in which narrow weights take whole bytes."""
    bits = result["weight_bits"]
    if bits >= BYTE or result["format"] not in ("integer", "qcdq"):
        return []
    return [
        f"note    in this format a weight of {bits} bit{'' if bits == 1 else 's'} takes a byte, as one of 8 bits; "
        "--format packed writes the small file"
    ]


def weights_lines(result: Result) -> list[str]:
    """Lines of export --format safetensors."""
    return [
        f"file    {result['file']}  ({size(result['size_bytes'])})",
        f"holds   {result['entries']} tensors of {result['label']} and its spec; read back, all are equal",
        f"sha256  {result['sha256']}",
    ]


def recheck_lines(result: Result) -> list[str]:
    """Lines of recheck."""
    judged = attack_lines(result)
    failed = [line for line in judged if line.startswith("FAILED")]
    head = f"{result['label']} as {result['format']} on {result['data']}"
    missing = [f"not compared: {what}" for what in result["not_compared"]]
    return [
        *failed,
        head,
        *missing,
        *_proof_lines(result),
        *_added_lines(result),
        *judged[len(failed) :],
        *not_for_lines(result),
    ]


def _added_lines(result: Result) -> list[str]:
    """Answers in another runtime, accuracies of the PyTorch model, and another result beside this one."""
    lines = []
    if result.get("runtime"):
        found = result["runtime"]
        agreement = found["agreement"]
        same = agreement["images"] - agreement["different_top1"]
        lines.append(
            f"runtime {found['name']} {found['version']}: {same} of {agreement['images']} answers are those of the "
            f"network, {found['different']} differ from onnxruntime's"
        )
    if result.get("network"):
        network = result["network"]
        clean, robust = (
            with_interval(network[name], network[interval])
            for name, interval in (("clean_accuracy", "clean_interval"), ("robust_accuracy", "interval"))
        )
        lines.append(f"PyTorch model.pt under the same suite: clean {clean}, under attack {robust}")
    return lines + [f"compare {line}" for line in result.get("comparison") or ()]


def _proof_lines(result: Result) -> list[str]:
    """Parity and integer layers of an exported file."""
    from robustq.export.recheck import QONNX_EXECUTOR

    integer, in_float = result["integer_layers"], result["float_layers"]
    lines = []
    if QONNX_EXECUTOR in result["parity"]:
        judged = "the QCDQ file of the same model" if result["judged_file"] != "qonnx" else "the twin of the file"
        lines.append(f"onnxruntime cannot load QONNX: all other results are of {judged}")
    if integer or in_float:
        lines.append(layers_line(integer, in_float))
    alike: dict[str, list[str]] = {}  # runs that agree alike share a line
    for run, agreement in result["parity"].items():
        alike.setdefault(_agreement(agreement, compared_with=result["compared_with"]), []).append(run)
    lines += [f"parity  {', '.join(runs)}: {words}" for words, runs in alike.items()]
    if result["on_ties"]:
        on_ties = ", ".join(result["on_ties"])
        lines.append(f"parity  {on_ties}: every layer computes what the file's does, but for rounding ties")
    return lines + [f"FAILED  {failure}" for failure in result["shortfalls"]]


def _agreement(found: dict[str, Any], *, compared_with: str) -> str:
    images, largest = found["images"], found["max_difference"]
    same = images - found["different_top1"]
    answers = f"all {images:,}" if same == images else f"{same:,} of {images:,}"
    logits = ", and so are the logits"
    if largest is None:
        logits = "; some logits are NaN"
    elif largest > 0:
        mean = scientific(found["mean_difference"])
        logits = f"; logits differ by {mean} of their range on average, {scientific(largest)} at most"
    ties = f"; {found['images_apart']:,} images on rounding ties" if found["images_apart"] else ""
    return f"{answers} answers are those of {compared_with}{logits}{ties}"


def layers_line(integer: Sequence[str], in_float: Sequence[str]) -> str:
    """Layers by name, as onnxruntime runs them."""
    line = f"layers  onnxruntime runs {len(integer)} of {len(integer) + len(in_float)} as integers"
    if in_float:
        line += f"; in float: {', '.join(in_float[:2])}{', ...' if len(in_float) > 2 else ''}"
    return line


def not_for_lines(result: Result) -> list[str]:
    """Runtimes and settings that an exported file is not for; older files do not name them."""
    return [f"not for {limit}" for limit in result.get("not_for", [])]
