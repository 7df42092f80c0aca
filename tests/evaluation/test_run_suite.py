"""The engine: who is asked, what counts, what is dropped, and what random numbers depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import fgsm, pgd, random_corners, square, uniform_noise
from robustq.data import to_float
from robustq.errors import UsageError
from robustq.evaluation.accuracy import correct
from robustq.evaluation.result import Evaluation
from robustq.evaluation.robust_accuracy import evaluate, find_suite, run_suite
from robustq.evaluation.suites import RECHECK, NamedAttack, Suite
from robustq.evaluation.target import AS_TRAINED, DRAWS, Target, settled
from tests.evaluation.budgets import small
from tests.evaluation.nets import Net, ResizedAndPadded, Scaled, trained
from tests.models.small_nets import digits

CPU = torch.device("cpu")
EPSILON = 32 / 255

QUICK = Suite(
    "quick",
    (
        NamedAttack("noise", uniform_noise, asks="judge"),
        NamedAttack("fgsm", fgsm, random=False),
        NamedAttack("pgd", pgd, {"steps": 5, "keep_best": True}),
    ),
    checks_masking=False,
)


def few(count: int = 60) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images[:count], labels[:count]


def run(target: Target, suite: Suite | str = QUICK, *, count: int = 60, **more: Any) -> Evaluation:
    images, labels = few(count)
    return run_suite(target, images, labels, suite=suite, **{"epsilon": EPSILON, "device": CPU, **more})


class Recording:
    """A model that remembers how many images each call had, and whether a gradient was wanted."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append((len(x), x.requires_grad))
        return self.model(x)


# --- what counts -----------------------------------------------------------------------------------------------------


def test_pictures_are_the_proof_of_every_count() -> None:
    model = trained("natural")
    images, labels = few()
    found = run(Target.of(model))
    # The judge is wrong on exactly the pictures of the images that do not count as robust.
    right = correct(model, to_float(found.x_adv), labels, batch_size=256)
    assert torch.equal(right & found.clean, found.robust)
    levels = (found.x_adv.int() - images.int()).abs()
    assert int(levels.max()) == 32
    assert found.x_adv.dtype == torch.uint8
    # One letter for each: wrong as it is, broken by, or the worst that was tried.
    assert [name == "clean" for name in found.found_by] == (~found.clean).tolist()
    assert set(found.found_by) <= {"clean", "noise", "fgsm", "pgd"}
    assert torch.equal(found.x_adv[~found.clean], images[~found.clean])
    assert 0.0 < found.robust_accuracy < found.clean_accuracy


def test_the_judge_counts_and_not_the_source() -> None:
    images, labels = few()
    source = trained("natural")

    def judge(x: Tensor) -> Tensor:
        """Right on whatever is within 32 levels of an image that it knows."""
        levels = (x * 255).round()[:, None] - images.float()[None]
        nearest = levels.abs().flatten(2).amax(dim=2).argmin(dim=1)
        return nn.functional.one_hot(labels[nearest], 10).float()

    found = run(Target(judge, {AS_TRAINED: source}))
    assert found.clean_accuracy == found.robust_accuracy == 1.0
    assert found.twin_agreement < 1.0


HUNTING = Suite(
    "hunting",
    (
        NamedAttack("corners", random_corners, {"corners": 5}, asks="judge", hunts=True),
        NamedAttack("square", square, {"queries": 20}, asks="judge", hunts=True),
    ),
    checks_masking=False,
)


def test_what_guides_a_search_is_not_what_counts() -> None:
    model = trained("natural")
    judge, guide = Recording(model), Recording(model)
    plain = run(Target(model, {AS_TRAINED: model}), HUNTING)
    guided = run(Target(judge, {AS_TRAINED: model}, guide=guide), HUNTING)
    assert torch.equal(guided.robust, plain.robust) and torch.equal(guided.x_adv, plain.x_adv)
    assert 0.0 < guided.robust_accuracy < guided.clean_accuracy
    # The judge hears of clean images, of what broke the guide, and of what is left.
    assert sum(count for count, _ in judge.calls) < sum(count for count, _ in guide.calls)

    def wrong(x: Tensor) -> Tensor:
        return cast("Tensor", -model(x))

    misled = run(Target(model, {AS_TRAINED: model}, guide=wrong), HUNTING)
    right = correct(model, to_float(misled.x_adv), few()[1], batch_size=256)
    assert torch.equal(right & misled.clean, misled.robust)
    assert torch.equal(misled.clean, plain.clean)


def test_a_judge_that_is_asked_otherwise_has_no_guide() -> None:
    model = trained("natural")
    x = to_float(few()[0])

    def random(x: Tensor) -> Tensor:
        return cast("Tensor", model(x) + torch.randn(len(x), 10))

    def of_its_batch(x: Tensor) -> Tensor:
        return cast("Tensor", model(x) * (1.0 + x.mean() + 0.1 * len(x)))

    for judge, alone in ((random, False), (of_its_batch, False), (model, True)):
        target, _ = settled(Target(judge, {AS_TRAINED: model}, guide=model, image_by_image=alone), x, batch_size=60)
        assert target.guide is None and target.query_model is target.judge
    target, _ = settled(Target(model, {AS_TRAINED: model}, guide=model), x, batch_size=60)
    assert target.guide is model


def test_only_rounded_pictures_inside_the_ball_count() -> None:
    def cheat(model: object, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        return x + 0.4 / 255  # breaks a judge that sees floats, and rounds to the clean picture

    def far(model: object, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        return 1.0 - x

    def judge(x: Tensor) -> Tensor:
        clean = ((x * 255) - (x * 255).round()).abs().flatten(1).amax(dim=1) < 1e-3
        distance = (x[:, None] - to_float(few()[0])[None]).abs().flatten(2).amax(dim=2).amin(dim=1)
        near = distance <= EPSILON + 1e-6
        return nn.functional.one_hot(torch.where(clean & near, 0, 1), 2).float()

    images, labels = few()
    suite = Suite(
        "cheats",
        (NamedAttack("cheat", cheat, random=False), NamedAttack("far", far, random=False)),
        checks_masking=False,
    )
    target = Target(judge, {AS_TRAINED: trained("natural")})
    found = run_suite(target, images, torch.zeros_like(labels), suite=suite, epsilon=EPSILON, device=CPU)
    assert found.robust_accuracy == 1.0


def test_broken_images_are_dropped_from_later_attacks() -> None:
    found = run(Target.of(trained("natural")))
    standing = int(found.clean.sum())
    for trial in found.results:
        assert len(trial.places) == standing
        standing = trial.remaining
        assert standing == len(trial.kept_indices)
    assert standing == int(found.robust.sum()) < int(found.clean.sum())
    # FGSM takes one gradient of each image that it meets, PGD five.
    steps = {trial.name: trial.gradient_steps for trial in found.results}
    met = {trial.name: len(trial.places) for trial in found.results}
    assert steps == {"noise": 0, "fgsm": met["fgsm"], "pgd": 5 * met["pgd"]}
    assert found.to_dict()["gradient_steps"] == sum(steps.values())


def test_columns_are_counted_over_all_images() -> None:
    model = trained("natural")
    images, labels = few()
    found = evaluate(model, model, images, labels, attacks=RECHECK, epsilon=EPSILON, device=CPU)
    assert set(found.attacked) == {"fgsm", "pgd20", "margin_pgd40"}
    assert all(len(kept) == len(images) for kept in found.attacked.values())
    worst = found.clean.clone()
    for kept in found.attacked.values():
        worst &= kept
    assert torch.equal(worst, found.robust)
    assert found.verdict == "not judged"


def test_queries_count_what_the_judge_was_asked() -> None:
    judge = Recording(trained("natural"))
    found = run(Target(judge, {AS_TRAINED: trained("natural")}))
    assert not any(wants for _, wants in judge.calls)
    asked_by_attacks = sum(trial.queries for trial in found.results if trial.name == "noise")
    assert asked_by_attacks == int(found.clean.sum())
    assert sum(count for count, _ in judge.calls) >= found.to_dict()["queries"]


def test_a_smaller_ball_is_taken_over() -> None:
    target = Target.of(trained("natural"))
    small = run(target, epsilon=16 / 255)
    nothing = Suite("nothing", (), checks_masking=False)
    taken = run(target, nothing, known=small)
    assert torch.equal(taken.robust, small.robust)
    assert torch.equal(taken.x_adv[~small.robust], small.x_adv[~small.robust])
    assert run(target, known=small).robust_accuracy <= min(small.robust_accuracy, run(target).robust_accuracy)


# --- random numbers --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits() -> None:
    target = Target.of(trained("natural"))
    torch.manual_seed(1)
    first = run(target, small("standard"), count=40)
    torch.rand(3)  # the global stream takes no part
    state = torch.random.get_rng_state()
    again = run(target, small("standard"), count=40)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.x_adv, again.x_adv)
    assert first.found_by == again.found_by
    other = run(target, small("standard"), count=40, seed=1)
    assert not torch.equal(first.x_adv, other.x_adv)


@pytest.mark.parametrize(
    "suite",
    [
        small("standard"),
        small("full"),
        small("paper"),
        pytest.param(find_suite("standard"), marks=pytest.mark.slow, id="whole"),
    ],
    ids=lambda suite: suite.name,
)
def test_another_batch_size_changes_at_most_one_image(suite: Suite) -> None:
    model = trained("n-fgsm")
    assert isinstance(model, Net)
    target = Target(model, {AS_TRAINED: model}, features=model.features, surrogates={"other": trained("natural", 1)})
    plain = replace(suite, checks_masking=False)
    found = [run(target, plain, count=60, batch_size=batch_size) for batch_size in (13, 32, 60)]
    # Kernels sum in another order at another batch size, which may turn an image that sits on a boundary.
    robust = [int(one.robust.sum()) for one in found]
    assert max(robust) - min(robust) <= 1
    assert 0 < robust[0] < int(found[0].clean.sum())
    assert list(found[0].attacked) == list(found[1].attacked) == list(found[2].attacked)
    for name in found[0].attacked:
        broken = [int((~one.attacked[name]).sum()) for one in found]
        assert max(broken) - min(broken) <= 1, name


def test_an_image_meets_the_same_attack_whatever_becomes_of_the_others() -> None:
    model = trained("natural")
    images, labels = few(20)
    target = Target(model, {AS_TRAINED: model})
    whole = run_suite(target, images, labels, suite=QUICK, epsilon=EPSILON, device=CPU, batch_size=20)
    # The first half is mislabelled, so that none of it is attacked.
    wrong = torch.cat([(labels[:10] + 1) % 10, labels[10:]])
    half = run_suite(target, images, wrong, suite=QUICK, epsilon=EPSILON, device=CPU, batch_size=20)
    same = (whole.x_adv[10:] == half.x_adv[10:]).flatten(1).all(dim=1)
    # Only the number of images in a batch differs, and with it the rounding of sums.
    assert int(same.sum()) >= 9


# --- judges of every kind --------------------------------------------------------------------------------------------


def test_a_judge_that_depends_on_the_batch_is_asked_one_by_one() -> None:
    model = trained("natural")

    def dynamic(x: Tensor) -> Tensor:
        logits = model(x)
        return torch.as_tensor(logits / logits.abs().max())

    judge = Recording(dynamic)
    found = run(Target(judge, {AS_TRAINED: model}))
    assert "judged image by image" in " ".join(found.notes)
    assert {count for count, _ in judge.calls[-60:]} == {1}
    told = Recording(model)
    run(Target(told, {AS_TRAINED: model}, image_by_image=True))
    assert {count for count, _ in told.calls} == {1}
    assert not run(Target.of(model)).notes


def test_a_judge_that_answers_at_random_is_attacked_in_the_mean() -> None:
    model = ResizedAndPadded(trained("natural"))
    found = run(Target.of(model), small("standard"), count=40)
    assert "randomness" in [check.name for check in found.flags]
    (check,) = (check for check in found.checks if check.name == "randomness")
    assert check.evidence["draws"] == DRAWS
    assert torch.equal(found.x_adv, run(Target.of(model), small("standard"), count=40).x_adv)


class Constant(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0.0 * x.flatten(1).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("suite", ["standard", "paper", "recheck"])
def test_nan_logits_are_never_right(suite: str) -> None:
    found = run(Target.of(Constant([float("nan")] * 10)), suite, count=12)
    assert found.clean_accuracy == found.robust_accuracy == 0.0
    assert "12 clean images get NaN logits" in " ".join(found.notes)


@pytest.mark.parametrize("suite", ["standard", "paper"])
def test_constant_logits_keep_their_class_and_are_flagged(suite: str) -> None:
    model = Constant([0.0] * 10)
    images, labels = few(250)
    target = Target(model, {AS_TRAINED: model}, control=trained("natural"))
    found = run_suite(target, images, labels, suite=suite, epsilon=EPSILON, device=CPU)
    assert found.clean_accuracy == found.robust_accuracy == int((labels == 0).sum()) / 250
    if suite == "standard":
        assert "zero gradient" in [check.name for check in found.flags]
        assert found.verdict == "upper bound: masking suspected"


@pytest.mark.parametrize("suite", ["standard", "paper"])
def test_one_class_leaves_nothing_to_attack(suite: str) -> None:
    images, labels = few(12)
    found = run_suite(
        Target.of(Constant([0.0])), images, torch.zeros_like(labels), suite=suite, epsilon=EPSILON, device=CPU
    )
    assert found.clean_accuracy == found.robust_accuracy == 1.0
    assert found.verdict == "not judged"
    assert not found.results


@pytest.mark.parametrize("suite", ["standard", "paper", "recheck"])
def test_one_image(suite: str) -> None:
    found = run(Target.of(trained("natural")), suite, count=1)
    assert found.images == 1
    assert found.verdict in ("not judged", "upper bound: masking suspected")
    assert found.to_dict()["interval"][1] <= 1.0


def test_epsilon_zero_attacks_nothing() -> None:
    found = run(Target.of(trained("natural")), "standard", epsilon=0.0)
    assert found.robust_accuracy == found.clean_accuracy
    assert not found.results
    assert found.verdict == "not judged"
    assert "nothing to attack at epsilon 0" in " ".join(found.not_judged_for)


def test_images_of_another_size_end_in_one_line() -> None:
    images, labels = few(5)
    with pytest.raises(UsageError, match=r"cannot take images of shape \(1, 8, 6\)") as told:
        run_suite(Target.of(trained("natural")), images[..., :6], labels, epsilon=EPSILON, device=CPU)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, "no images"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "5 images and 3 labels"),
        ({"labels": torch.full((5,), 10)}, "labels go from 10 to 10"),
        ({"labels": torch.full((5,), -1)}, "labels go from -1 to -1"),
        ({"epsilon": 0.5 / 255}, "below one grey level"),
        ({"epsilon": 8.0}, "epsilon is 8.0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"suite": "standart"}, "unknown suite 'standart'"),
    ],
)
def test_bad_input_is_one_line(more: dict[str, Any], told: str) -> None:
    images, labels = few(5)
    arguments: dict[str, Any] = {"images": images, "labels": labels, "epsilon": EPSILON, "device": CPU, **more}
    with pytest.raises(UsageError, match=told):
        run_suite(Target.of(trained("natural")), **arguments)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_without_a_control_nothing_is_judged() -> None:
    found = run(Target.of(trained("n-fgsm")), small("standard"), count=210)
    assert found.verdict == "not judged"
    assert not {"harness", "noise", "transfer"} & {check.name for check in found.checks}
    assert any("control" in reason for reason in found.not_judged_for)


def raised(target: Target, **more: Any) -> dict[str, dict[str, Any]]:
    """Evidence of each flag that a small hunt raises."""
    return {check.name: check.evidence for check in run(target, small("standard"), **more).flags}


def test_a_control_that_stands_is_the_fault_of_the_harness() -> None:
    model = trained("n-fgsm")
    flags = raised(Target(model, {AS_TRAINED: model}, control=Constant([1.0] + [0.0] * 9)))
    # It was attacked in ever larger balls, as far as they go.
    assert flags["harness"]["epsilon"] == 0.5
    assert flags["harness"]["kept"] == flags["harness"]["clean"] > 0
    fallen = run(Target(model, {AS_TRAINED: model}, control=trained("natural", 1)), small("standard"))
    (harness,) = (check for check in fallen.checks if check.name == "harness")
    assert not harness.raised and harness.evidence["kept"] == 0
    # At 32/255 it stands too well to tell: natural digits need twice that.
    assert harness.evidence["epsilon"] == 2 * EPSILON


def test_gradients_of_another_model_are_a_flag() -> None:
    backwards = Scaled(trained("natural"), -1.0)
    assert raised(Target(trained("natural"), {AS_TRAINED: backwards}))["twin"] == {"different": 60, "images": 60}


def test_few_images_are_not_judged() -> None:
    model = trained("n-fgsm")
    found = run(Target(model, {AS_TRAINED: model}, control=trained("natural", 1)), small("standard"), count=30)
    assert found.verdict == "not judged"
    assert found.not_judged_for == ["30 images are too few, 200 would do"]


def test_suites_have_the_stages_that_they_promise() -> None:
    stages = {name: list(dict.fromkeys(a.stage for a in find_suite(name).attacks)) for name in ("standard", "full")}
    five = ["noise and corners", "white-box", "features", "transfer", "square"]
    assert stages == {"standard": five, "full": [*five, "hard label"]}
    budgets = {a.name: dict(a.settings) for a in find_suite("standard").attacks}
    assert budgets["corners"] == {"corners": 20}
    assert budgets["apgd-ce"]["steps"] == budgets["apgd-margin"]["steps"] == budgets["apgd-t"]["steps"] == 50
    assert budgets["pgd++"] == {"steps": 20}
    assert budgets["square"] == {"queries": 1000}
    full = {a.name: dict(a.settings) for a in find_suite("full").attacks}
    assert full["apgd-ce"]["steps"] == full["apgd-t"]["steps"] == full["fab-t"]["steps"] == 100
    assert full["apgd-t"]["target_classes"] == full["fab-t"]["target_classes"] == 9
    assert full["square"] == {"queries": 5000}


# --- what an attack may use ------------------------------------------------------------------------------------------


def test_every_backward_rule_is_attacked_and_a_column_has_one() -> None:
    rules = {AS_TRAINED: trained("natural"), "other": trained("natural", 1)}
    target = Target(trained("natural"), rules)
    dropping = run(target, replace(small("standard"), checks_masking=False))
    for name in ("apgd-ce", "apgd-margin", "apgd-t", "pgd++"):
        assert {name, f"{name} (other)"} <= dropping.attacked.keys()
    assert {"corners", "square", "uniform noise"} <= dropping.attacked.keys()
    columns = run(target, small("paper"))
    assert list(columns.attacked) == ["gn", "fgsm", "pgd20", "bim20", "tpgd20"]


def test_the_papers_second_columns_are_found_on_surrogates() -> None:
    model = trained("natural")
    alone = run(Target.of(model), "paper")
    target = Target(model, {AS_TRAINED: model}, surrogates={"twin": model, "robust": trained("n-fgsm")})
    found = run(target, "paper")
    assert list(found.attacked)[:5] == list(alone.attacked)
    assert list(found.attacked)[5:] == [
        f"{name} (B: {other})" for other in ("twin", "robust") for name in alone.attacked
    ]
    # Found on the very model that is judged, they are the white-box columns.
    for name, kept in alone.attacked.items():
        assert torch.equal(found.attacked[f"{name} (B: twin)"], kept)
    assert float(found.attacked["pgd20 (B: robust)"].float().mean()) > float(alone.attacked["pgd20"].float().mean())


def test_surrogates_and_features_are_asked_and_counted() -> None:
    model, other = trained("n-fgsm"), trained("natural", 1)
    assert isinstance(model, Net)
    target = Target(model, {AS_TRAINED: model}, features=model.features, surrogates={"other": other})
    found = run(target, replace(small("standard"), checks_masking=False))
    trials = {trial.name: trial for trial in found.results}
    assert trials["features"].gradient_steps == 5 * len(trials["features"].places)
    # APGD takes a gradient at its start and after each of its steps but the last.
    assert trials["transfer: other"].gradient_steps == 5 * len(trials["transfer: other"].places)
    assert trials["transfer: other"].queries >= len(trials["transfer: other"].places)
