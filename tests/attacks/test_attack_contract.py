"""The contract that every attack keeps, whatever its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.attacks import ATTACKS
from robustq.attacks.ball import uniform_start
from robustq.attacks.losses import margin
from robustq.errors import UsageError

EPSILON = 24 / 255
# x + epsilon and the differences below are rounded to float32, whose spacing just under 1 is 6e-8.
SLACK = 1e-6

Attack = Callable[..., Tensor]

# Every attack, and the variants that take another path through the code.
CASES: dict[str, tuple[Attack, dict[str, Any]]] = {
    **{name: (attack, {}) for name, attack in ATTACKS.items()},
    "pgd-margin": (ATTACKS["pgd"], {"loss": margin}),
    "pgd-keep-best": (ATTACKS["pgd"], {"keep_best": True}),
    "pgd-long-step": (ATTACKS["pgd"], {"step_size": 4 * EPSILON}),
    "tpgd-rho": (ATTACKS["tpgd"], {"rho": 0.5}),
}
RANDOM = {name for name in CASES if name not in ("fgsm", "bim")}
ITERATED = {name for name in CASES if name.startswith(("pgd", "bim", "tpgd"))}
ASKS_MODEL = {name for name in CASES if "noise" not in name}

each_case = pytest.mark.parametrize("case", CASES)


def attack_with(case: str, model: Any, x: Tensor, y: Tensor, *, epsilon: float, seed: int = 0, **more: Any) -> Tensor:
    attack, settings = CASES[case]
    if case in RANDOM:
        more["generator"] = torch.Generator().manual_seed(seed)
    return attack(model, x, y, epsilon=epsilon, **{**settings, **more})


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """150 uint8 pictures 1 x 6 x 6 of three noisy prototypes, black and white pixels among them."""
    generator = torch.Generator().manual_seed(1)
    prototypes = 0.5 + 0.12 * torch.randn(3, 1, 6, 6, generator=generator)
    y = torch.arange(150) % 3
    x = prototypes[y] + 0.2 * torch.randn(150, 1, 6, 6, generator=generator)
    return (x.clamp(0, 1) * 255).round() / 255, y


@pytest.fixture(scope="module")
def trained(images: tuple[Tensor, Tensor]) -> nn.Module:
    """A small network with BatchNorm, at least 90% right on the images, in eval mode."""
    x, y = images
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    assert accuracy(model, x, y) >= 0.9
    return model


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).double().mean())


@each_case
def test_result_is_a_float32_picture_inside_the_ball(
    case: str, trained: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    before = x.clone()
    x_adv = attack_with(case, trained, x.requires_grad_(), y, epsilon=EPSILON)
    x.requires_grad_(False)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    assert x.grad is None
    assert torch.equal(x, before)
    assert x_adv.min() >= 0.0
    assert x_adv.max() <= 1.0
    assert (x_adv - x).abs().max() <= EPSILON + SLACK
    # Not merely inside: it uses the ball.
    assert (x_adv - x).abs().max() >= 0.9 * EPSILON


@each_case
def test_same_seed_same_result(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    first, again = (attack_with(case, trained, x, y, epsilon=EPSILON, seed=5) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("case", sorted(RANDOM))
def test_other_seed_other_result(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    # One short step, after which the start is still visible; twenty lead to the same corner from anywhere.
    few = {"steps": 1, "step_size": EPSILON / 4} if case in ITERATED else {}
    first, other = (attack_with(case, trained, x, y, epsilon=EPSILON, seed=seed, **few) for seed in (5, 6))
    assert not torch.equal(first, other)


@each_case
def test_epsilon_zero_returns_the_images(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    assert torch.equal(attack_with(case, trained, x, y, epsilon=0.0), x)


@each_case
def test_larger_epsilon_is_never_weaker(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    epsilons = [0.0, 4 / 255, 16 / 255, 64 / 255, 255 / 255]
    accuracies = [accuracy(trained, attack_with(case, trained, x, y, epsilon=epsilon), y) for epsilon in epsilons]
    assert accuracies == sorted(accuracies, reverse=True)
    # In the whole cube noise drowns the prototypes of some 45% of the images and gradient attacks break all. TPGD
    # leaves 45%: KL also grows when the model gets surer of the right class, and from some starts that is the way up.
    assert accuracies[-1] <= (0.05 if case in ASKS_MODEL - {"tpgd"} else 0.7)


@pytest.mark.parametrize("case", sorted(ITERATED - {"pgd-long-step"}))
def test_more_steps_are_never_weaker(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    accuracies = [
        accuracy(trained, attack_with(case, trained, x, y, epsilon=EPSILON, step_size=EPSILON / 10, steps=steps), y)
        for steps in (1, 5, 20)
    ]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < accuracies[0]


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_model_is_left_as_it_was(case: str, training: bool, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    frozen = next(trained.parameters())
    frozen.requires_grad_(False)
    trained.train(training)
    try:
        attack_with(case, trained, x, y, epsilon=EPSILON)
        assert not x.requires_grad
        assert all(module.training is training for module in trained.modules())
        assert [p.requires_grad for p in trained.parameters()] == [p is not frozen for p in trained.parameters()]
        assert all(p.grad is None for p in trained.parameters())
        # In train mode BatchNorm's own buffers move with every forward, which is the caller's choice.
        kept = dict(trained.named_parameters()) if training else trained.state_dict()
        assert kept
        assert all(torch.equal(value, before[name]) for name, value in kept.items())
    finally:
        frozen.requires_grad_(True)
        trained.load_state_dict(before)
        trained.eval()


@each_case
def test_works_under_no_grad(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    expected = attack_with(case, trained, x, y, epsilon=EPSILON)
    with torch.no_grad():
        assert torch.equal(attack_with(case, trained, x, y, epsilon=EPSILON), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("case", sorted(set(CASES) - RANDOM))
def test_image_is_attacked_alike_alone_and_in_a_batch(
    case: str, trained: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    together = attack_with(case, trained, x[:8], y[:8], epsilon=EPSILON)
    alone = torch.cat([attack_with(case, trained, x[i : i + 1], y[i : i + 1], epsilon=EPSILON) for i in range(8)])
    assert torch.equal(together, alone)


@each_case
@pytest.mark.parametrize("epsilon", [-1 / 255, 8.0, float("nan")])
def test_impossible_epsilon_is_refused(case: str, epsilon: float, images: tuple[Tensor, Tensor]) -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("the model was asked before the settings were checked")

    with pytest.raises(UsageError, match="epsilon"):
        attack_with(case, never, *images, epsilon=epsilon)


@pytest.mark.parametrize("case", sorted(ITERATED))
@pytest.mark.parametrize(
    ("settings", "named"),
    [({"steps": 0}, "steps"), ({"step_size": -0.1}, "step_size"), ({"step_size": 2.0}, "step_size")],
)
def test_impossible_steps_are_refused(
    case: str, settings: dict[str, Any], named: str, trained: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(UsageError, match=named):
        attack_with(case, trained, *images, epsilon=EPSILON, **settings)


@pytest.mark.parametrize("case", sorted(ITERATED - {"pgd-long-step"}))
def test_step_defaults_to_a_quarter_of_epsilon(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    default = attack_with(case, trained, x, y, epsilon=EPSILON, steps=2)
    explicit = attack_with(case, trained, x, y, epsilon=EPSILON, steps=2, step_size=EPSILON / 4)
    assert torch.equal(default, explicit)


@pytest.mark.parametrize("case", sorted(ASKS_MODEL))
def test_model_without_gradient_is_refused(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    @torch.no_grad()
    def judge(x: Tensor) -> Tensor:
        result: Tensor = trained(x)
        return result

    def detaching(x: Tensor) -> Tensor:
        result: Tensor = trained(x.detach())
        return result

    for model in (judge, detaching):
        with pytest.raises(UsageError, match="without a gradient"):
            attack_with(case, model, *images, epsilon=EPSILON)


@pytest.mark.parametrize("case", sorted(ASKS_MODEL))
def test_nan_gradient_never_reaches_the_image(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images

    def partly_nan(images: Tensor) -> Tensor:
        # sqrt(0 * pixel) is 0, and its gradient inf * 0.
        result: Tensor = trained(images) + torch.sqrt(0.0 * images[:, 0, 0, :1])
        return result

    x_adv = attack_with(case, partly_nan, x, y, epsilon=EPSILON)
    assert not x_adv.isnan().any()
    # No step is taken there: the pixel stays where the attack started, which is off x for a random start.
    pixel = x_adv[:, 0, 0, 0]
    if case in RANDOM:
        width = 1 / 255 if case.startswith("tpgd") else EPSILON
        start = uniform_start(x, epsilon=width, generator=torch.Generator().manual_seed(0))
        assert torch.equal(pixel, start[:, 0, 0, 0])
    else:
        assert torch.equal(pixel, x[:, 0, 0, 0])
    # The other pixels are attacked as ever.
    assert accuracy(trained, x_adv, y) < accuracy(trained, x, y)
