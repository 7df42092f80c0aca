"""Remaining images under each backward rule, and under other constants of the smooth one.

    python -m benchmarks.backward_rules MODEL --data cifar10 --epsilon 8 [--images 200] [--steps 10]

APGD on the margin, with the same start for every rule. `in all` counts images that also straight-through and
pass-through leave.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.output import head, make_parser, row
from robustq.attacks import ImageGenerators, apgd
from robustq.attacks.losses import margin
from robustq.checkpoint import load_model
from robustq.data import load_dataset, to_float
from robustq.models.quant import backward_rules
from robustq.models.quant.backward_rules import PASS_THROUGH, SMOOTH, STRAIGHT_THROUGH, under_rule

WAVES = (0.0, backward_rules.WAVE, 1.0)
SIGN_WIDTHS = (0.25, backward_rules.SIGN_WIDTH, 1.0)


def main() -> None:
    """Attack under every rule and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--epsilon", type=float, default=8.0, help="of 255")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, spec, _ = load_model(options.model)
    model.eval().requires_grad_(False)
    pixels, y = load_dataset(options.data).test.take(options.images)
    x = to_float(pixels)

    def kept(rule: str) -> Tensor:
        generators = ImageGenerators.of(options.seed, range(len(x)))
        source, epsilon = under_rule(model, rule), options.epsilon / 255
        x_adv = apgd(source, x, y, epsilon=epsilon, steps=options.steps, loss=margin, generator=generators)
        with torch.no_grad():
            return torch.as_tensor(model(x_adv).argmax(dim=1) == y)

    with torch.no_grad():
        clean = int((model(x).argmax(dim=1) == y).sum())
    print(f"{spec.label}, epsilon {options.epsilon:g}/255, {clean} of {len(x)} right without attack")
    head("rule", "remaining", "in all")
    both = torch.ones(len(y), dtype=torch.bool)
    for rule in (STRAIGHT_THROUGH, PASS_THROUGH):
        left = kept(rule)
        both &= left
        row(rule, int(left.sum()), int(both.sum()))
    for name, values in (("WAVE", WAVES), ("SIGN_WIDTH", SIGN_WIDTHS)):
        ours = getattr(backward_rules, name)
        for value in values:
            setattr(backward_rules, name, value)
            left = kept(SMOOTH)
            row(f"{SMOOTH}, {name} {value:g}", int(left.sum()), int((left & both).sum()))
        setattr(backward_rules, name, ours)


if __name__ == "__main__":
    main()
