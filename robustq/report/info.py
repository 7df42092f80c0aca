"""The lines of `robustq info` and `robustq recipes`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from robustq.recipe import METADATA, format_epsilon, parse_epsilon
from robustq.recipe.paper import PAPER_TABLES
from robustq.report.text import layers_line, not_for_lines, percent, size, with_interval


def description_lines(found: Mapping[str, Any]) -> list[str]:
    """A few lines for any kind of file; ``--json`` has the rest."""
    failures = found.get("file_failures" if found["kind"] == "export folder" else "failed", ())
    lines = [*(f"FAILED  {failure}" for failure in failures), f"{found['kind']}  {found['path']}"]
    if found.get("without_model"):
        lines.append("model   model.pt is not in the folder; the lines below are of the file alone")
    if "architecture" in found:
        lines += _network(found)
    if found["kind"] == "onnx":
        lines += _onnx(found)
    if found.get("layers"):
        lines += _layers(found["layers"])
    if found["kind"] == "model":
        lines += [f"info    {_entry(key, value)}" for key, value in found["info"].items() if value is not None]
    if found["kind"] == "export folder":
        lines += _export(found)
    if found["kind"] == "run folder":
        lines += _run(found)
    digests = found.get("sha256")
    if isinstance(digests, str):
        digests = {size(found["size_bytes"]): digests}
    lines += [f"sha256  {digest}  {name}" for name, digest in (digests or {}).items()]
    return lines


def _entry(key: str, value: Any) -> str:
    """One entry of a model file's info, such as ``holdout clean accuracy 71.9%``."""
    if key.endswith("accuracy") and isinstance(value, float):
        value = percent(value)
    if isinstance(value, dict):
        value = ", ".join(f"{name} {inner}" for name, inner in value.items())
    return " ".join(f"{key.replace('_', ' ')} {value}".split())


def _network(found: Mapping[str, Any]) -> list[str]:
    is_float = found["weight_bits"] == 32
    width = "float" if is_float else f"{found['weight_bits']}-bit weights, {found['act_bits']}-bit activations"
    parameters = f" · {found['parameters']:,} parameters" if "parameters" in found else ""
    lines = [f"network {found['architecture']}{parameters} · {width}"]
    shape = f"{found['classes']} classes, {found['channels']} channels"
    if "image_size" in found:
        shape += f", {found['image_size']}x{found['image_size']} pixels"
    if found.get("data"):
        shape = f"{found['data']} ({shape})"
    lines.append(f"data    {shape}")
    if found.get("epsilon") is not None:
        lines.append(f"radius  {format_epsilon(found['epsilon'])}")
    return lines


def _layers(layers: list[dict[str, Any]]) -> list[str]:
    """Adjacent layers of one width share a line."""
    lines = []
    for bits, same in groupby(layers, key=lambda layer: layer["weight_bits"]):
        names = [layer["name"] for layer in same]
        span = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} layers)"
        width = "weights of unknown width" if bits is None else "float" if bits == 32 else f"{bits}-bit weights"
        lines.append(f"layers  {width}: {span}")
    return lines


def _onnx(found: Mapping[str, Any]) -> list[str]:
    spec = found["spec"] or {}
    lines = [f"format  {found['format'] or 'not written by robustq'} · {found['producer']}"]
    if spec:
        epsilon = spec.get("epsilon")
        lines.append(
            f"network {spec.get('architecture')} on {spec.get('data')}"
            + (f" · radius {format_epsilon(epsilon)}" if isinstance(epsilon, int | float) else "")
        )
    for what in ("inputs", "outputs"):
        shown = ", ".join(f"{one['name']} {one['type'].lower()} {one['shape']}" for one in found[what])
        lines.append(f"{what.ljust(7)} {shown}")
    lines.append(_images(found))
    lines.append("nodes   " + ", ".join(f"{count} {name}" for name, count in found["operators"].items()))
    lines.append(f"values  {found['stored_values']:,} stored in {size(found['size_bytes'])}")
    lines += _quantizers(found["quantizers"]) + _scales(found) + [_runs(found)]
    if found["no_gradient"]:
        lines.append(f"attack  without gradients: no derivative of {', '.join(found['no_gradient'])}")
    return lines + not_for_lines(found)


def _images(found: Mapping[str, Any]) -> str:
    """Layout, range and normalisation of the images, as far as the file states them."""
    images = found["images"]
    if images is None:
        return f"images  no classifier of images: {found['no_classifier']}"
    ranges = {None: "pixel range and normalisation not stated (--input)", "unit": "[0, 1]", "uint8": "0 to 255"}
    pixels = ranges.get(images["pixels"], f"mean/deviation {images['pixels']}")
    source = f", by {images['found_in']}" if images["found_in"] else ""
    classes = "; answers with classes" if found["answers"] == "classes" else ""
    return f"images  {images['layout'] or 'layout not stated (--layout)'}, {pixels}{source}{classes}"


def _quantizers(rows: list[dict[str, Any]]) -> list[str]:
    """Widths of activations."""
    counts = Counter("an unknown number of" if row["bits"] is None else str(row["bits"]) for row in rows)
    shown = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(counts.items()))
    return [f"codes   activations: {shown}"] if rows else []


def _scales(found: Mapping[str, Any]) -> list[str]:
    """Range of the scales of weights and of activations."""
    parts = []
    for what, rows in (("weights", found["layers"]), ("activations", found["quantizers"])):
        for per in ("channel", "tensor"):
            scales = [row["scale"] for row in rows if row["scale"] is not None and row["scale"]["per"] == per]
            if scales:
                low, high = min(scale["low"] for scale in scales), max(scale["high"] for scale in scales)
                parts.append(f"{what} per {per} {low:.3g} to {high:.3g}")
    return [f"scales  {'; '.join(parts)}"] if parts else []


def _runs(found: Mapping[str, Any]) -> str:
    integer, in_float = found["integer_layers"], found["float_layers"]
    if integer is None:
        return f"runs    not in onnxruntime: {found['not_run']}"
    return layers_line(integer, in_float)


def _export(found: Mapping[str, Any]) -> list[str]:
    integer, in_float = found.get("integer_layers", []), found.get("float_layers", [])
    lines = [f"format  {found['format']} · {len(integer)} of {len(integer) + len(in_float)} layers run as integers"]
    recheck = found.get("recheck")
    if recheck:
        lines.append(f"clean   {with_interval(recheck['clean_accuracy'], recheck['clean_interval'])}")
        lines.append(
            f"robust  at most {with_interval(recheck['robust_accuracy'], recheck['interval'])} at "
            f"{format_epsilon(recheck['epsilon'])} ({recheck['images']:,} images, {recheck['verdict']})"
        )
        lines += [f"flag    {flag['name']}: {flag['text']}" for flag in recheck["flags"]]
    lines += [f"equal   answers proved in {runtime}" for runtime in found.get("equal_in", [])]
    return lines + not_for_lines(found)


def _run(found: Mapping[str, Any]) -> list[str]:
    result = found["result"]
    recipe = (found["config"] or {}).get("recipe", {})
    lines = [f"recipe  {recipe.get('name')} ({recipe.get('method')})"]
    if result is None:
        return [*lines, "state   not finished: the folder has no result.json"]
    lines.append(f"clean   {percent(result.get('clean_accuracy'))} on {result.get('test_images')} test images")
    epochs = result.get("epochs_done", result.get("epochs"))
    lines.append(
        f"held    clean {percent(result.get('holdout_clean_accuracy'))}, PGD-10 "
        f"{percent(result.get('holdout_pgd10_accuracy'))} (epoch {result.get('best_epoch')} of {epochs})"
    )
    return lines + [f"FAILED  {failure}" for failure in result.get("shortfalls", [])]


def zoo_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines of zoo: a paragraph for each network."""
    lines = []
    for card in found["zoo"]:
        width = "float" if card["weight_bits"] == 32 else f"{card['weight_bits']} bits"
        clean = with_interval(card["clean_accuracy"], card["clean_interval"])
        robust = with_interval(card["robust_accuracy"], card["interval"])
        lines += [
            f"zoo:{card['name']}  {card['summary']}",
            f"  {card['architecture']} on {card['data']} · {width} · {card['size_bytes']:,} bytes",
            f"  clean {clean}, robust at most {robust} at {format_epsilon(card['epsilon'])} "
            f"({card['suite']}, {card['images']:,} images)",
        ]
    return lines


_OPEN = {
    "data": "from model.pt or --data",
    "architecture": "from model.pt or --architecture",
    "weight_bits": "from --bits, else model.pt",
    "act_bits": "from --bits, else model.pt",
    "shared_sum_scale": "from model.pt, else false",
    "epsilon": "from --epsilon or model.pt, else 8/255",
    "crop_padding": "an eighth of the image side",
    "flip": "true for known photograph data sets, else false",
}
"""Source of a value that a recipe leaves open."""


def list_lines(recipes: Sequence[dict[str, Any]], tables: Mapping[str, Sequence[str]]) -> list[str]:
    """A name and a sentence for each recipe: the rows of the paper's tables (table -> names) first, then the others."""
    summaries = {recipe["name"]: recipe["summary"] for recipe in recipes}
    sections = {
        f"Table {table} of arXiv:2210.08701: {PAPER_TABLES[table][0]}": names for table, names in tables.items()
    }
    in_tables = {name for names in tables.values() for name in names}
    sections["Others"] = [name for name in summaries if name not in in_tables]
    lines = []
    for head, names in sections.items():
        width = max(map(len, names), default=0)
        lines += ["", head, *(f"  {name.ljust(width)}  {summaries[name]}" for name in names)] if names else []
    return lines[1:]


def toml_lines(recipe: dict[str, Any]) -> list[str]:
    """One recipe as TOML; comments name the source of the values that it leaves open."""
    lines = [f"# {' '.join(recipe['name'].split())}", *_metadata(recipe)]
    for key, value in recipe.items():
        if key in ("name", "settings", *METADATA):
            continue
        lines.append(f"# {key}: {_OPEN[key]}" if value is None else f"{key} = {_toml(key, value)}")
    if recipe["settings"]:
        lines += ["", f"[{recipe['method']}]"]
        lines += [f"{key} = {_toml(key, value)}" for key, value in recipe["settings"].items()]
    return lines


def _metadata(recipe: dict[str, Any]) -> list[str]:
    """Comments, since a changed copy of the recipe must not claim them."""
    lines = [f"# row {row} of Table {table} of arXiv:2210.08701" for table, row in recipe.get("paper_rows", {}).items()]
    evidence = recipe.get("evidence", {})
    if evidence:
        figures = ", ".join(f"{name} {value:g}" for name, value in evidence["figures"].items())
        lines.append(f"# evidence: {figures} (seed {evidence['seed']}, {evidence['hardware']})")
        lines.append(f"#   {' '.join(evidence['command'].split())}")
    return lines


def _toml(key: str, value: object) -> str:
    if key == "epsilon" and isinstance(value, float):
        levels = f"{round(value * 255)}/255"
        return f'"{levels}"' if parse_epsilon(levels) == value else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are valid TOML, which must escape DEL as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
