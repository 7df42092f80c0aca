"""The training loop: a method's loss, SGD, metrics, a monitor on held-out images, best weights, resumable state."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from robustq.data import Augment, Batch, Split
from robustq.errors import NotFiniteError, RunStoppedError
from robustq.hardening.averaging import IMAGES
from robustq.hardening.diagnosis import FiniteCheck, find_nonfinite
from robustq.hardening.methods.method import Method
from robustq.hardening.metrics import RunningMeans, peak_memory, reset_peak_memory
from robustq.hardening.monitor import BATCH, Collapse, HoldoutAccuracy, Monitor, find_collapse
from robustq.hardening.optimization import TrainStep, learning_rate
from robustq.hardening.state import Checkpointer, StopRequest, TrainState, restore, snapshot
from robustq.progress import bar, note
from robustq.recipe import Recipe

CHECK_EVERY = 20  # batches between two checks for NaN and Inf: a GPU waits for each check
SAVE_EVERY_SECONDS = 600.0  # longest training time without a saved state, for long epochs


@dataclass(eq=False, repr=False)
class Training:
    """One run of a recipe.

    :meth:`state_dict` is everything that the rest of the run depends on. Order and augmentation of the images are not
    in it: they are a pure function of seed and epoch. On the CPU a restored run continues bit for bit.
    """

    model: nn.Module  # on ``device``; trained in place
    method: Method  # built for ``model``
    split: Split  # training images
    monitor: Monitor  # evaluates each epoch
    recipe: Recipe
    _: KW_ONLY
    augment: Augment
    seed: int  # of order and augmentation
    device: torch.device  # of the batches

    def __post_init__(self) -> None:
        # The fastest convolutions of CPUs and GPUs use this memory format.
        self.model = self.model.to(memory_format=torch.channels_last)
        self.train_step = TrainStep(self.model, self.method, self.recipe)
        self.state = TrainState()
        self.means = RunningMeans(self.device)
        self._averaged_weights: dict[str, Tensor] | None = None
        self._clock = 0.0

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch, including a short last one."""
        return math.ceil(len(self.split) / self.recipe.batch_size)

    @property
    def collapse(self) -> Collapse | None:
        """The collapse of robust accuracy that ends the run; a pure function of the epochs so far."""
        if not self.recipe.stop_on_collapse:
            return None
        robust = [row["holdout_pgd10_accuracy"] for row in self.state.rows]
        monitor, planned = self.monitor, self.recipe.epochs
        return find_collapse(robust, images=monitor.images, chance=monitor.chance, planned=planned)

    @property
    def finished(self) -> bool:
        """Whether all epochs have ended or robust accuracy has collapsed."""
        return self.state.epoch >= self.recipe.epochs or self.collapse is not None

    def state_dict(self) -> dict[str, Any]:
        """The state between two batches. Its tensors are not copies: write or copy them before the next batch.

        ``judged``: averaged weights that the last epoch's accuracies belong to; None without averaging and in an epoch.
        """
        average = self.train_step.average
        return {
            "standing": self.state.to_dict(),
            "totals": self.means.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.train_step.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "average": None if average is None else average.state_dict(),
            "judged": self._averaged_weights,
            # For networks with dropout; robustq's own code has its own generators.
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.state = TrainState.from_dict(state["standing"])
        self.means.load_state_dict(state["totals"])
        restore(self.model, state["model"])
        self.train_step.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        if self.train_step.average is not None:
            self.train_step.average.load_state_dict(state["average"])
        self._averaged_weights = state.get("judged")  # runs of older versions have no averages
        torch.set_rng_state(state["random"].cpu())
        # A run that moved from the CPU to a GPU has no state of the GPU's generator, which only dropout uses.
        if self.device.type == "cuda" and state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"].cpu(), self.device)

    def run(self, checkpointer: Checkpointer, stop: StopRequest) -> None:
        """Train to the last epoch, or until robust accuracy collapses; the network is left in eval mode with the
        weights of the last epoch.

        Args:
            checkpointer: saves the state after each epoch, when the run stops (``stop`` is checked after each batch),
                and every ten minutes in long epochs; it must already have saved the current state.

        Raises:
            NotFiniteError: loss, weights or images are NaN or Inf; names the step and the first layer. The states saved
                before remain.
            RunStoppedError: ``stop`` was requested; the state has been saved.
        """
        state, recipe = self.state, self.recipe
        remaining = (recipe.epochs - state.epoch) * len(self.split) - state.step * recipe.batch_size
        holdout = "" if state.best is None else f"  held out: {_describe(state.best)}"
        with bar(recipe.method, max(remaining, 0)) as progress:
            while not self.finished:
                check, saved_at = FiniteCheck(self.device), time.monotonic()
                reset_peak_memory(self.device)
                self._clock = time.perf_counter()
                for batch in self._timed(self.epoch_batches()):
                    check.add(batch.x, self.take_step(batch))
                    progress.advance(len(batch.y), partial(self._status, state.epoch + 1, holdout))
                    stopping = stop.requested  # read once: a signal may come between any two lines
                    due = stopping or time.monotonic() - saved_at > SAVE_EVERY_SECONDS
                    if due or state.step % CHECK_EVERY == 0:
                        self._check_finite(check, checkpointer)
                    if due:
                        self._count_seconds()
                        checkpointer.save(self.state_dict(), epoch_ended=False, is_best=False)
                        saved_at = time.monotonic()
                    if stopping:
                        raise RunStoppedError(
                            f"stopped after batch {state.step:,} of {self.batches_per_epoch:,} "
                            f"in epoch {state.epoch + 1} of {recipe.epochs}"
                        )
                self._check_finite(check, checkpointer)
                holdout = f"  held out: {_describe(self._end_epoch(checkpointer))}"
                if state.epoch % max(recipe.epochs // 10, 1) == 0:
                    note(f"  epoch {self._status(state.epoch, holdout)}  {state.rows[-1]['seconds']:.1f} s")
                if stop.requested:
                    raise RunStoppedError(f"stopped after epoch {state.epoch} of {recipe.epochs}")
        self.model.eval()

    def epoch_batches(self) -> Iterator[Batch]:
        """Begin or continue the current epoch; its remaining batches."""
        self.model.train()
        self._averaged_weights = None
        if self.state.step == 0:
            self.method.begin_epoch(self.state.epoch)
            self.means = RunningMeans(self.device)
        return self._batches(skip=self.state.step)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; adds the time of loading them to :attr:`state`."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.state.loading_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _batches(self, *, skip: int) -> Iterator[Batch]:
        epoch, seed = self.state.epoch, self.seed
        return self.split.batches(
            self.recipe.batch_size, device=self.device, seed=seed, epoch=epoch, augment=self.augment, skip=skip
        )

    def take_step(self, batch: Batch) -> Tensor:
        """Train on one batch, as often as the method repeats it; the mean loss, detached."""
        state, recipe, batches = self.state, self.recipe, self.batches_per_epoch
        # Warm-up counts from one step, since a learning rate of 0 would waste the first batch; the schedule behind it
        # counts from zero, since the end of the cosine is 0 and milestones would come a step early.
        warming = state.epoch + state.step / batches < recipe.warmup_epochs
        self.train_step.lr = learning_rate(recipe, state.epoch + (state.step + warming) / batches)
        losses = []
        for _ in range(self.method.repeats):
            output = self.train_step.step(batch, epoch=state.epoch)
            self.means.add(output.loss, output.terms, output.logits, batch.y)
            losses.append(output.loss.detach())
        state.step += 1
        return torch.stack(losses).mean()

    def _averaged(self) -> AbstractContextManager[None]:
        """Within it the network has the averaged weights, if the recipe averages them."""
        if self.train_step.average is None:
            return nullcontext()
        # Batches of the epoch that has just ended: the same ones in a resumed run.
        full = max(len(self.split) // self.recipe.batch_size, 1)
        count = min(math.ceil(IMAGES / self.recipe.batch_size), full)
        return self.train_step.average.applied_to(self.model, islice(self._batches(skip=0), count))

    def _end_epoch(self, checkpointer: Checkpointer) -> HoldoutAccuracy:
        state = self.state
        means = self.means.means()
        self._count_seconds()
        seconds, start = state.epoch_seconds, time.perf_counter()
        with self._averaged():
            accuracy = self.monitor.evaluate(self.model)
            inspection = self.monitor.inspect(self.model, batch_size=min(BATCH, self.recipe.batch_size))
            row = {
                "epoch": state.epoch + 1,
                **means,
                "holdout_clean_accuracy": accuracy.clean,
                "holdout_pgd10_accuracy": accuracy.robust,
                **asdict(inspection),
                "lr": self.train_step.lr,
                "seconds": seconds + time.perf_counter() - start,
                "images_per_second": len(self.split) / max(seconds, 1e-9),
                "loading_share": state.loading_seconds / max(seconds, 1e-9),
                **peak_memory(self.device),
            }
            is_best = state.end_epoch(row, accuracy, self.model)
            self._averaged_weights = None if self.train_step.average is None else snapshot(self.model)
        checkpointer.save(self.state_dict(), epoch_ended=True, is_best=is_best)
        return accuracy

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.state.epoch_seconds += now - self._clock
        self._clock = now

    def _check_finite(self, check: FiniteCheck, checkpointer: Checkpointer) -> None:
        if check.is_finite(self.model):
            return
        last = self.state.step
        self.load_state_dict(checkpointer.load())
        self.train_step.use_eager()  # hooks do not run in compiled layers
        first = self.state.step + 1
        found = find_nonfinite(
            self.model, self.epoch_batches(), self.take_step, epoch=self.state.epoch + 1, first=first, last=last
        )
        raise NotFiniteError(f"{found}; what was saved before remains: lower lr or raise warmup_epochs")

    def _status(self, epoch: int, holdout: str) -> str:
        means = self.means.means()
        return f"{epoch}/{self.recipe.epochs}  loss {means['loss']:.2f}  train {means['train_accuracy']:.1%}{holdout}"


def _describe(accuracy: HoldoutAccuracy) -> str:
    robust = "" if accuracy.robust is None else f", PGD-10 {accuracy.robust:.1%}"
    return f"clean {accuracy.clean:.1%}{robust}"
