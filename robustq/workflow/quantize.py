"""Quantizing a network: weights into a spec's bit widths, calibration, and post-training quantization as a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustq.checkpoint import load_weights, save_model
from robustq.data import Dataset, to_float
from robustq.errors import OutOfMemoryError
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.files import free_path, write_text_atomically
from robustq.hardening.diagnosis import runs_out_of_memory
from robustq.hardening.methods.ptq import PtqSettings, correct_biases
from robustq.hardening.methods.registry import SETTINGS
from robustq.hardening.run_folder import CONFIG, RESULT, RUNS
from robustq.models.spec import ModelSpec, build_model
from robustq.outputs import atomic_folder
from robustq.progress import detail, note
from robustq.recipe import Recipe
from robustq.recipe.schema import check_settings
from robustq.report.info import toml_lines
from robustq.workflow.setup import versions
from robustq.workflow.training_run import EVALUATION_BATCH, TrainResult, accuracy_on_test, calibrate_on, run_config


def is_post_training(recipe: Recipe) -> bool:
    """Whether the recipe quantizes without training (method ``ptq``)."""
    return SETTINGS[recipe.method] is PtqSettings


def quantize(
    weights: dict[str, torch.Tensor],
    source: ModelSpec,
    target: ModelSpec,
    data: Dataset,
    recipe: Recipe,
    *,
    device: torch.device,
    path: Path,
    own_model: str | None = None,
) -> nn.Module:
    """A network of ``target``'s bit widths with ``weights`` of ``source``, on ``device``.

    Activation scales are calibrated where they are unknown, and always for post-training quantization.
    """
    model = build_model(target, own_model=own_model)
    same_quantizers = all(
        getattr(source, name) == getattr(target, name) for name in ("widths", "layer_bits", "shared_sum_scale")
    )
    if same_quantizers and not is_post_training(recipe):
        model.load_state_dict(weights)
        return model.to(device)
    load_weights(model, weights, path)
    model = model.to(device)
    calibrate_on(model, data, recipe, device=device, from_scratch=False)
    return model


def quantize_only(
    model: nn.Module,
    spec: ModelSpec,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    out: Path | None,
    source: Path,
    skip_bad_images: bool = False,
) -> TrainResult:
    """Correct the biases of a calibrated network and write its run folder, whole or not at all.

    Args:
        model: built from ``spec`` with the float weights, activation scales calibrated, on ``device``.
        spec, data, recipe, device, out, source, skip_bad_images: as :func:`run_recipe`.
        seed: recorded; nothing here is random.

    Raises:
        OutOfMemoryError: the calibration images do not fit at once.
    """
    start = time.perf_counter()
    settings: PtqSettings = check_settings(recipe.settings, PtqSettings, table=recipe.method)
    config = run_config(spec, data, recipe, seed=seed, device=device, source=source, skip_bad_images=skip_bad_images)
    note(f"{spec.label} · post-training quantization: no training, no defence")
    note(f"recipe  {recipe.name}: calibrated on {min(recipe.calibration_images, len(data.train)):,} images")
    for line in toml_lines(config["recipe"]):
        detail(f"setting {line}")
    if settings.bias_correction:
        note(f"biases  {_correct_biases(model, data, recipe, device)} layers corrected")
    model.eval()
    images, labels = data.holdout.take(recipe.monitor_images)
    held_out = correct(model, to_float(images.to(device)), labels.to(device), batch_size=EVALUATION_BATCH)
    right, count = accuracy_on_test(model, data, device=device)
    final = out or free_path(RUNS / f"{spec.label}-{recipe.method}")
    holdout_accuracy = int(held_out.sum()) / len(held_out)
    info = {"recipe": recipe.name, "method": recipe.method, "seed": seed, "versions": versions()}
    info["holdout_clean_accuracy"] = holdout_accuracy
    with atomic_folder(final) as folder:
        _write_json(folder / CONFIG, config)
        for name in ("best.pt", "last.pt"):  # one state under both names of a training run
            save_model(folder / name, model, spec, info=info)
        result = TrainResult(
            checkpoint=final.absolute() / "best.pt",
            run=final.absolute(),
            model=spec.label,
            recipe=recipe.name,
            clean_accuracy=right / count,
            clean_interval=wilson_interval(right, count),
            test_images=count,
            epochs=0,
            epochs_done=0,
            best_epoch=0,
            holdout_clean_accuracy=holdout_accuracy,
            holdout_pgd10_accuracy=None,
            seconds_per_epoch=0.0,
            seconds=time.perf_counter() - start,
            size_bytes=(folder / "best.pt").stat().st_size,
            epsilon=spec.epsilon,
            seed=seed,
            bits=spec.weight_bits,
            method=recipe.method,
        )
        _write_json(folder / RESULT, result.to_dict())
    return result


def _correct_biases(model: nn.Module, data: Dataset, recipe: Recipe, device: torch.device) -> int:
    counts: list[int] = []

    def work() -> None:
        images, _ = data.train.take(recipe.calibration_images)
        counts.append(correct_biases(model, to_float(images.to(device))))

    if runs_out_of_memory(work):
        raise OutOfMemoryError(
            f"out of memory on {device} while {recipe.calibration_images:,} images correct the biases; "
            f"use fewer: --set calibration_images={max(recipe.calibration_images // 4, 2)}"
        )
    return counts[0]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
