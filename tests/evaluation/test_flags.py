"""Each flag at its threshold: raised just beyond, not at it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from robustq.evaluation import flags
from robustq.evaluation.accuracy import Comparison
from robustq.evaluation.flags import Check

SAME = Comparison(1000, 0, 0)


def of(only_first: int, only_second: int = 0) -> Comparison:
    return Comparison(1000, only_first, only_second)


def gradient_free(broken: int, left: int, images: int = 1000) -> Check:
    return flags.gradient_free(broken=broken, left=left, images=images)


def large(kept: int, against_small: Comparison = SAME) -> Check:
    return flags.large_ball(kept=kept, images=1000, chance=0.1, against_small=against_small, epsilon=0.5)


CASES: list[tuple[str, Check, bool]] = [
    ("harness", flags.harness(kept=5, images=1000, epsilon=0.1, clean=900), False),
    ("harness", flags.harness(kept=6, images=1000, epsilon=0.1, clean=900), True),
    ("step order", flags.step_order(of(5), of(10)), False),
    ("step order", flags.step_order(of(6), of(10)), True),
    ("step order", flags.step_order(of(5), of(11)), True),
    ("large ball", large(100), False),
    ("large ball", large(118), False),  # its 95% interval reaches 10%
    ("large ball", large(125), True),
    ("large ball", large(50, of(3)), False),
    ("large ball", large(50, of(4)), True),
    ("noise", flags.noise(of(1), control=of(500)), False),
    ("noise", flags.noise(of(0), control=of(500)), True),
    ("noise", flags.noise(of(0, 7), control=of(51)), True),
    ("noise", flags.noise(of(0), control=of(50)), False),  # at this radius nobody loses anything
    ("zero gradient", flags.zero_gradient(zero=10, images=1000), False),
    ("zero gradient", flags.zero_gradient(zero=11, images=1000), True),
    ("logit scale", flags.logit_scale(of(20), left=(0.5, 0.48)), False),
    ("logit scale", flags.logit_scale(of(21), left=(0.5, 0.479)), True),
    ("loss", flags.loss([("margin", of(60), (0.5, 0.44)), ("dlr", of(30), (0.5, 0.47))]), False),
    ("loss", flags.loss([("margin", of(30), (0.5, 0.47)), ("dlr", of(61), (0.5, 0.439))]), True),
    ("gradient-free", gradient_free(4, 400), False),
    ("gradient-free", gradient_free(5, 400), True),
    ("gradient-free", gradient_free(3, 10), False),  # three of a thousand are within chance
    ("transfer", flags.transfer([("a", of(20)), ("b", of(3))]), False),
    ("transfer", flags.transfer([("a", of(3)), ("b", of(21))]), True),
    ("randomness", flags.randomness(share=0.0, draws=8), False),
    ("randomness", flags.randomness(share=0.01, draws=8), True),
    ("twin", flags.twin(different=1, images=1000, random=False), False),
    ("twin", flags.twin(different=2, images=1000, random=False), True),
    ("twin", flags.twin(different=400, images=1000, random=True), False),
    ("file alone", flags.file_alone(of(10), left=(0.5, 0.49)), False),
    ("file alone", flags.file_alone(of(11), left=(0.5, 0.489)), True),
    ("file alone", flags.file_alone(of(200, 189), left=(0.5, 0.489)), False),  # within the interval
    ("file alone", flags.file_alone(of(0, 11), left=(0.5, 0.511)), False),
]


@pytest.mark.parametrize(("name", "check", "raised"), CASES)
def test_a_flag_is_raised_beyond_its_threshold(name: str, check: Check, raised: bool) -> None:
    assert (check.name, check.raised) == (name, raised)
    assert check.text and "\n" not in check.text
    assert check.evidence
    assert check.to_dict()["doc"] == f"docs/flags.md#{name.replace(' ', '-')}"


def test_a_file_that_gives_weaker_gradients_says_so() -> None:
    weaker = [flags.file_alone(found, left=(0.5, 0.5)).evidence["weaker"] for found in (of(0, 10), of(0, 11), of(11))]
    assert weaker == [False, True, False]


def test_every_flag_is_tested_and_explained() -> None:
    assert {name for name, _, raised in CASES if raised} == set(flags.FLAG_NAMES)
    text = (Path(__file__).parents[2] / "docs" / "flags.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in flags.FLAG_NAMES] == list(flags.FLAG_NAMES)
