"""Results as a terminal shows them: a few lines of at most 120 columns; figures first, then failures in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from robustq.recipe import format_epsilon

if TYPE_CHECKING:
    from robustq.evaluation.suites import Suite

Result = Mapping[str, Any]  # by the keys of ``--json``
NO_DEFENCE = 0.005  # robust accuracy up to which a model counts as undefended


RESIZES = {
    "none": "images of {size} pixels as they are",
    "squash": "whole image scaled to {size}",
    "short-side": "shorter side scaled to {shorter}, centre cropped to {size}",
}
"""Ways of :func:`robustq.models.preprocessing.preprocessing_of` to make an image square, in words."""


def percent(share: float | None) -> str:
    """``37.1%``; a dash where nothing was measured."""
    return "-" if share is None else f"{share:.1%}"


def with_interval(share: float, interval: Sequence[float]) -> str:
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


def preprocessing_line(found: Mapping[str, Any]) -> str:
    """One line of :func:`robustq.models.preprocessing.preprocessing_of`, for people."""
    height, width = found["size"]
    step = RESIZES[found["resize"]].format(size=f"{width}x{height}", shorter=found.get("shorter_side"))
    inside = "" if found.get("mean") is None else "; the network applies mean and deviation itself"
    return f"{found['channels']}, {step}, {found['range']}{inside}"


def training_lines(result: Result, *, next_command: str) -> list[str]:
    """Lines of train and harden."""
    held_out = held_out_accuracies(result)
    clean = with_interval(result["clean_accuracy"], result["clean_interval"])
    before = result.get("float_holdout_accuracy")
    held_out += "" if before is None else f"; the float network: clean {percent(before)}"
    epoch = f"epoch {result['best_epoch']} of {result['epochs_done']}; " if result["epochs"] else ""
    time = f"{result['seconds_per_epoch']:.2f} s per epoch" if result["epochs"] else f"{result['seconds']:.1f} s"
    return [
        f"clean   {clean} on {result['test_images']:,} test images",
        *_training_warnings(result),
        f"saved   {result['checkpoint']}  ({epoch}held out: {held_out})",
        f"time    {time}",
        f"next    {next_command}",
    ]


def held_out_accuracies(result: Result) -> str:
    """``clean 71.9%, PGD-10 40.2%``; only what was measured."""
    shown = [f"clean {percent(result.get('holdout_clean_accuracy'))}"]
    robust = result.get("holdout_pgd10_accuracy")
    return ", ".join([*shown, *([] if robust is None else [f"PGD-10 {percent(robust)}"])])


def _training_warnings(result: Result) -> list[str]:
    """A network near chance, and held-out images that may not be new to it."""
    lines = []
    if result["near_chance"]:
        lines.append(
            f"WARNING near chance (one class for all images is right on {percent(result['chance'])}): check "
            "--normalisation, labels and lr"
        )
    if result.get("foreign"):
        lines.append("note    the given weights may have been trained on the held-out images: compare the test images")
    return lines


def attack_lines(result: Result) -> list[str]:
    """Accuracy after each attack, the worst case, and how far that number can be trusted.

    ``result`` is that of attack, of its replay, or the re-check of a file.
    """
    from robustq.evaluation.suites import SUITES

    suite = SUITES.get(result.get("suite", ""))
    return [
        *(f"FAILED  {failure}" for failure in result.get("file_failures", ())),
        *_columns(result, suite),
        _worst_case(result),
        *_flags(result),
        *_undefended(result, suite),
        *_not_judged(result, suite),
        *(f"note    {note}" for note in result.get("notes", ())),
        *_additions(result),
    ]


def _columns(result: Result, suite: Suite | None) -> list[str]:
    if suite is not None and suite.drops_broken:
        shown = _after_each(result["stages"])
        if shown and shown[-1][1] != result["robust_accuracy"]:
            shown.append(("masking checks", result["robust_accuracy"]))
    else:
        shown = list(result["attacks"].items())
    lines = [f"clean {percent(result['clean_accuracy'])}"]
    for name, share in shown:
        column = f"{name} {percent(share)}"
        if len(lines[-1]) + len(column) + 3 > 116:
            lines.append(f"  {column}")
        else:
            lines[-1] += f" · {column}"
    return lines


def _after_each(stages: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Accuracy after each attack; its backward rules and surrogates share a column, unlike in the JSON."""
    after: dict[str, float] = {}
    for stage in stages:
        if stage["stage"] != "diagnosis":
            after[stage["attack"].split(" (")[0].split(": ")[0]] = stage["accuracy"]
    return list(after.items())


def _worst_case(result: Result) -> str:
    from robustq.evaluation.flags import NOT_FOUND

    verdict = result["verdict"]
    at_most = "" if verdict == NOT_FOUND else "at most "
    robust = f"{with_interval(result['robust_accuracy'], result['interval'])} at {format_epsilon(result['epsilon'])}"
    return f"robust accuracy {at_most}{robust} · {verdict} (worst case of {result['images']:,} images)"


def _flags(result: Result) -> list[str]:
    from robustq.evaluation.suites import CROSS_ENTROPY

    flags = result["flags"]
    width = max((len(flag["name"]) for flag in flags), default=0)
    lines = [f"  {flag['name'].ljust(width)}  {flag['text']}   ({flag['doc']})" for flag in flags]
    lines += [
        f"  suspected: {check['name']}  {check['text']}   ({check['doc']})"
        for check in result.get("checks", ())
        if check["suspected"]
    ]
    easy = [stage["accuracy"] for stage in result.get("stages", ()) if stage["attack"] == CROSS_ENTROPY]
    if flags and easy and round(easy[0], 3) > round(result["robust_accuracy"], 3):
        lines.append(f"Do not quote {percent(easy[0])}.")
    return lines


def _undefended(result: Result, suite: Suite | None) -> list[str]:
    """A line for a model without defence, so that its low accuracy is not taken for a fault of the attack."""
    right = round(result["images"] * (result["clean_accuracy"] or 0.0))
    if suite is None or not suite.checks_masking or not right or result["robust_accuracy"] > NO_DEFENCE:
        return []
    broken = right - round(result["images"] * result["robust_accuracy"])
    return [f"This model has no defence: the attack breaks {broken:,} of {right:,} correctly classified images."]


def _not_judged(result: Result, suite: Suite | None) -> list[str]:
    from robustq.evaluation.flags import NOT_JUDGED

    if result["verdict"] != NOT_JUDGED:
        return []
    lines = [f"{NOT_JUDGED}: {reason}" for reason in result.get("not_judged_for", ())]
    if suite is not None and not suite.checks_masking:
        lines.append("  'robustq attack --suite standard' checks for masking, and may find a lower accuracy")
    return lines


def _additions(result: Result) -> list[str]:
    """What some attacks have: an unlike gradient model, radii, costs, files, the attack that is replayed."""
    lines = []
    is_flagged = any(flag["name"] in ("twin", "randomness") for flag in result["flags"])
    if not is_flagged and result["twin_agreement"] is not None and result["twin_agreement"] < 0.999:
        agreement = f"{result['twin_agreement']:.1%}"
        lines.append(f"WARNING the model that gives the gradients agrees with the judge on {agreement} only")
    for check in result.get("checks", ()):
        if check["name"] == "file alone" and not check["raised"]:
            weaker = "WARNING" if check["evidence"]["weaker"] else "file   "
            lines.append(f"{weaker} {check['text']}")
    if result.get("curve"):
        points = (f"{format_epsilon(one['epsilon'])} {percent(one['robust_accuracy'])}" for one in result["curve"])
        lines.append(f"curve   {' · '.join(points)}")
    if result.get("gradient_steps"):
        counts = f"{result['gradient_steps']:,} gradient steps, {result['queries']:,} queries"
        lines.append(f"cost    {counts}, {duration(result['seconds'])}")
    if result.get("adversarial"):
        lines.append(f"saved   {result['adversarial']}")
    if "found_on" in result:
        origin = result["found_on"]
        lines.append(
            f"replay  found on {origin.get('label')} (robust accuracy {percent(origin.get('robust_accuracy'))}); "
            f"{percent(result['same_as_recorded'])} of the images are right there and here, or wrong there and here"
        )
        if not result["ball_checked"]:
            lines.append("note    the ball was not checked: the clean images are not available")
        lines += _unattacked(result)
    return lines


def _unattacked(result: Result) -> list[str]:
    """A line on images that the attack left as they were, since the model was wrong on them already."""
    untouched = result["wrong_before"]
    if not untouched:
        return []
    kind = "WARNING" if mostly_wrong_before(result) else "note   "
    return [
        f"{kind} {untouched:,} of {result['images']:,} images are clean: the attack left them as they were, since "
        f"{result['found_on'].get('label')} was wrong on them before"
    ]


def mostly_wrong_before(result: Result) -> bool:
    """Whether most images of a replay were never attacked, so that its robust accuracy says little."""
    return bool(2 * result["wrong_before"] > result["images"])


NAMED = 6
"""Layers that one line names."""


def named_layers(names: Sequence[str]) -> str:
    """The layers of a network that have no integer form."""
    listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} layer{' stays' if len(names) == 1 else 's stay'} in float: {listed}"


def quickstart_lines(result: Result) -> list[str]:
    """The table of quickstart."""
    columns = ("clean", "fgsm", "pgd20", "margin_pgd40")
    table = [
        ("model", "clean", "FGSM", "PGD-20", "margin-PGD-40", "file"),
        *((row["model"], *(percent(row[name]) for name in columns), size(row["size_bytes"])) for row in result["rows"]),
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    last = result["rows"][-1]
    worst = with_interval(last["worst_case"], last["worst_case_interval"])
    return [
        "",
        *("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table),
        "",
        f"{result['test_images']} test images, uint8 pixels within {format_epsilon(result['epsilon'])}; "
        "rows of deployed files count the answers of onnxruntime",
        f"worst case of the packed file: at most {worst} · not judged for masking",
        f"{result['seconds']:.0f} s · results are in {result['folder']}",
        *(f"FAILED  {failure}" for failure in result["shortfalls"]),
        "yours   robustq harden YOUR-MODEL.pt --bits 4 --data YOUR-DATA   (robustq --help)",
    ]
