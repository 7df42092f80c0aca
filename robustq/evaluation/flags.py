"""The flags: signs of gradient masking, from the counts of an evaluation (docs/flags.md).

A raised flag turns the verdict into "upper bound: masking suspected". A difference between two attacks counts only if
it also exceeds the 95% interval of the paired images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from robustq.evaluation.accuracy import Comparison, wilson_interval

HARNESS_KEPT = 0.005
"""Share of the images that a network without defence may keep in a ball that is large enough."""
STEP_ORDER_POINTS, MORE_STEPS_POINTS = 0.5, 1.0
ZERO_GRADIENT_SHARE = 0.01
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
    *("harness", "step order", "large ball", "noise", "zero gradient", "logit scale", "loss", "gradient-free"),
    *("transfer", "randomness", "twin", "file alone"),
)
"""In the order of docs/flags.md."""


@dataclass(frozen=True)
class Check:
    """A check for one kind of masking: its name (of :data:`FLAG_NAMES`), whether it is raised, and the evidence."""

    name: str
    raised: bool
    text: str
    evidence: dict[str, Any]

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
    return Check(
        "harness",
        kept > HARNESS_KEPT * images,
        f"a network without defence keeps {kept / images:.1%} at {255 * epsilon:g}/255",
        {"kept": kept, "images": images, "clean": clean, "epsilon": epsilon},
    )


def step_order(one_step: Comparison, more_steps: Comparison) -> Check:
    """PGD leaves over 0.5 points more than FGSM, or 50 steps of APGD leave over 1 point more than 100."""
    found = []
    if one_step.exceeds(STEP_ORDER_POINTS):
        found.append(f"one step breaks {_points(one_step)} more than 20 steps do")
    if more_steps.exceeds(MORE_STEPS_POINTS):
        found.append(f"100 steps break {_points(more_steps)} more than 50 do")
    return Check(
        "step order",
        bool(found),
        "; ".join(found) or "more steps break no less, and 50 are enough",
        {"pgd_minus_fgsm": one_step.to_dict(), "steps_50_minus_100": more_steps.to_dict()},
    )


def large_ball(*, kept: int, images: int, chance: float, against_small: Comparison, epsilon: float) -> Check:
    """Accuracy above chance in a ball where no image can be recognised, or more left there than in the smaller ball.

    kept: number of images right in the large ball, of radius epsilon. chance: accuracy of the best constant answer.
    against_small: the large ball (first) and that of the evaluation (second).
    """
    found = []
    if wilson_interval(kept, images)[0] > chance:
        found.append(f"{kept / images:.1%} left at epsilon {epsilon:g}, chance is {chance:.1%}")
    if against_small.exceeds(0.0):
        found.append(f"the larger ball leaves {_points(against_small)} more than the smaller one")
    return Check(
        "large ball",
        bool(found),
        "; ".join(found) or f"{kept / images:.1%} left at epsilon {epsilon:g}",
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
    return Check(
        "noise",
        pgd_against_noise.difference <= 0.0 and control.exceeds(CONTROL_POINTS),
        f"PGD breaks {_points(pgd_against_noise)} more than uniform noise; "
        f"of a network without defence it breaks {_points(control)}",
        {"noise_minus_pgd": pgd_against_noise.to_dict(), "control_clean_minus_pgd": control.to_dict()},
    )


def zero_gradient(*, zero: int, images: int) -> Check:
    """More than 1% of the images that are right without attack have an exactly zero gradient of cross-entropy."""
    return Check(
        "zero gradient",
        zero > ZERO_GRADIENT_SHARE * images,
        f"{zero / max(images, 1):.1%} of images have an exactly zero input gradient",
        {"zero": zero, "images": images},
    )


def logit_scale(plain_against_rescaled: Comparison, *, left: tuple[float, float]) -> Check:
    """PGD on rescaled logits, which changes no answer, breaks over 2 points more; left: the accuracies under both."""
    return Check(
        "logit scale",
        plain_against_rescaled.exceeds(LOGIT_SCALE_POINTS),
        f"cross-entropy leaves {left[0]:.1%}, rescaled logits leave {left[1]:.1%}",
        {"plain_minus_rescaled": plain_against_rescaled.to_dict(), "plain": left[0], "rescaled": left[1]},
    )


def loss(found: Sequence[tuple[str, Comparison, tuple[float, float]]]) -> Check:
    """Another loss breaks over 6 points more than cross-entropy (3 to 4 are usual).

    found: (name of the attack with the loss, cross-entropy against it, accuracies under both).
    """
    over = [entry for entry in found if entry[1].exceeds(LOSS_POINTS)] or list(found)
    name, _, left = max(over, key=lambda entry: entry[1].difference)
    return Check(
        "loss",
        any(comparison.exceeds(LOSS_POINTS) for _, comparison, _ in found),
        f"cross-entropy leaves {left[0]:.1%}, {name} leaves {left[1]:.1%}",
        {
            name: {**comparison.to_dict(), "cross_entropy": left[0], "other": left[1]}
            for name, comparison, left in found
        },
    )


def gradient_free(*, broken: int, left: int, images: int) -> Check:
    """Attacks without gradients break more than 1% of the images that white-box attacks left (broken, left)."""
    return Check(
        "gradient-free",
        broken > GRADIENT_FREE_SHARE * left and Comparison(images, broken, 0).exceeds(0.0),
        f"without gradients {broken} of the {left} images break that gradients left",
        {"broken": broken, "left": left, "images": images},
    )


def transfer(found: Sequence[tuple[str, Comparison]]) -> Check:
    """Adversarial images of a surrogate break over 2 points that white-box attacks left; found: by surrogate."""
    name, most = max(found, key=lambda entry: entry[1].difference)
    return Check(
        "transfer",
        any(comparison.exceeds(TRANSFER_POINTS) for _, comparison in found),
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
    return Check(
        "twin",
        not random and different > max(TWIN_SHARE * images, 1),
        f"twin and judge agree on {images - different:,} of {images:,} images",
        {"different": different, "images": images},
    )


def file_alone(found: Comparison, *, left: tuple[float, float]) -> Check:
    """The same attacks break over 1 point more through the file alone than through its model.pt.

    found: through model.pt (first) and through the file alone (second). left: the accuracies. Where the file alone
    breaks that much less, the evidence is ``weaker``.
    """
    weaker = Comparison(found.images, found.only_second, found.only_first).exceeds(FILE_ALONE_POINTS)
    return Check(
        "file alone",
        found.exceeds(FILE_ALONE_POINTS),
        f"the same attacks leave {left[1]:.1%} through the file alone, {left[0]:.1%} through model.pt",
        {"model_minus_file": found.to_dict(), "through_model": left[0], "through_file": left[1], "weaker": weaker},
    )


def _points(comparison: Comparison) -> str:
    return f"{100 * comparison.difference:.1f} points"
