"""The options of any method, each against its formula written out over several steps, and all of them at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from robustq.data import Augment
from robustq.errors import RecipeError, RunStoppedError
from robustq.hardening.averaging import IMAGES as REESTIMATED
from robustq.hardening.awp import adversarial_weights
from robustq.hardening.methods.method import CrossEntropy
from robustq.hardening.methods.natural import Natural
from robustq.hardening.methods.registry import build_method
from robustq.hardening.monitor import Monitor, HoldoutAccuracy
from robustq.hardening.state import StopRequest
from robustq.hardening.trainer import Training
from robustq.models.batch_norm import batch_statistics
from robustq.recipe import Recipe, load_recipe
from tests.hardening.memory_checkpointer import MemoryCheckpointer
from tests.hardening.test_resume import CPU, EPSILON, IMAGES, Interrupting, begun, same
from tests.hardening.test_trainer import BATCH, Scripted, network, split

STEPS_AN_EPOCH = 3
LR = 0.05


def settings(**keys: Any) -> Recipe:
    common: dict[str, Any] = {"epochs": 2, "batch_size": BATCH, "lr": LR, "schedule": "steps", "weight_decay": 0.01}
    return Recipe(name="test", method="natural", **{**common, **keys})


def trained(
    model: nn.Module, recipe: Recipe, *, monitor: Scripted | None = None
) -> tuple[Training, MemoryCheckpointer]:
    natural = Natural(model, cross_entropy=CrossEntropy(recipe.label_smoothing))
    watching = cast(Monitor, monitor or Scripted())
    training = Training(model, natural, split(), watching, recipe, augment=Augment(), seed=7, device=CPU)
    keeper = MemoryCheckpointer()
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    training.run(keeper, StopRequest())
    return training, keeper


@dataclass
class Options:
    """As in a recipe."""

    label_smoothing: float = 0.0
    clip_gradient: float = 0.0
    awp_gamma: float = 0.0
    awp_warmup_epochs: int = 0
    ema_decay: float = 0.0


def by_hand(model: nn.Module, options: Options) -> Iterator[dict[str, Tensor]]:
    """Natural training of a float network with every formula written out; the weights after each step."""
    recipe = settings()
    parameters = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = model(x)
        classes, s = logits.shape[1], options.label_smoothing
        share = torch.full_like(logits, s / classes)
        share[torch.arange(len(y)), y] += 1 - s
        log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
        loss = -(share * log_p).sum() / len(y)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    model.train()
    for epoch in range(recipe.epochs):
        for batch in split().batches(BATCH, device=CPU, seed=7, epoch=epoch, augment=Augment()):
            at = {name: value.detach().clone() for name, value in parameters.items()}
            if options.awp_gamma and epoch >= options.awp_warmup_epochs:
                kept = {name: value.clone() for name, value in model.named_buffers()}
                ascent = gradients(batch.x, batch.y)
                with torch.no_grad():
                    for name, value in model.named_buffers():
                        value.copy_(kept[name])
                    for name, value in parameters.items():
                        if name.endswith("weight") and value.dim() > 1:
                            length = math.sqrt(value.double().square().sum().item())
                            steepness = math.sqrt(ascent[name].double().square().sum().item())
                            value.add_(ascent[name], alpha=options.awp_gamma * length / steepness)
            descent = gradients(batch.x, batch.y)
            total = math.sqrt(sum(value.double().square().sum().item() for value in descent.values()))
            shorter = min(1.0, options.clip_gradient / total) if options.clip_gradient else 1.0
            with torch.no_grad():
                for name, value in parameters.items():
                    pull = shorter * descent[name] + recipe.weight_decay * at[name]
                    velocity[name] = recipe.momentum * velocity[name] + pull
                    value.copy_(at[name] - LR * velocity[name])
            yield {name: value.detach().clone() for name, value in parameters.items()}


def far(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


CASES = {
    "clip": Options(clip_gradient=0.3),
    "smoothing": Options(label_smoothing=0.2),
    "awp": Options(awp_gamma=0.05),
    "awp after an epoch": Options(awp_gamma=0.05, awp_warmup_epochs=1),
    "all": Options(label_smoothing=0.1, clip_gradient=0.5, awp_gamma=0.02, awp_warmup_epochs=1),
}


@pytest.mark.parametrize("case", CASES)
def test_training_follows_the_formulas(case: str) -> None:
    options = CASES[case]
    model = network()
    trained(model, settings(**vars(options)))
    (*_, want), (*_, plain) = by_hand(network(), options), by_hand(network(), Options())
    got = {name: value.detach() for name, value in model.named_parameters()}
    # Six steps of a ReLU network in float32, whose sums run in another order: 1e-7 grows by a few powers of ten.
    assert far(got, want) < 2e-4
    assert far(plain, want) > 20 * 2e-4  # what the option changes is far from the tolerance


def test_defaults_change_not_one_bit_and_cost_nothing() -> None:
    calls: list[int] = []

    class Counted(Natural):
        def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, places: Tensor) -> Any:
            calls.append(1)
            return super().loss(x, x_adv, y, places)

    model, twin = network(4), network(4)
    counted = Counted(model, cross_entropy=CrossEntropy(0.0))
    watching = cast(Monitor, Scripted())
    training = Training(model, counted, split(), watching, settings(), augment=Augment(), seed=7, device=CPU)
    training.run(MemoryCheckpointer(), StopRequest())
    assert len(calls) == 2 * STEPS_AN_EPOCH and training.descent.average is None
    # A gradient that is never long enough, and a perturbation that never begins, do not either.
    trained(twin, settings(clip_gradient=1e6, awp_gamma=0.1, awp_warmup_epochs=9))
    same(dict(model.state_dict()), dict(twin.state_dict()))


def test_the_worst_weights_are_left_as_they_were_found() -> None:
    model = network(4).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = split().images[:8].float() / 255, split().labels[:8]
    gamma = 0.1
    seen: list[float] = []

    def loss() -> Tensor:
        value = CrossEntropy()(model(x), y)
        seen.append(value.item())
        return value

    with pytest.raises(ZeroDivisionError), adversarial_weights(model, loss, gamma=gamma):
        for name, parameter in model.named_parameters():
            moved = (parameter.detach() - state[name]).norm()
            expected = gamma * state[name].norm() if parameter.dim() > 1 else torch.zeros(())
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=0)  # float32 sums of a thousand squares
        with batch_statistics(model), torch.no_grad():
            loss()
        raise ZeroDivisionError
    assert seen[1] > seen[0]  # worse they are
    same(dict(model.state_dict()), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_without_gradient_are_not_perturbed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    unused = nn.Linear(4, 4)
    model.unused = unused
    with torch.no_grad():
        nn.init.zeros_(cast(nn.Linear, model[1]).weight)  # the second layer's input, so its gradient, is 0
    before = unused.weight.detach().clone()

    def loss() -> Tensor:
        answer: Tensor = model[2](model[1](model[0](torch.ones(1, 1, 2, 2))))
        return answer[0, 0]

    with adversarial_weights(model, loss, gamma=0.5):
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        assert torch.equal(unused.weight, before)
        assert not cast(nn.Linear, model[1]).weight.any()  # a part of nothing is nothing


class Copying(Scripted):
    """Keeps everything that it is asked to judge."""

    def __init__(self) -> None:
        super().__init__(HoldoutAccuracy(0.5, None), HoldoutAccuracy(0.6, None))
        self.judged: list[dict[str, Tensor]] = []

    def watch(self, model: nn.Module) -> HoldoutAccuracy:
        self.judged.append({name: value.clone() for name, value in model.state_dict().items()})
        return super().watch(model)


def test_the_average_is_judged_and_kept_and_training_does_not_notice() -> None:
    model, twin, watching, decay = network(4), network(4), Copying(), 0.3
    training, keeper = trained(model, settings(ema_decay=decay), monitor=watching)
    # The weights themselves are those of a run without.
    steps: list[dict[str, Tensor]] = []

    class Recording(Natural):
        def perturb(self, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
            steps.append({name: value.detach().clone() for name, value in twin.named_parameters()})
            return super().perturb(x, y, places)

    recording = Recording(twin, cross_entropy=CrossEntropy())
    monitor = cast(Monitor, Scripted())
    Training(twin, recording, split(), monitor, settings(), augment=Augment(), seed=7, device=CPU).run(
        MemoryCheckpointer(), StopRequest()
    )
    steps.append({name: value.detach().clone() for name, value in twin.named_parameters()})
    same(dict(model.state_dict()), dict(twin.state_dict()))
    # The average over them, its first steps faster.
    average = {name: value.double() for name, value in steps[0].items()}
    for t, weights in enumerate(steps[1:], start=1):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * value.double() for name, value in weights.items()}
        if t % STEPS_AN_EPOCH == 0:
            judged = watching.judged[t // STEPS_AN_EPOCH - 1]
            for name, value in average.items():
                torch.testing.assert_close(judged[name].double(), value, rtol=1e-5, atol=1e-7)  # float32
    state = keeper.load()
    same(state["judged"], watching.judged[1])
    same(state["standing"]["best_weights"], watching.judged[1])
    same(dict(state["model"]), dict(model.state_dict()))
    assert training.descent.average is not None and training.descent.average.steps == 2 * STEPS_AN_EPOCH


@pytest.mark.parametrize("bits", [32, 4])
def test_batch_norm_is_that_of_the_averaged_weights(bits: int) -> None:
    model, watching = network(bits), Copying()
    trained(model, settings(ema_decay=0.5, epochs=1), monitor=watching)
    (judged,) = watching.judged
    twin = network(bits)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            value.copy_(judged[name])
    means: dict[str, list[Tensor]] = {}
    variances: dict[str, list[Tensor]] = {}

    def looking(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = getattr(inputs[0], "value", inputs[0])
            means.setdefault(name, []).append(x.mean(dim=(0, 2, 3)))
            variances.setdefault(name, []).append(x.var(dim=(0, 2, 3)))

        return hook

    norms = {name: module for name, module in twin.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, module in norms.items():
        module.register_forward_pre_hook(looking(name))
    batches = list(split().batches(BATCH, device=CPU, seed=7, epoch=0, augment=Augment()))
    assert len(split()) < REESTIMATED
    with batch_statistics(twin.train()), torch.no_grad():
        for batch in batches[:2]:  # the whole ones
            twin(batch.x)
    assert len(norms) > 5
    for name in norms:
        for key, seen in (("running_mean", means[name]), ("running_var", variances[name])):
            torch.testing.assert_close(judged[f"{name}.{key}"], torch.stack(seen).mean(dim=0), rtol=1e-4, atol=1e-6)


ALL: dict[str, Any] = {
    "label_smoothing": 0.1,
    "clip_gradient": 0.5,
    "awp_gamma": 0.01,
    "awp_warmup_epochs": 1,
    "ema_decay": 0.9,
}


def begun_with_all(method: str, bits: int, keys: dict[str, Any], *, init: int) -> tuple[Training, Interrupting]:
    plain, images = begun(method, bits, keys, init=init)
    recipe = replace(plain.recipe, **ALL)
    bound = build_method(
        recipe, plain.model, epsilon=EPSILON, image_shape=(1, 8, 8), samples=IMAGES, device=CPU, seed=3
    )
    assert getattr(bound, "cross_entropy", CrossEntropy(0.1)).label_smoothing == 0.1
    settings: dict[str, Any] = {"augment": plain.augment, "seed": plain.seed, "device": CPU}
    return Training(plain.model, bound, images, plain.monitor, recipe, **settings), images


@pytest.mark.parametrize(
    ("method", "bits", "keys"),
    [("odgq", 4, {"domains": 2}), ("free", 0, {"repeats": 2}), ("trades", 0, {}), ("fgsm-mep", 0, {})],
)
def test_all_options_at_once_resume_bit_for_bit(method: str, bits: int, keys: dict[str, Any]) -> None:
    def whole() -> dict[str, Any]:
        training, _ = begun_with_all(method, bits, keys, init=0)
        keeper = MemoryCheckpointer()
        keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
        training.run(keeper, StopRequest())
        return keeper.load()

    expected = whole()
    training, images = begun_with_all(method, bits, keys, init=0)
    keeper = MemoryCheckpointer()
    keeper.save(training.state_dict(), epoch_ended=False, is_best=False)
    for turn, stop_at in enumerate((2, 5), start=1):  # in mid-epoch; without and with the weights perturbed
        images.stop_at = stop_at
        with StopRequest() as stop, pytest.raises(RunStoppedError):
            training.run(keeper, stop)
        assert keeper.load()["judged"] is None
        training, images = begun_with_all(method, bits, keys, init=turn)
        training.load_state_dict(keeper.load())
    training.run(keeper, StopRequest())
    same(keeper.load(), expected)
    assert expected["average"]["steps"] == 6 * keys.get("repeats", 1)


@pytest.mark.parametrize(
    "bad",
    [
        "label_smoothing=1",
        "label_smoothing=-0.1",
        "clip_gradient=-1",
        "clip_gradient=true",
        "ema_decay=1",
        "awp_gamma=1.5",
        "awp_warmup_epochs=0.5",
        "awp_warmup_epochs=-1",
    ],
)
def test_values_without_a_meaning_are_refused(bad: str) -> None:
    with pytest.raises(RecipeError, match=bad.partition("=")[0]):
        load_recipe("odgq", (bad,))


def test_rslad_reads_no_labels_to_smooth() -> None:
    keys = ("method=rslad", "epochs=1", "batch_size=8", "lr=0.1")
    with pytest.raises(RecipeError, match="label_smoothing has no meaning for method 'rslad', which reads no labels"):
        load_recipe("natural", (*keys, "label_smoothing=0.1"))
    assert load_recipe("natural", keys).label_smoothing == 0
