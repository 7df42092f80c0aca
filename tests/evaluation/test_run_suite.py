"""Suites of attacks: the models that are queried, the images that count and drop out, and the verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import fgsm, pgd, random_corners, square, uniform_noise
from robustq.data import to_float
from robustq.errors import UsageError
from robustq.evaluation.accuracy import correct
from robustq.evaluation.flags import MASKED, Check
from robustq.evaluation.result import Evaluation
from robustq.evaluation.run_suite import evaluate, find_suite, run_suite
from robustq.evaluation.suites import RECHECK, NamedAttack, Suite
from robustq.evaluation.target import AS_TRAINED, DRAWS, Target, adapt_target
from tests.evaluation.budgets import small
from tests.evaluation.nets import Net, ResizedAndPadded, Scaled, trained
from tests.models.small_nets import digits

CPU = torch.device("cpu")
EPSILON = 32 / 255

QUICK = Suite(
    "quick",
    (
        NamedAttack("noise", uniform_noise, uses="queries"),
        NamedAttack("fgsm", fgsm),
        NamedAttack("pgd", pgd, {"steps": 5, "keep_best": True}),
    ),
    checks_masking=False,
)
SEARCHES = Suite(
    "searches",
    (
        NamedAttack("corners", random_corners, {"corners": 5}, uses="queries"),
        NamedAttack("square", square, {"queries": 20}, uses="queries"),
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


class Constant(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0.0 * x.flatten(1).sum(dim=1, keepdim=True)


# --- what counts -----------------------------------------------------------------------------------------------------


def test_adversarial_images_are_the_proof_of_every_count() -> None:
    model = trained("natural")
    images, labels = few()
    found = run(Target.of(model))
    # The judge is wrong on exactly the adversarial images of the images that do not count as robust.
    right = correct(model, to_float(found.x_adv), labels, batch_size=256)
    assert torch.equal(right & found.clean, found.robust)
    assert int((found.x_adv.int() - images.int()).abs().max()) == 32
    assert found.x_adv.dtype == torch.uint8
    assert [name == "clean" for name in found.found_by] == (~found.clean).tolist()
    assert set(found.found_by) <= {"clean", "noise", "fgsm", "pgd"}
    assert torch.equal(found.x_adv[~found.clean], images[~found.clean])
    assert 0.0 < found.robust_accuracy < found.clean_accuracy
    # Broken images are dropped from later attacks.
    remaining = int(found.clean.sum())
    for result in found.results:
        assert len(result.indices) == remaining
        remaining = result.remaining
        assert remaining == len(result.kept_indices)
    assert remaining == int(found.robust.sum())
    # FGSM takes one gradient of each image that it meets, PGD five.
    met = {result.name: len(result.indices) for result in found.results}
    steps = {result.name: result.gradient_steps for result in found.results}
    assert steps == {"noise": 0, "fgsm": met["fgsm"], "pgd": 5 * met["pgd"]}
    assert found.to_dict()["gradient_steps"] == sum(steps.values())


def test_only_the_judge_counts_and_only_rounded_images_inside_the_ball() -> None:
    def cheat(model: object, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        return x + 0.4 / 255  # breaks a judge that sees floats, and rounds to the clean image

    def far(model: object, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
        return 1.0 - x

    images, labels = few()

    def judge(x: Tensor) -> Tensor:
        """Right on uint8 images within 32 levels of one that it knows."""
        off = ((x * 255) - (x * 255).round()).abs().flatten(1).amax(dim=1) > 1e-3
        levels = ((x * 255).round()[:, None] - images.float()[None]).abs().flatten(2).amax(dim=2)
        known = labels[levels.argmin(dim=1)]
        wrong = off | (levels.amin(dim=1) > 32)
        return nn.functional.one_hot(torch.where(wrong, (known + 1) % 10, known), 10).float()

    suite = replace(QUICK, attacks=(*QUICK.attacks, NamedAttack("cheat", cheat), NamedAttack("far", far)))
    found = run(Target(judge, {AS_TRAINED: trained("natural")}), suite)
    assert found.clean_accuracy == found.robust_accuracy == 1.0
    assert found.twin_agreement is not None and found.twin_agreement < 1.0


def test_a_proxy_is_queried_and_the_judge_counts() -> None:
    model = trained("natural")
    judge, proxy = Recording(model), Recording(model)
    plain = run(Target(model, {AS_TRAINED: model}), SEARCHES)
    found = run(Target(judge, {AS_TRAINED: model}, proxy=proxy), SEARCHES)
    assert torch.equal(found.robust, plain.robust) and torch.equal(found.x_adv, plain.x_adv)
    assert 0.0 < found.robust_accuracy < found.clean_accuracy
    # The judge gets clean images, images that broke the proxy, and the last ones.
    assert sum(count for count, _ in judge.calls) < sum(count for count, _ in proxy.calls)
    assert not any(wants_gradient for _, wants_gradient in judge.calls)
    misled = run(Target(model, {AS_TRAINED: model}, proxy=Scaled(model, -1.0)), SEARCHES)
    right = correct(model, to_float(misled.x_adv), few()[1], batch_size=256)
    assert torch.equal(right & misled.clean, misled.robust)
    assert torch.equal(misled.clean, plain.clean)


def test_columns_are_counted_over_all_images() -> None:
    model = trained("natural")
    images, labels = few()
    found = evaluate(model, model, images, labels, attacks=RECHECK, epsilon=EPSILON, device=CPU)
    assert set(found.attacked) == {"fgsm", "pgd20", "margin_pgd40"}
    assert all(len(kept) == len(images) for kept in found.attacked.values())
    worst = torch.stack([found.clean, *found.attacked.values()]).all(dim=0)
    assert torch.equal(worst, found.robust)
    assert found.verdict == "not judged"


def test_a_smaller_ball_is_taken_over() -> None:
    target = Target.of(trained("natural"))
    inner = run(target, epsilon=16 / 255)
    taken = run(target, Suite("nothing", (), checks_masking=False), known=inner)
    assert torch.equal(taken.robust, inner.robust)
    assert torch.equal(taken.x_adv[~inner.robust], inner.x_adv[~inner.robust])


# --- random numbers --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits() -> None:
    target = Target.of(trained("natural"))
    torch.manual_seed(1)
    first = run(target, small("standard"), count=40)
    torch.rand(3)  # the global generator takes no part
    state = torch.random.get_rng_state()
    again = run(target, small("standard"), count=40)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.x_adv, again.x_adv)
    assert first.found_by == again.found_by
    other = run(target, small("standard"), count=40, seed=1)
    assert not torch.equal(first.x_adv, other.x_adv)


# --- judges of every kind --------------------------------------------------------------------------------------------


def test_a_judge_that_depends_on_the_batch_gets_one_image_at_a_time() -> None:
    model = trained("natural")

    def dynamic(x: Tensor) -> Tensor:
        logits = model(x)
        return torch.as_tensor(logits / logits.abs().max())

    judge = Recording(dynamic)
    found = run(Target(judge, {AS_TRAINED: model}))
    assert "judged image by image" in " ".join(found.notes)
    assert {count for count, _ in judge.calls[-60:]} == {1}
    declared = Recording(model)
    run(Target(declared, {AS_TRAINED: model}, image_by_image=True))
    assert {count for count, _ in declared.calls} == {1}
    assert not run(Target.of(model)).notes


def test_a_random_judge_is_attacked_in_the_mean_and_the_lower_of_mean_and_single_answers_counts() -> None:
    target = Target.of(ResizedAndPadded(trained("natural")))
    found = run(target, small("standard"), count=40)
    (check,) = (check for check in found.flags if check.name == "randomness")
    assert check.evidence["draws"] == DRAWS
    assert torch.equal(found.x_adv, run(target, small("standard"), count=40).x_adv)


@pytest.mark.parametrize("right", [0.7, 0.3])
def test_a_single_random_answer_is_right_as_often_as_it_is(right: float) -> None:
    images, labels = few(200)

    def judge(x: Tensor) -> Tensor:
        """Of the label or of one other class, at random in each call, whatever the pixels."""
        rows = torch.cdist(x.flatten(1), to_float(images).flatten(1)).argmin(dim=1)
        hit = torch.rand(len(x)) < right
        return nn.functional.one_hot(torch.where(hit, labels[rows], (labels[rows] + 1) % 10), 10).float()

    found = run(Target(judge, {}), SEARCHES, count=200, epsilon=0.0)
    answers = found.to_dict()["random_answers"]
    # 200 images of 32 answers have a standard deviation of 0.006; the lower of two counts of each image is 0.09 less.
    assert answers["single"]["clean_accuracy"] == pytest.approx(right, abs=0.02)
    assert right - 0.1 < answers["single"]["robust_accuracy"] <= answers["single"]["clean_accuracy"]
    lower = min(answers["single"]["robust_accuracy"], answers["mean"]["robust_accuracy"])
    assert found.robust_accuracy == lower
    # The mean of eight answers is right more often than one if most answers are, and else less often.
    assert (answers["single"]["robust_accuracy"] == lower) == (right > 0.5)
    low, high = found.interval
    assert low < lower < high


def test_a_judge_that_is_wrapped_has_no_proxy() -> None:
    model, x = trained("natural"), to_float(few()[0])
    judges: list[tuple[Callable[[Tensor], Tensor], bool, bool]] = [
        (lambda x: model(x) + torch.randn(len(x), 10), False, False),
        (lambda x: model(x) * (1.0 + x.mean() + 0.1 * len(x)), False, False),
        (model, True, False),
        (model, False, True),
    ]
    for judge, alone, has_proxy in judges:
        target = Target(judge, {AS_TRAINED: model}, proxy=model, image_by_image=alone)
        adapted, _ = adapt_target(target, x, batch_size=60)
        assert adapted.proxy is (model if has_proxy else None)
        assert adapted.query_model is (model if has_proxy else adapted.judge)


def linear(x: Tensor, bits: int = 0) -> Tensor:
    weight = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    return x.flatten(1) @ (weight if not bits else (weight * 2**bits).round() / 2**bits)


def test_a_switch_in_a_tenth_of_the_calls_is_noticed() -> None:
    generator = torch.Generator().manual_seed(0)

    def switching(x: Tensor) -> Tensor:
        return linear(x, 2 if float(torch.rand((), generator=generator)) < 0.1 else 0)

    x = to_float(few()[0])
    found = [adapt_target(Target(switching, {}), x, batch_size=60) for _ in range(40)]
    # Missed with 1% each.
    assert sum(random > 0.0 for _, random in found) >= 38
    assert not any(target.image_by_image for target, random in found if random > 0.0)


def test_a_class_that_never_wins_hides_no_randomness() -> None:
    def hidden(x: Tensor) -> Tensor:
        return torch.cat([linear(x) + 0.3 * torch.randn(len(x), 10), torch.full((len(x), 1), -1e6)], dim=1)

    x = to_float(few()[0])
    assert adapt_target(Target(hidden, {}), x, batch_size=60)[1] == 1.0
    same = Target(lambda x: torch.cat([linear(x), torch.full((len(x), 1), -1e6)], dim=1), {})
    assert adapt_target(same, x, batch_size=60) == (same, 0.0)


def test_nan_logits_are_never_right() -> None:
    found = run(Target.of(Constant([float("nan")] * 10)), "standard", count=12)
    assert found.clean_accuracy == found.robust_accuracy == 0.0
    assert "12 clean images get NaN logits" in " ".join(found.notes)


def test_constant_logits_keep_their_class_and_are_flagged() -> None:
    model = Constant([0.0] * 10)
    target = Target(model, {AS_TRAINED: model}, control=trained("natural"))
    found = run(target, small("standard"), count=250)
    assert found.clean_accuracy == found.robust_accuracy == int((few(250)[1] == 0).sum()) / 250
    assert "zero gradient" in [check.name for check in found.flags]
    assert found.verdict == "upper bound: masking suspected"


def test_nothing_to_attack() -> None:
    images, labels = few(12)
    one_class = Target.of(Constant([0.0]))
    found = run_suite(one_class, images, torch.zeros_like(labels), epsilon=EPSILON, device=CPU)
    assert found.clean_accuracy == found.robust_accuracy == 1.0
    assert found.verdict == "not judged" and not found.results
    found = run(Target.of(trained("natural")), "standard", epsilon=0.0)
    assert found.robust_accuracy == found.clean_accuracy
    assert found.verdict == "not judged" and not found.results
    assert "nothing to attack at epsilon 0" in " ".join(found.not_judged_for)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, "no images"),
        ({"images": torch.zeros(5, 1, 8, 6, dtype=torch.uint8)}, r"cannot take images of shape \(1, 8, 6\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "5 images and 3 labels"),
        ({"labels": torch.full((5,), 10)}, "labels go from 10 to 10"),
        ({"epsilon": 0.5 / 255}, "below one grey level"),
    ],
)
def test_bad_input_is_one_line(more: dict[str, Any], message: str) -> None:
    images, labels = few(5)
    arguments: dict[str, Any] = {"images": images, "labels": labels, "epsilon": EPSILON, "device": CPU, **more}
    with pytest.raises(UsageError, match=message) as raised:
        run_suite(Target.of(trained("natural")), **arguments)
    assert "\n" not in str(raised.value)


# --- judges without gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no gradient", "outside PyTorch", "no model"])
def test_a_judge_without_gradients_gets_the_attacks_without_them(kind: str) -> None:
    network, other = trained("natural"), trained("natural", 1)

    def votes(x: Tensor) -> Tensor:
        x = torch.from_numpy(x.numpy()) if kind == "outside PyTorch" else x
        return nn.functional.one_hot(network(x).argmax(dim=1), 10).float()

    models = {} if kind == "no model" else {AS_TRAINED: votes}
    found = run(Target(votes, models, surrogates={"other": other}), "standard", epsilon=48 / 255)
    assert [result.name for result in found.results] == [
        *("uniform noise", "corners", "transfer: other", "square", "rays"),
    ]
    assert found.verdict == "not judged" and found.not_judged_for[0].startswith("no gradient was used")
    assert ("no gradients" in " ".join(found.notes)) == (kind != "no model")
    assert found.clean_accuracy > 0.9
    # The network inside keeps nothing here.
    assert found.robust_accuracy <= 0.05
    with pytest.raises(UsageError, match="suite 'recheck' needs gradients"):
        run(Target(votes, models), "recheck")


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_without_a_control_or_with_few_images_nothing_is_judged() -> None:
    model = trained("n-fgsm")
    found = run(Target.of(model), small("standard"), count=210)
    assert found.verdict == "not judged"
    # Cross-entropy with more and more steps, until a run finds nothing that all other attacks left.
    (check,) = (check for check in found.checks if check.name == "step order")
    names = [f"apgd-ce {steps}" for steps in check.evidence["steps"][1:]]
    newly = {result.name: before.remaining - result.remaining for before, result in pairwise(found.results)}
    assert names[0] == "apgd-ce 10" and all(newly[name] > 0 for name in names[:-1])
    assert newly[names[-1]] == 0 or names[-1] in ("apgd-ce 20", "apgd-ce 80")
    assert not {"harness", "noise", "transfer"} & {check.name for check in found.checks}
    assert any("control" in reason for reason in found.not_judged_for)
    found = run(Target(model, {AS_TRAINED: model}, control=trained("natural", 1)), small("standard"), count=30)
    assert found.verdict == "not judged"
    assert found.not_judged_for == ["a verdict needs 200 images or more, these are 30"]
    found = run(Target.of(model), small("standard"), count=1)
    assert found.images == 1 and found.to_dict()["interval"][1] <= 1.0


def test_a_control_that_does_not_break_raises_the_harness_flag() -> None:
    model = trained("n-fgsm")

    def harness(control: nn.Module) -> Any:
        found = run(Target(model, {AS_TRAINED: model}, control=control), small("standard"))
        (check,) = (check for check in found.checks if check.name == "harness")
        return check

    standing = harness(Constant([1.0] + [0.0] * 9))
    # It was attacked in ever larger balls, up to the limit.
    assert standing.raised and standing.evidence["epsilon"] == 0.5
    assert standing.evidence["kept"] == standing.evidence["clean"] > 0
    broken = harness(trained("natural", 1))
    assert not broken.raised and broken.evidence["kept"] == 0
    # At 32/255 it keeps too many images to tell: natural digits need twice that.
    assert broken.evidence["epsilon"] == 2 * EPSILON


def test_gradients_of_another_model_are_a_flag() -> None:
    target = Target(trained("natural"), {AS_TRAINED: Scaled(trained("natural"), -1.0)})
    evidence = {check.name: check.evidence for check in run(target, small("standard")).flags}
    assert evidence["twin"] == {"different": 60, "images": 60}


# --- the models that attacks use -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [replace(QUICK, drops_broken=False), small("standard")], ids=["columns", "standard"])
def test_a_file_that_gives_away_more_than_its_model_is_a_flag(suite: Suite) -> None:
    model = trained("natural")
    saturated = Scaled(model, 1e4)  # cross-entropy has no gradient

    def check(gradients: nn.Module, file_alone: nn.Module) -> tuple[Evaluation, Check]:
        found = run(Target(model, {AS_TRAINED: gradients}, file_alone=file_alone), suite)
        return found, next(one for one in found.checks if one.name == "file alone")

    found, raised = check(saturated, model)
    assert raised.raised and found.verdict == MASKED
    first, second = (raised.evidence[key] for key in ("through_model", "through_file"))
    assert second < first and not any("file alone" in name for name in found.attacked)
    if suite.checks_masking:  # the images that it breaks count
        assert found.robust_accuracy <= second
    else:
        assert found.robust_accuracy <= first
        assert second == run(Target.of(model), replace(suite, attacks=suite.attacks[1:])).robust_accuracy
    _, turned = check(model, saturated)
    assert not turned.raised and turned.evidence["weaker"]
    assert "file alone" not in [one.name for one in run(Target.of(model), suite).checks]


def test_suites_have_the_stages_and_budgets_that_docs_promise() -> None:
    stages = {name: list(dict.fromkeys(a.stage for a in find_suite(name).attacks)) for name in ("standard", "full")}
    five = ["noise and corners", "white-box", "features", "transfer", "square"]
    assert stages == {"standard": five, "full": [*five, "hard label"]}
    standard, full = ({a.name: a.settings for a in find_suite(name).attacks} for name in ("standard", "full"))
    assert standard["corners"] == {"corners": 20} and standard["square"] == {"queries": 1000}
    assert standard["apgd-ce"]["steps"] == standard["apgd-margin"]["steps"] == standard["apgd-t"]["steps"] == 50
    assert full["apgd-ce"]["steps"] == full["apgd-t"]["steps"] == full["fab-t"]["steps"] == 100
    assert full["apgd-t"]["target_classes"] == full["fab-t"]["target_classes"] == 9
    assert full["square"] == {"queries": 5000}


def test_the_papers_second_columns_are_found_on_surrogates() -> None:
    model = trained("natural")
    alone = run(Target.of(model), small("paper"))
    target = Target(model, {AS_TRAINED: model}, surrogates={"twin": model, "robust": trained("n-fgsm")})
    found = run(target, small("paper"))
    columns = ["gn", "fgsm", "pgd20", "bim20", "tpgd20"]
    assert list(alone.attacked) == columns
    assert list(found.attacked) == columns + [
        f"{name} (B: {other})" for other in ("twin", "robust") for name in columns
    ]
    # Found on the very model that is judged, they are the white-box columns.
    for name, kept in alone.attacked.items():
        assert torch.equal(found.attacked[f"{name} (B: twin)"], kept)
    assert int(found.attacked["pgd20 (B: robust)"].sum()) > int(alone.attacked["pgd20"].sum())


def test_backward_rules_surrogates_and_features_are_used_and_counted() -> None:
    model, other = trained("n-fgsm"), trained("natural", 1)
    assert isinstance(model, Net)
    rules = {AS_TRAINED: model, "other": other}
    target = Target(model, rules, features=model.features, surrogates={"other": other})
    found = run(target, replace(small("standard"), checks_masking=False))
    results = {result.name: result for result in found.results}
    assert {"apgd-ce", "apgd-margin", "apgd-t", "pgd++", "pgd-t", "apgd-ce (other)"} <= results.keys()
    # The other rule is used until it breaks none in an attack.
    under_other = [len(one.broken_indices) for name, one in results.items() if name.endswith(" (other)")]
    assert 0 not in under_other[:-1] and under_other[-1] == 0
    assert {"corners", "square", "uniform noise"} <= results.keys()
    # APGD takes a gradient at its start and after each of its steps but the last.
    for name in ("features", "transfer: other"):
        assert results[name].gradient_steps == 5 * len(results[name].indices) > 0
        assert results[name].queries >= len(results[name].indices)
