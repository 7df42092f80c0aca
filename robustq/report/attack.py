"""The lines of an attack's result.

Numbers as a terminal shows them, each with its unit.

What attack and recheck say: each attack, the worst case, and in words what the number is worth.
"""

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
