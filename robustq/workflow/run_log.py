"""Log lines of a training run before it begins: settings, forecast, and hints that would save time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustq.data import Dataset
from robustq.errors import OutputError, RunLockedError, UsageError
from robustq.hardening.forecast import fitting_setting, forecast
from robustq.hardening.precision import WORTH_COMPILING, advice, compile_notes, has_integer_convolution
from robustq.hardening.run_config import CONFIG, read_config
from robustq.hardening.run_folder import (
    RESULT,
    RESUME,
    RUNS,
    resume_command,
)
from robustq.hardening.run_lock import check_not_running
from robustq.hardening.trainer import Training
from robustq.memory import within_memory
from robustq.models.preprocessing import preprocessing_of
from robustq.models.quant.quantizers import QuantReLU
from robustq.models.spec import ModelSpec
from robustq.models.state_dict import count_parameters, float_layers_of
from robustq.progress import detail, note
from robustq.recipe import format_epsilon
from robustq.recipe.schema import FLOAT32, INTEGER, SAME
from robustq.report.recipes import toml_lines
from robustq.report.text import duration, named_layers, preprocessing_line, size
from robustq.workflow.setup import radius_of


def log_run(
    spec: ModelSpec, data: Dataset, training: Training, config: dict[str, Any], *, resumed: Path | None = None
) -> None:
    """Print network, recipe and data, then the hints; ``resumed`` is the folder of a run that is resumed."""
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
    radius = f" (epsilon {format_epsilon(radius_of(spec))})" if training.method.settings.defends else ""
    parameters = count_parameters(training.model)
    note(f"{spec.architecture} · {parameters:,} parameters · {inner}")
    computing = "" if recipe.precision == FLOAT32 else f" in {recipe.precision}"
    if recipe.side_precision not in (SAME, recipe.precision):
        computing += f" · auxiliary passes in {recipe.side_precision}"
    computing += " · compiled" if recipe.compile else ""
    named = recipe.method if recipe.name == recipe.method else f"{recipe.name}: {recipe.method}"
    note(f"recipe  {named}{radius} · batches of {recipe.batch_size} · {device}{computing}")
    note(f"data    {data.name} ({len(data.train):,} train, {len(data.holdout):,} held out to choose best.pt)")
    if spec.resize is not None:
        note(f"images  {preprocessing_line(preprocessing_of(spec))}")
    log_float_layers(training.model)
    for line in hints(config, device, resumed=resumed):
        note(f"note    {line}")
    for line in [*toml_lines(config["recipe"]), f"augment {config['augment']}", f"seed {config['seed']}"]:
        detail(f"setting {line}")


def log_float_layers(model: nn.Module) -> None:
    """Name the layers of a custom network that have no integer form."""
    names = float_layers_of(model)
    if names:
        note(f"float   {named_layers(names)}")
        detail(f"float   {', '.join(names)}")


def check_forecast(training: Training, *, parent: Path) -> None:
    """Rehearse the run, print its expected time, memory and disk use, and refuse it when they do not suffice.

    ``training`` is left as it was; ``parent`` is the folder of the run folder.

    Raises:
        OutOfMemoryError: a batch does not fit; names one that does.
        OutputError: the files do not fit on the disk.
    """
    recipe = training.recipe
    found = within_memory(
        lambda: forecast(training),
        lambda: (
            f"out of memory on {training.device} with batches of {recipe.batch_size:,} images; "
            f"{fitting_setting(training)}"
        ),
        trial=lambda: forecast(training),
    )
    state = training.state  # the forecast has put it back
    begun = bool(state.epoch or state.step)
    planned = f"{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}"
    epochs = f"the last {recipe.epochs - state.epoch} of {planned}" if begun else planned
    parameters = count_parameters(training.model)
    count = f"{parameters / 1e6:.1f} M" if parameters >= 1_000_000 else f"{parameters / 1000:.3g} k"
    passes = training.method.passes.removesuffix(" passes").removesuffix(" pass")
    note(
        f"takes   about {duration(found.seconds)}, {found.memory_bytes / 1e9:.1f} GB memory, "
        f"{size(found.disk_bytes)} disk: {count} parameters, {len(training.split):,} images, "
        f"{epochs}, {passes} a batch{' (AWP: one more of each)' if recipe.awp_gamma else ''}"
    )
    on_cpu = training.device.type == "cpu"  # on GPUs the gain was not measured
    if not recipe.compile and not begun and on_cpu and found.seconds >= WORTH_COMPILING:
        # Where integer convolutions would save time (docs/results/training-cost.md).
        has_codes = any(isinstance(module, QuantReLU) for module in training.model.modules())
        integers = recipe.side_precision == SAME and training.method.adversarial and has_codes
        integers = integers and has_integer_convolution(training.device)
        share, more = ("third", f" --set side_precision={INTEGER}") if integers else ("fifth", "")
        advised = f"a {share} shorter with --compile{more}, which takes a C++ compiler and some minutes"
        note(f"note    so long a run may be {advised}")
    needed = found.disk_bytes + found.spare_bytes
    existing = next(folder for folder in (parent.absolute(), *parent.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{parent}: has {size(free)} free, the run writes {size(needed)}; free space or name another --out"
        )


def hints(config: dict[str, Any], device: torch.device, *, resumed: Path | None = None) -> list[str]:
    """Hints that would save the run, or most of its time: one line each; ``resumed`` is skipped in the search for the
    same run.
    """
    lines = []
    if device.type == "cpu" and torch.cuda.is_available():
        lines.append("this machine has a GPU that is far faster: --device cuda")
    for key in ("precision", "side_precision"):
        # Recipes of post-training quantization have no precision.
        if (better := advice(config["recipe"].get(key, FLOAT32), device, key=key)) is not None:
            lines.append(better)
    if config["recipe"].get("compile", False):
        lines += compile_notes(device, cuda_graphs=config["recipe"]["cuda_graphs"])
    for path in sorted(RUNS.glob(f"*/{CONFIG}")):
        folder = path.parent
        if resumed is not None and folder.resolve() == resumed.resolve():
            continue
        try:
            other = read_config(folder)
            same = _identity(other) == _identity(config)
        except (UsageError, KeyError, TypeError):
            continue  # a run of another version is not the same run
        if same and (folder / RESULT).exists() and (folder / "best.pt").exists():
            lines.append(f"the same run has finished in {folder}: {folder / 'best.pt'}")
        elif same and (folder / RESUME).exists():
            try:
                check_not_running(folder)
                lines.append(f"the same run was started in {folder}; resume it with: {resume_command(folder, other)}")
            except RunLockedError:
                lines.append(f"the same run is running in {folder}")
            except OSError:
                continue  # a lock of another user
    return lines


_NOT_COMPARED = ("name", "summary", "data", "tensorboard", "compile", "cuda_graphs")
"""Keys of a recipe that change nothing but rounding; the data are compared by their digest."""


def _identity(config: dict[str, Any]) -> str:
    """All that decides the outcome but for rounding: no paths, machine or versions."""
    source = config["source"]
    return json.dumps(
        {
            "source": None if source is None else source["sha256"],
            "data": config["data"]["digest"],
            **{key: config[key] for key in ("command", "augment", "seed")},
            "spec": {key: value for key, value in config["spec"].items() if key != "data"},
            "recipe": {key: value for key, value in config["recipe"].items() if key not in _NOT_COMPARED},
        },
        sort_keys=True,
    )
