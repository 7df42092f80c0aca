"""Time, memory and disk space that a run will take, measured on its own first steps, which are then undone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustq.hardening.metrics import process_peak_memory, reset_peak_memory
from robustq.hardening.trainer import Training
from robustq.memory import fits, largest_that_fits

TIMED_STEPS = 2
"""After one that is not timed: allocations and kernel choices of the first step do not repeat."""


@dataclass(frozen=True)
class Forecast:
    """The rest of a run."""

    seconds: float  # training and monitor until the last epoch
    memory_bytes: int  # peak so far: of the GPU, or of this process on a CPU
    disk_bytes: int  # files of the run folder during the run
    spare_bytes: int  # on top, while the state is written


def forecast(training: Training) -> Forecast:
    """Rehearse a few steps and a part of the monitor's work; ``training`` is then restored bit for bit."""
    before = copied(training.state_dict())
    epochs_left = training.recipe.epochs - training.state.epoch
    steps_left = epochs_left * training.batches_per_epoch - training.state.step
    reset_peak_memory(training.device)
    try:
        step_seconds = _time_steps(training)
        start = time.perf_counter()
        times = training.monitor.rehearse(training.model)
        _synchronize(training.device)
        monitor_seconds = (time.perf_counter() - start) * times
        on_gpu = training.device.type == "cuda"
        memory = torch.cuda.max_memory_reserved(training.device) if on_gpu else process_peak_memory()
    finally:
        training.load_state_dict(before)
    weights = _bytes(before["model"])
    momentum = _bytes(dict(training.model.named_parameters()))
    state = 2 * weights + _bytes(before["method"]) + momentum
    if training.train_step.average is not None:
        state += _bytes(before["average"]["averages"]) + weights  # the averages, and the weights evaluated last
    return Forecast(
        seconds=steps_left * step_seconds + epochs_left * monitor_seconds,
        memory_bytes=memory,
        disk_bytes=state + 2 * weights,
        spare_bytes=state,
    )


def fitting_setting(training: Training) -> str:
    """After memory ran out: the setting that fits, found by trying, as the end of a sentence.

    ``training`` cannot be used afterwards.
    """
    size = training.recipe.batch_size

    def steps(count: int) -> None:
        training.model.train()
        training.method.begin_epoch(0)
        batches = training.split.batches(
            count, device=training.device, seed=training.seed, epoch=0, augment=training.augment
        )
        # Two: the optimizer's momentum exists from the second forward pass on.
        for batch, _ in zip(batches, range(2), strict=False):
            training.take_step(batch)

    if not fits(lambda: steps(size)):
        # Twice the images must fit: fragmentation grows during a run.
        fitting = largest_that_fits(lambda count: steps(2 * count), too_large=size, least=2)
        if fitting is None:
            return "not even a batch of 2 images fits; take a smaller network or a machine with more memory"
        return f"a batch of {fitting:,} fits: --set batch_size={fitting}"
    images = training.recipe.monitor_images
    if not fits(lambda: training.monitor.rehearse(training.model)):
        fitting = largest_that_fits(lambda n: training.monitor.rehearse(training.model, images=n), too_large=images)
        if fitting is not None:
            return f"monitoring {fitting:,} held-out images fits: --set monitor_images={fitting}"
    smaller = max(size // 2, 2)
    return f"a batch of {size:,} fits now, so something else took the memory: try again, or --set batch_size={smaller}"


def copied(state: Any) -> Any:
    """A state with copies of its tensors, on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copied(value) for value in state]
    return state


def _time_steps(training: Training) -> float:
    """Mean seconds of a step with its loading; 0 if no batch of the epoch is left."""
    ends = [time.perf_counter()]
    for batch in training.epoch_batches():
        training.take_step(batch)
        _synchronize(training.device)
        ends.append(time.perf_counter())
        if len(ends) == TIMED_STEPS + 2:
            break
    timed = ends[1:] if len(ends) > 2 else ends
    return (timed[-1] - timed[0]) / max(len(timed) - 1, 1)


def _bytes(state: dict[str, Any]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
