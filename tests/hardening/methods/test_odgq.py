"""ODG-Q against the line-by-line reference of Algorithm 1, and what each of its other readings changes.

The comparison runs in float64: sign() of a gradient that two orders of summation leave on different sides of 0 would
otherwise decide the test. Images, P and step sizes are then equal bit by bit, since both sides do the same sums there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustq.errors import RecipeError
from robustq.hardening.methods.method import LossOutput
from robustq.hardening.methods.mmd import mmd
from robustq.hardening.methods.odgq import Odgq, OdgqSettings
from robustq.hardening.methods.registry import resolved_settings
from robustq.models.quant.calibration import calibrate
from robustq.models.spec import ModelSpec, build_model
from tests.hardening.methods import odgq_reference as reference
from tests.hardening.tiny import build, context, recipe

EPSILON = 0.1
SLOTS = 6
SHAPE = (2, 6, 6)
SAMPLES = 16


class Twin(nn.Module):
    """The reference's net as an ordinary module, with the layer names of our ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.bn1(self.conv1(x)))
        h = functional.relu(self.bn2(self.conv2(h)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(h), 1))
        return logits


def twins(seed: int = 0) -> tuple[Twin, reference.ReferenceNet]:
    """The same float64 net twice, in train mode, with running statistics and affine parameters that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    model = Twin().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for norm in (model.bn1, model.bn2):
            norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator, dtype=torch.float64))
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(0.3 * torch.randn(norm.running_mean.shape, generator=generator))
            norm.running_var.copy_(0.5 + torch.rand(norm.running_var.shape, generator=generator))
    running = {name: value for name, value in model.state_dict().items() if "running" in name}
    return model, reference.ReferenceNet(dict(model.named_parameters()), running)


def images(count: int, *, seed: int, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    """float64 images between `low` and `high` (a fifth of the pixels black or white when that is all of [0, 1])."""
    generator = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand((count, *SHAPE), generator=generator, dtype=torch.float64)
    if (low, high) == (0.0, 1.0):
        x = ((x - 0.1) * 1.25).clamp(0, 1)
    return x, torch.randint(0, 3, (count,), generator=generator)


def odgq(model: nn.Module, *, seed: int = 0, dtype: Any = torch.float64, **keys: Any) -> Odgq:
    sizes: dict[str, Any] = {"batch_size": SLOTS, "image_shape": SHAPE, "samples": SAMPLES}
    method = Odgq(context(model, **sizes, generator=torch.Generator().manual_seed(seed)), OdgqSettings(**keys))
    method.perturbations = method.perturbations.to(dtype)
    return method


def one_step(method: Odgq, x: Tensor, y: Tensor, indices: Tensor) -> LossOutput:
    return method.loss(x, method.perturb(x, y, indices), y, indices)


def running(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}


class Watch:
    """Copies of what goes into a model and what comes out, in the order of its forward passes."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._handle = model.register_forward_hook(self._note)

    def _note(self, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.inputs.append(inputs[0].detach().clone())
        self.outputs.append(output.detach().clone())

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_close(got: Any, expected: Any) -> None:
    """Equal for two float64 programs that sum in another order: 1e-15 apart in a step, 1e-14 in 15 steps of SGD."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("domains", "local_scale", "mmd_weight"), [(1, 1.0, 3.0), (2, 0.5, 0.3), (4, 1.25, 3.0)])
def test_algorithm_1(domains: int, local_scale: float, mmd_weight: float) -> None:
    x, y = images(SAMPLES, seed=1)
    # Each epoch in another order, in batches of 6, 6 and 4: the last batch is short, and samples change slots.
    shuffled = [torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)) for epoch in range(5)]
    orders = [torch.split(order, SLOTS) for order in shuffled]
    model, net = twins()
    expected = reference.train(
        net,
        [[(x[indices], y[indices]) for indices in order] for order in orders],
        reference.Settings(N_k=domains, epsilon=EPSILON, epsilon_l=local_scale * EPSILON, lambda_=mmd_weight, eta=0.05),
        slots=SLOTS,
    )
    method = odgq(model, domains=domains, local_scale=local_scale, mmd_weight=mmd_weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    trace = iter(expected)
    for epoch, order in enumerate(orders):
        method.begin_epoch(epoch)
        for indices in order:
            with Watch(model) as seen:
                step = one_step(method, x[indices], y[indices], indices)
            want = next(trace)
            assert method.domain == want.k
            # Line 5's images, the clean ones and line 9's images, and no fourth pass.
            assert len(seen.inputs) == 3
            assert torch.equal(seen.inputs[0], want.x_g)
            assert torch.equal(seen.inputs[1], x[indices])
            assert torch.equal(seen.inputs[2], want.x_adv)
            assert torch.equal(method.perturbations, want.P)
            assert_close(step.terms["cross_entropy"].item(), want.task_loss)
            assert_close(step.terms["mmd"].item(), want.mmd_loss)
            assert_close(step.loss.item(), want.task_loss + mmd_weight * want.mmd_loss)
            assert torch.equal(step.logits, seen.outputs[2])
            optimizer.zero_grad()
            step.loss.backward()  # type: ignore[no-untyped-call]
            assert_close({n: p.grad for n, p in model.named_parameters()}, want.gradients)
            assert_close(running(model), want.running)
            optimizer.step()
            assert_close({n: p.data for n, p in model.named_parameters()}, want.parameters)
    assert next(trace, None) is None
    # The run must have met what the test is about: P beyond the ball, both clamps, and a local part of both signs.
    P = expected[-1].P
    assert P.abs().max() > 1.5 * EPSILON
    assert all(bool((step.x_adv == bound).any()) for step in expected for bound in (0.0, 1.0))
    assert P.min() < 0 < P.max()
    if domains > 1:
        assert not torch.equal(P[0], P[1])


def grey(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images so far from 0 and 1 that nothing is clamped, their labels and indices."""
    return *images(SLOTS, seed=seed, low=0.3, high=0.7), torch.arange(SLOTS)


def first_sign(model: nn.Module, x_g: Tensor, y: Tensor) -> Tensor:
    """Sign of line 6's gradient by another way: the model in eval mode, the loss summed over the images."""
    model.eval()
    x_g = x_g.clone().requires_grad_()
    functional.cross_entropy(model(x_g), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
    model.train()
    model.zero_grad()
    assert x_g.grad is not None
    return x_g.grad.sign()


def test_global_perturbation_none() -> None:
    model, _ = twins()
    method = odgq(model, global_perturbation="none")
    for batch in range(2):
        x, y, indices = grey(seed=batch)
        with Watch(model) as seen:
            x_adv = method.perturb(x, y, indices)
        assert torch.equal(seen.inputs[0], x)
        torch.testing.assert_close(x_adv, x + EPSILON * first_sign(model, x, y), rtol=0, atol=1e-15)
    assert method.perturbations.numel() == 0


def test_global_perturbation_noise() -> None:
    model, _ = twins()
    x, y, indices = grey()
    method, again, other = (odgq(model, seed=seed, global_perturbation="noise") for seed in (3, 3, 4))
    starts = []
    for run in (method, method, again, other):
        with Watch(model) as seen:
            x_adv = run.perturb(x, y, indices)
        starts.append(seen.inputs[0] - x)
        torch.testing.assert_close(
            x_adv, seen.inputs[0] + EPSILON * first_sign(model, seen.inputs[0], y), rtol=0, atol=1e-15
        )
    # Uniform in +-2 epsilon, clipped to +-epsilon by line 5 as P would be: a quarter of the entries at either end.
    # The noise is float32 (epsilon rounds by 1.5e-9), as it is in training.
    assert starts[0].abs().max().item() == pytest.approx(EPSILON, abs=1e-8)
    for end in (-EPSILON, EPSILON):
        share = ((starts[0] - end).abs() < 1e-8).double().mean().item()
        # 432 draws at 1/4: a standard deviation of 0.021, and five of them.
        assert share == pytest.approx(0.25, abs=0.105)
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[3])
    assert method.perturbations.numel() == 0


def test_update_once_per_epoch() -> None:
    model, _ = twins()
    method = odgq(model, update="epoch", domains=1)
    changed = []
    for epoch in range(3):
        method.begin_epoch(epoch)
        for batch in range(3):
            before = method.perturbations.clone()
            x, y, indices = grey(seed=10 * epoch + batch)
            with Watch(model) as seen:
                method.perturb(x, y, indices)
            # Used in every batch, written in the first.
            torch.testing.assert_close(seen.inputs[0], x + before[0].clamp(-EPSILON, EPSILON), rtol=0, atol=1e-15)
            changed.append(not torch.equal(method.perturbations, before))
    assert changed == [True, False, False] * 3


def test_tied_to_the_sample() -> None:
    model, _ = twins()
    x, y = images(SAMPLES, seed=1, low=0.3, high=0.7)
    method = odgq(model, tied_to="sample", domains=2)
    assert method.perturbations.shape == (2, SAMPLES, *SHAPE)
    method.begin_epoch(1)
    indices = torch.tensor([9, 2, 15, 4])
    sign = first_sign(model, x[indices], y[indices])
    method.perturb(x[indices], y[indices], indices)
    assert torch.equal(method.perturbations[1, indices], EPSILON * sign)
    others = torch.tensor([place for place in range(SAMPLES) if place not in indices.tolist()])
    assert not method.perturbations[1, others].any() and not method.perturbations[0].any()
    # Image 2 in another slot of another batch meets its own perturbation; image 7 has none yet.
    with Watch(model) as seen:
        method.perturb(x[[7, 2]], y[[7, 2]], torch.tensor([7, 2]))
    torch.testing.assert_close(seen.inputs[0][0], x[7], rtol=0, atol=0)
    torch.testing.assert_close(seen.inputs[0][1], x[2] + EPSILON * sign[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [({}, torch.float64), ({"clip_stored": True}, torch.float64), ({"stored_as": "float16"}, torch.float16)],
)
def test_the_stored_set_is_a_sum_clipped_or_rounded(keys: dict[str, Any], dtype: torch.dtype) -> None:
    model, _ = twins()
    method = odgq(model, domains=1, local_scale=0.75, dtype=dtype, **keys)
    expected = torch.zeros(SLOTS, *SHAPE, dtype=dtype)
    for batch in range(6):
        x, y, indices = grey(seed=batch)
        with Watch(model) as seen:
            x_adv = method.perturb(x, y, indices)
        assert torch.equal(seen.inputs[0], x + expected.double().clamp(-EPSILON, EPSILON)) and x_adv.dtype == x.dtype
        expected = (expected + 0.75 * EPSILON * first_sign(model, seen.inputs[0], y)).to(dtype)
        if "clip_stored" in keys:
            expected = expected.clamp(-EPSILON, EPSILON)
        assert torch.equal(method.perturbations[0], expected)
    assert bool((method.perturbations.abs() > EPSILON).any()) is ("clip_stored" not in keys)


def test_project_total() -> None:
    x, y, indices = grey()
    results = []
    for project_total in (False, True):
        model, _ = twins()
        method = odgq(model, project_total=project_total, domains=1)
        method.perturb(x, y, indices)
        with Watch(model) as seen:
            results.append((method.perturb(x, y, indices), seen.inputs, method.perturbations.clone()))
    (free, free_seen, free_P), (projected, projected_seen, projected_P) = results
    # Both parts agree in most pixels of the second batch: 2 epsilon by default, which the images have room for.
    assert (free - x).abs().max().item() == pytest.approx(2 * EPSILON, abs=1e-15)
    torch.testing.assert_close(projected, x + (free - x).clamp(-EPSILON, EPSILON), rtol=0, atol=1e-15)
    # Nothing else changes.
    assert torch.equal(free_seen[0], projected_seen[0]) and torch.equal(free_P, projected_P)


def features_of(net: reference.ReferenceNet, x: Tensor, feature: str) -> Tensor:
    """What each reading of "the last convolution output" means on the twin, under the statistics of x."""
    if feature in ("pooled", "logits"):
        logits, pooled = net.forward(x, train=True, move=False)
        return pooled if feature == "pooled" else logits
    p = net.parameters
    h = functional.conv2d(x, p["conv1.weight"], padding=1)
    h = functional.relu(functional.batch_norm(h, None, None, p["bn1.weight"], p["bn1.bias"], training=True))
    h = functional.conv2d(h, p["conv2.weight"], padding=1, stride=2)
    if feature == "unpooled":
        h = functional.relu(functional.batch_norm(h, None, None, p["bn2.weight"], p["bn2.bias"], training=True))
    return h.flatten(1)


@pytest.mark.parametrize("feature", ["pooled", "unpooled", "conv", "logits"])
def test_features(feature: str) -> None:
    x, y, indices = grey()
    model, net = twins()
    method = odgq(model, features=feature)
    x_adv = method.perturb(x, y, indices)
    step = method.loss(x, x_adv, y, indices)
    gap = reference.mmd_loss(features_of(net, x_adv, feature), features_of(net, x, feature).detach())
    assert step.terms["mmd"].item() == pytest.approx(gap.item(), rel=1e-10)
    task = reference.task_loss(net.forward(x_adv, train=True, move=False)[0], y)
    # The last layers take no part in the alignment of an earlier feature: no gradient of theirs to compare.
    expected = torch.autograd.grad(task + 3 * gap, list(net.parameters.values()))
    assert_close(gradients(model, step.loss), dict(zip(net.parameters, expected, strict=True)))


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"estimator": "squared"}, {"estimator": "squared"}),
        ({"bandwidth": "mean"}, {"bandwidth": "mean"}),
        ({"bandwidth": 0.02}, {"bandwidth": 0.02}),
    ],
)
def test_estimator_and_bandwidth_reach_the_mmd(keys: dict[str, Any], options: dict[str, Any]) -> None:
    x, y, indices = grey()
    model, net = twins()
    method = odgq(model, **keys)
    x_adv = method.perturb(x, y, indices)
    step = method.loss(x, x_adv, y, indices)
    a, b = features_of(net, x_adv, "pooled"), features_of(net, x, "pooled")
    expected = mmd(a, b, **options).item()
    assert step.terms["mmd"].item() == pytest.approx(expected, rel=1e-10)
    assert expected != pytest.approx(mmd(a, b).item(), rel=1e-3)


BATCH_NORM_MODES = ["eval", "train", "joint", "separate"]


@pytest.mark.parametrize("natural_gradient", [False, True])
@pytest.mark.parametrize("batch_norm", BATCH_NORM_MODES)
def test_batch_norm(batch_norm: str, natural_gradient: bool) -> None:
    x, y, indices = grey()
    model, net = twins()
    method = odgq(model, batch_norm=batch_norm, natural_gradient=natural_gradient)
    with Watch(model) as seen:
        step = one_step(method, x, y, indices)
    x_g = seen.inputs[0].clone().requires_grad_()
    line_6_train = batch_norm in ("train", "separate")
    logits, _ = net.forward(x_g, train=line_6_train, move=batch_norm == "train")
    (gradient,) = torch.autograd.grad(reference.task_loss(logits, y), x_g)
    x_adv = x + EPSILON * gradient.sign()
    if batch_norm == "joint":
        assert len(seen.inputs) == 2
        torch.testing.assert_close(seen.inputs[1], torch.cat([x_adv, x]), rtol=0, atol=1e-15)
        both_logits, both = net.forward(torch.cat([x_adv, x]), train=True, move=True)
        logits, features, natural = both_logits[:SLOTS], both[:SLOTS], both[SLOTS:]
    else:
        assert len(seen.inputs) == 3
        torch.testing.assert_close(seen.inputs[2], x_adv, rtol=0, atol=1e-15)
        _, natural = net.forward(x, train=True, move=batch_norm == "train")
        logits, features = net.forward(x_adv, train=True, move=True)
    task = reference.task_loss(logits, y)
    gap = reference.mmd_loss(features, natural if natural_gradient else natural.detach())
    expected = torch.autograd.grad(task + 3 * gap, list(net.parameters.values()))
    assert step.loss.item() == pytest.approx((task + 3 * gap).item(), rel=1e-10)
    assert step.logits.shape == (SLOTS, 3)
    assert_close(step.logits, logits.detach())
    assert_close(gradients(model, step.loss), dict(zip(net.parameters, expected, strict=True)))
    assert_close(running(model), net.running)
    assert model.bn1.num_batches_tracked == (3 if batch_norm == "train" else 1)
    assert all(module.training for module in model.modules())
    assert model.bn1.track_running_stats and model.bn2.track_running_stats


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_black_and_white_pixels_do_not_freeze_behind_the_input_quantizer(pixel: float) -> None:
    torch.manual_seed(0)
    model = build_model(ModelSpec("resnet8", 4, 4, 10, 1, 8, "digits", None, ()))
    x = torch.rand(8, 1, 8, 8)
    x[:, :, ::2] = pixel
    calibrate(model, x, from_scratch=True)
    model.train()
    y = torch.arange(8)
    outward = -1.0 if pixel == 0.0 else 1.0
    moved = {}
    for clamp in (True, False):
        method = Odgq(context(model, batch_size=8), OdgqSettings(clamp=clamp, domains=1))
        # P far outside, as a raw sum gets within an epoch.
        method.perturbations += outward * 5 * EPSILON
        before = method.perturbations.clone()
        method.perturb(x, y, torch.arange(8))
        change = (method.perturbations - before)[0, :, :, ::2]
        moved[clamp] = (change != 0).double().mean().item()
    # A pixel that the 4-bit layers behind it ignore has a gradient of 0 as well; most have none.
    assert moved[True] > 0.9
    assert moved[False] == 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("domains", 0),
        ("domains", True),
        ("local_scale", float("nan")),
        ("bandwidth", "modal"),
        ("bandwidth", float("inf")),
        ("batch_norm", "frozen"),
        ("mmd_wieght", 3.0),
    ],
)
def test_bad_settings(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"odgq\.{key}\b"):
        resolved_settings(recipe("odgq", settings={key: value}))


def test_build_method_passes_settings_and_sizes_on() -> None:
    model, _ = twins()

    def built(**keys: Any) -> Any:
        sizes: dict[str, Any] = {"image_shape": SHAPE, "samples": SAMPLES, "epsilon": 0.2, "seed": 5}
        return build(recipe("odgq", batch_size=SLOTS, settings=keys), model, **sizes)

    assert built().perturbations.shape == (4, SLOTS, *SHAPE) and built().perturbations.dtype == torch.float32
    assert built(stored_as="float16").state_dict()["perturbations"].dtype == torch.float16
    assert built().generator.initial_seed() == 5
