"""The contract that every attack keeps, whatever its formula."""

from __future__ import annotations

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
# x + epsilon and the differences below are rounded to float32, whose spacing just under 1 is 6e-8.
SLACK = 1e-6

# In the whole cube gradient attacks break nearly all images. Noise drowns the prototypes of some 45% of them. TPGD
# leaves 45%: KL also grows when the model gets surer of the right class, and from some starts that is the way up; so do
# features.
LEFT_IN_THE_CUBE = dict.fromkeys(("gaussian_noise", "uniform_noise", "tpgd", "tpgd-stopping", "feature_space"), 0.7)

Attack = Callable[..., Tensor]

# Every attack, and the variants that take another path through the code.
CASES: dict[str, tuple[Attack, dict[str, Any]]] = {
    **{name: (attack, {}) for name, attack in ATTACKS.items()},
    "pgd-margin": (ATTACKS["pgd"], {"loss": margin}),
    "pgd-keep-best": (ATTACKS["pgd"], {"keep_best": True}),
    "pgd-long-step": (ATTACKS["pgd"], {"step_size": 4 * EPSILON}),
    "pgd-stopping": (ATTACKS["pgd"], {"stop_when_broken": True}),
    "bim-stopping": (ATTACKS["bim"], {"stop_when_broken": True}),
    "tpgd-stopping": (ATTACKS["tpgd"], {"stop_when_broken": True}),
    "tpgd-rho": (ATTACKS["tpgd"], {"rho": 0.5}),
    "pgd++-all-steps": (ATTACKS["pgd_plus_plus"], {"stop_when_broken": False}),
    "apgd": (ATTACKS["apgd"], {"steps": 20}),
    "apgd-all-steps": (ATTACKS["apgd"], {"steps": 20, "stop_when_broken": False}),
    "apgd-margin": (ATTACKS["apgd"], {"steps": 20, "loss": margin}),
    "apgd-dlr-restarts": (ATTACKS["apgd"], {"steps": 10, "loss": dlr, "restarts": 2}),
    "apgd_targeted": (ATTACKS["apgd_targeted"], {"steps": 20}),
    "apgd-targeted-margin": (ATTACKS["apgd_targeted"], {"steps": 20, "loss": targeted_margin, "target_classes": 1}),
    "fab": (ATTACKS["fab"], {"steps": 10}),
    "fab-restarts": (ATTACKS["fab"], {"steps": 4, "restarts": 3}),
    "fab_targeted": (ATTACKS["fab_targeted"], {"steps": 10}),
    "fab-targeted-restarts": (ATTACKS["fab_targeted"], {"steps": 4, "restarts": 2, "target_classes": 1}),
    "square": (ATTACKS["square"], {"queries": 40}),
    "rays": (ATTACKS["rays"], {"queries": 60}),
    "feature_space": (ATTACKS["feature_space"], {"steps": 20}),
    "feature-space-guided": (ATTACKS["feature_space"], {"steps": 20}),
    "transfer": (ATTACKS["transfer"], {"steps": 10}),
}
DETERMINISTIC = {"fgsm", "bim", "bim-stopping", "fab", "fab_targeted", "rays"}
RANDOM = set(CASES) - DETERMINISTIC
ITERATED = {name for name in CASES if name.startswith(("pgd", "bim", "tpgd", "feature"))}
APGD = {name for name in CASES if name.startswith("apgd")}
FAB = {name for name in CASES if name.startswith("fab")}
GRADIENT_FREE = {"gaussian_noise", "uniform_noise", "random_corners", "square", "rays"}
# These drop images as they break, and return a picture that breaks the image if they met one.
HUNTING = {
    *(APGD | FAB),
    *("pgd_plus_plus", "pgd++-all-steps", "random_corners", "square", "rays", "transfer"),
    *("feature_space", "feature-space-guided"),
}
# These count the last iterate, and hunt when they are told to.
STOPPING = {"pgd-stopping", "bim-stopping", "tpgd-stopping"}
ASKS_GRADIENT = set(CASES) - GRADIENT_FREE

each_case = pytest.mark.parametrize("case", CASES)


def attack_with(case: str, model: Any, x: Tensor, y: Tensor, *, epsilon: float, seed: int = 0, **more: Any) -> Tensor:
    attack, settings = CASES[case]
    if case in RANDOM and "generator" not in more:
        more["generator"] = torch.Generator().manual_seed(seed)
    return attack(model, x, y, epsilon=epsilon, **{**settings, **needs(case, model, x), **more})


def needs(case: str, model: Any, x: Tensor) -> dict[str, Any]:
    """What some attacks ask for beside their settings: the logits as features, the model as its own surrogate."""
    if case == "transfer":
        # The same network under other counters: what is found on it costs the model nothing.
        return {"surrogates": [model.model if isinstance(model, Counted) else model]}
    if not case.startswith("feature"):
        return {}

    def features(pictures: Tensor) -> tuple[Tensor, Tensor]:
        logits = (model.model if isinstance(model, Counted) else model)(pictures)
        return logits, logits

    more: dict[str, Any] = {"features": model.sharing(features) if isinstance(model, Counted) else features}
    if case == "feature-space-guided":
        more["guides"] = 1.0 - x.detach()
    return more


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
    assert accuracies[-1] <= LEFT_IN_THE_CUBE.get(case, 0.05)


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
    # FAB's points keep the last bit of a gradient, and a matrix product's last bit depends on the batch.
    model = batchwise if case in FAB else trained
    together = attack_with(case, model, x[:8], y[:8], epsilon=EPSILON)
    alone = torch.cat([attack_with(case, model, x[i : i + 1], y[i : i + 1], epsilon=EPSILON) for i in range(8)])
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


@pytest.mark.parametrize("case", sorted(ASKS_GRADIENT))
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


@pytest.mark.parametrize("case", sorted(ASKS_GRADIENT))
def test_nan_gradient_never_reaches_the_image(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images

    def partly_nan(images: Tensor) -> Tensor:
        # sqrt(0 * pixel) is 0, and its gradient inf * 0.
        result: Tensor = trained(images) + torch.sqrt(0.0 * images[:, 0, 0, :1])
        return result

    def partly_flat(images: Tensor) -> Tensor:
        seen = images.clone()
        seen[:, 0, 0, 0] = images[:, 0, 0, 0].detach()
        result: Tensor = trained(seen)
        return result

    x_adv = attack_with(case, partly_nan, x, y, epsilon=EPSILON)
    assert not x_adv.isnan().any()
    assert torch.equal(x_adv, attack_with(case, partly_flat, x, y, epsilon=EPSILON))
    # No step is taken there: the pixel stays where the attack started, which is off x for a random start.
    pixel = x_adv[:, 0, 0, 0]
    if case in (HUNTING | STOPPING) - {"bim-stopping"}:
        assert not torch.equal(pixel, x[:, 0, 0, 0])  # their starts are their own
    elif case in RANDOM:
        width = 1 / 255 if case.startswith("tpgd") else EPSILON
        start = uniform_start(x, epsilon=width, generator=torch.Generator().manual_seed(0))
        assert torch.equal(pixel, start[:, 0, 0, 0])
    else:
        assert torch.equal(pixel, x[:, 0, 0, 0])
    # The other pixels are attacked as ever.
    assert accuracy(trained, x_adv, y) < accuracy(trained, x, y)


def batchwise(x: Tensor) -> Tensor:
    """Three classes, computed image by image: bitwise the same in any batch, which matrix products are not."""
    weight = torch.randn(3, 36, generator=torch.Generator().manual_seed(12))
    hidden = (x.flatten(1)[:, None, :] * weight).sum(dim=2)
    return 4.0 * hidden.sin() + hidden


@pytest.mark.parametrize("case", sorted(RANDOM))
def test_stream_belongs_to_its_image(case: str, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    streams = ImageGenerators.of(3, range(100, 124), attack=case)
    together = attack_with(case, batchwise, x[:24], y[:24], epsilon=4 / 255, generator=streams)
    for rows in (torch.arange(5, 6), torch.arange(23, -1, -2)):
        part = attack_with(case, batchwise, x[rows], y[rows], epsilon=4 / 255, generator=streams[rows])
        assert torch.equal(part, together[rows])
    other = attack_with(case, batchwise, x[:24], y[:24], epsilon=4 / 255, generator=streams.child("other"))
    assert not torch.equal(other, together)


@pytest.mark.parametrize("case", sorted(RANDOM))
def test_streams_of_other_images_are_refused(case: str, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    with pytest.raises(UsageError, match="3 random streams and 4 images"):
        attack_with(case, batchwise, x[:4], y[:4], epsilon=EPSILON, generator=ImageGenerators.of(0, range(3)))


@pytest.mark.parametrize("case", sorted(HUNTING | STOPPING))
def test_hunt_leaves_misclassified_images_alone(case: str, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    wrong = batchwise(x).argmax(dim=1) != y
    assert 20 <= int(wrong.sum()) <= 130
    x_adv = attack_with(case, batchwise, x, y, epsilon=EPSILON)
    assert torch.equal(x_adv[wrong], x[wrong])
    moved = (x_adv[~wrong] != x[~wrong]).flatten(1).any(dim=1)
    assert bool(moved.any())


@pytest.mark.parametrize("case", sorted(HUNTING | STOPPING))
def test_hunt_returns_every_image_that_it_broke(case: str, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    met = torch.zeros(len(x), dtype=torch.bool)

    def watching(pictures: Tensor) -> Tensor:
        logits = batchwise(pictures)
        # Without streams of its own a picture is told by the image that it lies in the ball of.
        distance, image = (pictures.detach()[:, None] - x[None]).abs().amax(dim=(2, 3, 4)).min(dim=1)
        wrong = (logits.argmax(dim=1) != y[image]) & (
            distance <= 6 / 255 + SLACK
        )  # FAB and RayS ask outside of the ball too
        met[image[wrong]] = True
        return logits

    x_adv = attack_with(case, watching, x, y, epsilon=6 / 255)
    broken = batchwise(x_adv).argmax(dim=1) != y
    assert torch.equal(broken, met)
    assert 0 < int(broken.sum()) < len(x)


@pytest.mark.parametrize("case", sorted(HUNTING))
def test_stopping_at_success_changes_no_count_and_costs_less(case: str, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    broken, spent = [], []
    for stop in (True, False):
        model: Any = Counted(batchwise, images=len(x))
        x_adv = attack_with(case, model, x, y, epsilon=6 / 255, stop_when_broken=stop)
        broken.append(batchwise(x_adv).argmax(dim=1) != y)
        spent.append(model.gradient_steps + model.queries)
    assert torch.equal(*broken)
    right = batchwise(x).argmax(dim=1) == y
    fell = broken[0] & right
    assert bool(fell.any()) and bool((~broken[0]).any())
    assert bool((spent[0][fell] <= spent[1][fell]).all())
    # One surrogate asks once, and cannot ask less.
    assert bool((spent[0][fell] < spent[1][fell]).any()) or case == "transfer"
    assert torch.equal(spent[0][~broken[0]], spent[1][~broken[0]])
    assert set(spent[0][~right].tolist()) == {1}


@pytest.mark.parametrize("case", sorted(STOPPING))
def test_what_stops_breaks_all_that_the_last_iterate_broke_and_costs_less(
    case: str, images: tuple[Tensor, Tensor]
) -> None:
    x, y = images
    streams = ImageGenerators.of(0, range(len(x)), attack=case) if case in RANDOM else None
    more: dict[str, Any] = {} if streams is None else {"generator": streams}
    broken, spent = [], []
    for stop in (True, False):
        model: Any = Counted(batchwise, images=len(x))
        x_adv = attack_with(case, model, x, y, epsilon=6 / 255, stop_when_broken=stop, **more)
        broken.append(batchwise(x_adv).argmax(dim=1) != y)
        spent.append(model.gradient_steps + model.queries)
    right = batchwise(x).argmax(dim=1) == y
    # Image for image the same way is gone, so that what the last iterate breaks has been met.
    assert bool((broken[0] | ~broken[1])[right].all())
    fell = broken[0] & right
    assert 0 < int(fell.sum()) < int(right.sum())
    # The clean image and the end are looked at without a gradient; a broken image has no end.
    assert bool((spent[0][right & ~broken[0]] <= spent[1][right & ~broken[0]] + 2).all())
    assert float(spent[0][fell].double().mean()) < 0.9 * float(spent[1][fell].double().mean())
    assert set(spent[0][~right].tolist()) == {1}


@pytest.mark.parametrize("case", sorted(HUNTING))
def test_criterion_has_the_last_word(case: str, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    asked: list[Tensor] = []

    def rounded(pictures: Tensor, rows: Tensor) -> Tensor:
        asked.append(rows)
        assert bool((batchwise(pictures).argmax(dim=1) != y[rows]).all())
        assert float((pictures - x[rows]).abs().max()) <= 6 / 255 + SLACK
        return batchwise((pictures * 63).round() / 63).argmax(dim=1) != y[rows]

    x_adv = attack_with(case, batchwise, x, y, epsilon=6 / 255, criterion=rounded)
    assert asked
    plain = attack_with(case, batchwise, x, y, epsilon=6 / 255)

    def left(pictures: Tensor) -> int:
        return int((batchwise((pictures * 63).round() / 63).argmax(dim=1) == y).sum())

    # Adversarial images that stopped just behind the boundary fall back when they are rounded.
    assert left(x_adv) <= left(plain)


@pytest.mark.parametrize("case", sorted(HUNTING | STOPPING))
def test_hunt_of_a_model_that_answers_nan_or_always_alike(case: str, images: tuple[Tensor, Tensor]) -> None:
    x, y = images[0][:6], images[1][:6]

    def nan(pictures: Tensor) -> Tensor:
        return pictures.flatten(1)[:, :3] * torch.nan

    def constant(pictures: Tensor) -> Tensor:
        return pictures.flatten(1)[:, :3] * 0.0

    # NaN classifies nothing, so every image is broken as it is.
    assert torch.equal(attack_with(case, nan, x, y, epsilon=EPSILON), x)
    # The first of equal classes wins: images of class 0 are right and cannot be broken, the others are wrong already.
    x_adv = attack_with(case, constant, x, y, epsilon=EPSILON)
    assert torch.equal(x_adv[y != 0], x[y != 0])
    assert not x_adv.isnan().any()
    assert (x_adv - x).abs().max() <= EPSILON + SLACK


@pytest.mark.parametrize("case", sorted(HUNTING | STOPPING))
def test_hunt_counts_a_nan_met_on_the_way_as_broken(case: str, images: tuple[Tensor, Tensor]) -> None:
    x = images[0][:8]

    def nan_off_the_images(pictures: Tensor) -> Tensor:
        logits = torch.cat([pictures.flatten(1)[:, :1] + 2.0, pictures.flatten(1)[:, 1:3]], dim=1)
        off = (pictures.detach()[:, None] - x[None]).abs().amax(dim=(2, 3, 4)).amin(dim=1, keepdim=True) > 1e-6
        return logits.masked_fill(off, torch.nan)

    y = torch.zeros(len(x), dtype=torch.int64)
    x_adv = attack_with(case, nan_off_the_images, x, y, epsilon=EPSILON)
    assert bool(nan_off_the_images(x_adv).isnan().any(dim=1).all())


@pytest.mark.parametrize("case", sorted(HUNTING | STOPPING))
@pytest.mark.parametrize("classes", [1, 2, 3, 4])
def test_hunt_with_few_classes(case: str, classes: int, images: tuple[Tensor, Tensor]) -> None:
    x, y = images[0], torch.zeros(len(images[0]), dtype=torch.int64)
    weight = torch.randn(classes, 36, generator=torch.Generator().manual_seed(4))

    def model(pictures: Tensor) -> Tensor:
        return pictures.flatten(1) @ weight.T

    if classes == 1:
        with pytest.raises(UsageError, match="at least 2 classes"):
            attack_with(case, model, x, y, epsilon=EPSILON)
        return
    right = int((model(x).argmax(dim=1) == y).sum())
    x_adv = attack_with(case, model, x, y, epsilon=EPSILON)
    assert right >= 10
    assert int((model(x_adv).argmax(dim=1) == y).sum()) < right


@pytest.mark.parametrize("case", sorted(APGD))
@pytest.mark.parametrize("named", ["steps", "restarts", "target_classes"])
def test_impossible_apgd_settings_are_refused(case: str, named: str, images: tuple[Tensor, Tensor]) -> None:
    if named != "steps" and (named == "restarts") == ("targeted" in case):
        return
    attack, settings = CASES[case]
    with pytest.raises(UsageError, match=named):
        attack(batchwise, *images, epsilon=EPSILON, **{**settings, named: 0})


@pytest.mark.parametrize("case", sorted(RANDOM - {"gaussian_noise", "uniform_noise"}))
def test_other_batch_sizes_count_alike(case: str, trained: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    streams = ImageGenerators.of(0, range(len(x)), attack=case)
    together = attack_with(case, trained, x, y, epsilon=EPSILON, generator=streams)
    parts = [
        attack_with(case, trained, x[rows], y[rows], epsilon=EPSILON, generator=streams[rows])
        for rows in (slice(0, 7), slice(7, 40), slice(40, 150))
    ]
    # A matrix product of other size rounds otherwise: one image at most may fall on the other side.
    assert abs(accuracy(trained, together, y) - accuracy(trained, torch.cat(parts), y)) * len(x) <= 1.0 + 1e-6
