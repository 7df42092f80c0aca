"""The learning rate as a pure function of how far training has come."""

from __future__ import annotations

import math

from robustq.recipe import Recipe


def learning_rate(recipe: Recipe, epochs_done: float) -> float:
    """Learning rate after ``epochs_done`` epochs (a fraction within an epoch).

    Linear warm-up from 0 over ``warmup_epochs``; then ``cosine``: lr * (1 + cos(pi * t)) / 2 with t from 0 to 1 over
    the remaining epochs (arXiv:1608.03983 without restarts), or ``steps``: lr / 10^(milestones passed).
    """
    if epochs_done < recipe.warmup_epochs:
        return recipe.lr * epochs_done / recipe.warmup_epochs
    if recipe.schedule == "steps":
        return recipe.lr / 10.0 ** sum(epochs_done >= milestone for milestone in recipe.milestones)
    remaining = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    share = min((epochs_done - recipe.warmup_epochs) / remaining, 1.0)
    return recipe.lr * (1.0 + math.cos(math.pi * share)) / 2.0
