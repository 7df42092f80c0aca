"""Suite `standard` compared with AutoAttack's standard suite from its own package: time and robust accuracy.

    python -m benchmarks.attacks --model float/best.pt --data cifar10.npz --images 1000
    python -m benchmarks.attacks --model hardened/best.pt --images 100 --pairs --steps 20 --queries 300

Both attack the same test images in the same batches, without transfer, which AutoAttack lacks, and take turns
(`--rounds`). Robustq counts uint8 images; AutoAttack's float images are counted as they are and after rounding. Seconds
are given for the stages and with the attacks for the flags, which AutoAttack lacks; CPU seconds without a GPU.

`--pairs` compares single attacks with equal budgets: `--steps` for APGD (no restarts, nine target classes) and FAB,
`--queries` for Square. Needs the packages of requirements-reference.txt.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

from benchmarks.output import head, make_parser, percent, ratio, row
from robustq import progress
from robustq.attacks import ImageGenerators, apgd, apgd_targeted, fab_targeted, square
from robustq.attacks.ball import round_to_uint8
from robustq.attacks.base import Model
from robustq.data import to_float
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.evaluation.evaluator import DIAGNOSIS
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import run_suite
from robustq.recipe import DEFAULT_EPSILON
from robustq.workflow.open_model import open_attackable
from robustq.workflow.prepared_target import prepared_target
from robustq.workflow.setup import data_for, pick_device

LOG = logging.getLogger(__name__)


def main() -> None:
    """Attack and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", help="default: as the model says")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, help="default: as the model says, else 8/255")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=1, help="turns that the suites take")
    parser.add_argument("--pairs", action="store_true", help="compare single attacks")
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB, with --pairs")
    parser.add_argument("--queries", type=int, default=5000, help="of Square, with --pairs")
    options = parser.parse_args()
    progress.show(True)
    opened = open_attackable(options.model, custom_model=None, device=pick_device(options.device))
    data = data_for(opened.spec, options.data, opened.checkpoint, skip_bad_images=False)
    images, labels = data.test.take(options.images)
    epsilon = options.epsilon or opened.spec.epsilon or DEFAULT_EPSILON
    target, device = opened.target(), pick_device(options.device)
    x, y = to_float(images.to(device)), labels.to(device)
    print(f"{opened.spec.label}, {len(x)} images, epsilon {255 * epsilon:g}/255, {torch.get_num_threads()} thread(s)\n")
    if options.pairs:
        pairs(target.gradient_model, x, y, epsilon=epsilon, options=options)
    else:
        settings = {"device": device, "batch_size": options.batch_size, "seed": options.seed}
        with prepared_target(target, opened.differentiable, images, compiled=False) as prepared:
            rounds = []
            for _ in range(options.rounds):  # alternately, on a machine with other work
                start = now(device)
                ours = run_suite(prepared, images, labels, suite="standard", epsilon=epsilon, **settings)
                spent = now(device) - start
                theirs = autoattack(prepared.gradient_model, x, y, epsilon=epsilon, options=options)
                rounds.append((ours, spent, theirs))
        suites_table(rounds)


@dataclass(frozen=True)
class AutoAttackResult:
    """Remaining images as AutoAttack counts them, and after rounding to uint8; seconds."""

    remaining: int
    remaining_rounded: int
    seconds: float


def autoattack(model: Model, x: Tensor, y: Tensor, *, epsilon: float, options: argparse.Namespace) -> AutoAttackResult:
    """Run AutoAttack's standard suite."""
    start = now(x.device)
    suite = AutoAttack(model, norm="Linf", eps=epsilon, version="standard", seed=options.seed, device=x.device)
    x_adv, _ = suite.run_standard_evaluation(x, y, batch_size=options.batch_size)
    seconds = now(x.device) - start
    rounded = round_to_uint8(x_adv, x, epsilon=epsilon)
    on_floats, on_uint8 = (remaining(model, images, y, options.batch_size) for images in (x_adv, rounded))
    return AutoAttackResult(on_floats, on_uint8, seconds)


def remaining(model: Model, x: Tensor, y: Tensor, batch_size: int) -> int:
    """Number of images that are still right."""
    return int(correct(model, x, y, batch_size=batch_size).sum())


def pairs(model: Model, x: Tensor, y: Tensor, *, epsilon: float, options: argparse.Namespace) -> None:
    """Each attack of AutoAttack's standard suite and robustq's with the same budget."""
    steps, queries, seed = options.steps, options.queries, options.seed
    generators = ImageGenerators.of(seed, range(len(x)))
    same = {"norm": "Linf", "eps": epsilon, "seed": seed, "device": x.device}
    attacks: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "APGD-CE": (
            lambda: APGDAttack(model, n_iter=steps, loss="ce", logger=LOG, **same).perturb(x, y),
            lambda: apgd(model, x, y, epsilon=epsilon, steps=steps, generator=generators),
        ),
        "APGD-T": (
            lambda: APGDAttack_targeted(model, n_iter=steps, logger=LOG, **same).perturb(x, y),
            lambda: apgd_targeted(model, x, y, epsilon=epsilon, steps=steps, generator=generators),
        ),
        "FAB-T": (
            lambda: FABAttack_PT(model, n_iter=steps, targeted=True, **same).perturb(x, y),
            lambda: fab_targeted(model, x, y, epsilon=epsilon, steps=steps, generator=generators),
        ),
        "Square": (
            lambda: SquareAttack(model, n_queries=queries, resc_schedule=False, **same).perturb(x, y),
            lambda: square(model, x, y, epsilon=epsilon, queries=queries, generator=generators),
        ),
    }
    n = len(x)
    clean = remaining(model, x, y, options.batch_size)
    print(f"clean {clean / n:.1%}; steps {steps}, queries {queries}\n")
    head("attack", "remaining after AutoAttack's", "after robustq's", "s, AutoAttack", "s, robustq", "ratio")
    for name, both in attacks.items():
        counted = []
        for attack in both:
            start = now(x.device)
            x_adv = attack()
            counted.append((now(x.device) - start, remaining(model, x_adv, y, options.batch_size)))
        (their_seconds, theirs), (our_seconds, ours) = counted
        shares = f"{theirs / n:.1%}", f"{ours / n:.1%}"
        row(name, *shares, f"{their_seconds:.1f}", f"{our_seconds:.1f}", f"{our_seconds / their_seconds:.2f}")


def suites_table(rounds: Sequence[tuple[Evaluation, float, AutoAttackResult]]) -> None:
    """Print both suites: the counts of the first round, and the times of all."""
    ours, _, theirs = rounds[0]
    stages = [trial for trial in ours.results if trial.stage != DIAGNOSIS]
    after_stages, in_all = stages[-1].remaining, int(ours.robust.sum())
    spent = [seconds for _, seconds, _ in rounds]
    of_stages = [
        seconds * sum(trial.seconds for trial in found.results if trial.stage != DIAGNOSIS) / found.seconds
        for found, seconds, _ in rounds
    ]
    their_seconds = [other.seconds for _, _, other in rounds]

    def accuracy(count: int) -> str:
        return percent(count / ours.images, wilson_interval(count, ours.images))

    print(f"clean {accuracy(int(ours.clean.sum()))}; {ours.verdict}; {', '.join(flag.name for flag in ours.flags)}\n")
    head("suite", "remaining, on uint8 images", "remaining, on floats", "s", "ratio")
    for name, rounded, floats, seconds in (
        ("AutoAttack standard", accuracy(theirs.remaining_rounded), accuracy(theirs.remaining), their_seconds),
        ("robustq standard, stages", accuracy(after_stages), "", of_stages),
        ("with the attacks for the flags", accuracy(in_all), "", spent),
    ):
        row(name, rounded, floats, f"{statistics.median(seconds):.1f}", ratio(seconds, their_seconds))


def now(device: torch.device) -> float:
    """CPU seconds of this process, which do not depend on other work on the machine; seconds with a GPU."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


if __name__ == "__main__":
    main()
