"""Power of the flags: the gap that raises each in nine evaluations of ten, and how often its threshold does.

    python -m benchmarks.flag_power

Each image breaks, or answers otherwise, independently with the same probability, and none the other way round. Computed
from the binomial distribution, without a network.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.output import head, make_parser, row
from robustq.evaluation import flags
from robustq.evaluation.comparison import Comparison
from robustq.evaluation.diagnosis import IMAGES
from robustq.evaluation.flags import Check
from robustq.evaluation.flatness import IMAGES as FLAT_IMAGES
from robustq.evaluation.target import CALLS

# Not a plain import: scipy (here through scikit-learn) has no type stubs.
binom = importlib.import_module("scipy.stats").binom

POWER = 0.9
SIZES = (200, 500, 1000)
CHANCE = 0.1  # ten classes


@dataclass(frozen=True)
class Case:
    """A flag, its counted event, its threshold (a share), the images that are counted of all, and the check."""

    flag: str
    event: str
    threshold: float
    counted: Callable[[int], int]
    check: Callable[[int, int], Check]


def main() -> None:
    """Print the table."""
    make_parser(__doc__).parse_args()
    head("flag", "gap", "threshold", *(f"{size:,} images" for size in SIZES), "raised at the threshold, 200 images")
    for case in cases():
        gaps = [f"{100 * gap(case, case.counted(size)):.1f}" for size in SIZES]
        false_alarm = probability(raising(case, case.counted(SIZES[0])), case.counted(SIZES[0]), case.threshold)
        row(case.flag, case.event, f"{100 * case.threshold:g}", *gaps, f"{false_alarm:.1%}")
    least = 1.0 - (1.0 - POWER) ** (1.0 / CALLS)
    row("randomness", "calls that answer otherwise", "0", *[f"{100 * least:.1f}"] * len(SIZES), "0.0%")


def cases() -> list[Case]:
    """Every flag that counts images."""
    none = Comparison(1, 0, 0)
    left = (0.0, 0.0)

    def diagnosed(images: int) -> int:
        return min(images, IMAGES)

    def everything(images: int) -> int:
        return images

    def flat(images: int) -> int:
        return min(images, FLAT_IMAGES)

    def half(images: int) -> int:
        return images // 2

    def step_order(first: Comparison, second: Comparison, third: Comparison) -> Check:
        return flags.step_order(first, second, only_longer=third, steps=[50, 100])

    return [
        Case(
            "harness",
            "the control keeps",
            flags.HARNESS_KEPT,
            diagnosed,
            lambda count, images: flags.harness(kept=count, images=images, epsilon=0.5, clean=images),
        ),
        Case(
            "step order",
            "PGD leaves more than FGSM",
            flags.STEP_ORDER_POINTS / 100,
            diagnosed,
            lambda count, images: step_order(Comparison(images, count, 0), none, none),
        ),
        Case(
            "step order",
            "twice the steps leave more",
            flags.MORE_STEPS_POINTS / 100,
            diagnosed,
            lambda count, images: step_order(none, Comparison(images, count, 0), none),
        ),
        Case(
            "step order",
            "only longer runs break",
            flags.MORE_STEPS_POINTS / 100,
            everything,
            lambda count, images: step_order(none, none, Comparison(images, count, 0)),
        ),
        Case(
            "large ball",
            "kept, of ten classes",
            CHANCE,
            diagnosed,
            lambda count, images: flags.large_ball(
                kept=count, images=images, chance=CHANCE, against_small=none, epsilon=0.5
            ),
        ),
        Case(
            "zero gradient",
            "of the images",
            flags.ZERO_GRADIENT_SHARE,
            diagnosed,
            lambda count, images: flags.zero_gradient(zero=count, images=images),
        ),
        Case(
            "flat loss",
            "of the images",
            flags.FLAT_SHARE,
            flat,
            lambda count, images: flags.flat_loss(flat=count, images=images, of="", fixed_steps=none),
        ),
        Case(
            "flat loss",
            "only fixed steps break",
            flags.FIXED_STEP_POINTS / 100,
            everything,
            lambda count, images: flags.flat_loss(
                flat=0, images=images, of="", fixed_steps=Comparison(images, count, 0)
            ),
        ),
        Case(
            "logit scale",
            "only rescaled logits break",
            flags.LOGIT_SCALE_POINTS / 100,
            diagnosed,
            lambda count, images: flags.logit_scale(
                none, others_against_rescaled=Comparison(images, count, 0), left=left
            ),
        ),
        Case(
            "logit scale",
            "rescaled logits break more",
            flags.LOSS_POINTS / 100,
            diagnosed,
            lambda count, images: flags.logit_scale(
                Comparison(images, count, 0), others_against_rescaled=none, left=left
            ),
        ),
        Case(
            "loss",
            "another loss breaks more",
            flags.LOSS_POINTS / 100,
            everything,
            lambda count, images: flags.loss([("", Comparison(images, count, 0), left)]),
        ),
        Case(
            "gradient-free",
            "of the images left, if half are",
            flags.GRADIENT_FREE_SHARE,
            half,
            lambda count, images: flags.gradient_free(broken=count, left=images, images=2 * images),
        ),
        Case(
            "transfer",
            "only a surrogate's images break",
            flags.TRANSFER_POINTS / 100,
            everything,
            lambda count, images: flags.transfer([("", Comparison(images, count, 0))]),
        ),
        Case(
            "twin",
            "of the images",
            flags.TWIN_SHARE,
            everything,
            lambda count, images: flags.twin(different=count, images=images, random=False),
        ),
        Case(
            "file alone",
            "the file alone breaks more",
            flags.FILE_ALONE_POINTS / 100,
            diagnosed,
            lambda count, images: flags.file_alone(Comparison(images, count, 0), left=left),
        ),
    ]


def raising(case: Case, images: int) -> int:
    """The least count that raises the flag."""
    return next((count for count in range(1, images + 1) if case.check(count, images).raised), images + 1)


def probability(count: int, images: int, share: float) -> float:
    """Of that count or more."""
    return float(binom.sf(count - 1, images, share))


def gap(case: Case, images: int) -> float:
    """The least share, in steps of 0.1 points, at which the flag is raised with the wanted power."""
    count = raising(case, images)
    return next(step / 1000 for step in range(1001) if probability(count, images, step / 1000) >= POWER)


if __name__ == "__main__":
    main()
