"""The flags: signs of gradient masking, from the counts of an evaluation (docs/flags.md).

A flag is raised when its count exceeds its threshold with 95% confidence, and turns the verdict into "upper bound:
masking suspected". It is suspected when the count exceeds the threshold and the interval does not; then no verdict is
given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from robustq.evaluation.accuracy import wilson_interval
from robustq.evaluation.comparison import Comparison, Level

HARNESS_KEPT = 0.005
"""Share of the images that a network without defence may keep in a ball that is large enough."""
STEP_ORDER_POINTS, MORE_STEPS_POINTS = 0.5, 1.0
ZERO_GRADIENT_SHARE = 0.01
FLAT_SHARE, FIXED_STEP_POINTS = 0.1, 2.0
LOGIT_SCALE_POINTS = 2.0
LOSS_POINTS = 6.0
GRADIENT_FREE_SHARE = 0.01
TRANSFER_POINTS = 2.0
CONTROL_POINTS = 5.0
TWIN_SHARE = 0.001
FILE_ALONE_POINTS = 1.0

MASKED = "upper bound: masking suspected"
NOT_FOUND = "no masking found"
NOT_JUDGED = "not judged"

FLAG_NAMES = (
    *("harness", "step order", "large ball", "noise", "zero gradient", "flat loss", "logit scale", "loss"),
    *("gradient-free", "transfer", "randomness", "twin", "file alone"),
)
"""In the order of docs/flags.md."""


@dataclass(frozen=True)
class Check:
    """A check for one kind of masking: its name (of :data:`FLAG_NAMES`), whether it is raised, and the evidence.

    ``suspected``: not raised, but the images at hand exceed its threshold.
    """

    name: str
    raised: bool
    text: str
    evidence: dict[str, Any]
    suspected: bool = False

    @property
    def doc(self) -> str:
        """The page that explains the flag."""
        return f"docs/flags.md#{self.name.replace(' ', '-')}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "doc": self.doc}


def harness(*, kept: int, images: int, epsilon: float, clean: int) -> Check:
    """The natural control keeps more than 0.5% of the images, so that the attacks do not work as they should.

    kept, clean: numbers of images right with and without attack. epsilon: the last of balls that grew up to a limit.
    """
    return _check(
        "harness",
        Level.of_share(kept, images, HARNESS_KEPT),
        f"a network without defence keeps {kept / images:.1%} at {255 * epsilon:g}/255",
        {"kept": kept, "images": images, "clean": clean, "epsilon": epsilon},
    )


def step_order(
    one_step: Comparison, fewer_steps: Comparison, *, only_longer: Comparison, steps: Sequence[int]
) -> Check:
    """More steps leave more, or longer runs find what no other loss had found.

    one_step: 20-step PGD (first) and FGSM (second). fewer_steps: APGD on cross-entropy with twice the steps (first) and
    with those of the suite (second). only_longer: white-box attacks of the suite together (first) and all runs on
    cross-entropy (second). steps: of all runs.
    """
    parts = {
        f"one step breaks {_points(one_step)} more than 20 steps do": one_step.level(STEP_ORDER_POINTS),
        f"{steps[0]} steps break {_points(fewer_steps)} more than {2 * steps[0]} do": fewer_steps.level(
            MORE_STEPS_POINTS
        ),
        f"{steps[-1]} steps of cross-entropy break {_points(only_longer)} more than all losses did": only_longer.level(
            MORE_STEPS_POINTS
        ),
    }
    return _check(
        "step order",
        Level.highest(parts.values()),
        _over(parts) or f"more steps break no less; with {steps[-1]} nothing more was found",
        {
            "pgd_minus_fgsm": one_step.to_dict(),
            "longer_minus_shorter": fewer_steps.to_dict(),
            "only_longer": only_longer.to_dict(),
            "steps": list(steps),
        },
    )


def large_ball(*, kept: int, images: int, chance: float, against_small: Comparison, epsilon: float) -> Check:
    """Accuracy above chance in a ball where no image can be recognised, or more left there than in the smaller ball.

    kept: number of images right in the large ball, of radius epsilon. chance: accuracy of the best constant answer.
    against_small: the large ball (first) and that of the evaluation (second).
    """
    above = Level(wilson_interval(kept, images)[0] > chance, kept > chance * images)
    parts = {
        f"{kept / images:.1%} left at epsilon {epsilon:g}, chance is {chance:.1%}": above,
        f"the larger ball leaves {_points(against_small)} more than the smaller one": against_small.level(0.0),
    }
    return _check(
        "large ball",
        Level.highest(parts.values()),
        _over(parts) or f"{kept / images:.1%} left at epsilon {epsilon:g}",
        {
            "kept": kept,
            "images": images,
            "chance": chance,
            "epsilon": epsilon,
            "large_minus_small": against_small.to_dict(),
        },
    )


def noise(pgd_against_noise: Comparison, *, control: Comparison) -> Check:
    """PGD leaves at least as much as noise, in a ball in which PGD takes more than 5 points from the natural control.

    pgd_against_noise: uniform noise (first) and PGD (second). control: no attack (first) and PGD (second) on it.
    """
    useless, works = pgd_against_noise.difference <= 0.0, control.level(CONTROL_POINTS)
    return _check(
        "noise",
        Level(useless and works.confident, useless and works.observed),
        f"PGD breaks {_points(pgd_against_noise)} more than uniform noise; "
        f"of a network without defence it breaks {_points(control)}",
        {"noise_minus_pgd": pgd_against_noise.to_dict(), "control_clean_minus_pgd": control.to_dict()},
    )


def zero_gradient(*, zero: int, images: int) -> Check:
    """More than 1% of the images that are right without attack have an exactly zero gradient of cross-entropy."""
    return _check(
        "zero gradient",
        Level.of_share(zero, images, ZERO_GRADIENT_SHARE),
        f"{zero / max(images, 1):.1%} of images have an exactly zero input gradient",
        {"zero": zero, "images": images},
    )


def flat_loss(*, flat: int, images: int, fixed_steps: Comparison, of: str) -> Check:
    """The loss of over 10% of the images takes few values along a path, or fixed steps find what APGD does not.

    flat, images, of: such images, of how many, and whether the gradient model or the judge answers so. fixed_steps:
    images that APGD on all losses left and targeted PGD with fixed steps broke.
    """
    share = flat / max(images, 1)
    parts = {
        f"the loss of {of} takes few values on {share:.1%} of images": Level.of_share(flat, images, FLAT_SHARE),
        f"fixed steps break {_points(fixed_steps)} that APGD left": fixed_steps.level(FIXED_STEP_POINTS),
    }
    return _check(
        "flat loss",
        Level.highest(parts.values()),
        _over(parts) or f"the loss takes few values on {share:.1%} of images",
        {"flat": flat, "images": images, "of": of, "apgd_minus_fixed_steps": fixed_steps.to_dict()},
    )


def logit_scale(
    plain_against_rescaled: Comparison, *, others_against_rescaled: Comparison, left: tuple[float, float]
) -> Check:
    """Rescaled logits, which change no answer, break over 6 points more, or over 2 points that no other loss broke.

    plain_against_rescaled: cross-entropy (first) and PGD on rescaled logits (second). Networks without masking show a
    gap here, that between cross-entropy and losses of differences of logits. others_against_rescaled: cross-entropy,
    margin and targeted losses together (first). left: accuracies under plain cross-entropy and on rescaled logits.
    """
    parts = (plain_against_rescaled.level(LOSS_POINTS), others_against_rescaled.level(LOGIT_SCALE_POINTS))
    return _check(
        "logit scale",
        Level.highest(parts),
        f"cross-entropy leaves {left[0]:.1%}, rescaled logits leave {left[1]:.1%}"
        + (f"; they break {_points(others_against_rescaled)} that all other losses left" if parts[1].observed else ""),
        {
            "plain_minus_rescaled": plain_against_rescaled.to_dict(),
            "others_minus_rescaled": others_against_rescaled.to_dict(),
            "plain": left[0],
            "rescaled": left[1],
        },
    )


def loss(found: Sequence[tuple[str, Comparison, tuple[float, float]]]) -> Check:
    """Another loss breaks over 6 points more than cross-entropy (3 to 4 are usual).

    found: (name of the attack with the loss, cross-entropy against it, accuracies under both).
    """
    over = [entry for entry in found if entry[1].exceeds(LOSS_POINTS)] or list(found)
    name, _, left = max(over, key=lambda entry: entry[1].difference)
    return _check(
        "loss",
        Level.highest(comparison.level(LOSS_POINTS) for _, comparison, _ in found),
        f"cross-entropy leaves {left[0]:.1%}, {name} leaves {left[1]:.1%}",
        {
            name: {**comparison.to_dict(), "cross_entropy": left[0], "other": left[1]}
            for name, comparison, left in found
        },
    )


def gradient_free(*, broken: int, left: int, images: int) -> Check:
    """Attacks without gradients break more than 1% of the images that white-box attacks left (broken, left)."""
    level = Level.of_share(broken, left, GRADIENT_FREE_SHARE)
    # Of few images left, one is more than 1%.
    several = Comparison(images, broken, 0).exceeds(0.0)
    return _check(
        "gradient-free",
        Level(level.confident and several, level.observed and several),
        f"without gradients {broken} of the {left} images break that gradients left",
        {"broken": broken, "left": left, "images": images},
    )


def transfer(found: Sequence[tuple[str, Comparison]]) -> Check:
    """Adversarial images of a surrogate break over 2 points that white-box attacks left; found: by surrogate."""
    name, most = max(found, key=lambda entry: entry[1].difference)
    return _check(
        "transfer",
        Level.highest(comparison.level(TRANSFER_POINTS) for _, comparison in found),
        f"images of {name} break {_points(most)} that white-box attacks left",
        {name: comparison.to_dict() for name, comparison in found},
    )


def randomness(*, share: float, draws: int) -> Check:
    """Two calls answer differently for a share of the images, so that an attack meets another network at every step.

    draws: number of answers whose mean was attacked and judged, if there are such images.
    """
    text = f"{share:.1%} of images get other logits when asked again"
    if share == 0.0:
        return Check("randomness", False, text, {"share": share, "draws": 1})
    text += f"; attacked and judged in the mean of {draws} answers"
    return Check("randomness", True, text, {"share": share, "draws": draws})


def twin(*, different: int, images: int, random: bool) -> Check:
    """Gradient model and judge disagree on over one clean image in a thousand, and on over one, which may be a tie.

    Random answers are a flag of their own.
    """
    level = Level.of_share(different, images, TWIN_SHARE)
    several = not random and different > 1
    return _check(
        "twin",
        Level(several and level.confident, several and level.observed),
        f"twin and judge agree on {images - different:,} of {images:,} images",
        {"different": different, "images": images},
    )


def file_alone(found: Comparison, *, left: tuple[float, float]) -> Check:
    """The same attacks break over 1 point more through the file alone than through its model.pt.

    found: through model.pt (first) and through the file alone (second). left: the accuracies. Where the file alone
    breaks that much less, the evidence is ``weaker``.
    """
    weaker = Comparison(found.images, found.only_second, found.only_first).exceeds(FILE_ALONE_POINTS)
    return _check(
        "file alone",
        found.level(FILE_ALONE_POINTS),
        f"the same attacks leave {left[1]:.1%} through the file alone, {left[0]:.1%} through model.pt",
        {"model_minus_file": found.to_dict(), "through_model": left[0], "through_file": left[1], "weaker": weaker},
    )


def _check(name: str, level: Level, text: str, evidence: dict[str, Any]) -> Check:
    return Check(name, level.confident, text, evidence, suspected=level.observed and not level.confident)


def _over(parts: Mapping[str, Level]) -> str:
    """The texts of the parts that exceed their thresholds."""
    return "; ".join(text for text, level in parts.items() if level.observed)


def _points(comparison: Comparison) -> str:
    return f"{100 * comparison.difference:.1f} points"
