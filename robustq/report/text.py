"""Results as a terminal shows them: a few lines of at most 120 columns; figures first, then what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustq.recipe import format_epsilon


def percent(share: float | None) -> str:
    """``37.1%``; a dash where nothing was measured."""
    return "-" if share is None else f"{share:.1%}"


def bounded(share: float, interval: Sequence[float]) -> str:
    """``37.1% [34.2, 40.1]``: a share and its 95% interval."""
    return f"{share:.1%} [{interval[0] * 100:.1f}, {interval[1] * 100:.1f}]"


def scientific(value: float | None) -> str:
    """``4e-08``; ``NaN`` where nothing could be computed."""
    return "NaN" if value is None else f"{value:.0e}"


def size(count: int) -> str:
    """``187 kB``, ``12.3 MB``, ``1.1 GB``."""
    if count >= 1_000_000_000:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 10_000_000 else f"{count / 1000:,.0f} kB"


def duration(seconds: float) -> str:
    """``40 s``, ``6 min``, ``3.5 hours``, ``2.1 days``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} hours" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"


NO_DEFENCE = 0.005
"""Robust accuracy up to which a model has none: what a natural control may keep."""


def attack_lines(result: dict[str, Any]) -> list[str]:
    """Accuracy after each attack, then the worst case and what it is worth.

    Args:
        result: of attack, its replay, or the re-check of a file.
    """
    return [
        *(f"FAILED  {failure}" for failure in result.get("file_failures", ())),
        *_columns(result),
        _worst_case(result),
        *_flags(result),
        *_undefended(result),
        *_not_judged(result),
        *(f"note    {note}" for note in result.get("notes", ())),
        *_twin(result),
        *_curve(result),
        *_cost(result),
    ]


def _columns(result: dict[str, Any]) -> list[str]:
    if result.get("suite") in ("standard", "full"):
        shown = _after_each(result["stages"])
        if shown and shown[-1][1] != result["robust_accuracy"]:
            shown.append(("the hunt for masking", result["robust_accuracy"]))
    else:
        shown = list(result["attacks"].items())
    heads = [f"clean {percent(result['clean_accuracy'])}", *(f"{name} {percent(share)}" for name, share in shown)]
    lines = [heads[0]]
    for head in heads[1:]:
        if len(lines[-1]) + len(head) + 3 > 116:
            lines.append(f"  {head}")
        else:
            lines[-1] += f" · {head}"
    return lines


def _after_each(stages: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """What stands after each attack, its backward rules and surrogates taken together; the JSON has them apart."""
    after: dict[str, float] = {}
    for stage in stages:
        if stage["stage"] != "diagnosis":
            after[stage["attack"].split(" (")[0].split(": ")[0]] = stage["accuracy"]
    return list(after.items())


def _worst_case(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    at_most = "" if verdict == "no masking found" else "at most "
    found = f"{bounded(result['robust_accuracy'], result['interval'])} at {format_epsilon(result['epsilon'])}"
    return f"robust accuracy {at_most}{found} · {verdict} (worst case of {result['images']:,} images)"


def _flags(result: dict[str, Any]) -> list[str]:
    flags = result["flags"]
    width = max((len(flag["name"]) for flag in flags), default=0)
    lines = [f"  {flag['name'].ljust(width)}  {flag['text']}   ({flag['doc']})" for flag in flags]
    easy = [stage["accuracy"] for stage in result.get("stages", ()) if stage["attack"] == "apgd-ce"]
    if flags and easy and round(easy[0], 3) > round(result["robust_accuracy"], 3):
        lines.append(f"Do not quote {percent(easy[0])}.")
    return lines


def _undefended(result: dict[str, Any]) -> list[str]:
    """Said of what falls in whole, so that nobody takes a found weakness for a fault of the attack."""
    right = round(result["images"] * (result["clean_accuracy"] or 0.0))
    if result.get("suite") not in ("standard", "full") or not right or result["robust_accuracy"] > NO_DEFENCE:
        return []
    kept = round(result["images"] * result["robust_accuracy"])
    return [f"This model has no defence: {right - kept:,} of the {right:,} images that it gets right break."]


def _not_judged(result: dict[str, Any]) -> list[str]:
    if result["verdict"] != "not judged":
        return []
    lines = [f"not judged: {reason}" for reason in result.get("not_judged_for", ())]
    if result.get("suite") in ("paper", "recheck"):
        lines[-1] += "; robustq attack --suite standard does, and may leave less"
    return lines


def _twin(result: dict[str, Any]) -> list[str]:
    if result["twin_agreement"] >= 0.999 or any(flag["name"] in ("twin", "randomness") for flag in result["flags"]):
        return []
    return [f"WARNING the model whose gradients were used agrees with the judge on {result['twin_agreement']:.1%} only"]


def _curve(result: dict[str, Any]) -> list[str]:
    points = [
        f"{format_epsilon(point['epsilon'])} {percent(point['robust_accuracy'])}" for point in result.get("curve", ())
    ]
    return [f"curve   {' · '.join(points)}"] if points else []


def _cost(result: dict[str, Any]) -> list[str]:
    lines = []
    if result.get("gradient_steps"):
        lines.append(
            f"spent   {result['gradient_steps']:,} gradient steps, {result['queries']:,} queries, "
            f"{duration(result['seconds'])}"
        )
    if result.get("adversarial"):
        lines.append(f"saved   {result['adversarial']}")
        lines.append(f"next    robustq attack MODEL --replay {result['adversarial']}")
    if result.get("suite") == "replay":
        known = "" if result["ball_checked"] else "; not checked to lie in the ball: the clean images cannot be had"
        found = result["found_on"]
        lines.append(
            f"replay  {result['same_as_recorded']:.1%} answered as {found.get('label')} did (robust accuracy "
            f"{percent(found.get('robust_accuracy'))}){known}"
        )
    return lines


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
    lines.append(f"next    robustq recheck {result['bundle']}")
    return lines


def equal_lines(result: dict[str, Any]) -> list[str]:
    """In which runtimes the file's answers were proved equal to the network's."""
    return [f"equal   answers proved in {one}" for one in result["equal_in"]] or [
        "equal   answers proved in no runtime: do not use this file"
    ]


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
