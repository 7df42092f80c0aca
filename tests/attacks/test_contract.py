"""The contract that every attack keeps, whatever its formula."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import ATTACKS, Counted, ImageGenerators
from robustq.attacks.ball import uniform_start
from robustq.attacks.losses import dlr, margin, targeted_margin
from robustq.errors import UsageError

EPSILON = 24 / 255
SMALL = 6 / 255
# x + epsilon and the differences below are rounded to float32, whose spacing just under 1 is 6e-8.
SLACK = 1e-6

# Budgets, and the variants that take another path through the code.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("gaussian_noise", "uniform_noise", "random_corners", "fgsm", "bim", "pgd")},
    "pgd-margin-keep-best": ("pgd", {"loss": margin, "keep_best": True}),
    "tpgd": ("tpgd", {}),
    "pgd_plus_plus": ("pgd_plus_plus", {}),
    "pgd_targeted": ("pgd_targeted", {}),
    "apgd": ("apgd", {"steps": 20}),
    "apgd-dlr-restarts": ("apgd", {"steps": 10, "loss": dlr, "restarts": 2}),
    "apgd_targeted": ("apgd_targeted", {"steps": 20}),
    "apgd-targeted-margin": ("apgd_targeted", {"steps": 20, "loss": targeted_margin, "target_classes": 1}),
    "fab": ("fab", {"steps": 10}),
    "fab-restarts": ("fab", {"steps": 4, "restarts": 3}),
    "fab_targeted": ("fab_targeted", {"steps": 4, "restarts": 2}),
    "square": ("square", {"queries": 40}),
    "rays": ("rays", {"queries": 60}),
    "feature_space": ("feature_space", {"steps": 20}),
    "transfer": ("transfer", {"steps": 10}),
}


def taking(parameter: str) -> list[str]:
    return [case for case, (name, _) in CASES.items() if parameter in inspect.signature(ATTACKS[name]).parameters]


STOPPING = taking("criterion")  # these drop images as they break
SIGN = taking("step_size")
# FAB without restarts draws nothing from the generator that it takes.
RANDOM = [case for case in taking("generator") if case != "fab"]
GRADIENT_FREE = {"gaussian_noise", "uniform_noise", "random_corners", "square", "rays"}
GRADIENT = [case for case in CASES if case not in GRADIENT_FREE]

# In the whole cube gradient attacks break nearly all images. Noise drowns the prototypes of some 45% of them. TPGD
# leaves 45%: KL also grows when the model gets surer of the right class, and from some starts that is the way up; so do
# features.
LEFT_IN_THE_CUBE = dict.fromkeys(("gaussian_noise", "uniform_noise", "tpgd", "feature_space"), 0.7)

each_case = pytest.mark.parametrize("case", CASES)
each_stopping = pytest.mark.parametrize("case", STOPPING)
Images = tuple[Tensor, Tensor]


def attack_with(case: str, model: Any, x: Tensor, y: Tensor, *, epsilon: float, seed: int = 0, **more: Any) -> Tensor:
    name, settings = CASES[case]
    inner = model.model if isinstance(model, Counted) else model
    if name == "transfer":
        # The same network without its counters: what is found on it costs the model nothing.
        more.setdefault("surrogates", [inner])
    if name == "feature_space":

        def features(images: Tensor) -> tuple[Tensor, Tensor]:
            logits = inner(images)
            return logits, logits

        more["features"] = model.sharing(features) if isinstance(model, Counted) else features
    if case in RANDOM:
        more.setdefault("generator", torch.Generator().manual_seed(seed))
    return ATTACKS[name](model, x, y, epsilon=epsilon, **{**settings, **more})


def test_every_attack_is_here() -> None:
    assert {name for name, _ in CASES.values()} == set(ATTACKS)


@pytest.fixture(scope="module")
def images() -> Images:
    """150 uint8 images 1 x 6 x 6 of three noisy prototypes, black and white pixels among them."""
    generator = torch.Generator().manual_seed(1)
    prototypes = 0.5 + 0.12 * torch.randn(3, 1, 6, 6, generator=generator)
    y = torch.arange(150) % 3
    x = prototypes[y] + 0.2 * torch.randn(150, 1, 6, 6, generator=generator)
    return (x.clamp(0, 1) * 255).round() / 255, y


@pytest.fixture(scope="module")
def trained(images: Images) -> nn.Module:
    """A small network with BatchNorm, at least 90% right on the images, in eval mode."""
    x, y = images
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    assert accuracy(model, x, y) >= 0.9
    return model


def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).double().mean())


def imagewise(x: Tensor) -> Tensor:
    """Three classes, computed image by image: bitwise the same in any batch, which matrix products are not."""
    weight = torch.randn(3, 36, generator=torch.Generator().manual_seed(12))
    hidden = (x.flatten(1)[:, None, :] * weight).sum(dim=2)
    return 4.0 * hidden.sin() + hidden


@each_case
def test_result_is_inside_the_ball_and_depends_on_the_seed_alone(case: str, trained: nn.Module, images: Images) -> None:
    x, y = images
    before = x.clone()
    x_adv = attack_with(case, trained, x.requires_grad_(), y, epsilon=EPSILON)
    x.requires_grad_(False)
    assert x_adv.shape == x.shape and x_adv.dtype == torch.float32
    assert not x_adv.requires_grad and x.grad is None
    assert torch.equal(x, before)
    assert x_adv.min() >= 0.0 and x_adv.max() <= 1.0
    # Not merely inside: it uses the ball.
    assert 0.9 * EPSILON <= (x_adv - x).abs().max() <= EPSILON + SLACK
    with torch.no_grad():
        assert torch.equal(attack_with(case, trained, x, y, epsilon=EPSILON), x_adv)
        assert not torch.is_grad_enabled()
    if case in RANDOM:
        # One short step, after which the start is still visible; twenty lead to the same corner from anywhere.
        few = {"steps": 1, "step_size": EPSILON / 4} if case in SIGN else {}
        first, other = (attack_with(case, trained, x, y, epsilon=EPSILON, seed=seed, **few) for seed in (0, 6))
        assert not torch.equal(first, other)


@each_case
def test_larger_epsilon_is_never_weaker_and_zero_is_no_attack(case: str, trained: nn.Module, images: Images) -> None:
    x, y = images
    assert torch.equal(attack_with(case, trained, x, y, epsilon=0.0), x)
    epsilons = [4 / 255, 24 / 255, 1.0]
    accuracies = [accuracy(trained, attack_with(case, trained, x, y, epsilon=epsilon), y) for epsilon in epsilons]
    assert [accuracy(trained, x, y), *accuracies] == sorted([accuracy(trained, x, y), *accuracies], reverse=True)
    assert accuracies[-1] <= LEFT_IN_THE_CUBE.get(case, 0.05)


@pytest.mark.parametrize("case", SIGN)
def test_more_steps_are_never_weaker_and_the_step_is_a_quarter_of_epsilon(
    case: str, trained: nn.Module, images: Images
) -> None:
    x, y = images
    accuracies = [
        accuracy(trained, attack_with(case, trained, x, y, epsilon=EPSILON, step_size=EPSILON / 10, steps=steps), y)
        for steps in (1, 5, 20)
    ]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < accuracies[0]
    default = attack_with(case, trained, x, y, epsilon=EPSILON, steps=2)
    assert torch.equal(default, attack_with(case, trained, x, y, epsilon=EPSILON, steps=2, step_size=EPSILON / 4))


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_model_is_left_as_it_was(case: str, training: bool, trained: nn.Module, images: Images) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    frozen = next(trained.parameters())
    frozen.requires_grad_(False)
    trained.train(training)
    try:
        attack_with(case, trained, *images, epsilon=EPSILON)
        assert all(module.training is training for module in trained.modules())
        assert [p.requires_grad for p in trained.parameters()] == [p is not frozen for p in trained.parameters()]
        assert all(p.grad is None for p in trained.parameters())
        # In train mode BatchNorm's own buffers move with every forward, which is the caller's choice.
        kept = dict(trained.named_parameters()) if training else trained.state_dict()
        assert kept and all(torch.equal(value, before[name]) for name, value in kept.items())
    finally:
        frozen.requires_grad_(True)
        trained.load_state_dict(before)
        trained.eval()


def test_impossible_settings_are_refused_before_the_model_runs(images: Images) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("the model ran before the settings were checked")

    for case, (name, _) in CASES.items():
        for epsilon in (-1 / 255, 8.0, float("nan")):
            with pytest.raises(UsageError, match="epsilon"):
                attack_with(case, never, *images, epsilon=epsilon)
        impossible: dict[str, Any] = dict.fromkeys(("steps", "restarts", "target_classes", "queries", "corners"), 0)
        impossible["step_size"] = 2.0
        for parameter, value in impossible.items():
            if parameter in inspect.signature(ATTACKS[name]).parameters:
                with pytest.raises(UsageError, match=parameter):
                    attack_with(case, never, *images, epsilon=EPSILON, **{parameter: value})
        if case in RANDOM:
            with pytest.raises(UsageError, match="3 random generators and 150 images"):
                attack_with(case, imagewise, *images, epsilon=EPSILON, generator=ImageGenerators.of(0, range(3)))


@pytest.mark.parametrize("case", GRADIENT)
def test_model_without_gradient_is_refused(case: str, trained: nn.Module, images: Images) -> None:
    def detaching(x: Tensor) -> Tensor:
        return torch.as_tensor(trained(x.detach()))

    for model in (torch.no_grad()(lambda x: trained(x)), detaching):
        with pytest.raises(UsageError, match="without a gradient"):
            attack_with(case, model, *images, epsilon=EPSILON)


@pytest.mark.parametrize("case", GRADIENT)
def test_nan_gradient_never_reaches_the_image(case: str, trained: nn.Module, images: Images) -> None:
    x, y = images

    def partly_nan(images: Tensor) -> Tensor:
        # sqrt(0 * pixel) is 0, and its gradient inf * 0.
        return torch.as_tensor(trained(images) + torch.sqrt(0.0 * images[:, 0, 0, :1]))

    def partly_flat(images: Tensor) -> Tensor:
        seen = images.clone()
        seen[:, 0, 0, 0] = images[:, 0, 0, 0].detach()
        return torch.as_tensor(trained(seen))

    x_adv = attack_with(case, partly_nan, x, y, epsilon=EPSILON)
    assert not x_adv.isnan().any()
    assert torch.equal(x_adv, attack_with(case, partly_flat, x, y, epsilon=EPSILON))
    # No step is taken there: the pixel stays where the attack started.
    if case not in STOPPING:
        start = x
        if case in RANDOM:
            width = 1 / 255 if case == "tpgd" else EPSILON
            start = uniform_start(x, epsilon=width, generator=torch.Generator().manual_seed(0))
        assert torch.equal(x_adv[:, 0, 0, 0], start[:, 0, 0, 0])
    # The other pixels are attacked as ever.
    assert accuracy(trained, x_adv, y) < accuracy(trained, x, y)


@each_case
def test_image_is_attacked_alike_in_any_batch(case: str, images: Images) -> None:
    x, y = images[0][:24], images[1][:24]
    generators = ImageGenerators.of(3, range(100, 124), attack=case)

    def attack(rows: Tensor, generators: ImageGenerators = generators) -> Tensor:
        more: dict[str, Any] = {"generator": generators[rows]} if case in RANDOM else {}
        return attack_with(case, imagewise, x[rows], y[rows], epsilon=4 / 255, **more)

    together = attack(torch.arange(24))
    for rows in (torch.arange(5, 6), torch.arange(23, -1, -2)):
        assert torch.equal(attack(rows), together[rows])
    if case in RANDOM:
        assert not torch.equal(attack(torch.arange(24), generators.child("other")), together)


@each_stopping
def test_misclassified_images_are_left_alone_and_broken_ones_are_returned(case: str, images: Images) -> None:
    x, y = images
    met = torch.zeros(len(x), dtype=torch.bool)

    def watching(queried: Tensor) -> Tensor:
        logits = imagewise(queried)
        # The image is told by the ball that the query lies in; FAB and RayS query outside of the ball too.
        distance, image = (queried.detach()[:, None] - x[None]).abs().amax(dim=(2, 3, 4)).min(dim=1)
        wrong = (logits.argmax(dim=1) != y[image]) & (distance <= SMALL + SLACK)
        met[image[wrong]] = True
        return logits

    x_adv = attack_with(case, watching, x, y, epsilon=SMALL)
    broken = imagewise(x_adv).argmax(dim=1) != y
    assert torch.equal(broken, met)
    wrong = imagewise(x).argmax(dim=1) != y
    assert torch.equal(x_adv[wrong], x[wrong])
    assert 20 <= int(wrong.sum()) < int(broken.sum()) < len(x)
    assert bool((x_adv != x)[~broken].any())


@each_stopping
def test_stopping_at_success_changes_no_count_and_costs_less(case: str, images: Images) -> None:
    x, y = images
    broken, costs = [], []
    for stop in (True, False):
        model: Any = Counted(imagewise, images=len(x))
        x_adv = attack_with(case, model, x, y, epsilon=SMALL, stop_when_broken=stop)
        broken.append(imagewise(x_adv).argmax(dim=1) != y)
        costs.append(model.gradient_steps + model.queries)
    assert torch.equal(*broken)
    right = imagewise(x).argmax(dim=1) == y
    fell = broken[0] & right
    assert bool(fell.any()) and bool((~broken[0]).any())
    assert bool((costs[0][fell] <= costs[1][fell]).all())
    # One surrogate costs one query, and cannot cost less.
    assert bool((costs[0][fell] < costs[1][fell]).any()) or case == "transfer"
    assert torch.equal(costs[0][~broken[0]], costs[1][~broken[0]])
    assert set(costs[0][~right].tolist()) == {1}


@each_stopping
def test_criterion_decides_which_misclassified_images_are_broken(case: str, images: Images) -> None:
    x, y = images
    calls: list[Tensor] = []

    def coarse(x_adv: Tensor) -> Tensor:
        return imagewise((x_adv * 63).round() / 63).argmax(dim=1)

    def criterion(x_adv: Tensor, rows: Tensor) -> Tensor:
        calls.append(rows)
        assert bool((imagewise(x_adv).argmax(dim=1) != y[rows]).all())
        assert float((x_adv - x[rows]).abs().max()) <= SMALL + SLACK
        return coarse(x_adv) != y[rows]

    judged = attack_with(case, imagewise, x, y, epsilon=SMALL, criterion=criterion)
    assert calls
    plain = attack_with(case, imagewise, x, y, epsilon=SMALL)
    # Adversarial images that stopped just behind the boundary fall back when they are rounded.
    assert int((coarse(judged) == y).sum()) <= int((coarse(plain) == y).sum())


@each_stopping
def test_models_that_answer_nan_or_always_alike(case: str, images: Images) -> None:
    x, y = images[0][:8], images[1][:8]
    # NaN classifies nothing, so every image is broken as it is.
    assert torch.equal(attack_with(case, lambda x: x.flatten(1)[:, :3] * torch.nan, x, y, epsilon=EPSILON), x)
    # The first of equal classes wins: images of class 0 are right and cannot be broken, the others are wrong already.
    x_adv = attack_with(case, lambda x: x.flatten(1)[:, :3] * 0.0, x, y, epsilon=EPSILON)
    assert torch.equal(x_adv[y != 0], x[y != 0])
    assert (x_adv - x).abs().max() <= EPSILON + SLACK  # fails for NaN too

    def nan_off_the_images(queried: Tensor) -> Tensor:
        logits = torch.cat([queried.flatten(1)[:, :1] + 2.0, queried.flatten(1)[:, 1:3]], dim=1)
        off = (queried.detach()[:, None] - x[None]).abs().amax(dim=(2, 3, 4)).amin(dim=1, keepdim=True) > 1e-6
        return logits.masked_fill(off, torch.nan)

    x_adv = attack_with(case, nan_off_the_images, x, torch.zeros_like(y), epsilon=EPSILON)
    assert bool(nan_off_the_images(x_adv).isnan().any(dim=1).all())


@each_stopping
def test_few_classes(case: str, images: Images) -> None:
    x, y = images[0], torch.zeros(len(images[0]), dtype=torch.int64)
    weight = torch.randn(4, 36, generator=torch.Generator().manual_seed(4))
    with pytest.raises(UsageError, match="at least 2 classes"):
        attack_with(case, lambda x: x.flatten(1) @ weight[:1].T, x, y, epsilon=EPSILON)
    for classes in (2, 3, 4):
        few = weight[:classes].T

        def model(x: Tensor, few: Tensor = few) -> Tensor:
            return x.flatten(1) @ few

        before = accuracy(model, x, y)
        assert before >= 0.05
        assert accuracy(model, attack_with(case, model, x, y, epsilon=EPSILON), y) < before
