"""What a run will take, measured on its own first steps, which are then taken back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustq.hardening.diagnosis import largest_that_fits, runs_out
from robustq.hardening.metrics import process_peak
from robustq.hardening.trainer import Training

TIMED_STEPS = 2
"""After one that is not timed, since allocations and kernel choices of the first step come once."""


@dataclass(frozen=True)
class Forecast:
    """What is left of a run.

    Args:
        seconds: training and watching until the last epoch.
        memory_bytes: the most that was in use so far: of the GPU, or of this process on a CPU.
        disk_bytes: files of the run folder while it runs.
        spare_bytes: on top, for the moment in which the state is written anew.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    spare_bytes: int


def forecast(training: Training) -> Forecast:
    """Rehearse: a few steps and a part of the monitor's work, after which ``training`` is as it was, bit for bit.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: memory runs out (see :mod:`robustq.hardening.diagnosis`).
    """
    before = copied(training.state_dict())
    standing = training.standing
    steps_left = (training.recipe.epochs - standing.epoch) * training.batches_per_epoch - standing.step
    epochs_left = training.recipe.epochs - standing.epoch
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.device)
    try:
        seconds_a_step = _time_steps(training)
        start = time.perf_counter()
        times = training.monitor.rehearse(training.model)
        _wait(training.device)
        seconds_to_watch = (time.perf_counter() - start) * times
        memory = _peak_memory(training.device)
    finally:
        training.load_state_dict(before)
    weights = _bytes(before["model"])
    state = 2 * weights + _bytes(before["method"]) + sum(p.numel() * p.element_size() for p in _parameters(training))
    if training.descent.average is not None:
        state += _bytes(before["average"]["averages"]) + weights  # the averages, and the weights that were judged
    return Forecast(
        seconds=steps_left * seconds_a_step + epochs_left * seconds_to_watch,
        memory_bytes=memory,
        disk_bytes=state + 2 * weights,
        spare_bytes=state,
    )


def what_fits(training: Training) -> str:
    """After memory ran out: which setting would fit, found by trying, as the end of a sentence.

    ``training`` cannot be used for anything else afterwards.
    """
    size = training.recipe.batch_size

    def steps(count: int) -> None:
        training.model.train()
        training.method.begin_epoch(0)
        batches = training.split.batches(
            count, device=training.device, seed=training.seed, epoch=0, augment=training.augment
        )
        # Two: only the second forward pass has the optimiser's momentum beside it.
        for batch, _ in zip(batches, range(2), strict=False):
            training.take_step(batch)

    def with_room_to_spare(count: int) -> None:
        steps(count + count // 4)  # memory gets fragmented in time, and what just fits today does not tomorrow

    if runs_out(lambda: steps(size)):
        fitting = largest_that_fits(with_room_to_spare, too_large=size, least=2)
        if fitting is None:
            return "not even a batch of 2 images fits; take a smaller network or a machine with more memory"
        return f"a batch of {fitting:,} fits: --set batch_size={fitting}"
    watched = training.recipe.monitor_images
    if runs_out(lambda: training.monitor.rehearse(training.model)):
        fitting = largest_that_fits(lambda n: training.monitor.rehearse(training.model, images=n), too_large=watched)
        if fitting is not None:
            return f"watching {fitting:,} held-out images fits: --set monitor_images={fitting}"
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
    """Mean seconds of a step, reading the data included; 0 where the epoch lacks no batch any more."""
    ends = [time.perf_counter()]
    for batch in training.epoch_batches():
        training.take_step(batch)
        _wait(training.device)
        ends.append(time.perf_counter())
        if len(ends) == TIMED_STEPS + 2:
            break
    timed = ends[1:] if len(ends) > 2 else ends
    return (timed[-1] - timed[0]) / max(len(timed) - 1, 1)


def _parameters(training: Training) -> list[Tensor]:
    return list(training.model.parameters())


def _bytes(state: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return process_peak()
