"""export and recheck: the deploy file of a trained network, and the proof of what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from robustq.checkpoint import load_model, save_model
from robustq.data import to_float
from robustq.errors import UsageError
from robustq.evaluation.suites import RECHECK
from robustq.export.bundle import FAILED, MODEL, RECORD, open_bundle, write_record
from robustq.export.formats import build, check_format
from robustq.export.metadata import add_results
from robustq.export.parity import drift
from robustq.export.recheck import attack_file, prove
from robustq.export.runtime_limits import not_for
from robustq.export.session import Layers
from robustq.files import check_place, folder_when_whole, free_path
from robustq.hardening.run_folder import last_hardened
from robustq.models.quant.folding import fold
from robustq.models.spec import ModelSpec
from robustq.progress import detail, note
from robustq.workflow.open_model import tell_failures
from robustq.workflow.setup import DEFAULT_EPSILON, data_for, pick_device, tell_evaluation, versions

EXPORTS = Path("export-out")

COUNTED_CLEAN = ("images", "clean_accuracy", "clean_interval")
COUNTED = (*COUNTED_CLEAN, "robust_accuracy", "interval", "epsilon", "verdict", "flags")
"""What a file says of the accuracy that was counted on it, without and with attacks."""


def export_model(
    model: Path | str | None = None,
    *,
    format_name: str = "integer",
    pixels: str = "float",
    batch_norm: str = "fold",
    consumer: str | None = None,
    epsilon: float | None = None,
    images: int = 1000,
    recheck: bool = True,
    data: str | None = None,
    own_model: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Write the deploy file of a quantized model, and judge that file.

    Args:
        model: a .pt that robustq wrote; None: the last hardened one.
        format_name: a key of :data:`robustq.export.formats.FORMATS`.
        pixels: ``uint8`` for a file that takes pixels as they are, ``float`` for one that takes them divided by 255.
        batch_norm: ``keep`` leaves BatchNormalization nodes in a QONNX file.
        consumer: the tool that a QONNX file is written for, one of :data:`robustq.export.formats.CONSUMERS`; None:
            the first of them.
        epsilon: radius of the re-check; None: what the model was trained for, else 8/255.
        images: test images for parity and re-check (evenly spaced; 0: all).
        recheck: also count accuracy under attack.
        data: over what the model says.
        own_model: the ``module:function`` that built the network, where it is the user's own; without it the code is
            not run.
        skip_bad_images: leave out image files that cannot be read, with a warning.
        seed: of the random starts.
        device: where attacks are found; None: a GPU where there is one.
        out: export folder; must not exist. None: ``export-out/<run>-<format>``.

    Returns:
        ``files parity equal_in not_for integer_layers float_layers recheck`` and more; ``shortfalls`` says in words
        what did not hold. A file whose answers are not the network's is called ``NAME.failed.onnx``.

    Raises:
        RobustqError: bad input; nothing is written.
    """
    place = pick_device(device)
    chosen = last_hardened() if model is None else Path(model)
    check_place(out, EXPORTS)
    if images < 0:
        raise UsageError(f"--images {images} is negative; give a number, or 0 for all")
    network, spec, info = load_model(chosen, own_model=own_model)
    check_format(format_name, spec, pixels=pixels, batch_norm=batch_norm, consumer=consumer)
    loaded = data_for(spec, data, chosen, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    folded = fold(network, spec)
    name = f"{chosen.absolute().parent.name}-{format_name}"
    final = out or free_path(EXPORTS / name)
    with folder_when_whole(final) as folder:
        path = folder / f"{spec.label}.onnx"
        note(f"writing {spec.label} as {format_name}" + (f" for {consumer}" if consumer else ""))
        kept = network.eval() if batch_norm == "keep" else None
        written = build(format_name, kept or folded, spec, pixels=pixels, consumer=consumer)
        onnx.save(written, path)
        save_model(folder / MODEL, network, spec, info=info)
        note(f"wrote   {path.name} ({path.stat().st_size:,} bytes); checking it on {len(x):,} test images")
        proof = prove(path, format_name, folded, spec, x, unfolded=kept)
        _tell_layers(proof.layers)
        if proof.parity_failures:
            path = path.rename(path.with_name(f"{spec.label}{FAILED}"))
        record: dict[str, Any] = {
            "format": format_name,
            "label": spec.label,
            "input": pixels,
            "batch_norm": batch_norm,
            "consumer": consumer,
            "data": loaded.name,
            "suite": "recheck",
            "judge": "onnxruntime",
            "seed": seed,
            **proof.to_dict(),
            "not_for": not_for(written, spec, consumer=consumer),
            "drift": drift(network, folded, to_float(x)).to_dict(),
            "shortfalls": proof.shortfalls,
            "versions": versions(),
        }
        radius = _radius(epsilon, spec)
        if recheck:
            tell_evaluation(spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
        attacks = RECHECK if recheck else ()
        found = attack_file(
            path, format_name, folded, spec, x, y, attacks=attacks, epsilon=radius, device=place, seed=seed
        ).to_dict()
        record["recheck"] = found if recheck else None
        keys = COUNTED if recheck else COUNTED_CLEAN
        accuracy = {key: found[key] for key in keys} | ({"suite": "recheck"} if recheck else {})
        add_results(
            path, accuracy=accuracy, equal_in=proof.equal_in, not_for=record["not_for"], failed=proof.shortfalls
        )
        record["size_bytes"] = path.stat().st_size
        write_record(folder, record, path, folder / MODEL)
    files = [str((final / file).absolute()) for file in (path.name, MODEL, RECORD)]
    return {"bundle": str(final.absolute()), "files": files, **record}


def recheck_bundle(
    bundle: Path | str,
    *,
    epsilon: float | None = None,
    images: int = 1000,
    data: str | None = None,
    own_model: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Judge an export folder again: parity, layers, and accuracy under attack of the deployed file.

    Args and errors are those of :func:`export_model`.

    Returns:
        ``parity clean_accuracy robust_accuracy flags verdict`` and more.
    """
    place = pick_device(device)
    if images < 0:
        raise UsageError(f"--images {images} is negative; give a number, or 0 for all")
    bundle = Path(bundle)
    opened = open_bundle(bundle)
    network, spec, _ = load_model(opened.model, own_model=own_model)
    check_format(opened.format, spec)
    tell_failures(opened.failures)
    loaded = data_for(spec, data, opened.model, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    folded = fold(network, spec)
    kept = network.eval() if opened.record.get("batch_norm") == "keep" else None
    proof = prove(opened.onnx, opened.format, folded, spec, x, unfolded=kept)
    radius = _radius(epsilon, spec)
    tell_evaluation(spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
    found = attack_file(opened.onnx, opened.format, folded, spec, x, y, epsilon=radius, device=place, seed=seed)
    return {
        "bundle": str(bundle.absolute()),
        "format": opened.format,
        "label": spec.label,
        "data": loaded.name,
        "suite": "recheck",
        "judge": "onnxruntime",
        "seed": seed,
        "size_bytes": opened.onnx.stat().st_size,
        "file_failures": opened.failures,
        **proof.to_dict(),
        "shortfalls": proof.shortfalls,
        **found.to_dict(),
    }


def _tell_layers(layers: Layers) -> None:
    """With --verbose, a table of what runs as integers and what in float."""
    for kind, names in (("integer", layers.integer), ("float", layers.in_float)):
        for name in names:
            detail(f"layer   {kind:8s} {name}")


def _radius(epsilon: float | None, spec: ModelSpec) -> float:
    if epsilon is not None:
        return epsilon
    return DEFAULT_EPSILON if spec.epsilon is None else spec.epsilon
