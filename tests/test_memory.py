"""Memory that runs out: recognised, freed, and answered with the size that fits."""

from __future__ import annotations

import errno
import gc
import os
import signal
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustq.data import TensorSplit
from robustq.hardening.forecast import fitting_setting
from robustq.hardening.methods.natural import Natural
from robustq.memory import caused_by_memory, fits, is_out_of_memory, runs_out_of_memory
from tests.hardening.tiny import ScriptedMonitor, natural, recipe, training


def allocate_an_exbibyte() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failed:
        allocate_an_exbibyte()
    assert is_out_of_memory(failed.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("could not create a primitive"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_memory_of_the_failed_work_is_free_again() -> None:
    held: list[weakref.ref[Tensor]] = []

    def work() -> None:
        kept = torch.zeros(10)
        held.append(weakref.ref(kept))
        allocate_an_exbibyte()

    gc.disable()  # the memory is needed now, not at the next collection
    try:
        assert runs_out_of_memory(work)
        assert held[0]() is None
    finally:
        gc.enable()


def test_an_error_that_lack_of_memory_has_led_to_is_known() -> None:
    def load() -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ValueError("cannot be loaded") from error

    with pytest.raises(ValueError, match="cannot be loaded") as failed:
        load()
    assert caused_by_memory(failed.value) and not is_out_of_memory(failed.value)
    assert not caused_by_memory(ValueError("cannot be loaded"))


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("work", "expected"), [(crash, False), (allocate_an_exbibyte, False), (gc.collect, True)])
def test_a_trial_that_crashes_harms_nobody(work: Callable[[], object], expected: bool) -> None:
    assert fits(work) is expected


def starving_above(limit: int) -> Callable[[int], None]:
    def work(size: int) -> None:
        if size > limit:
            allocate_an_exbibyte()

    return work


@pytest.mark.parametrize(
    ("limit", "images", "words"),
    [
        (11, 100, "a batch of 4 fits: --set batch_size=4"),  # 8 would, but without reserve
        (12, 100, "a batch of 4 fits: --set batch_size=4"),
        (1, 100, "not even a batch of 2 images fits"),
        (32, 60, "monitoring 50 held-out images fits: --set monitor_images=50"),
        (32, 100, "a batch of 32 fits now, so something else took the memory"),
    ],
)
def test_the_answer_names_the_setting_that_fits(limit: int, images: int, words: str) -> None:
    class Starving(Natural):
        def perturb(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
            starving_above(limit)(len(x))
            return x

    class StarvingMonitor(ScriptedMonitor):
        def rehearse(self, model: nn.Module, *, images: int | None = None) -> float:
            starving_above(watched)(images or 100)
            return 1.0

    watched = images
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    data = TensorSplit(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 2)
    settings = recipe(batch_size=32, monitor_images=100)
    starved = training(model, settings, method=natural(model, Starving), data=data, monitor=StarvingMonitor())
    assert fitting_setting(starved).startswith(words)
