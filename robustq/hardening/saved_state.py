"""The state in a resume.pt, checked against a run before its first step: a state that does not fit changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustq.hardening.state import TrainState
from robustq.hardening.trainer import Training


def check_state(state: dict[str, Any], training: Training) -> None:
    """Check the names, types and shapes of everything in a saved state.

    Args:
        state: of :meth:`Training.state_dict`, as it was saved.
        training: the same run before its first step; unchanged.

    Raises:
        ValueError: names the first entry that is missing, unknown, or of another type, shape or range.
    """
    expected = training.state_dict()
    progress = state.get("standing")
    like = {**TrainState().to_dict(), "rows": list, "best": object, "best_weights": dict}
    expected["standing"] = like
    wrong = _misfit(progress, like, "standing")
    if wrong is None:
        wrong = _wrong_progress(state["standing"], training, expected["model"])
    if wrong is None:
        # Entries that a run before its first step does not have yet.
        parameters = [one for group in training.train_step.optimizer.param_groups for one in group["params"]]
        for index in _table(_table(state.get("optimizer")).get("state")):
            known = isinstance(index, int) and 0 <= index < len(parameters)
            expected["optimizer"]["state"][index] = {"momentum_buffer": parameters[index]} if known else None
        sums = {*_table(_table(state.get("totals")).get("sums"))}
        sums |= {"loss", "train_accuracy"} if state["standing"]["step"] else set()
        expected["totals"]["sums"] = {name: torch.zeros(()) for name in sums}
        if state.get("judged") is not None:
            expected["judged"] = expected["model"]
        expected["device_random"] = state.get("device_random")  # of another device, if the run has moved
        wrong = _misfit({"judged": None, "average": None, **state}, expected, "")
    if wrong is not None:
        raise ValueError(f"{wrong} is missing, unknown, or of another type, shape or range")


def _wrong_progress(progress: dict[str, Any], training: Training, weights: dict[str, Tensor]) -> str | None:
    """The first entry of the progress that contradicts the recipe or the other entries."""
    epoch, rows = progress["epoch"], progress["rows"]
    highest = {"epoch": training.recipe.epochs, "step": training.batches_per_epoch, "best_epoch": epoch}
    for name, most in highest.items():
        if not (name == "best_epoch" and epoch > 0) <= progress[name] <= most:
            return f"standing.{name}"
    for number, row in enumerate(rows):
        plain = isinstance(row, dict) and all(isinstance(one, str | int | float | None) for one in row.values())
        accuracies = {"holdout_clean_accuracy", "holdout_pgd10_accuracy"}
        if not plain or row.get("epoch") != number + 1 or not accuracies <= row.keys():
            return f"standing.rows[{number}]"
    if len(rows) != epoch:
        return "standing.rows"
    best = {"clean": 0.0, "robust": 0.0 if training.method.adversarial else None} if epoch else None
    return _misfit(progress["best"], best, "standing.best") or _misfit(
        progress["best_weights"], weights if epoch else {}, "standing.best_weights"
    )


def _table(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _misfit(found: Any, expected: Any, name: str) -> str | None:
    """The name of the first entry that is not like ``expected``: tensors by type and shape, other values by type."""
    if isinstance(expected, dict | list) and isinstance(found, dict if isinstance(expected, dict) else list):
        ours, theirs = (dict(enumerate(one)) if isinstance(one, list) else one for one in (expected, found))
        names = {key: f"{name}.{key}".removeprefix(".") for key in (*ours, *theirs)}
        for key in names:
            if key not in ours or key not in theirs:
                return names[key]
            if (wrong := _misfit(theirs[key], ours[key], names[key])) is not None:
                return wrong
        return None
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        same = (found.shape, found.dtype) == (expected.shape, expected.dtype)
    elif isinstance(expected, type):
        same = isinstance(found, expected)
    else:
        same = type(found) is type(expected) or (isinstance(expected, float) and type(found) is int)
    return None if same else name
