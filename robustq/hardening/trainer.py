"""The one training loop: SGD over a method's loss, with metrics, a monitor on held-out images, the best weights kept,
and a state from which another process can go on as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from robustq.data import Augment, Batch, Split
from robustq.errors import NotFiniteError, RunStoppedError
from robustq.hardening.averaging import IMAGES
from robustq.hardening.diagnosis import FiniteWatch, find_fault
from robustq.hardening.methods.method import Method
from robustq.hardening.metrics import RunningMeans, epoch_row, forget_peak_memory
from robustq.hardening.monitor import BATCH, Collapse, Monitor, Watched, find_collapse
from robustq.hardening.optimization import Descent, learning_rate
from robustq.hardening.state import Checkpointer, StopRequest, TrainState, restore, snapshot
from robustq.progress import bar, note
from robustq.recipe import Recipe

CHECK_EVERY = 20
"""Batches between two looks for NaN and Inf: each look makes a GPU wait once."""

SAVE_EVERY_SECONDS = 600.0
"""Longest training time without a saved state, for epochs that take longer than that."""


@dataclass(frozen=True)
class Trained:
    """Outcome of a run: the best epoch's watched accuracies, the mean time of an epoch's training part, and why it
    ended early, where it did.
    """

    best_epoch: int
    best: Watched
    seconds_per_epoch: float
    collapse: Collapse | None = None


class Training:
    """One run: a network on its way through a recipe.

    :meth:`state_dict` is everything that the rest of the run depends on. Order and augmentation are not in it: they
    are a pure function of seed and epoch. On the CPU, a run that is put back into it continues bit for bit.

    Args:
        model: on ``device``; trained in place.
        method: bound to ``model``.
        split: training images.
        monitor: judges each epoch.
        recipe: epochs, batch size, learning rate.
        augment: what happens to training images.
        seed: with the epoch it decides order and augmentation.
        device: where batches are put.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        split: Split,
        monitor: Monitor,
        recipe: Recipe,
        *,
        augment: Augment,
        seed: int,
        device: torch.device,
    ) -> None:
        # Channels beside each other in memory are what the fastest convolutions of CPUs and GPUs work on.
        self.model = model.to(memory_format=torch.channels_last)
        self.method = method
        self.split = split
        self.monitor = monitor
        self.recipe = recipe
        self.augment = augment
        self.seed = seed
        self.device = device
        self.descent = Descent(model, method, recipe)
        self._judged: dict[str, Tensor] | None = None
        self.standing = TrainState()
        self.totals = RunningMeans(device)
        self._clock = 0.0

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch, a short last one included."""
        return math.ceil(len(self.split) / self.recipe.batch_size)

    @property
    def collapse(self) -> Collapse | None:
        """The collapse of robust accuracy that ends the run, or has ended it; a pure function of the epochs so far."""
        if not self.recipe.stop_on_collapse:
            return None
        robust = [row["holdout_pgd10_accuracy"] for row in self.standing.rows]
        monitor, planned = self.monitor, self.recipe.epochs
        return find_collapse(robust, images=monitor.images, chance=monitor.chance, planned=planned)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left: all have ended, or robust accuracy has collapsed."""
        return self.standing.epoch >= self.recipe.epochs or self.collapse is not None

    def state_dict(self) -> dict[str, Any]:
        """The state between two batches. Its tensors are the living ones: write or copy them before the next batch.

        ``judged``: the weights that an epoch's accuracies are of where they are not ``model``'s; None after the next
        batch.
        """
        return {
            "standing": self.standing.to_dict(),
            "totals": self.totals.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.descent.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "average": None if self.descent.average is None else self.descent.average.state_dict(),
            "judged": self._judged,
            # Nothing of ours draws from torch's own generators while it trains, but a network with dropout does.
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back (or forth) to what :meth:`state_dict` gave, whatever happened in between."""
        self.standing = TrainState.from_dict(state["standing"])
        self.totals.load_state_dict(state["totals"])
        restore(self.model, state["model"])
        self.descent.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        if self.descent.average is not None:
            self.descent.average.load_state_dict(state["average"])
        self._judged = state.get("judged")  # a run of an older version has neither
        torch.set_rng_state(state["random"].cpu())
        # A run that goes on on another kind of device has no state for its generator, which only dropout would use.
        if self.device.type == "cuda" and state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"].cpu(), self.device)

    def run(self, keeper: Checkpointer, stop: StopRequest) -> Trained:
        """Train to the last epoch, or until robust accuracy collapses; the network is left in eval mode with the
        weights of the epoch that ended last.

        Args:
            keeper: gets the state after each epoch, when the run stops, and every ten minutes within long epochs; it
                must already hold the state at which this call begins.
            stop: looked at after each batch.

        Raises:
            NotFiniteError: loss, weights or images are NaN or Inf; names the step and the first layer. The states saved
                before stand.
            RunStoppedError: ``stop`` was requested; the state has been saved.
        """
        standing, recipe = self.standing, self.recipe
        remaining = (recipe.epochs - standing.epoch) * len(self.split) - standing.step * recipe.batch_size
        told = "" if standing.best is None else f"  held out: {_describe(standing.best)}"
        with bar(recipe.method, max(remaining, 0)) as progress:
            while not self.finished:
                watch, saved_at = FiniteWatch(self.device), time.monotonic()
                forget_peak_memory(self.device)
                self._clock = time.perf_counter()
                for batch in self._timed(self.epoch_batches()):
                    watch.add(batch.x, self.take_step(batch))
                    progress.advance(len(batch.y), partial(self._status, standing.epoch + 1, told))
                    stopping = stop.requested  # read once: a signal may come between any two lines
                    due = stopping or time.monotonic() - saved_at > SAVE_EVERY_SECONDS
                    if due or standing.step % CHECK_EVERY == 0:
                        self._check_finite(watch, keeper)
                    if due:
                        self._count_seconds()
                        keeper.save(self.state_dict(), epoch_ended=False, is_best=False)
                        saved_at = time.monotonic()
                    if stopping:
                        raise RunStoppedError(
                            f"stopped after batch {standing.step:,} of {self.batches_per_epoch:,} "
                            f"in epoch {standing.epoch + 1} of {recipe.epochs}"
                        )
                self._check_finite(watch, keeper)
                watched = self._end_epoch(keeper)
                told = f"  held out: {_describe(watched)}"
                if standing.epoch % max(recipe.epochs // 10, 1) == 0:
                    note(f"  epoch {self._status(standing.epoch, told)}  {standing.rows[-1]['seconds']:.1f} s")
                if stop.requested:
                    raise RunStoppedError(f"stopped after epoch {standing.epoch} of {recipe.epochs}")
        self.model.eval()
        assert standing.best is not None  # a recipe has at least one epoch
        return Trained(standing.best_epoch, standing.best, standing.seconds / standing.epoch, self.collapse)

    def epoch_batches(self) -> Iterator[Batch]:
        """Begin or continue the epoch that :attr:`standing` stands in, and hand out the batches that it still lacks."""
        self.model.train()
        self._judged = None
        if self.standing.step == 0:
            self.method.begin_epoch(self.standing.epoch)
            self.totals = RunningMeans(self.device)
        return self._batches(skip=self.standing.step)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; :attr:`standing` counts how long they were waited for."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.standing.loading_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _batches(self, *, skip: int) -> Iterator[Batch]:
        epoch, seed = self.standing.epoch, self.seed
        return self.split.batches(
            self.recipe.batch_size, device=self.device, seed=seed, epoch=epoch, augment=self.augment, skip=skip
        )

    def take_step(self, batch: Batch) -> Tensor:
        """Train on one batch, as often as the method repeats it, and count it; the mean loss, detached."""
        standing, recipe, batches = self.standing, self.recipe, self.batches_per_epoch
        # Warm-up begins one step in: a learning rate of exactly 0 would waste the first batch. Only warm-up does:
        # shifted to its end, the cosine would waste the last batch instead, and milestones would come a step early.
        warming = standing.epoch + standing.step / batches < recipe.warmup_epochs
        done = standing.epoch + (standing.step + warming) / batches
        self.descent.lr = learning_rate(recipe, done)
        losses = []
        for _ in range(self.method.repeats):
            outcome = self.descent.step(batch, epoch=standing.epoch)
            self.totals.add(outcome.loss, outcome.terms, outcome.logits, batch.y)
            losses.append(outcome.loss.detach())
        standing.step += 1
        return torch.stack(losses).mean()

    def _weights_to_judge(self) -> AbstractContextManager[None]:
        if self.descent.average is None:
            return nullcontext()
        # Batches of the epoch that has just ended: the same ones whichever process comes to this place.
        whole = max(len(self.split) // self.recipe.batch_size, 1)
        count = min(math.ceil(IMAGES / self.recipe.batch_size), whole)
        return self.descent.average.in_place_of(self.model, islice(self._batches(skip=0), count))

    def _end_epoch(self, keeper: Checkpointer) -> Watched:
        standing = self.standing
        means = self.totals.means()
        self._count_seconds()
        seconds, start = standing.epoch_seconds, time.perf_counter()
        with self._weights_to_judge():
            watched = self.monitor.watch(self.model)
            inspection = self.monitor.inspect(self.model, batch_size=min(BATCH, self.recipe.batch_size))
            row = epoch_row(
                standing.epoch + 1,
                means,
                watched,
                inspection,
                lr=self.descent.lr,
                seconds=seconds + time.perf_counter() - start,
                training_seconds=seconds,
                loading_seconds=standing.loading_seconds,
                images=len(self.split),
                device=self.device,
            )
            is_best = standing.end_epoch(row, watched, self.model)
            self._judged = None if self.descent.average is None else snapshot(self.model)
        keeper.save(self.state_dict(), epoch_ended=True, is_best=is_best)
        return watched

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.standing.epoch_seconds += now - self._clock
        self._clock = now

    def _check_finite(self, watch: FiniteWatch, keeper: Checkpointer) -> None:
        if watch.fine(self.model):
            return
        seen = self.standing.step
        self.load_state_dict(keeper.load())
        self.descent.as_written()  # compiled layers could not be looked at
        fault = find_fault(
            self.model,
            self.epoch_batches(),
            self.take_step,
            epoch=self.standing.epoch + 1,
            first=self.standing.step + 1,
            last=seen,
        )
        raise NotFiniteError(f"{fault}; what was saved before stands: lower lr or raise warmup_epochs")

    def _status(self, epoch: int, told: str) -> str:
        means = self.totals.means()
        return f"{epoch}/{self.recipe.epochs}  loss {means['loss']:.2f}  train {means['train_accuracy']:.1%}{told}"


def _describe(watched: Watched) -> str:
    robust = "" if watched.robust is None else f", PGD-10 {watched.robust:.1%}"
    return f"clean {watched.clean:.1%}{robust}"
