"""The lines of `robustq info` and `robustq zoo`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from robustq.recipe import format_epsilon
from robustq.report.export import layers_line, not_for_lines
from robustq.report.text import (
    RESIZES,
    held_out_accuracies,
    percent,
    preprocessing_line,
    quickstart_lines,
    size,
    with_interval,
)
from robustq.tables import misfit


def description_lines(found: Mapping[str, Any]) -> list[str]:
    """A few lines for any kind of file; ``--json`` has the rest."""
    failures = found.get("file_failures" if found["kind"] == "export folder" else "failed", ())
    lines = [*(f"FAILED  {failure}" for failure in failures), f"{found['kind']}  {found['path']}"]
    if found["kind"] == "quickstart":
        return lines + _quickstart(found)
    if found.get("without_model"):
        lines.append("model   model.pt is not in the folder; the lines below are of the file alone")
    if "architecture" in found:
        lines += _network(found)
    if found["kind"] == "state dict":
        lines += _state_dict(found)
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
    digests, sizes = found.get("sha256"), found.get("sizes", {})
    if isinstance(digests, str):
        digests = {size(found["size_bytes"]): digests}
    shown = {name: f"{name} ({size(sizes[name])})" if name in sizes else name for name in digests or {}}
    return lines + [f"sha256  {digest}  {shown[name]}" for name, digest in (digests or {}).items()]


def _quickstart(found: Mapping[str, Any]) -> list[str]:
    """The table, and the folders that info, attack and recheck open."""
    lines = [line for line in quickstart_lines(found) if not line.startswith("yours ")]
    lines += [f"run     {found['path']}/{name}" for name in found["runs"]]
    return lines + [f"export  {found['path']}/{name}" for name in found["exports"]]


def _state_dict(found: Mapping[str, Any]) -> list[str]:
    """What a checkpoint of another program says beside the shapes."""
    lines = [f"weights {', '.join(found['dtypes'])}"]
    if len(found["weights"]) > 1:
        first, *others = found["weights"]
        lines[0] += f"; the set {first}, other sets: {', '.join(others)} (--weights KEY)"
    if found["architecture"] is None:
        lines.append(
            "note    no architecture of robustq: name it by --arch torchvision:NAME or --model MODULE:FUNCTION"
        )
    if found["stated_accuracy"] is not None:
        lines.append(f"stated  accuracy {percent(found['stated_accuracy'])}")
    return lines + [f"stated  {key}: {text}" for key, text in found["metadata"].items()]


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
    lines = [f"network {found['architecture'] or 'unknown'}{parameters} · {width}"]
    if found["architecture"] is None:
        return lines
    shape = f"{found['classes']} classes, {found['channels']} channels"
    if "image_size" in found:
        shape += f", {found['image_size']}x{found['image_size']} pixels"
    if found.get("data"):
        shape = f"{found['data']} ({shape})"
    lines.append(f"data    {shape}")
    lines += _preprocessing("images", found.get("preprocessing"))
    if found.get("epsilon") is not None:
        lines.append(f"radius  {format_epsilon(found['epsilon'])}")
    return lines


def _preprocessing(label: str, found: Any) -> list[str]:
    """Nothing for a table of another form, which anybody may have written into a file."""
    shape = {"channels": str, "resize": str, "size": (int, int), "range": str}
    fits = isinstance(found, dict) and misfit(found, shape) is None and found["resize"] in RESIZES
    return [f"{label}  {preprocessing_line(found)}"] if fits else []


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
    lines += _preprocessing("before", found["preprocessing"])
    lines += _accuracy(found["accuracy"] or {})
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
    lines += _accuracy(found.get("recheck") or (found.get("onnx") or {}).get("accuracy") or {})
    lines += [f"equal   answers proved in {runtime}" for runtime in found.get("equal_in", [])]
    return lines + not_for_lines(found)


def _accuracy(counted: Mapping[str, Any]) -> list[str]:
    """What the export counted on the file, as far as it is there in the form that it was written in."""
    wrong = misfit(dict(counted), {"clean_accuracy": int | float, "clean_interval": (int | float, int | float)})
    if wrong is not None:
        return []
    lines = [f"clean   {with_interval(counted['clean_accuracy'], counted['clean_interval'])}"]
    wrong = misfit(
        dict(counted),
        {
            **dict.fromkeys(("robust_accuracy", "epsilon"), int | float),
            "interval": (int | float, int | float),
            "images": int,
            "verdict": str,
            "flags": [{"name": str, "text": str}],
        },
    )
    if wrong is None:
        lines.append(
            f"robust  at most {with_interval(counted['robust_accuracy'], counted['interval'])} at "
            f"{format_epsilon(counted['epsilon'])} ({counted['images']:,} images, {counted['verdict']})"
        )
        lines += [f"flag    {flag['name']}: {flag['text']}" for flag in counted["flags"]]
    return lines


def _run(found: Mapping[str, Any]) -> list[str]:
    result = found["result"]
    recipe = (found["config"] or {}).get("recipe", {})
    lines = [f"recipe  {recipe.get('name')} ({recipe.get('method')})"]
    if result is None:
        return [*lines, "state   not finished: the folder has no result.json"]
    lines.append(f"clean   {percent(result.get('clean_accuracy'))} on {result.get('test_images')} test images")
    if result.get("near_chance"):
        lines.append("WARNING this is near chance")
    epochs = result.get("epochs_done", result.get("epochs"))
    epoch = f" (epoch {result.get('best_epoch')} of {epochs})" if epochs else ""
    lines.append(f"held    {held_out_accuracies(result)}{epoch}")
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
