"""Quantizing a network: weights into a spec's bit widths, calibration, and post-training quantization as a run."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustq.checkpoint import load_weights, save_model
from robustq.data import to_float
from robustq.evaluation.accuracy import correct
from robustq.files import free_path, write_text_atomically
from robustq.hardening.methods.ptq import PtqSettings, correct_biases
from robustq.hardening.run_config import CONFIG
from robustq.hardening.run_folder import RESULT
from robustq.memory import shrinking
from robustq.models.spec import ModelSpec, build_model
from robustq.models.state_dict import with_names_of
from robustq.outputs import atomic_folder
from robustq.progress import detail, note
from robustq.recipe.schema import check_settings
from robustq.report.recipes import toml_lines
from robustq.workflow.job import Job, TrainResult
from robustq.workflow.run_log import log_float_layers
from robustq.workflow.setup import versions
from robustq.workflow.training_run import (
    EVALUATION_BATCH,
    accuracy_on_test,
    calibrate_on,
    with_calibration_images,
)


def quantize(
    weights: dict[str, torch.Tensor], source: ModelSpec, job: Job, *, path: Path, custom_model: str | None = None
) -> nn.Module:
    """A network of the job's bit widths with ``weights`` of ``source``, on the job's device.

    Activation scales are calibrated where they are unknown, and always for post-training quantization.
    """
    model = build_model(job.spec, custom_model=custom_model)
    weights = with_names_of(model, weights)
    same_quantizers = all(
        getattr(source, name) == getattr(job.spec, name) for name in ("widths", "layer_bits", "shared_sum_scale")
    )
    if same_quantizers and job.recipe.trains:
        if source.widths.is_float:
            load_weights(model, weights, path)
        else:
            model.load_state_dict(weights)
        return model.to(job.device)
    load_weights(model, weights, path)
    model = model.to(job.device)
    calibrate_on(model, job, from_scratch=False)
    return model


def quantize_only(model: nn.Module, job: Job) -> TrainResult:
    """Correct the biases of a calibrated network and write its run folder, whole or not at all.

    Args:
        model: built from the job's ``spec`` with the float weights, activation scales calibrated, on its device.

    Raises:
        OutOfMemoryError: the calibration images do not fit at once.
    """
    start = time.perf_counter()
    spec, data, recipe, device = job.spec, job.data, job.recipe, job.device
    settings: PtqSettings = check_settings(recipe.settings, PtqSettings, table=recipe.method)
    config = job.config()
    note(f"{spec.label} · post-training quantization: no training, no defence")
    note(f"recipe  {recipe.name}: calibrated on {min(recipe.calibration_images, len(data.train)):,} images")
    log_float_layers(model)
    for line in toml_lines(config["recipe"]):
        detail(f"setting {line}")
    if settings.bias_correction:
        corrected = with_calibration_images(job, partial(correct_biases, model), purpose="correct the biases")
        note(f"biases  {corrected} layers: each bias makes up for the mean error of its quantized channel")
    model.eval()
    images, labels = data.holdout.take(recipe.monitor_images)
    held_out = shrinking(
        lambda size: correct(model, to_float(images.to(device)), labels.to(device), batch_size=size), EVALUATION_BATCH
    )
    answers = accuracy_on_test(model, data, device=device)
    final = job.out or free_path(job.default_folder)
    holdout_accuracy = int(held_out.sum()) / len(held_out)
    info = {"recipe": recipe.name, "method": recipe.method, "seed": job.seed, "versions": versions()}
    info["holdout_clean_accuracy"] = holdout_accuracy
    with atomic_folder(final) as folder:
        _write_json(folder / CONFIG, config)
        for name in ("best.pt", "last.pt"):  # one state under both names of a training run
            save_model(folder / name, model, spec, info=info)
        result = TrainResult.of(
            final,
            spec,
            recipe,
            data,
            answers,
            hardened=True,
            holdout_clean_accuracy=holdout_accuracy,
            float_holdout_accuracy=job.float_accuracy,
            foreign=job.foreign or None,
            seconds=time.perf_counter() - start,
            size_bytes=(folder / "best.pt").stat().st_size,
            seed=job.seed,
        )
        _write_json(folder / RESULT, result.to_dict())
    return result


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
