"""Defences that mask on purpose are flagged and broken all the same; honest networks are not flagged.

On the digits at 48/255, where a network without defence falls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import ImageGenerators, apgd_targeted, pgd_targeted
from robustq.attacks.base import Model
from robustq.data import to_float
from robustq.evaluation.flags import FLAT_SHARE
from robustq.evaluation.flatness import find_flat
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import run_suite
from robustq.evaluation.target import AS_TRAINED, Target
from tests.evaluation.nets import (
    FewValues,
    HardPixels,
    ResizedAndPadded,
    Saturating,
    Scaled,
    Squeezed,
    binarised,
    trained,
)
from tests.models.small_nets import digits

EPSILON = 48 / 255
WITHIN = 0.05
"""How much more than the undefended network a masked one may seem to keep (docs/flags.md: five points)."""


def judged(
    model: nn.Module,
    *,
    epsilon: float = EPSILON,
    rules: Mapping[str, Model] | None = None,
    transfers: bool = False,
    suite: str = "standard",
) -> Evaluation:
    """All 359 test digits; transfer from two networks of other seeds, where it is asked for."""
    images, labels = digits()
    surrogates = {"natural": trained("natural", 1), "robust": trained("n-fgsm", 1)} if transfers else {}
    target = Target(model, {AS_TRAINED: model, **(rules or {})}, surrogates=surrogates, control=trained("natural", 1))
    return run_suite(target, images, labels, suite=suite, epsilon=epsilon, device=torch.device("cpu"))


@functools.cache
def undefended() -> Evaluation:
    return judged(trained("natural"))


def scaled(factor: float) -> Evaluation:
    return judged(Scaled(trained("natural"), factor))


def hard_pixels() -> Evaluation:
    return judged(HardPixels(trained("natural"), levels=16), transfers=True)


def saturating() -> Evaluation:
    # Steep enough to hide one image in ten, flat enough that margins are left for Square to climb.
    return judged(Saturating(trained("natural"), slope=8.0), transfers=True)


def resized() -> Evaluation:
    return judged(ResizedAndPadded(trained("natural")))


def useless_straight_through() -> Evaluation:
    rules = {"pass-through": binarised(gain=1e3, clipped=False)}
    return judged(binarised(gain=1e3, clipped=True), rules=rules)


def squeezed() -> Evaluation:
    return judged(Squeezed(trained("smoothed"), width=0.5, height=1.0))


MASKED: dict[str, tuple[Callable[[], Evaluation], set[str], bool]] = {
    # name: evaluation, flags that it must raise, whether it is slow
    "logits times 1e3": (functools.partial(scaled, 1e3), {"zero gradient", "logit scale", "loss", "noise"}, True),
    "logits times 1e-3": (functools.partial(scaled, 1e-3), {"loss"}, True),
    "squeezed logits": (squeezed, {"logit scale", "loss"}, False),
    "random resize and pad": (resized, {"randomness"}, True),
    "rounded pixels": (hard_pixels, {"zero gradient", "noise", "large ball", "gradient-free", "transfer"}, True),
    "saturating output": (saturating, {"zero gradient"}, True),
    "useless straight-through": (useless_straight_through, {"zero gradient", "noise"}, True),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if slow else []) for name, (_, _, slow) in MASKED.items()]
)
def test_a_masking_defence_is_flagged_and_broken_all_the_same(name: str) -> None:
    evaluate, flags, _ = MASKED[name]
    found = evaluate()
    assert flags <= {check.name for check in found.flags}
    assert found.verdict == "upper bound: masking suspected"
    # A single answer to a resized digit of 8 pixels is right less often than the mean of eight.
    assert found.clean_accuracy > (0.7 if "randomness" in flags else 0.9)
    assert found.robust_accuracy <= undefended().robust_accuracy + WITHIN
    # The control has no defence, and shows that the attacks work.
    (harness,) = (check for check in found.checks if check.name == "harness")
    assert not harness.raised


def test_a_network_without_defence_falls_and_is_not_flagged() -> None:
    found = undefended()
    assert found.clean_accuracy > 0.95
    assert found.robust_accuracy <= 0.005  # science's bound for a natural control
    assert found.flags == []
    assert found.verdict == "no masking found"


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [32 / 255, 48 / 255], ids=["32", "48"])
@pytest.mark.parametrize("method", ["pgd", "n-fgsm"])
def test_honest_training_raises_no_flag(method: str, epsilon: float) -> None:
    found = judged(trained(method), epsilon=epsilon, transfers=True)
    assert found.flags == []
    assert found.verdict == "no masking found"
    # It is worth something, unlike the network without defence.
    assert found.robust_accuracy > 0.35
    assert found.clean_accuracy > 0.9


@functools.cache
def robust_inside(kind: str) -> Evaluation:
    """``bare`` or a kind of `FewValues`: a PGD-trained network on 200 images."""
    images, labels = digits()
    model = trained("pgd") if kind == "bare" else FewValues(trained("pgd"), kind)
    target = Target(model, {AS_TRAINED: model}, control=trained("natural", 1))
    return run_suite(target, images[:200], labels[:200], epsilon=EPSILON, device=torch.device("cpu"))


KINDS = ("one-hot", "rounded", "votes", "clipped")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_few_values_are_flagged_and_hide_no_more_than_the_network_inside(kind: str) -> None:
    bare, found = robust_inside("bare"), robust_inside(kind)
    assert bare.flags == [] and 0.3 < bare.robust_accuracy < 0.5
    assert "flat loss" in {check.name for check in found.flags}
    assert "rays" in {result.name for result in found.results}
    assert found.clean_accuracy == bare.clean_accuracy or kind == "votes"
    assert found.robust_accuracy <= bare.robust_accuracy + WITHIN


@pytest.mark.parametrize(
    "epsilon", [*(pytest.param(one / 255, marks=pytest.mark.slow) for one in (1, 8)), EPSILON], ids=["1", "8", "48"]
)
def test_the_loss_of_honest_networks_is_not_flat_and_that_of_few_values_is(epsilon: float) -> None:
    images, labels = digits()
    x = to_float(images)

    def share(model: Model, judge: Model) -> float:
        right = (trained("pgd")(x).argmax(dim=1) == labels).nonzero()[:, 0]
        found = find_flat(Target(judge, {AS_TRAINED: model}), x, labels, right, epsilon=epsilon)
        return found.flat / found.images

    honest = [trained(method) for method in ("natural", "pgd", "natural-binarised")]
    # A binarised network at 1/255 has the most: up to 5%, by the CPU that trained it.
    assert all(share(model, model) < 0.75 * FLAT_SHARE for model in honest)
    inside = trained("pgd")
    assert all(share(FewValues(inside, kind), inside) > 0.9 for kind in KINDS)
    assert share(inside, FewValues(inside, "votes", differentiable=False)) == 1.0


def test_fixed_steps_break_through_a_flat_loss() -> None:
    images, labels = digits()
    x, inside = to_float(images[:100]), trained("pgd")
    flat = FewValues(inside, "one-hot")

    def left(model: nn.Module, attack: Callable[..., Tensor], steps: int) -> int:
        generators = ImageGenerators.of(0, range(100))
        x_adv = attack(model, x, labels[:100], epsilon=EPSILON, steps=steps, generator=generators)
        return int((inside(x_adv).argmax(dim=1) == labels[:100]).sum())

    bare = left(inside, apgd_targeted, 20)
    assert left(flat, pgd_targeted, 20) <= bare + 5 < left(flat, apgd_targeted, 20)


@pytest.mark.slow
def test_the_full_suite_is_never_weaker() -> None:
    standard, full = (judged(trained("pgd"), suite=suite) for suite in ("standard", "full"))
    # Other budgets move the step sizes, which may save an image that sits on a boundary.
    assert int(full.robust.sum()) <= int(standard.robust.sum()) + 1
    assert full.flags == []
