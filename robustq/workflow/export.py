"""export: write the deploy file of a trained network, and check it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from robustq.checkpoint import load_model, save_model
from robustq.data import to_float
from robustq.errors import UsageError
from robustq.evaluation.accuracy import predict, wilson_interval
from robustq.evaluation.result import Evaluation
from robustq.evaluation.suites import RECHECK, SUITES
from robustq.export.bundle import FAILED, MODEL, RECORD, write_record
from robustq.export.formats import FORMATS, build, check_format
from robustq.export.integer_layers import Layers
from robustq.export.kit import KIT, write_kit
from robustq.export.metadata import add_results
from robustq.export.parity import MAX_DRIFT, drift
from robustq.export.recheck import QONNX_EXECUTOR, attack_file, prove
from robustq.export.runtimes.registry import ONNXRUNTIME, open_judge
from robustq.export.targets.check import Replayed, check_file, check_names, installed_runtime, replay
from robustq.export.targets.schema import Target, find_target
from robustq.export.timing import Latency, Subject
from robustq.files import check_output, free_path, optional_path
from robustq.hardening.run_folder import last_hardened
from robustq.models.preprocessing import preprocessing_of
from robustq.models.quant.folding import fold
from robustq.models.state_dict import float_layers_of
from robustq.outputs import partial_folder, publish, warn_of_other_name
from robustq.progress import detail, note
from robustq.recipe import parse_epsilon
from robustq.report.card import write_card
from robustq.report.cyclonedx import write_cyclonedx
from robustq.workflow import Result
from robustq.workflow.setup import data_for, log_evaluation, pick_device, radius_of, versions, with_images
from robustq.zoo import model_path

EXPORTS = Path("export-out")
DEFAULT_FORMAT = "integer"
RECHECK_SUITE = SUITES["recheck"].name

COUNTED_CLEAN = ("images", "clean_accuracy", "clean_interval")
COUNTED = (*COUNTED_CLEAN, "robust_accuracy", "interval", "epsilon", "verdict", "flags")
"""Keys of the accuracy in the file's metadata, without and with attacks."""


@dataclass(frozen=True, eq=False)
class ExportResult(Result):
    """Result of export.

    Args:
        bundle: export folder.
        files: the .onnx, model.pt and bundle.json in it.
        record: content of bundle.json: settings, ``parity not_for integer_layers float_layers stay_in_float shortfalls
            recheck`` and more. ``float_layers`` are those of onnxruntime, ``stay_in_float`` the network's layers that
            have no integer form.
    """

    FLAT = ("record",)

    bundle: Path
    files: tuple[Path, ...]
    record: dict[str, Any]


def export_model(
    model: Path | str | nn.Module | None = None,
    *,
    format_name: str = DEFAULT_FORMAT,
    pixels: str = "float",
    batch_norm: str = "fold",
    consumer: str | None = None,
    epsilon: float | str | None = None,
    images: int = 1000,
    recheck: bool = True,
    max_drift: float = MAX_DRIFT,
    kit: bool = True,
    target: Path | str | None = None,
    data: str | None = None,
    custom_model: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
    out: Path | str | None = None,
) -> ExportResult:
    """Write the deploy file of a model as ONNX, and check that file: its answers, its layers, accuracy under attack.

    Args:
        model: path of a model file of robustq (.pt, .safetensors) or ``zoo:NAME``; None: the last hardened model. A
            torch.nn.Module cannot be exported as it is: harden it first.
        format_name: ``"integer"`` (onnxruntime, all layers integer), ``"packed"`` (the same in the smallest file),
            ``"qcdq"`` (any ONNX runtime), ``"qonnx"`` (FINN, hls4ml) or ``"float"`` (32-bit networks).
        pixels: input of the file: ``"uint8"`` for pixels 0 to 255, ``"float"`` for pixel / 255.
        batch_norm: ``"fold"``, or ``"keep"``: BatchNormalization nodes in a QONNX file.
        consumer: tool that reads a QONNX file: ``"finn"`` or ``"hls4ml"``; None: FINN.
        epsilon: radius of the re-check in units of pixel / 255: a number in [0, 1] or a text such as ``"8/255"``; None:
            as the model was trained, else 8/255.
        images: number of test images for all checks, evenly spaced; 0: all.
        recheck: also count accuracy under attack.
        max_drift: share of the answers (0 to 1) that folding BatchNorm, or rounding ties of the file, may change.
        kit: also write the folder ``kit``, with which the device checks the file; needs ``recheck``, and a format that
            onnxruntime runs.
        target: name of a target, or the path of its .toml file (docs/runtimes.md#targets): it decides format, input
            and consumer, its runtime judges the file, and the adversarial images are counted in its other runtimes.
        data: data set: a known name (``"cifar10"``), a folder of images or an .npz file; None: the model's.
        custom_model: ``module:function`` that built the network, if it is a custom model; its code is run.
        skip_bad_images: leave out image files that cannot be read, with a warning; kept in the folder's model.pt.
        seed: of the random starts.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:0"`` for attack generation; None: a GPU if there is one.
        out: path of the new export folder; None: ``export-out/<run>-<format>``, numbered if it exists.

    Returns:
        the paths of the folder (``result["bundle"]``) and its files, and the results of the checks; ``shortfalls``
        names those that failed. A file with other answers than the network is called ``NAME.failed.onnx``.

    Raises:
        UsageError: an unknown format, option, target or device, or no model is given and none was hardened.
        ModelFileError: the file cannot be read.
        ExportError: the network cannot be written in this format.
        DataError: data that are missing, broken or unfit for the model.
        OutputExistsError: ``out`` exists.
        OutOfMemoryError: the images do not fit; a number that does is named.
    """
    if isinstance(model, nn.Module):
        raise UsageError(
            f"{type(model).__name__}: a module cannot be exported as it is; quantize it first, "
            "harden_model(module, bits=4, data=...), and export result['checkpoint']"
        )
    wanted_target = None if target is None else find_target(target)
    if wanted_target is not None:
        if format_name not in (DEFAULT_FORMAT, wanted_target.format) or pixels not in ("float", wanted_target.input):
            raise UsageError(f"--target {target} decides format and input; leave --format and --input out")
        check_names(wanted_target)
        format_name, pixels, consumer = wanted_target.format, wanted_target.input, wanted_target.consumer
    place, out = pick_device(device), optional_path(out)
    wanted_radius = None if epsilon is None else parse_epsilon(epsilon)
    chosen = last_hardened() if model is None else model_path(model)
    check_output(out, EXPORTS)
    if images < 0:
        raise UsageError(f"--images {images} is negative; give a number, or 0 for all")
    network, spec, info = load_model(chosen, custom_model=custom_model)
    spec = replace(spec, skip_bad_images=spec.skip_bad_images or skip_bad_images)
    check_format(format_name, spec, pixels=pixels, batch_norm=batch_norm, consumer=consumer)
    loaded = data_for(spec, data, chosen, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    folded = fold(network, spec)
    ending = format_name if wanted_target is None else wanted_target.name
    name = f"{chosen.absolute().parent.name}-{ending}"
    wanted = out or free_path(EXPORTS / name)
    fit = partial(with_images, model=folded, images=x, device=place)
    with partial_folder(wanted) as folder:
        path = folder / f"{spec.label}.onnx"
        note(f"writing {spec.label} as {format_name}" + (f" for {consumer}" if consumer else ""))
        kept = network.eval() if batch_norm == "keep" else None
        onnx.save(build(format_name, kept or folded, spec, pixels=pixels, consumer=consumer), path)
        save_model(folder / MODEL, network, spec, info=info)
        note(f"wrote   {path.name} ({path.stat().st_size:,} bytes); checking it on {len(x):,} test images")
        proof = fit(lambda: prove(path, format_name, folded, spec, x, unfolded=kept, max_drift=max_drift))
        _log_layers(proof.layers)
        checked = None
        if wanted_target is not None:
            executed = proof.agreements.get(QONNX_EXECUTOR)
            checked = fit(partial(check_file, wanted_target, path, kept or folded, x, executed=executed))
        if checked is not None:
            note(f"target  {checked.sentence}")
        judge = (None if wanted_target is None else installed_runtime(wanted_target)) or ONNXRUNTIME
        if checked is not None and checked.in_runtime and checked.agreement is None:
            judge = ONNXRUNTIME  # the target's runtime cannot run the file
        if proof.parity_failures or (checked is not None and checked.failures):
            path = path.rename(path.with_name(f"{spec.label}{FAILED}"))
        drifted = fit(lambda: drift(network, folded, to_float(x)))
        shortfalls = [*proof.shortfalls, *(() if checked is None else checked.failures)]
        if kept is None and wilson_interval(drifted.different_top1, drifted.images)[0] > max_drift:
            shortfalls.append(
                f"folding BatchNorm changed the class of {drifted.different_top1} of {drifted.images} images, more "
                f"than {max_drift:.0%}: train the model longer, keep BatchNorm (--batch-norm keep, qonnx), or allow it "
                "by --max-drift"
            )
        record: dict[str, Any] = {
            "format": format_name,
            "label": spec.label,
            "weight_bits": spec.weight_bits,
            "act_bits": spec.act_bits,
            "input": pixels,
            "preprocessing": preprocessing_of(spec, pixels=pixels),
            "batch_norm": batch_norm,
            "consumer": consumer,
            "data": loaded.name,
            "suite": RECHECK_SUITE,
            "judge": judge,
            "seed": seed,
            **proof.to_dict(),
            "stay_in_float": list(float_layers_of(network)),
            "drift": drifted.to_dict(),
            "max_drift": max_drift,
            "shortfalls": shortfalls,
            "versions": versions(),
        }
        radius, runs = radius_of(spec, wanted_radius), bool(FORMATS[format_name].runs)
        if recheck:
            log_evaluation(spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
        attacks = RECHECK if recheck else ()
        count = partial(attack_file, path, format_name, folded, spec, x, y, epsilon=radius, device=place, seed=seed)
        count = partial(count, judge=partial(open_judge, judge))
        evaluation = fit(lambda: count(attacks=attacks))
        found = evaluation.to_dict()
        record["recheck"] = found if recheck else None
        if checked is not None and wanted_target is not None:
            others = _replayed(wanted_target, judge, path, x, y, evaluation) if recheck and runs else ()
            record["target"] = {**checked.to_dict(), "replayed": [one.to_dict() for one in others]}
        keys = COUNTED if recheck else COUNTED_CLEAN
        accuracy = {key: found[key] for key in keys} | ({"suite": RECHECK_SUITE} if recheck else {})
        add_results(path, accuracy=accuracy, equal_in=proof.equal_in, not_for=record["not_for"], failed=shortfalls)
        record["size_bytes"] = path.stat().st_size
        record["kit"] = None
        if kit and recheck and runs and not path.name.endswith(FAILED):
            record["kit"] = KIT
            about = {"label": spec.label, "data": Path(loaded.name).name, "epsilon": radius, "suite": RECHECK_SUITE}
            write_kit(folder, path, x, y, evaluation.x_adv, about=about)
        side = spec.image_size
        latency = Latency.of(Subject(path, (spec.channels, side, side))) if runs else None
        write_card(folder, record, path, latency)
        write_cyclonedx(folder, record, path, folder / MODEL)
        write_record(folder, record, path, folder / MODEL)
        final = publish(folder, out or EXPORTS / name, numbered=True)
    if out is not None:
        warn_of_other_name(out, final)
    final = final.absolute()
    return ExportResult(final, tuple(final / file for file in (path.name, MODEL, RECORD)), record)


def _replayed(target: Target, judge: str, path: Path, x: Tensor, y: Tensor, found: Evaluation) -> tuple[Replayed, ...]:
    """The adversarial images in every runtime of the target that is installed; the first is the judge itself."""
    first = predict(open_judge(judge, path), to_float(x), batch_size=100)
    wanted = [judge, *([] if target.runtime is None else [target.runtime]), *target.replay]
    return replay(tuple(dict.fromkeys(wanted)), path, x, y, found.x_adv, first=first)


def _log_layers(layers: Layers) -> None:
    """Print the integer and the float layers with --verbose."""
    for kind, names in (("integer", layers.integer), ("float", layers.in_float)):
        for name in names:
            detail(f"layer   {kind:8s} {name}")
