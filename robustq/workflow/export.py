"""export: write the deploy file of a trained network, and check it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from robustq.checkpoint import load_model, save_model
from robustq.data import to_float
from robustq.errors import UsageError
from robustq.evaluation.accuracy import wilson_interval
from robustq.evaluation.suites import RECHECK, SUITES
from robustq.export.bundle import FAILED, MODEL, RECORD, write_record
from robustq.export.formats import FORMATS, build, check_format
from robustq.export.integer_layers import Layers
from robustq.export.kit import KIT, write_kit
from robustq.export.metadata import add_results
from robustq.export.parity import drift
from robustq.export.recheck import attack_file, prove
from robustq.export.timing import Latency, Subject
from robustq.files import check_output, free_path
from robustq.hardening.run_folder import last_hardened
from robustq.models.quant.folding import fold
from robustq.outputs import partial_folder, publish, warn_of_other_name
from robustq.progress import detail, note
from robustq.report.card import write_card
from robustq.workflow import Result
from robustq.workflow.setup import data_for, log_evaluation, pick_device, radius_of, versions, with_images
from robustq.zoo import model_path

EXPORTS = Path("export-out")
RECHECK_SUITE = SUITES["recheck"].name

MAX_DRIFT = 0.02
"""Share of the answers that folding BatchNorm may change; more come from broken running statistics."""

COUNTED_CLEAN = ("images", "clean_accuracy", "clean_interval")
COUNTED = (*COUNTED_CLEAN, "robust_accuracy", "interval", "epsilon", "verdict", "flags")
"""Keys of the accuracy in the file's metadata, without and with attacks."""


@dataclass(frozen=True, eq=False)
class ExportResult(Result):
    """Result of export.

    Args:
        bundle: export folder.
        files: the .onnx, model.pt and bundle.json in it.
        record: content of bundle.json: settings, ``parity not_for integer_layers float_layers shortfalls recheck``
            and more.
    """

    FLAT = ("record",)

    bundle: Path
    files: tuple[Path, ...]
    record: dict[str, Any]


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
    max_drift: float = MAX_DRIFT,
    kit: bool = True,
    data: str | None = None,
    custom_model: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
) -> ExportResult:
    """Write the deploy file of a model, and check that file.

    Args:
        model: a .pt of robustq; None: the last hardened model.
        format_name: a key of :data:`robustq.export.formats.FORMATS`.
        pixels: input of the file: ``uint8`` for raw pixels, ``float`` for pixels / 255.
        batch_norm: ``keep`` leaves BatchNormalization nodes in a QONNX file.
        consumer: the tool that reads a QONNX file, of :data:`robustq.export.formats.CONSUMERS`; None: the first.
        epsilon: radius of the re-check; None: as the model was trained, else 8/255.
        images: test images for parity and re-check, evenly spaced; 0: all.
        recheck: also count accuracy under attack.
        max_drift: share of the answers that folding BatchNorm may change.
        kit: also write the folder ``kit``, with which the device checks the file; needs ``recheck``, and a format that
            onnxruntime runs.
        data: overrides the model's.
        custom_model: the ``module:function`` that built the network, if it is a custom model; allows its code to run.
        skip_bad_images: skip image files that cannot be read, with a warning.
        seed: of the random starts.
        device: of attack generation; None: a GPU if there is one.
        out: export folder; must not exist. None: ``export-out/<run>-<format>``.

    Returns:
        ``shortfalls`` names the failed checks. A file with other answers than the
            network is called ``NAME.failed.onnx``.

    Raises:
        RobustqError: bad input; nothing is written.
    """
    place = pick_device(device)
    chosen = last_hardened() if model is None else model_path(model)
    check_output(out, EXPORTS)
    if images < 0:
        raise UsageError(f"--images {images} is negative; give a number, or 0 for all")
    network, spec, info = load_model(chosen, custom_model=custom_model)
    check_format(format_name, spec, pixels=pixels, batch_norm=batch_norm, consumer=consumer)
    loaded = data_for(spec, data, chosen, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    folded = fold(network, spec)
    name = f"{chosen.absolute().parent.name}-{format_name}"
    wanted = out or free_path(EXPORTS / name)
    fit = partial(with_images, model=folded, images=x, device=place)
    with partial_folder(wanted) as folder:
        path = folder / f"{spec.label}.onnx"
        note(f"writing {spec.label} as {format_name}" + (f" for {consumer}" if consumer else ""))
        kept = network.eval() if batch_norm == "keep" else None
        onnx.save(build(format_name, kept or folded, spec, pixels=pixels, consumer=consumer), path)
        save_model(folder / MODEL, network, spec, info=info)
        note(f"wrote   {path.name} ({path.stat().st_size:,} bytes); checking it on {len(x):,} test images")
        proof = fit(lambda: prove(path, format_name, folded, spec, x, unfolded=kept))
        _log_layers(proof.layers)
        if proof.parity_failures:
            path = path.rename(path.with_name(f"{spec.label}{FAILED}"))
        drifted = fit(lambda: drift(network, folded, to_float(x)))
        shortfalls = list(proof.shortfalls)
        if kept is None and wilson_interval(drifted.different_top1, drifted.images)[0] > max_drift:
            shortfalls.append(
                f"folding BatchNorm changed the class of {drifted.different_top1} of {drifted.images} images, more "
                f"than {max_drift:.0%}: train the model longer, keep BatchNorm (--batch-norm keep, qonnx), or allow it "
                "by --max-drift"
            )
        record: dict[str, Any] = {
            "format": format_name,
            "label": spec.label,
            "input": pixels,
            "batch_norm": batch_norm,
            "consumer": consumer,
            "data": loaded.name,
            "suite": RECHECK_SUITE,
            "judge": "onnxruntime",
            "seed": seed,
            **proof.to_dict(),
            "drift": drifted.to_dict(),
            "shortfalls": shortfalls,
            "versions": versions(),
        }
        radius = radius_of(spec, epsilon)
        if recheck:
            log_evaluation(spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
        attacks = RECHECK if recheck else ()
        count = partial(attack_file, path, format_name, folded, spec, x, y, epsilon=radius, device=place, seed=seed)
        evaluation = fit(lambda: count(attacks=attacks))
        found = evaluation.to_dict()
        record["recheck"] = found if recheck else None
        keys = COUNTED if recheck else COUNTED_CLEAN
        accuracy = {key: found[key] for key in keys} | ({"suite": RECHECK_SUITE} if recheck else {})
        add_results(path, accuracy=accuracy, equal_in=proof.equal_in, not_for=record["not_for"], failed=shortfalls)
        record["size_bytes"] = path.stat().st_size
        record["kit"] = None
        runs = bool(FORMATS[format_name].runs)
        if kit and recheck and runs and not proof.parity_failures:
            record["kit"] = KIT
            about = {"label": spec.label, "data": Path(loaded.name).name, "epsilon": radius, "suite": RECHECK_SUITE}
            write_kit(folder, path, x, y, evaluation.x_adv, about=about)
        side = spec.image_size
        latency = Latency.of(Subject(path, (spec.channels, side, side))) if runs else None
        write_card(folder, record, path, latency)
        write_record(folder, record, path, folder / MODEL)
        final = publish(folder, out or EXPORTS / name, numbered=True)
    if out is not None:
        warn_of_other_name(out, final)
    final = final.absolute()
    return ExportResult(final, tuple(final / file for file in (path.name, MODEL, RECORD)), record)


def _log_layers(layers: Layers) -> None:
    """Print the integer and the float layers with --verbose."""
    for kind, names in (("integer", layers.integer), ("float", layers.in_float)):
        for name in names:
            detail(f"layer   {kind:8s} {name}")
