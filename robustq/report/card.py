"""The card of an export folder: one page to hand on, as Markdown (card.md) and as a web page (card.html).

Both show the entries of bundle.json. The Markdown begins with the table that model hubs read: ``model-index``, in JSON,
which is YAML too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from robustq.errors import printable
from robustq.export.timing import Latency
from robustq.recipe import format_epsilon
from robustq.report.targets import replayed_in
from robustq.report.text import NAMED, percent, preprocessing_line, size, with_interval

NAMES = ("card.md", "card.html")

ATTACKS = {"fgsm": "FGSM", "pgd20": "PGD, 20 steps", "margin_pgd40": "PGD on the margin, 40 steps"}
"""Attacks of the suite recheck, as a page names them."""


def write_card(folder: Path, record: Mapping[str, Any], file: Path, latency: Latency | None = None) -> None:
    """Write card.md and card.html into ``folder``.

    Args:
        record: content of bundle.json, without its hashes.
        file: the .onnx in the folder.
        latency: of the file on this machine; None if it was not timed.
    """
    facts = _facts(record, file, latency)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robustq.report"),
        autoescape=lambda name: bool(name) and str(name).endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    for name in NAMES:
        text = environment.get_template(f"{name}.j2").render(**facts)
        (folder / name).write_text(text, encoding="utf-8")


def _plain(text: object) -> str:
    """Text of one line without Markdown's table bars and without HTML."""
    return " ".join(printable(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())


def _facts(record: Mapping[str, Any], file: Path, latency: Latency | None) -> dict[str, Any]:
    counted = record["recheck"]
    integer, in_float = record["integer_layers"], record["float_layers"]
    rows = [
        ("format", record["format"]),
        ("images", preprocessing_line(record["preprocessing"])),
        ("size", size(record["size_bytes"])),
        ("layers as integers", f"{len(integer)} of {len(integer) + len(in_float)} in onnxruntime"),
    ]
    if in_float:
        rows.append(("layers in float", named_few(in_float)))
    if record["stay_in_float"]:
        rows.append(("layers without an integer form", named_few(record["stay_in_float"])))
    if latency is not None:
        figures = f"{latency.median_ms:.3g} ms for one image (99 of 100: {latency.p99_ms:.3g} ms)"
        rows.append(("latency", f"{figures}, {latency.cpu}, one thread"))
    if record["judged_file"] != record["format"]:
        rows.append(("accuracies", f"counted on the file {record['judged_file']} of the same network"))
    rows += [("same answers as the network", where) for where in record["equal_in"]]
    target = record.get("target")
    if target:
        rows.append((f"target {target['name']}", target["text"]))
        rows += [("the same images in", replayed_in(one)) for one in target["replayed"]]
    rows += [("not for", limit) for limit in record["not_for"]]
    return {
        "label": record["label"],
        "data": Path(record["data"]).name,
        "sentence": sentence(record),
        "warnings": [*record["shortfalls"], *(flag["text"] for flag in (counted or {}).get("flags", []))],
        "accuracies": _accuracies(counted),
        "images": counted["images"] if counted else 0,
        "epsilon": format_epsilon(counted["epsilon"]) if counted else "",
        "suite": record["suite"],
        "verdict": counted["verdict"] if counted else "not attacked",
        "rows": rows,
        "versions": record["versions"],
        "commands": _commands(record),
        "index": json.dumps(_model_index(record)) if counted else "[]",
        "file": file.name,
        "kit": record["kit"],
    }


def sentence(record: Mapping[str, Any]) -> str:
    """What may be quoted of the file, with its limits, in one or two sentences."""
    name, counted = f"{record['label']} ({size(record['size_bytes'])})", record["recheck"]
    if record["shortfalls"]:
        return f"{name} failed a check and must not be used."
    if not counted:
        return f"{name} answers as its network does. Its accuracy was not counted at the export."
    clean = with_interval(counted["clean_accuracy"], counted["clean_interval"])
    robust = with_interval(counted["robust_accuracy"], counted["interval"])
    images = f"{counted['images']:,} test images of {Path(record['data']).name}"
    text = (
        f"{name} answers {clean} of {images} right, and at most {robust} "
        f"under attack within {format_epsilon(counted['epsilon'])}."
    )
    if counted["flags"]:
        return f"{text} Attacks with gradients may not see this network as it is: the second figure is too high."
    return f"{text} Stronger attacks may lower the second figure."


def _accuracies(counted: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not counted:
        return []
    return [
        ("clean", with_interval(counted["clean_accuracy"], counted["clean_interval"])),
        *((ATTACKS.get(name, name), percent(kept)) for name, kept in counted["attacks"].items()),
        ("worst case of each image", with_interval(counted["robust_accuracy"], counted["interval"])),
    ]


def _commands(record: Mapping[str, Any]) -> list[str]:
    if record.get("target"):
        return _commands_of_target(record)
    options = f"--format {record['format']}"
    options += " --input uint8" if record["input"] == "uint8" else ""
    options += " --batch-norm keep" if record["batch_norm"] == "keep" else ""
    options += f" --for {record['consumer']}" if record["consumer"] else ""
    counted = record["recheck"]
    images = f" --images {counted['images']}" if counted else " --no-recheck"
    seed = f" --seed {record['seed']}" if record["seed"] else ""
    return [
        f"robustq export model.pt {options}{images}{seed}",
        f"robustq recheck .{images if counted else ''}{seed}",
        "robustq attack . --suite standard",
    ]


def _commands_of_target(record: Mapping[str, Any]) -> list[str]:
    target, counted = record["target"], record["recheck"]
    images = f" --images {counted['images']}" if counted else " --no-recheck"
    seed = f" --seed {record['seed']}" if record["seed"] else ""
    return [
        f"robustq export model.pt --target {target['name']}{images}{seed}",
        f"robustq recheck .{images if counted else ''}{seed}",
        f"robustq attack . --suite standard --runtime {record['judge']}",
    ]


def named_few(names: list[str]) -> str:
    """The first layers by name, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _model_index(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results as model hubs read them."""
    counted = record["recheck"]
    epsilon = format_epsilon(counted["epsilon"])
    metrics = [
        {"type": "accuracy", "name": "clean accuracy", "value": counted["clean_accuracy"]},
        {
            "type": "accuracy",
            "name": f"accuracy under attack within {epsilon} (suite {record['suite']}, upper bound)",
            "value": counted["robust_accuracy"],
        },
    ]
    name = Path(record["data"]).name
    data = {"type": name, "name": name, "split": "test"}
    task = {"type": "image-classification"}
    return [{"name": record["label"], "results": [{"task": task, "dataset": data, "metrics": metrics}]}]
