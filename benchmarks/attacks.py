"""Our suite `standard` beside AutoAttack's standard suite from its own package: time and worst-case accuracy.

    python -m benchmarks.attacks --model float/best.pt --data cifar10.npz --images 1000
    python -m benchmarks.attacks --model hardened/best.pt --images 100 --pairs --steps 20 --queries 300

Both attack the same test images in the same batches, one after the other in one run. Ours is counted as `robustq
attack` counts it, on pictures rounded to uint8; theirs on its own float images, and again after rounding. Our seconds
are given for the stages (what AutoAttack's suite is compared with) and with the hunt for masking, which AutoAttack
leaves to its user. Transfer is left out, since AutoAttack has none.

`--pairs` compares attack by attack instead, each with the same budget on the same images: `--steps` for APGD (restarts
none, nine target classes) and FAB, `--queries` for Square. Its seconds are those of the processor, where there is no
GPU. Needs the packages of requirements-reference.txt.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

from robustq import progress
from robustq.attacks import ImageGenerators, apgd, apgd_targeted, fab_targeted, square
from robustq.attacks.ball import round_to_uint8
from robustq.attacks.base import Model
from robustq.data import to_float
from robustq.evaluation.accuracy import correct, wilson_interval
from robustq.evaluation.evaluator import DIAGNOSIS
from robustq.evaluation.result import Evaluation
from robustq.evaluation.robust_accuracy import run_suite
from robustq.workflow.open_model import open_attackable
from robustq.workflow.setup import DEFAULT_EPSILON, data_for, pick_device

LOG = logging.getLogger(__name__)


def main() -> None:
    """Run what the options ask for and print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", help="over what the model says")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, help="what the model was trained for, else 8/255")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--pairs", action="store_true", help="attack by attack instead of suite by suite")
    parser.add_argument("--steps", type=int, default=100, help="of APGD and FAB, with --pairs")
    parser.add_argument("--queries", type=int, default=5000, help="of Square, with --pairs")
    options = parser.parse_args()
    progress.show(True)
    opened = open_attackable(options.model, own_model=None, device=pick_device(options.device))
    data = data_for(opened.spec, options.data, opened.checkpoint, skip_bad_images=False)
    images, labels = data.test.take(options.images)
    epsilon = options.epsilon or opened.spec.epsilon or DEFAULT_EPSILON
    target, device = opened.target(), pick_device(options.device)
    x, y = to_float(images.to(device)), labels.to(device)
    print(f"{opened.spec.label}, {len(x)} images, epsilon {255 * epsilon:g}/255, {torch.get_num_threads()} thread(s)\n")
    if options.pairs:
        result = pairs(target.gradient_model, x, y, epsilon=epsilon, options=options)
    else:
        ours = run_suite(
            target,
            images,
            labels,
            suite="standard",
            epsilon=epsilon,
            device=device,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        theirs = autoattack(target.gradient_model, x, y, epsilon=epsilon, options=options)
        result = suites_table(ours, theirs)
    print("\n" + json.dumps(result))


@dataclass(frozen=True)
class Theirs:
    """AutoAttack's standard suite: images left as it counts them, and after rounding to uint8, and its seconds."""

    left: int
    left_rounded: int
    seconds: float


def autoattack(model: Model, x: Tensor, y: Tensor, *, epsilon: float, options: argparse.Namespace) -> Theirs:
    """Run it on the images."""
    start = time.perf_counter()
    suite = AutoAttack(model, norm="Linf", eps=epsilon, version="standard", seed=options.seed, device=x.device)
    x_adv, _ = suite.run_standard_evaluation(x, y, batch_size=options.batch_size)
    seconds = time.perf_counter() - start
    rounded = round_to_uint8(x_adv, x, epsilon=epsilon)
    return Theirs(left(model, x_adv, y, options.batch_size), left(model, rounded, y, options.batch_size), seconds)


def left(model: Model, x: Tensor, y: Tensor, batch_size: int) -> int:
    """How many images are still right."""
    return int(correct(model, x, y, batch_size=batch_size).sum())


def pairs(model: Model, x: Tensor, y: Tensor, *, epsilon: float, options: argparse.Namespace) -> dict[str, object]:
    """Each attack of AutoAttack's standard suite beside ours with the same budget."""
    steps, queries, seed = options.steps, options.queries, options.seed
    streams = ImageGenerators.of(seed, range(len(x)))
    same = {"norm": "Linf", "eps": epsilon, "seed": seed, "device": x.device}
    attacks: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "APGD-CE": (
            lambda: APGDAttack(model, n_iter=steps, loss="ce", logger=LOG, **same).perturb(x, y),
            lambda: apgd(model, x, y, epsilon=epsilon, steps=steps, generator=streams),
        ),
        "APGD-T": (
            lambda: APGDAttack_targeted(model, n_iter=steps, logger=LOG, **same).perturb(x, y),
            lambda: apgd_targeted(model, x, y, epsilon=epsilon, steps=steps, generator=streams),
        ),
        "FAB-T": (
            lambda: FABAttack_PT(model, n_iter=steps, targeted=True, **same).perturb(x, y),
            lambda: fab_targeted(model, x, y, epsilon=epsilon, steps=steps, generator=streams),
        ),
        "Square": (
            lambda: SquareAttack(model, n_queries=queries, resc_schedule=False, **same).perturb(x, y),
            lambda: square(model, x, y, epsilon=epsilon, queries=queries, generator=streams),
        ),
    }
    # On a CPU the seconds that were worked: other work on the machine does not lengthen them.
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    n = len(x)
    clean = left(model, x, y, options.batch_size)
    print(f"clean {clean / n:.1%}; steps {steps}, queries {queries}\n")
    print("| attack | AutoAttack's package leaves | ours leaves | s, theirs | s, ours | ratio |")
    print("|---|---|---|---|---|---|")
    found: dict[str, object] = {"clean": clean}
    for name, both in attacks.items():
        counted = []
        for attack in both:
            start = clock()
            x_adv = attack()
            counted.append((clock() - start, left(model, x_adv, y, options.batch_size)))
        (their_seconds, theirs), (our_seconds, ours) = counted
        found[name] = {"theirs": theirs, "ours": ours, "seconds_theirs": their_seconds, "seconds_ours": our_seconds}
        print(
            f"| {name} | {theirs / n:.1%} | {ours / n:.1%} | {their_seconds:.1f} | {our_seconds:.1f} "
            f"| {our_seconds / their_seconds:.2f} |",
            flush=True,
        )
    return found


def suites_table(ours: Evaluation, theirs: Theirs) -> dict[str, object]:
    """The two suites side by side."""
    stages = [trial for trial in ours.results if trial.stage != DIAGNOSIS]
    seconds, left_by_stages = sum(trial.seconds for trial in stages), stages[-1].remaining
    in_all = int(ours.robust.sum())

    def accuracy(count: int) -> str:
        low, high = wilson_interval(count, ours.images)
        return f"{count / ours.images:.1%} [{100 * low:.1f}, {100 * high:.1f}]"

    print(f"clean {accuracy(int(ours.clean.sum()))}\n")
    print("| suite | left, on uint8 pictures | left, on floats | s | ratio |\n|---|---|---|---|---|")
    rows = [
        ("AutoAttack standard", accuracy(theirs.left_rounded), accuracy(theirs.left), theirs.seconds),
        ("robustq standard, its stages", accuracy(left_by_stages), "", seconds),
        ("and its hunt for masking", accuracy(in_all), "", ours.seconds),
    ]
    for name, rounded, floats, spent in rows:
        print(f"| {name} | {rounded} | {floats} | {spent:.1f} | {spent / theirs.seconds:.2f} |")
    return {
        "images": ours.images,
        "clean": int(ours.clean.sum()),
        "theirs": asdict(theirs),
        "ours": {"left": left_by_stages, "left_in_all": in_all, "seconds": seconds, "seconds_in_all": ours.seconds},
        "trials": [trial.to_dict(images=ours.images) for trial in ours.results],
    }


if __name__ == "__main__":
    main()
