"""A run that is stopped or dies, anywhere and several times, ends with the bits of the run that was left alone."""

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
from robustq.hardening.methods.registry import build_method
from robustq.hardening.methods.rslad import OnlineTeacher, CachedTeacher, Rslad, Teacher
from robustq.hardening.metrics import MACHINE_KEYS
from robustq.hardening.monitor import Monitor
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Training
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec, build_model
from robustq.recipe import Recipe
from robustq.recipe.schema import METHODS
from tests.hardening.memory_checkpointer import MemoryCheckpointer

CPU = torch.device("cpu")
EPSILON = 0.1
IMAGES, BATCH, EPOCHS = 40, 16, 2  # batches of 16, 16 and 8: six in all


class DeathError(Exception):
    """Stands for kill -9: nothing is saved any more."""


class Interrupting(TensorSplit):
    """A split that sends a signal, or lets the process die, at the batch of a number counted from 1."""

    stop_at = die_at = 0
    number = signal.SIGINT

    def batches(self, batch_size: int, **keys: Any) -> Iterator[Batch]:
        first = keys["epoch"] * 3 + keys["skip"] + 1
        for place, batch in enumerate(super().batches(batch_size, **keys), start=first):
            if place == self.die_at:
                raise DeathError
            if place == self.stop_at:
                os.kill(os.getpid(), self.number)
            yield batch


class WithDropout(nn.Module):
    """Draws from torch's own generator while it trains, as a user's network may."""

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


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return pictures, torch.randint(0, 10, (count,), generator=generator)


def teacher(split: Interrupting, keys: dict[str, Any], *, init: int = 100) -> Teacher:
    """The same in every process, but for its cached answers, which each computes for itself."""
    state = torch.get_rng_state()
    torch.manual_seed(init)
    network = WithDropout()
    torch.set_rng_state(state)
    if keys.get("teacher_sees") == "original":
        return CachedTeacher(network, TensorSplit(split.images, split.labels), mirrored=True, device=CPU)
    return OnlineTeacher(network)


def begun(method: str, bits: int, keys: dict[str, Any], *, init: int) -> tuple[Training, Interrupting]:
    """A training of its own, as a new process would build it; `init` decides what a restored state must overwrite."""
    torch.manual_seed(init)
    split = Interrupting(*images(IMAGES, 5))
    if bits == 0:
        model: nn.Module = WithDropout()
    else:
        model = build_model(ModelSpec("resnet8", bits, bits, 10, 1, 8, "digits", EPSILON, tuple("0123456789")))
        calibrate(model, split.images.float() / 255, from_scratch=True)
    recipe = Recipe(
        name="test",
        method=method,
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=0.1,
        warmup_epochs=0.5,
        settings=keys,
    )
    bound = build_method(
        recipe,
        model,
        epsilon=EPSILON,
        image_shape=(1, 8, 8),
        samples=IMAGES,
        device=CPU,
        seed=3,
        teacher=teacher(split, keys) if method == "rslad" else None,
    )
    x, y = images(8, 6)
    monitor = Monitor(x / 255, y, epsilon=EPSILON if bound.adversarial else None, batch_size=100, seed=3)
    return (
        Training(model, bound, split, monitor, recipe, augment=Augment(1, True), seed=7, device=CPU),
        split,
    )


def same(first: Any, second: Any, at: str = "state") -> None:
    """Equal bit for bit, all the way down; seconds and memory are nobody's bits."""
    assert type(first) is type(second), at
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype, at
        assert torch.equal(first, second), at
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), at
        for key in first:
            if key not in (*MACHINE_KEYS, "epoch_seconds", "loading_seconds"):
                same(first[key], second[key], f"{at}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), at
        for place, (one, other) in enumerate(zip(first, second, strict=True)):
            same(one, other, f"{at}[{place}]")
    else:
        assert first == second, at


def uninterrupted(method: str, bits: int, keys: dict[str, Any]) -> dict[str, Any]:
    training, _ = begun(method, bits, keys, init=0)
    keeper = MemoryCheckpointer()
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    training.run(keeper, StopRequest())
    return keeper.load()


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "natural-float": ("natural", 32, {}),
    "natural-4-bit": ("natural", 4, {}),
    "natural-dropout": ("natural", 0, {}),
    "odgq-float": ("odgq", 32, {"domains": 2}),
    "odgq-4-bit": ("odgq", 4, {"domains": 2}),
    "odgq-1-bit": ("odgq", 1, {"mmd_weight": 0.003}),
    # What the method carries does not ask how many bits the weights have, so the rest runs on the small network.
    "odgq-noise": ("odgq", 0, {"global_perturbation": "noise"}),
    "odgq-sample": ("odgq", 0, {"tied_to": "sample", "domains": 2}),
    "odgq-once-an-epoch": ("odgq", 0, {"update": "epoch", "domains": 2}),
    "pgd": ("pgd", 0, {"steps": 2}),
    "free": ("free", 0, {"repeats": 3}),
    "dq": ("dq", 0, {"orthogonality_weight": 0.01}),
    "fgsm-rs": ("fgsm-rs", 0, {}),
    "n-fgsm": ("n-fgsm", 0, {}),
    "fgsm-mep": ("fgsm-mep", 0, {}),
    "fgsm-mep-anew": ("fgsm-mep", 0, {"reset_epochs": 1}),
    "trades": ("trades", 0, {"steps": 2}),
    "rslad": ("rslad", 0, {}),
    "rslad-cached": ("rslad", 0, {"teacher_sees": "original"}),
}

# Batch 1: the first; 3: the last of its epoch, before it was judged; 4: the first of the second epoch.
STOPS = (1, 3, 4)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case == "odgq-1-bit" else case for case in CASES]
)
def test_stopped_and_resumed_is_the_same_run(case: str) -> None:
    method, bits, keys = CASES[case]
    expected = uninterrupted(method, bits, keys)
    keeper = MemoryCheckpointer()
    training, split = begun(method, bits, keys, init=0)
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    for turn, stop_at in enumerate(STOPS, start=1):
        split.stop_at = stop_at
        with StopRequest() as stop, pytest.raises(RunStoppedError, match=f"batch {(stop_at - 1) % 3 + 1} of 3"):
            training.run(keeper, stop)
        # Another process builds everything anew, from other random numbers.
        training, split = begun(method, bits, keys, init=turn)
        training.load_state_dict(keeper.load())
    split.die_at = 6
    with pytest.raises(DeathError):
        training.run(keeper, StopRequest())
    assert keeper.saved[-1][:2] == (1, 1)  # what the last stop saved: the batches since are lost
    training, split = begun(method, bits, keys, init=9)
    training.load_state_dict(keeper.load())
    trained = training.run(keeper, StopRequest())
    same(keeper.load(), expected)
    assert trained.best_epoch == expected["standing"]["best_epoch"]
    # Nothing is left to do for a run that died after its last epoch.
    training, _ = begun(method, bits, keys, init=10)
    training.load_state_dict(keeper.load())
    assert training.finished
    assert training.run(keeper, StopRequest()).best == trained.best
    same(keeper.load(), expected)


def test_every_method_that_trains_is_resumed_here() -> None:
    assert {method for method, *_ in CASES.values()} == set(METHODS) - {"ptq"}


def test_another_teacher_is_refused() -> None:
    training, split = begun("rslad", 0, {}, init=0)
    state = training.state_dict()
    assert isinstance(training.method, Rslad)
    for other in (teacher(split, {}, init=101), teacher(split, {"teacher_sees": "original"})):
        training.method.teacher = other
        with pytest.raises(ModelFileError, match="is not the teacher any more that the run began with"):
            training.load_state_dict(state)


def test_the_comparison_sees_one_bit() -> None:
    state = uninterrupted("natural", 0, {})
    other = uninterrupted("natural", 0, {})
    same(state, other)
    weight = other["model"]["fc.weight"]
    weight.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(AssertionError, match=r"state\.model\.fc\.weight"):
        same(state, other)


def test_dying_between_epochs_goes_on_with_the_next_one() -> None:
    expected = uninterrupted("natural", 0, {})
    keeper = MemoryCheckpointer()
    training, split = begun("natural", 0, {}, init=0)
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    split.die_at = 4
    with pytest.raises(DeathError):
        training.run(keeper, StopRequest())
    assert keeper.saved == [(0, 0, False, False), (1, 0, True, True)]
    training, _ = begun("natural", 0, {}, init=1)
    training.load_state_dict(keeper.load())
    training.run(keeper, StopRequest())
    same(keeper.load(), expected)


def test_long_epochs_are_saved_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = uninterrupted("natural", 0, {})
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", 0.0)
    training, _ = begun("natural", 0, {}, init=0)
    keeper = MemoryCheckpointer()
    training.run(keeper, StopRequest())
    assert [saved[:2] for saved in keeper.saved] == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    same(keeper.load(), expected)


def test_whenever_the_request_comes_what_is_told_as_stopped_is_saved() -> None:
    class Late(StopRequest):
        """Asks at the n-th time that anybody looks, so at each line where a signal could come in."""

        def __init__(self, n: int) -> None:
            self._left = n
            super().__init__()

        @property
        def requested(self) -> bool:
            self._left -= 1
            return self._left < 0

        @requested.setter
        def requested(self, value: bool) -> None:
            pass

    for n in range(8):  # six batches and two ends of epochs are looked at
        training, _ = begun("natural", 0, {}, init=0)
        keeper = MemoryCheckpointer()
        with pytest.raises(RunStoppedError):
            training.run(keeper, Late(n))
        assert keeper.saved[-1][:2] == (training.state.epoch, training.state.step), n
    training, _ = begun("natural", 0, {}, init=0)
    training.run(MemoryCheckpointer(), Late(8))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals) -> None:
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


def test_a_stop_during_the_last_batch_is_saved_before_the_epoch_is_judged() -> None:
    training, split = begun("natural", 0, {}, init=0)
    split.stop_at = 6
    keeper = MemoryCheckpointer()
    with StopRequest() as stop, pytest.raises(RunStoppedError, match=r"batch 3 of 3 in epoch 2 of 2"):
        training.run(keeper, stop)
    assert keeper.saved[-1] == (1, 3, False, False)
