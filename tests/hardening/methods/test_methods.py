"""Every method beside ODG-Q against a line-by-line reference over several epochs, its cost, and its invalid settings.

The comparison runs in float64, as that of ODG-Q does (`test_odgq.py` says why).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustq.errors import RecipeError
from robustq.hardening.methods.dq import orthogonality
from robustq.hardening.methods.fgsm_mep import FgsmMep
from robustq.hardening.methods.free import Free
from robustq.hardening.methods.registry import METHODS, SETTINGS, resolved_settings
from robustq.hardening.methods.rslad import OnlineTeacher
from tests.hardening.methods import methods_reference as reference
from tests.hardening.methods.test_odgq import EPSILON, SAMPLES, SHAPE, SLOTS, Twin, assert_close, images, running, twins
from tests.hardening.tiny import build, recipe

IMAGE = torch.zeros(SHAPE, dtype=torch.float64)
LEVEL = 1 / 255
SEED = 5
CLASSES = 3
EPOCHS = 3


def teacher_net() -> Twin:
    return twins(seed=9)[0].eval()


def settings_of(method: str, **keys: Any) -> dict[str, Any]:
    return resolved_settings(recipe(method, settings=keys))


def built(method: str, model: nn.Module, *, smoothing: float = 0.0, epsilon: float = EPSILON, **keys: Any) -> Any:
    """The method on a float64 net: its memory in float64 too."""
    teacher = OnlineTeacher(teacher_net()) if method == "rslad" else None
    settings = recipe(method, batch_size=SLOTS, label_smoothing=smoothing, settings=keys)
    sizes: dict[str, Any] = {"image_shape": SHAPE, "samples": SAMPLES, "classes": CLASSES, "epochs": EPOCHS}
    made = build(settings, model, epsilon=epsilon, **sizes, seed=SEED, teacher=teacher)
    for name in ("perturbation", "perturbations", "momenta", "guides"):
        if hasattr(made, name):
            setattr(made, name, getattr(made, name).double())
    return made


def train_both(
    method: Any, model: nn.Module, plain: reference.Reference, net: Any, *, epochs: int = 4
) -> list[reference.Made]:
    """Train by both, comparing after every step of the optimiser; what the reference made."""
    x, y = images(SAMPLES, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    sgd = reference.Sgd(net, eta=0.05)
    trace = []
    for epoch in range(epochs):
        # Each epoch in another order, in batches of 6, 6 and 4: the last batch is short, and samples change slots.
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        method.begin_epoch(epoch)
        for indices in torch.split(order, SLOTS):
            expected = plain(epoch, (x[indices], y[indices], indices))
            for _ in range(method.repeats):
                x_adv = method.perturb(x[indices], y[indices], indices)
                step = method.loss(x[indices], x_adv, y[indices], indices)
                optimizer.zero_grad()
                step.loss.backward()
                method.after_backward(x_adv)
                want = next(expected)
                # 1e-15: the two add epsilon to a pixel in another order, in float64.
                torch.testing.assert_close(x_adv.detach(), want.x_adv.detach(), rtol=0, atol=1e-15)
                assert step.loss.item() == pytest.approx(want.loss.item(), rel=1e-10)
                assert {name: value.item() for name, value in step.terms.items()} == pytest.approx(want.terms, rel=1e-9)
                gradients = sgd.step(want)
                assert_close({name: value.grad for name, value in model.named_parameters()}, gradients)
                assert_close(running(model), net.running)
                optimizer.step()
                assert_close(
                    {name: value.data for name, value in model.named_parameters()},
                    {name: value.detach() for name, value in net.parameters.items()},
                )
                trace.append(want)
            assert next(expected, None) is None
    return trace


@pytest.mark.parametrize(
    ("keys", "plain"),
    [
        ({}, {"steps": 7, "step": 2.5 * EPSILON / 7, "random_start": True, "mode": "eval"}),
        (
            {"steps": 5, "step_size": "4/255", "random_start": False, "batch_norm": "train"},
            {"steps": 5, "step": 4 / 255, "random_start": False, "mode": "train"},
        ),
    ],
)
def test_pgd(keys: dict[str, Any], plain: dict[str, Any]) -> None:
    model, net = twins()
    task = reference.Task(net, EPSILON, SEED, smoothing=0.1)
    x_advs = train_both(built("pgd", model, smoothing=0.1, **keys), model, reference.pgd(task, **plain), net, epochs=2)
    assert all(made.x_adv.min() >= 0 and made.x_adv.max() <= 1 for made in x_advs)


@pytest.mark.parametrize(
    ("keys", "alpha", "mode"),
    [({}, 1.25 * EPSILON, "train"), ({"step_scale": 0.5, "batch_norm": "eval"}, 0.5 * EPSILON, "eval")],
)
def test_fgsm_rs(keys: dict[str, Any], alpha: float, mode: str) -> None:
    model, net = twins()
    task = reference.Task(net, EPSILON, SEED)
    train_both(built("fgsm-rs", model, **keys), model, reference.fgsm_rs(task, alpha=alpha, mode=mode), net)


@pytest.mark.parametrize(
    ("keys", "k", "alpha", "mode"),
    [
        ({}, 2.0, EPSILON, "train"),
        ({"noise_scale": 1.0, "step_scale": 1.25, "batch_norm": "separate"}, 1.0, 1.25 * EPSILON, "separate"),
    ],
)
def test_n_fgsm(keys: dict[str, Any], k: float, alpha: float, mode: str) -> None:
    model, net = twins()
    task = reference.Task(net, EPSILON, SEED, smoothing=0.2)
    plain = reference.n_fgsm(task, k=k, alpha=alpha, mode=mode)
    train_both(built("n-fgsm", model, smoothing=0.2, **keys), model, plain, net)


@pytest.mark.parametrize(("m", "step_scale"), [(1, 1.0), (4, 1.0), (3, 0.5)])
def test_free(m: int, step_scale: float) -> None:
    model, net = twins()
    task = reference.Task(net, EPSILON, SEED)
    method = built("free", model, repeats=m, step_scale=step_scale)
    plain = reference.free(task, m=m, step=step_scale * EPSILON, slots=SLOTS, image=IMAGE)
    trace = train_both(method, model, plain, net, epochs=2)
    # The run must have met what the test is about: a perturbation that came from the batch before, and both clips.
    assert method.perturbation.abs().max() == EPSILON
    assert any(bool((made.x_adv == bound).any()) for made in trace for bound in (0.0, 1.0))


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_dq(beta: float) -> None:
    model, net = twins()
    task = reference.Task(net, EPSILON, SEED, smoothing=0.1)
    method = built("dq", model, smoothing=0.1, orthogonality_weight=beta)
    trace = train_both(method, model, reference.dq(task, beta=beta), net, epochs=2)
    # It lowers what it penalises, or it is not a penalty.
    assert (trace[-1].terms["orthogonality"] < 0.5 * trace[0].terms["orthogonality"]) == (beta > 0)


def test_orthonormal_layers_are_not_penalised() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, 4, 3), nn.Conv2d(2, 40, 3), nn.Linear(5, 9), nn.Conv2d(6, 6, 3, groups=3)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)  # type: ignore[arg-type]
    grouped = layers.pop()
    # float32: the Gram matrix of at most 18 rows is right to about 1e-6.
    assert orthogonality(nn.Sequential(*layers)).item() == pytest.approx(0.0, abs=1e-10)
    # Its three groups are matrices of two rows each, though the whole is one of six orthonormal rows.
    assert orthogonality(grouped).item() == pytest.approx(0.0, abs=1e-10)
    with torch.no_grad():
        grouped.weight[2:4].copy_(grouped.weight[0:2])  # type: ignore[index]
    assert orthogonality(grouped).item() == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize(
    ("mode", "through_prior", "keys"),
    [
        *((mode, True, {}) for mode in ("eval", "train", "separate")),
        *((mode, False, {}) for mode in ("eval", "train")),
        ("train", True, {"step_scale": 0.5, "momentum": 0.9, "mse_weight": 1.0}),
    ],
)
def test_fgsm_mep(mode: str, through_prior: bool, keys: dict[str, float]) -> None:
    model, net = twins()
    task = reference.Task(net, EPSILON, SEED, smoothing=0.4)
    common: dict[str, Any] = {"reset_epochs": 3, "prior_gradient": through_prior, "batch_norm": mode}
    method = built("fgsm-mep", model, smoothing=0.4, **common, **keys)
    plain = reference.fgsm_mep(
        task,
        alpha=EPSILON * keys.get("step_scale", 1.0),
        mu=keys.get("momentum", 0.3),
        lambda_=keys.get("mse_weight", 10.0),
        reset=3,
        samples=SAMPLES,
        image=IMAGE,
        mode=mode,
        through_prior=through_prior,
    )
    # The fourth epoch starts anew.
    trace = train_both(method, model, plain, net, epochs=4)
    assert all(bool((made.x_adv == bound).any()) for made in trace for bound in (0.0, 1.0))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nu_at(mode: str) -> None:
    model, net = twins()
    task = reference.Task(net, EPSILON, SEED, smoothing=0.4)
    method = built("nu-at", model, smoothing=0.4, batch_norm=mode)
    plain = reference.nu_at(task, alpha=EPSILON / 2, lambda_=4.0, epochs=EPOCHS, mode=mode)
    train_both(method, model, plain, net, epochs=EPOCHS)


@pytest.mark.parametrize(("mode", "epsilon", "s"), [("train", 8 / 255, 0.6), ("eval", EPSILON, 0.2)])
def test_liet(mode: str, epsilon: float, s: float) -> None:
    model, net = twins()
    task = reference.Task(net, epsilon, SEED)
    keys: dict[str, Any] = {"renew_batches": 2, "random_smoothing": s, "divergence_weight": 10.0}
    method = built("liet", model, epsilon=epsilon, batch_norm=mode, **keys)
    plain = reference.liet(task, lambda_=10.0, epochs=EPOCHS, renew=2, s=s, classes=CLASSES, image=IMAGE, mode=mode)
    train_both(method, model, plain, net, epochs=EPOCHS)


def test_fgsm_mep_without_any_gradient_stays_finite() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    method: FgsmMep = built("fgsm-mep", model)
    method.begin_epoch(0)
    x, y = images(SLOTS, seed=1)
    x_adv = method.perturb(x, y, torch.arange(SLOTS))
    assert x_adv.isfinite().all()
    assert not method.momenta.any()


@pytest.mark.parametrize(
    ("keys", "plain"),
    [
        ({}, {"beta": 6.0, "steps": 10, "step": 0.25 * EPSILON, "start": LEVEL, "mode": "eval"}),
        (
            {"steps": 1, "kl_weight": 1.0, "start_size": "4/255", "batch_norm": "train"},
            {"beta": 1.0, "steps": 1, "step": EPSILON, "start": 4 * LEVEL, "mode": "train"},
        ),
    ],
)
def test_trades(keys: dict[str, Any], plain: dict[str, Any]) -> None:
    model, net = twins()
    task = reference.Task(net, EPSILON, SEED, smoothing=0.1)
    train_both(built("trades", model, smoothing=0.1, **keys), model, reference.trades(task, **plain), net, epochs=2)


@pytest.mark.parametrize(
    ("keys", "plain"),
    [
        ({}, {"clean": 1 / 6, "steps": 1, "step": EPSILON, "start": LEVEL, "mode": "eval"}),
        (
            {"steps": 10, "clean_weight": 0, "start_size": "8/255", "batch_norm": "train"},
            {"clean": 0, "steps": 10, "step": 0.25 * EPSILON, "start": 8 * LEVEL, "mode": "train"},
        ),
    ],
)
def test_rslad(keys: dict[str, Any], plain: dict[str, Any]) -> None:
    model, net = twins()
    teacher = twins(seed=9)[1]

    def answer(x: Tensor) -> Tensor:
        return teacher.forward(x, train=False, move=False)[0].detach()

    task = reference.Task(net, EPSILON, SEED)
    train_both(built("rslad", model, **keys), model, reference.rslad(task, teacher=answer, **plain), net, epochs=2)


class Counted:
    """Passes through a network: forward ones at its first convolution, backward ones at that convolution's output."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = self.backward = 0
        model.get_submodule("conv1").register_forward_hook(self._seen)

    def _seen(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._back)  # type: ignore[no-untyped-call]

    def _back(self, _: Tensor) -> None:
        self.backward += 1


COSTS: list[tuple[str, dict[str, Any], int, int, int]] = [
    ("natural", {}, 1, 1, 0),
    ("odgq", {}, 3, 2, 0),
    ("odgq", {"mmd_weight": 0}, 2, 2, 0),
    ("odgq", {"natural_gradient": True}, 3, 3, 0),
    ("dq", {}, 1, 1, 0),
    ("pgd", {"steps": 7}, 8, 8, 0),
    ("fgsm-rs", {}, 2, 2, 0),
    ("n-fgsm", {}, 2, 2, 0),
    ("free", {"repeats": 6}, 6, 6, 0),
    ("fgsm-mep", {}, 2, 3, 0),
    ("fgsm-mep", {"batch_norm": "eval"}, 3, 3, 0),
    ("fgsm-mep", {"prior_gradient": False, "batch_norm": "eval"}, 2, 2, 0),
    ("nu-at", {}, 3, 3, 0),
    ("liet", {}, 2, 3, 0),
    ("liet", {"batch_norm": "eval"}, 3, 3, 0),
    ("trades", {"steps": 10}, 13, 12, 0),
    ("rslad", {}, 3, 3, 1),
    ("rslad", {"clean_weight": 0, "steps": 2}, 3, 3, 1),
]


@pytest.mark.parametrize(("name", "keys", "forward", "backward", "of_teacher"), COSTS)
def test_passes_are_what_a_batch_costs(
    name: str, keys: dict[str, Any], forward: int, backward: int, of_teacher: int
) -> None:
    model, _ = twins()
    teacher = teacher_net()
    taught = Counted(teacher)
    method: Any = built(name, model, **keys)
    if name == "odgq":
        method.perturbations = method.perturbations.double()
    if name == "rslad":
        method.teacher = OnlineTeacher(teacher)
    method.begin_epoch(0)
    if name == "liet":
        method.progress[1] = 1  # the first of 20 batches computes G besides
    counted = Counted(model)
    x, y = images(SLOTS, seed=1)
    for _ in range(method.repeats):
        x_adv = method.perturb(x, y, torch.arange(SLOTS))
        method.loss(x, x_adv, y, torch.arange(SLOTS)).loss.backward()
        method.after_backward(x_adv)
    assert (counted.forward, counted.backward, taught.forward) == (forward, backward, of_teacher)
    teachers = " + 1 teacher's forward" if of_teacher else ""
    plural = "es" if backward > 1 else ""
    assert method.passes == f"{forward} forward{teachers} + {backward} backward pass{plural}"


# What each carries from batch to batch, beside random numbers.
ALL = ["natural", "odgq", "pgd", "fgsm-rs", "n-fgsm", "free", "dq", "fgsm-mep", "nu-at", "liet", "trades", "rslad"]


def test_every_method_that_trains_is_here() -> None:
    assert sorted(SETTINGS) == sorted([*ALL, "ptq"])
    assert SETTINGS.keys() - METHODS.keys() == {"ptq"}
    assert [name for name, kind in SETTINGS.items() if not kind.trains] == ["ptq"]
    assert [name for name, kind in SETTINGS.items() if not kind.defends] == ["natural", "ptq"]
    assert {name: built(name, twins()[0]).adversarial for name in ALL} == {
        name: name not in ("natural", "dq") for name in ALL
    }


TRAIN_MODE = ("fgsm-rs", "n-fgsm", "fgsm-mep", "nu-at", "liet")
"""Methods whose attack generation moves BatchNorm's running statistics by default."""


@pytest.mark.parametrize("name", ALL)
def test_attack_generation_leaves_weights_and_modes_alone(name: str) -> None:
    model, _ = twins()
    keys: dict[str, Any] = {"batch_norm": "eval"} if name in TRAIN_MODE else {}
    method = built(name, model, **keys)
    method.begin_epoch(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = images(SLOTS, seed=1)
    kept = x.clone()
    x_adv = method.perturb(x, y, torch.arange(SLOTS))
    assert torch.equal(x, kept)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert x_adv.requires_grad == isinstance(method, Free)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ALL)
def test_the_loss_may_be_asked_for_again_at_other_weights(name: str) -> None:
    # As weight perturbation does: the second loss is that of a method which never was at the first weights.
    def second_loss(*, twice: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model, _ = twins()
        keys: dict[str, Any] = {"batch_norm": "separate"} if name in ("fgsm-mep", "liet") else {}
        method = built(name, model, **keys)
        method.begin_epoch(0)
        x, y = images(SLOTS, seed=1)
        indices = torch.arange(SLOTS)
        x_adv = method.perturb(x, y, indices)
        if twice:
            loss = method.loss(x, x_adv, y, indices).loss
            torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        elif name in ("fgsm-mep", "liet"):
            start = method.prior if name == "fgsm-mep" else method.start
            start._logits = None  # its first call would reuse the answer at the old weights
        state = {key: value.clone() for key, value in method.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        loss = method.loss(x, x_adv, y, indices).loss
        loss.backward()
        assert all(torch.equal(value, state[key]) for key, value in method.state_dict().items())
        return loss.detach(), {key: value.grad for key, value in model.named_parameters() if value.grad is not None}

    once, again = second_loss(twice=False), second_loss(twice=True)
    assert torch.equal(once[0], again[0])
    assert once[1].keys() == again[1].keys()
    assert all(torch.equal(value, again[1][key]) for key, value in once[1].items())


BAD: list[tuple[str, str, Any]] = [
    ("pgd", "steps", 0),
    ("pgd", "step_size", "quick"),
    ("pgd", "random_start", 1),
    ("fgsm-rs", "step_scale", float("nan")),
    ("dq", "orthogonality_weight", -1e-3),
    ("fgsm-mep", "reset_epochs", 0),
    ("fgsm-mep", "prior_gradient", "no"),
    ("liet", "random_smoothing", 1.5),
    ("trades", "step_size", "1/0"),
    ("trades", "start_size", "1/510"),
    ("rslad", "teacher", 3),
    ("rslad", "teacher_sees", "both"),
    ("rslad", "clean_weight", 1.01),
]


@pytest.mark.parametrize(("method", "key", "value"), BAD)
def test_bad_settings(method: str, key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"{method}\.{key}\b"):
        settings_of(method, **{key: value})
