"""Results as a terminal shows them: a few lines under 120 columns, the number first, what is wrong in words."""

from __future__ import annotations

from typing import Any

from robustq.recipe import format_epsilon
from robustq.report.attack import attack_lines, bounded, percent, scientific, size


def training_lines(result: dict[str, Any], *, advice: str) -> list[str]:
    """What train and harden say at the end."""
    held_out = f"clean {percent(result['holdout_clean_accuracy'])}"
    if result["holdout_pgd10_accuracy"] is not None:
        held_out += f", PGD-10 {percent(result['holdout_pgd10_accuracy'])}"
    clean = bounded(result["clean_accuracy"], result["clean_interval"])
    trained = f"epoch {result['best_epoch']} of {result['epochs_done']}; " if result["epochs"] else ""
    time = f"{result['seconds_per_epoch']:.2f} s an epoch" if result["epochs"] else f"{result['seconds']:.1f} s"
    return [
        f"clean   {clean} on {result['test_images']:,} test images",
        f"saved   {result['checkpoint']}  ({trained}held out: {held_out})",
        f"time    {time}",
        f"next    {advice}",
    ]


def proof_lines(result: dict[str, Any]) -> list[str]:
    """Parity and layers of an exported file."""
    total = len(result["integer_layers"]) + len(result["float_layers"])
    lines = []
    if result["judged_file"] == "qonnx" or "qonnx_executor" in result["parity"]:
        lines.append("onnxruntime cannot load QONNX: the rest is counted on the QCDQ file of the same model")
    lines.append(f"layers  onnxruntime runs {len(result['integer_layers'])} of {total} as integers")
    in_float = result["float_layers"]
    if in_float:
        lines[-1] += f"; in float: {', '.join(in_float[:2])}{', ...' if len(in_float) > 2 else ''}"
    for run, agreement in result["parity"].items():
        same = agreement["images"] - agreement["different_top1"]
        mean, largest = scientific(agreement["mean_difference"]), scientific(agreement["max_difference"])
        lines.append(
            f"parity  {run}: {same:,} of {agreement['images']:,} same answers as the folded network "
            f"(logits differ by {mean} of their range, at most {largest}"
            + (f"; {agreement['images_apart']:,} images on rounding ties)" if agreement["images_apart"] else ")")
        )
    if result["on_ties"]:
        runs = ", ".join(result["on_ties"])
        lines.append(f"parity  {runs}: the images furthest apart were followed to values on rounding ties")
    lines += [f"FAILED  {fall}" for fall in result["shortfalls"]]
    return lines


def export_lines(result: dict[str, Any]) -> list[str]:
    """What export says."""
    drift = result["drift"]
    lines = [
        f"file    {result['files'][0]}  ({size(result['size_bytes'])})",
        f"drift   folding BatchNorm gave {drift['different_top1']} of {drift['images']:,} images another class "
        f"(mean {scientific(drift['mean_difference'])} of the logit range)",
        *drift_warning(drift),
        *proof_lines(result),
    ]
    if result["recheck"] is not None:
        lines += attack_lines(result["recheck"])
    lines += equal_lines(result)
    lines += not_for_lines(result)
    lines.append(f"next    robustq recheck {result['bundle']}")
    return lines


def equal_lines(result: dict[str, Any]) -> list[str]:
    """In which runtimes the file's answers were proved equal to the network's."""
    return [f"equal   answers proved in {one}" for one in result["equal_in"]] or [
        "equal   answers proved in no runtime: do not use this file"
    ]


def not_for_lines(found: dict[str, Any]) -> list[str]:
    """Where an exported file may not be used; nothing for files written before they said so."""
    return [f"not for {one}" for one in found.get("not_for", [])]


def drift_warning(drift: dict[str, Any]) -> list[str]:
    """A line when rounding the biases changed more than one answer in a thousand."""
    if drift["same_answers"]:
        return []
    return ["WARNING these answers differ from those of model.pt: biases are rounded to int32 (docs/formats.md)"]


def recheck_lines(result: dict[str, Any]) -> list[str]:
    """What recheck says."""
    judged = attack_lines(result)
    failed = [line for line in judged if line.startswith("FAILED")]
    head = f"{result['label']} as {result['format']} on {result['data']}"
    return [*failed, head, *proof_lines(result), *judged[len(failed) :]]


def quickstart_lines(result: dict[str, Any]) -> list[str]:
    """The quickstart's table."""
    columns = ("clean", "fgsm", "pgd20", "margin_pgd40")
    heads = ("model", "clean", "FGSM", "PGD-20", "margin-PGD-40", "file")
    cells = [
        (row["model"], *(percent(row[name]) for name in columns), size(row["size_bytes"])) for row in result["rows"]
    ]
    widths = [max(len(line[place]) for line in [heads, *cells]) for place in range(len(heads))]
    table = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [heads, *cells]
    ]
    last = result["rows"][-1]
    worst = bounded(last["worst_case"], last["worst_case_interval"])
    return [
        "",
        *table,
        "",
        f"{result['test_images']} test images, uint8 pixels within {format_epsilon(result['epsilon'])}; "
        "the last row is counted on onnxruntime's answers",
        f"worst case of the deployed file: at most {worst} · not judged for masking",
        f"{result['seconds']:.0f} s · everything lies in {result['folder']}",
        *(f"FAILED  {fall}" for fall in result["shortfalls"]),
        "next    robustq harden YOUR-MODEL.pt --bits 4 --data YOUR-DATA   (robustq --help)",
    ]
