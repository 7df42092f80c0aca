"""A run that is stopped or dies, anywhere and several times, ends with the bits of the uninterrupted run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.data import Augment, Batch, TensorSplit
from robustq.errors import ModelFileError, RunStoppedError
from robustq.hardening import trainer
from robustq.hardening.methods.method import Teacher
from robustq.hardening.methods.registry import METHODS
from robustq.hardening.methods.rslad import CachedTeacher, OnlineTeacher, Rslad
from robustq.hardening.monitor import Monitor
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Training
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import build_model
from tests.hardening.tiny import (
    CPU,
    EPSILON,
    MemoryCheckpointer,
    begin,
    build,
    finish,
    recipe,
    same,
    spec,
    split,
    training,
)


class DeathError(Exception):
    """Stands for kill -9: nothing is saved any more."""


class Interrupting(TensorSplit):
    """A split that sends a signal, or lets the process die, at the batch of a number counted from 1."""

    stop_at = die_at = 0
    number = signal.SIGINT

    def batches(self, batch_size: int, **keys: Any) -> Iterator[Batch]:
        first = keys["epoch"] * 3 + keys["skip"] + 1
        for number, batch in enumerate(super().batches(batch_size, **keys), start=first):
            if number == self.die_at:
                raise DeathError
            if number == self.stop_at:
                os.kill(os.getpid(), self.number)
            yield batch


class WithDropout(nn.Module):
    """Draws from torch's own generator while it trains, as a custom model may."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.dropout(self.avgpool(self.bn1(self.conv1(x)).relu()).flatten(1)))
        return logits


def teacher(split: TensorSplit, keys: dict[str, Any], *, init: int = 100) -> Teacher:
    """The same in every process, but for its cached logits, which each computes for itself."""
    state = torch.get_rng_state()
    torch.manual_seed(init)
    network = WithDropout()
    torch.set_rng_state(state)
    if keys.get("teacher_sees") == "original":
        return CachedTeacher(network, TensorSplit(split.images, split.labels), mirrored=True, device=CPU)
    return OnlineTeacher(network)


ALL_OPTIONS: dict[str, Any] = {
    "label_smoothing": 0.1,
    "clip_gradient": 0.5,
    "awp_gamma": 0.01,
    "awp_warmup_epochs": 1,
    "ema_decay": 0.9,
}


def begun(method: str, bits: int, keys: dict[str, Any], *, init: int, **options: Any) -> tuple[Training, Interrupting]:
    """A training as a new process would build it; `init` decides what a restored state must overwrite."""
    torch.manual_seed(init)
    plain = split()
    images = Interrupting(plain.images, plain.labels)
    model: nn.Module = WithDropout() if bits == 0 else build_model(spec(bits))
    if bits:
        calibrate(model, images.images.float() / 255, from_scratch=True)
    settings = recipe(method, warmup_epochs=0.5, settings=keys, **options)
    bound = build(settings, model, teacher=teacher(images, keys) if method == "rslad" else None)
    held_out = split(6)
    x, y = held_out.images[:8] / 255, held_out.labels[:8]
    monitor = Monitor(x, y, epsilon=EPSILON if bound.adversarial else None, batch_size=100, seed=3)
    return training(model, settings, method=bound, data=images, monitor=monitor, augment=Augment(1, True)), images


def uninterrupted(method: str, bits: int, keys: dict[str, Any], **options: Any) -> dict[str, Any]:
    return finish(begun(method, bits, keys, init=0, **options)[0]).load()


CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "natural-4-bit": ("natural", 4, {}, {}),
    "natural-dropout": ("natural", 0, {}, {}),
    "odgq-4-bit-options": ("odgq", 4, {"domains": 2}, ALL_OPTIONS),
    # The state of a method does not depend on the bit width, so the rest runs on the small network.
    "odgq-noise": ("odgq", 0, {"global_perturbation": "noise"}, {}),
    "odgq-sample": ("odgq", 0, {"tied_to": "sample", "domains": 2}, {}),
    "odgq-once-an-epoch": ("odgq", 0, {"update": "epoch", "domains": 2}, {}),
    "pgd": ("pgd", 0, {"steps": 2}, {}),
    "free-options": ("free", 0, {"repeats": 3}, ALL_OPTIONS),
    "dq": ("dq", 0, {"orthogonality_weight": 0.01}, {}),
    "fgsm-rs": ("fgsm-rs", 0, {}, {}),
    "n-fgsm": ("n-fgsm", 0, {}, {}),
    "fgsm-mep-options": ("fgsm-mep", 0, {}, ALL_OPTIONS),
    "fgsm-mep-restart": ("fgsm-mep", 0, {"reset_epochs": 1}, {}),
    "nu-at": ("nu-at", 0, {}, {}),
    "liet-options": ("liet", 0, {"renew_batches": 2}, ALL_OPTIONS),
    "trades-options": ("trades", 0, {"steps": 2}, ALL_OPTIONS),
    "rslad": ("rslad", 0, {}, {}),
    "rslad-cached": ("rslad", 0, {"teacher_sees": "original"}, {}),
}

# Batch 1: the first; 3: the last of its epoch, before the monitor; 4: the first of the second epoch.
STOPS = (1, 3, 4)


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_the_same_run(case: str) -> None:
    method, bits, keys, options = CASES[case]
    expected = uninterrupted(method, bits, keys, **options)
    running, images = begun(method, bits, keys, init=0, **options)
    checkpointer = begin(running)
    for turn, stop_at in enumerate(STOPS, start=1):
        images.stop_at = stop_at
        with StopRequest() as stop, pytest.raises(RunStoppedError, match=f"batch {(stop_at - 1) % 3 + 1} of 3"):
            running.run(checkpointer, stop)
        assert checkpointer.load()["judged"] is None
        # Another process builds everything anew, from other random numbers.
        running, images = begun(method, bits, keys, init=turn, **options)
        running.load_state_dict(checkpointer.load())
    images.die_at = 6
    with pytest.raises(DeathError):
        running.run(checkpointer, StopRequest())
    assert checkpointer.saved[-1][:2] == (1, 1)  # what the last stop saved: the batches since are lost
    running, _ = begun(method, bits, keys, init=9, **options)
    running.load_state_dict(checkpointer.load())
    running.run(checkpointer, StopRequest())
    same(checkpointer.load(), expected)
    assert running.state.best_epoch == expected["standing"]["best_epoch"]
    # A run that died after its last epoch has nothing left to do.
    running, _ = begun(method, bits, keys, init=10, **options)
    running.load_state_dict(checkpointer.load())
    assert running.finished
    running.run(checkpointer, StopRequest())
    same(checkpointer.load(), expected)


def test_every_method_that_trains_is_resumed_here() -> None:
    assert {method for method, *_ in CASES.values()} == set(METHODS)


def test_another_teacher_is_refused() -> None:
    running, images = begun("rslad", 0, {}, init=0)
    state = running.state_dict()
    assert isinstance(running.method, Rslad)
    for other in (teacher(images, {}, init=101), teacher(images, {"teacher_sees": "original"})):
        running.method.teacher = other
        with pytest.raises(ModelFileError, match="is not the teacher any more that the run began with"):
            running.load_state_dict(state)


def test_long_epochs_are_saved_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = uninterrupted("natural", 0, {})
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    running, _ = begun("natural", 0, {}, init=0)
    checkpointer = MemoryCheckpointer()
    running.run(checkpointer, StopRequest())
    epochs_and_steps = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    assert [saved[:2] for saved in checkpointer.saved] == epochs_and_steps
    same(checkpointer.load(), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_and_the_second_stops(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        seen = [stop.requested]
        os.kill(os.getpid(), number)
        seen.append(stop.requested)
        assert seen == [False, True]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGTERM, before)
