"""One training run in its folder: from a network and a recipe to best.pt and result.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustq.data import Dataset, to_float
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.hardening.methods import build_method, resolved_settings
from robustq.hardening.monitor import Monitor
from robustq.hardening.run_folder import RUNS, RunFolder
from robustq.hardening.trainer import Trained, train
from robustq.models.calibration import calibrate
from robustq.models.spec import ModelSpec
from robustq.outputs import free_path, sha256
from robustq.progress import note
from robustq.recipe import Recipe, format_epsilon
from robustq.workflow.setting import DEFAULT_EPSILON, augmentation, check_last_batch, versions

EVALUATION_BATCH = 500


def run_recipe(
    model: nn.Module,
    spec: ModelSpec,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    out: Path | None,
    source: Path | None,
) -> dict[str, Any]:
    """Train ``model`` on ``device`` by ``recipe``, keep what happens in a run folder, count clean accuracy at the end.

    Args:
        model: built from ``spec``; left with the best epoch's weights, in eval mode.
        spec, data, recipe: what is trained, on what, how.
        seed: of order, augmentation and the method's draws.
        device: where.
        out: run folder, checked to be free; None: ``runs/<label>-<method>``.
        source: the model file that was fine-tuned; None from scratch: then the activation scales are calibrated first,
            with batch statistics, since the running ones mean nothing.

    Returns:
        What train and harden print, and result.json holds.
    """
    check_last_batch(model, spec, len(data.train), recipe)
    if source is None:
        calibrate_on(model, data, recipe, device=device, from_scratch=True)
    epsilon = DEFAULT_EPSILON if spec.epsilon is None else spec.epsilon
    augment = augmentation(recipe, data)
    method = build_method(
        recipe,
        model,
        epsilon=epsilon,
        image_shape=(spec.channels, spec.image_size, spec.image_size),
        samples=len(data.train),
        device=device,
        seed=seed,
    )
    images, labels = data.holdout.take(recipe.monitor_images)
    monitor = Monitor(
        to_float(images.to(device)),
        labels.to(device),
        epsilon=epsilon if method.adversarial else None,
        batch_size=EVALUATION_BATCH,
        seed=seed,
    )
    config = {
        "recipe": {**recipe.to_dict(), "settings": resolved_settings(recipe)},
        "source": None if source is None else {"path": str(source.absolute()), "sha256": sha256(source)},
        "spec": spec.to_dict(),
        "augment": {"crop_padding": augment.crop_padding, "flip": augment.flip},
        "seed": seed,
        "device": str(device),
        "versions": versions(),
    }
    folder = RunFolder(out or free_path(RUNS / f"{spec.label}-{recipe.method}"), config)
    _announce(model, spec, data, recipe, method.passes, epsilon=epsilon, device=device)
    about = {"recipe": recipe.name, "method": recipe.method, "seed": seed, "versions": versions()}

    def on_epoch(metrics: dict[str, Any], is_best: bool) -> None:
        folder.add_metrics(metrics)
        info = {**about, "epoch": metrics["epoch"], "holdout_clean_accuracy": metrics["holdout_clean_accuracy"]}
        info["holdout_pgd10_accuracy"] = metrics["holdout_pgd10_accuracy"]
        folder.save("last.pt", model, spec, info)
        if is_best:
            folder.save("best.pt", model, spec, info)
            best_state.clear()
            best_state.update({name: value.detach().clone() for name, value in model.state_dict().items()})

    best_state: dict[str, torch.Tensor] = {}
    trained = train(
        model,
        method,
        data.train,
        monitor,
        recipe,
        augment=augment,
        seed=seed,
        device=device,
        on_epoch=on_epoch,
    )
    model.load_state_dict(best_state)
    right, count = accuracy_on_test(model, data, device=device)
    result = _result(folder.path, spec, recipe, trained, right, count, seed=seed)
    folder.finish(result)
    return result


def _result(
    run: Path, spec: ModelSpec, recipe: Recipe, trained: Trained, right: int, count: int, *, seed: int
) -> dict[str, Any]:
    checkpoint = run / "best.pt"
    return {
        "checkpoint": str(checkpoint.absolute()),
        "run": str(run.absolute()),
        "model": spec.label,
        "recipe": recipe.name,
        "clean_accuracy": right / count,
        "clean_interval": list(wilson_interval(right, count)),
        "test_images": count,
        "epochs": recipe.epochs,
        "best_epoch": trained.best_epoch,
        "holdout_clean_accuracy": trained.best.clean,
        "holdout_pgd10_accuracy": trained.best.robust,
        "seconds_per_epoch": trained.seconds_per_epoch,
        "size_bytes": checkpoint.stat().st_size,
        "epsilon": spec.epsilon,
        "seed": seed,
    }


def _announce(
    model: nn.Module,
    spec: ModelSpec,
    data: Dataset,
    recipe: Recipe,
    passes: str,
    *,
    epsilon: float,
    device: torch.device,
) -> None:
    weights = sum(parameter.numel() for parameter in model.parameters())
    inner = (
        "float"
        if spec.widths.is_float
        else f"{spec.weight_bits}-bit weights, {spec.act_bits}-bit activations, 8-bit first and last layer"
    )
    radius = "" if recipe.method == "natural" else f" (epsilon {format_epsilon(epsilon)})"
    note(f"{spec.architecture} · {weights:,} parameters · {inner}")
    note(f"recipe  {recipe.name}: {recipe.method}{radius} · {recipe.epochs} epochs · {passes} a batch · {device}")
    note(f"data    {data.name} ({len(data.train):,} train, {len(data.holdout):,} held out to choose best.pt)")


def calibrate_on(model: nn.Module, data: Dataset, recipe: Recipe, *, device: torch.device, from_scratch: bool) -> None:
    """Set the activation scales of ``model`` from the recipe's number of unaugmented training images."""
    images, _ = data.train.take(recipe.calibration_images)
    calibrate(model, to_float(images.to(device)), from_scratch=from_scratch)


def accuracy_on_test(model: nn.Module, data: Dataset, *, device: torch.device) -> tuple[int, int]:
    """(right, images) on the whole test part, unattacked; in eval mode."""
    model.eval()
    right = images = 0
    for batch in data.test.batches(EVALUATION_BATCH, device=device):
        right += int(correct(model, batch.x, batch.y, batch_size=EVALUATION_BATCH).sum())
        images += len(batch.y)
    return right, images
