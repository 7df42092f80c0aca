"""The one training loop: SGD over a method's loss, with metrics, a monitor on held-out images, and the best weights
kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustq.data import Augment, Split
from robustq.errors import CheckFailedError
from robustq.hardening.method import Method
from robustq.hardening.monitor import Monitor, Watched
from robustq.hardening.schedule import learning_rate
from robustq.models.quantizers import learned_thresholds
from robustq.progress import bar, note
from robustq.recipe import Recipe

OnEpoch = Callable[[dict[str, Any], bool], None]


@dataclass(frozen=True)
class Trained:
    """Outcome of a run: the best epoch's watched accuracies and the mean time of an epoch's training part."""

    best_epoch: int
    best: Watched
    seconds_per_epoch: float


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with momentum; weight decay on everything but learned activation thresholds.

    The thresholds are logarithms: decay would pull every clipping range towards 1, whatever the activations are.
    """
    thresholds = [module.log_threshold for module in learned_thresholds(model).values()]
    held = {id(parameter) for parameter in thresholds}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in held]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if thresholds:
        groups.append({"params": thresholds, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def train(
    model: nn.Module,
    method: Method,
    split: Split,
    monitor: Monitor,
    recipe: Recipe,
    *,
    augment: Augment,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch,
) -> Trained:
    """Train ``model`` in place.

    Args:
        model: on ``device``; left in eval mode, with the last epoch's weights.
        method: bound to ``model``.
        split: training images.
        monitor: judges each epoch.
        recipe: epochs, batch size, learning rate.
        augment: what happens to training images.
        seed: with the epoch it decides order and augmentation.
        device: where batches are put.
        on_epoch: called after each epoch with its metrics row and whether it is the best so far (save the weights
            there).

    Raises:
        CheckFailedError: the loss or a weight is NaN or Inf; the epoch is named and the checkpoints of earlier epochs
            stand.
    """
    optimizer = build_optimizer(model, recipe)
    best: tuple[int, Watched] | None = None
    seconds = 0.0
    batches = math.ceil(len(split) / recipe.batch_size)
    with bar(recipe.method, recipe.epochs * len(split)) as progress:
        watched_text = ""
        for epoch in range(recipe.epochs):
            model.train()
            method.begin_epoch(epoch)
            start = time.perf_counter()
            totals = _Totals(device)
            for step, batch in enumerate(
                split.batches(recipe.batch_size, device=device, seed=seed, epoch=epoch, augment=augment)
            ):
                # Warm-up begins one step in: a learning rate of exactly 0 would waste the first batch. Only warm-up
                # does: shifted to its end, the cosine would waste the last batch instead, and milestones would come a
                # step early.
                warming = epoch + step / batches < recipe.warmup_epochs
                done = epoch + (step + warming) / batches
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, done)
                outcome = method.training_step(batch.x, batch.y, batch.places)
                optimizer.zero_grad(set_to_none=True)
                outcome.loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                totals.add(outcome.loss, outcome.terms, outcome.logits, batch.y)
                progress.advance(len(batch.y), partial(_status, epoch, recipe, totals, watched_text))
            row = totals.means()
            seconds += time.perf_counter() - start
            if not all(math.isfinite(value) for value in row.values()):
                raise CheckFailedError(
                    f"loss became {row['loss']} in epoch {epoch + 1}; the checkpoints of earlier epochs stand: "
                    "lower lr or raise warmup_epochs"
                )
            if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
                raise CheckFailedError(
                    f"weights became NaN or Inf in epoch {epoch + 1}; the checkpoints of earlier epochs stand: "
                    "lower lr or raise warmup_epochs"
                )
            watched = monitor.watch(model)
            is_best = best is None or watched.rank >= best[1].rank
            if is_best:
                best = (epoch, watched)
            metrics = {
                "epoch": epoch + 1,
                **row,
                "holdout_clean_accuracy": watched.clean,
                "holdout_pgd10_accuracy": watched.robust,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - start,
            }
            on_epoch(metrics, is_best)
            watched_text = f"  held out: {_describe(watched)}"
            if (epoch + 1) % max(recipe.epochs // 10, 1) == 0:
                note(f"  epoch {_status(epoch, recipe, totals, watched_text)}  {metrics['seconds']:.1f} s")
    model.eval()
    assert best is not None  # a recipe has at least one epoch
    return Trained(best[0] + 1, best[1], seconds / recipe.epochs)


def _status(epoch: int, recipe: Recipe, totals: _Totals, watched: str) -> str:
    means = totals.means()
    return f"{epoch + 1}/{recipe.epochs}  loss {means['loss']:.2f}  train {means['train_accuracy']:.1%}{watched}"


def _describe(watched: Watched) -> str:
    robust = "" if watched.robust is None else f", PGD-10 {watched.robust:.1%}"
    return f"clean {watched.clean:.1%}{robust}"


class _Totals:
    """Sums over an epoch, kept on the device so that no batch waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._device = device

    def add(self, loss: Tensor, terms: dict[str, Tensor], logits: Tensor, y: Tensor) -> None:
        values = {"loss": loss.detach(), **terms}
        for name, value in values.items():
            self._add(name, value * len(y))
        self._add("train_accuracy", (logits.argmax(dim=1) == y).sum())
        self._count += len(y)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value

    def means(self) -> dict[str, float]:
        return {name: value.item() / self._count for name, value in self._sums.items()}
