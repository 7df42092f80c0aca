"""What a run says before it begins: what it is, what it will take, and what would be had for less."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from robustq.data import Dataset
from robustq.errors import OutOfMemoryError, OutputError, RunLockedError, UsageError
from robustq.hardening.diagnosis import runs_out
from robustq.hardening.forecast import Forecast, forecast, what_fits
from robustq.hardening.precision import advice, better_compiled, compile_advice, compiling_pays, counts_codes
from robustq.hardening.run_folder import (
    CONFIG,
    RESULT,
    RESUME,
    RUNS,
    RunFolder,
    check_not_running,
    read_config,
    resume_command,
)
from robustq.hardening.trainer import Training
from robustq.models.quant.relu import QuantReLU
from robustq.models.spec import ModelSpec
from robustq.progress import detail, note
from robustq.recipe import format_epsilon
from robustq.recipe.schema import FLOAT32, SAME
from robustq.report.info import toml_lines
from robustq.report.text import duration, size
from robustq.workflow.setup import DEFAULT_EPSILON


def announce(
    spec: ModelSpec, data: Dataset, training: Training, config: dict[str, Any], *, resumed: Path | None = None
) -> None:
    """The network, the recipe, the data; then what the same would cost less.

    Args:
        spec, data, training, config: of the run.
        resumed: its folder, where it has one already.
    """
    recipe, device = training.recipe, training.device
    inner = (
        "float"
        if spec.widths.is_float
        else f"{spec.weight_bits}-bit weights, {spec.act_bits}-bit activations, 8-bit first and last layer"
    )
    if spec.layer_bits:
        inner += f", {len(spec.layer_bits)} layers of their own width"
    if spec.shared_sum_scale:
        inner += ", one scale for both inputs of each sum"
    epsilon = DEFAULT_EPSILON if spec.epsilon is None else spec.epsilon
    radius = "" if recipe.method == "natural" else f" (epsilon {format_epsilon(epsilon)})"
    note(f"{spec.architecture} · {_parameters(training):,} parameters · {inner}")
    computing = "" if recipe.precision == FLOAT32 else f" in {recipe.precision}"
    if recipe.side_precision not in (SAME, recipe.precision):
        computing += f" · passes on the side in {recipe.side_precision}"
    computing += " · compiled" if recipe.compile else ""
    note(f"recipe  {recipe.name}: {recipe.method}{radius} · batches of {recipe.batch_size} · {device}{computing}")
    note(f"data    {data.name} ({len(data.train):,} train, {len(data.holdout):,} held out to choose best.pt)")
    for line in cheaper(config, device, resumed=resumed):
        note(f"note    {line}")
    for line in [*toml_lines(config["recipe"]), f"augment {config['augment']}", f"seed {config['seed']}"]:
        detail(f"setting {line}")


def told_forecast(training: Training, *, parent: Path) -> Forecast:
    """Rehearse the run, say in one line what it (or the rest of it) will take, and refuse what cannot end well.

    Args:
        training: as it was, afterwards.
        parent: the folder that the run folder lies in, or will.

    Raises:
        OutOfMemoryError: a batch does not fit; names one that does.
        OutputError: the files would not fit on the disk.
    """
    outcome: list[Forecast] = []
    if runs_out(lambda: outcome.append(forecast(training))):
        raise OutOfMemoryError(
            f"out of memory on {training.device} with batches of {training.recipe.batch_size:,} images; "
            f"{what_fits(training)}"
        )
    found, recipe = outcome[0], training.recipe
    epochs = f"{recipe.epochs} epochs"
    begun = bool(training.standing.epoch or training.standing.step)
    if begun:
        epochs = f"the last {recipe.epochs - training.standing.epoch} of {epochs}"
    awp = " (AWP: one more of each)" if recipe.awp_gamma else ""
    note(
        f"takes   about {duration(found.seconds)}, {found.memory_bytes / 1e9:.1f} GB memory, "
        f"{size(found.disk_bytes)} disk: "
        f"{_short(_parameters(training))} parameters, {len(training.split):,} images, {epochs}, "
        f"{training.method.passes.removesuffix(' passes').removesuffix(' pass')} a batch{awp}"
    )
    if not recipe.compile and not begun and compiling_pays(training.device, seconds=found.seconds):
        integers = recipe.side_precision == SAME and training.method.adversarial and _has_codes(training)
        note(f"note    {better_compiled(integers=integers)}")
    free = shutil.disk_usage(
        next(folder for folder in (parent.absolute(), *parent.absolute().parents) if folder.exists())
    )
    if free.free < found.disk_bytes + found.spare_bytes:
        raise OutputError(
            f"{parent}: has {size(free.free)} free, the run writes {size(found.disk_bytes + found.spare_bytes)}; free "
            "the place or name another --out"
        )
    return found


def announce_safety(folder: RunFolder) -> None:
    """Say that the run can be stopped, and how to go on."""
    note(f"safe    Ctrl-C saves and stops; {folder.resume_command} goes on, after a crash too")


def cheaper(config: dict[str, Any], device: torch.device, *, resumed: Path | None = None) -> list[str]:
    """What is true and would save the run, or most of its time: one line each.

    Args:
        config: of the run that is about to begin.
        device: where it will run.
        resumed: its folder, where it has one already, which is passed over.
    """
    lines = []
    if device.type == "cpu" and torch.cuda.is_available():
        lines.append("this machine has a GPU that is far faster: --device cuda")
    for key in ("precision", "side_precision"):
        # ptq computes no steps
        if (better := advice(config["recipe"].get(key, FLOAT32), device, key=key)) is not None:
            lines.append(better)
    if config["recipe"].get("compile", False):
        lines += compile_advice(device, cuda_graphs=config["recipe"]["cuda_graphs"])
    for path in sorted(RUNS.glob(f"*/{CONFIG}")):
        folder = path.parent
        if resumed is not None and folder.resolve() == resumed.resolve():
            continue
        try:
            other = read_config(folder)
            same = _identity(other) == _identity(config)
        except (UsageError, KeyError, TypeError):
            continue  # the run of another version: not the same
        if not same:
            continue
        if (folder / RESULT).exists() and (folder / "best.pt").exists():
            lines.append(f"the same run has finished in {folder}: {folder / 'best.pt'}")
        elif (folder / RESUME).exists():
            try:
                check_not_running(folder)
                lines.append(f"the same run has begun in {folder}: {resume_command(folder, other)} continues it")
            except RunLockedError:
                lines.append(f"the same run is under way in {folder}")
            except OSError:
                continue  # another user's, whose lock this one may not look at
    return lines


def _has_codes(training: Training) -> bool:
    """Whether there are codes or signs to convolve, which was seen to save time (docs/results/training-cost.md)."""
    quantized = any(isinstance(module, QuantReLU) for module in training.model.modules())
    return quantized and counts_codes(training.device)


def _parameters(training: Training) -> int:
    return sum(parameter.numel() for parameter in training.model.parameters())


def _short(count: int) -> str:
    """``272 k``, ``11.7 M``: beside the exact number, which stands in the first line."""
    return f"{count / 1e6:.1f} M" if count >= 1_000_000 else f"{count / 1000:.0f} k"


_BESIDE = ("name", "summary", "data", "tensorboard", "compile", "cuda_graphs")
"""Keys of a recipe that decide nothing of what is trained but its rounding; the data are known by their content."""


def _identity(config: dict[str, Any]) -> str:
    """What decides the outcome, but for rounding: not where files lie, nor the machine and its versions."""
    source = config["source"]
    return json.dumps(
        {
            "source": None if source is None else source["sha256"],
            "data": config["data"]["digest"],
            **{key: config[key] for key in ("command", "augment", "seed")},
            "spec": {key: value for key, value in config["spec"].items() if key != "data"},
            "recipe": {key: value for key, value in config["recipe"].items() if key not in _BESIDE},
        },
        sort_keys=True,
    )
