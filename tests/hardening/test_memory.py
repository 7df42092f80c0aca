"""Memory that runs out is told apart from other faults, and the batch that fits is found by trying."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from robustq.data import Augment, TensorSplit
from robustq.hardening.diagnosis import is_out_of_memory, largest_that_fits, runs_out_of_memory
from robustq.hardening.forecast import fitting_setting
from robustq.hardening.methods.method import Method, Stateless, Step
from robustq.hardening.methods.natural import Natural
from robustq.hardening.monitor import Monitor
from robustq.hardening.trainer import Training
from robustq.recipe import Recipe


def too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # an exbibyte: no machine has it


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failed:
        too_much()
    assert is_out_of_memory(failed.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"),
            True,
        ),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_are_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_other_faults_pass_through() -> None:
    def broken() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        runs_out_of_memory(broken)
    assert not runs_out_of_memory(lambda: None)


def test_what_the_failed_work_held_is_free_again() -> None:
    held: list[weakref.ref[Tensor]] = []

    def work() -> None:
        kept = torch.zeros(10)
        held.append(weakref.ref(kept))
        too_much()

    gc.disable()  # the memory is needed now, not at the next collection
    try:
        assert runs_out_of_memory(work)
        assert held[0]() is None
    finally:
        gc.enable()


def starving_above(limit: int) -> Callable[[int], None]:
    def work(size: int) -> None:
        if size > limit:
            too_much()

    return work


@pytest.mark.parametrize(("limit", "expected"), [(9, 8), (8, 8), (7, 4), (15, 8), (2, 2), (1, None), (0, None)])
def test_the_largest_of_the_halves_that_fits(limit: int, expected: int | None) -> None:
    assert largest_that_fits(starving_above(limit), too_large=16, least=2) == expected


class Starving(Stateless):
    """Natural training on a machine that holds so many images a batch."""

    passes = "1 forward + 1 backward pass"
    adversarial = False

    def __init__(self, model: nn.Module, limit: int) -> None:
        self._natural, self._work = Natural(model), starving_above(limit)

    def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
        self._work(len(x))
        return self._natural.perturb(x, y, places)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Step:
        return self._natural.loss(x, x_adv, y, places)


class StarvingMonitor:
    def __init__(self, limit: int) -> None:
        self._work = starving_above(limit)

    def rehearse(self, model: nn.Module, *, images: int | None = None) -> float:
        self._work(images or 100)
        return 1.0


@pytest.mark.parametrize(
    ("limit", "watched", "words"),
    [
        (9, 100, "a batch of 4 fits: --set batch_size=4"),  # 8 would, but without room to spare
        (10, 100, "a batch of 8 fits: --set batch_size=8"),
        (1, 100, "not even a batch of 2 images fits"),
        (32, 60, "watching 50 held-out images fits: --set monitor_images=50"),
        (32, 100, "a batch of 32 fits now, so something else took the memory"),
    ],
)
def test_the_answer_names_the_setting_that_fits(limit: int, watched: int, words: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    training = Training(
        model,
        cast(Method, Starving(model, limit)),
        TensorSplit(torch.zeros(40, 1, 4, 4, dtype=torch.uint8), torch.arange(40) % 2),
        cast(Monitor, StarvingMonitor(watched)),
        Recipe(name="test", method="natural", epochs=1, batch_size=32, lr=0.1, monitor_images=100),
        augment=Augment(),
        seed=0,
        device=torch.device("cpu"),
    )
    assert fitting_setting(training).startswith(words)
