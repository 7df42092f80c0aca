"""Steps in bfloat16 and TF32: what computes so, what stays in float32, and that it trains as well."""

from __future__ import annotations

import functools
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import Tensor, nn

from robustq.errors import RecipeError
from robustq.hardening.features import FEATURES, FeatureTap
from robustq.hardening.methods.method import crafting
from robustq.hardening.methods.registry import build_method
from robustq.hardening.optimization import TrainStep
from robustq.hardening.precision import advice, in_precision
from robustq.models.quant import integer_convolution
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import BranchQuant, learned_thresholds
from robustq.models.quant.relu import QuantReLU
from robustq.recipe import Recipe, load_recipe
from tests.hardening.test_trainer import BATCH, CPU, EPSILON, IMAGES, network, split
from tests.models.test_tf32 import flags

HALF = torch.bfloat16


def types_seen(model: nn.Module) -> dict[str, torch.dtype]:
    """What every layer of one forward pass answered with."""
    found: dict[str, torch.dtype] = {}

    def note(_: nn.Module, __: Any, output: Any, *, name: str) -> None:
        found[name] = output.dtype

    handles = [
        module.register_forward_hook(lambda *seen, name=name: note(*seen, name=name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | qnn.QuantReLU)
    ]
    with torch.no_grad():
        model(next(split().batches(BATCH, device=CPU)).x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("bits", [32, 4, 1])
def test_layers_compute_in_bfloat16_and_answers_are_float32(bits: int) -> None:
    model = network(bits).train()
    before = types_seen(model)
    assert set(before.values()) == {torch.float32}
    with in_precision(model, "bfloat16"):
        inside = types_seen(model)
        assert model(torch.rand(2, 1, 8, 8)).dtype == torch.float32
        for feature in FEATURES:
            assert {each.dtype for each in FeatureTap(model, feature)(torch.rand(2, 1, 8, 8))} == {torch.float32}
    assert set(inside.values()) == {HALF}
    assert types_seen(model) == before
    assert "forward" not in vars(model)


def test_the_network_is_put_back_after_an_error() -> None:
    model = network(4)
    with pytest.raises(KeyError), in_precision(model, "bfloat16"):
        raise KeyError
    assert "forward" not in vars(model)


def test_one_inside_another_is_put_back_too() -> None:
    model = network(4)
    x = torch.rand(2, 1, 8, 8)
    with in_precision(model, "bfloat16"):
        with in_precision(model, "bfloat16"):
            pass
        assert set(types_seen(model).values()) == {HALF}
        assert model(x=x).dtype == torch.float32
    assert "forward" not in vars(model)


def test_float32_touches_nothing() -> None:
    model = network(4)
    with in_precision(model, "float32"):
        assert "forward" not in vars(model)


def layer(bits: int, threshold: float) -> tuple[QuantReLU, Any]:
    relu = QuantReLU(bit_width=bits)
    (learned,) = learned_thresholds(relu).values()
    learned.set_threshold(threshold)
    return relu, learned


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_quantizer_computes_in_float32_whatever_enters(bits: int) -> None:
    """The codes of bfloat16 activations are those of the same numbers in float32."""
    relu, _ = layer(bits, 0.37)
    x = (torch.randn(4, 8, 20, 20, generator=torch.Generator().manual_seed(0)) / 4).to(HALF)
    assert torch.equal(relu(x), relu(x.float()).to(HALF))
    assert relu(x).dtype == HALF


def branch() -> qnn.QuantIdentity:
    return qnn.QuantIdentity(act_quant=BranchQuant, return_quant_tensor=False)


QUANTIZERS: dict[str, Any] = {f"relu{bits}": functools.partial(QuantReLU, bit_width=bits) for bits in (8, 4, 2)}
QUANTIZERS["branch8"] = branch


@pytest.mark.parametrize("mean", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(32, 8, 16, 16), (64, 40)])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_of_a_quantizer_in_bfloat16(name: str, shape: tuple[int, ...], mean: float) -> None:
    """At thresholds as calibration sets them: there what a threshold gets is little beside what is added up."""
    errors, exact = [], []
    for seed in range(8):
        draws = torch.Generator().manual_seed(seed)
        x, upstream = torch.randn(shape, generator=draws).to(HALF), torch.randn(shape, generator=draws).to(HALF) + mean
        if len(shape) == 4 and seed % 2:
            x, upstream = x.to(memory_format=torch.channels_last), upstream.to(memory_format=torch.channels_last)
        found = []
        for kind in (HALF, torch.float32):
            quantizer = QUANTIZERS[name]()
            calibrate(quantizer, x.float())
            (learned,) = learned_thresholds(quantizer).values()
            leaf = x.clone().to(kind).requires_grad_()
            quantizer(leaf).backward(upstream.to(kind))
            assert leaf.grad is not None and leaf.grad.dtype == kind
            assert learned.log_threshold.grad is not None and learned.log_threshold.grad.dtype == torch.float32
            found.append((leaf.grad.float(), learned.log_threshold.grad.item()))
        (of_x, of_threshold), (exact_of_x, exact_of_threshold) = found
        assert torch.equal(of_x, exact_of_x)  # it is passed on or not
        errors.append(of_threshold - exact_of_threshold)
        exact.append(exact_of_threshold)
    # Each image's sum, and each element of it, is rounded to 8 bits; over all images that is less.
    rms = torch.tensor(exact).square().mean().sqrt()
    assert torch.tensor(errors).square().mean().sqrt() < 2.0**-8 * rms


def train(bits: int, method: str, kind: str, **keys: Any) -> tuple[nn.Module, Tensor]:
    """Four epochs; the mean loss of each step."""
    recipe = Recipe(name="test", method=method, epochs=4, batch_size=BATCH, lr=0.05, precision=kind, **keys)
    model = network(bits).train()
    descent = TrainStep(
        model,
        build_method(
            recipe, model, epsilon=EPSILON, image_shape=(1, 8, 8), samples=IMAGES, device=CPU, seed=3, teacher=None
        ),
        recipe,
    )
    losses = [
        descent.step(batch, epoch=epoch).loss.detach()
        for epoch in range(4)
        for batch in split().batches(BATCH, device=CPU, seed=7, epoch=epoch)
    ]
    return model, torch.stack(losses)


@pytest.mark.parametrize("method", ["natural", "odgq", "trades", "fgsm-mep", "dq"])
def test_every_weight_stays_float32_and_learns(method: str) -> None:
    model, losses = train(4, method, "bfloat16")
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert losses[-4:].mean() < losses[:4].mean()


@pytest.mark.parametrize("bits", [32, 4, 1])
def test_losses_fall_as_in_float32(bits: int) -> None:
    (_, half), (_, whole) = train(bits, "natural", "bfloat16"), train(bits, "natural", "float32")
    assert not torch.equal(half, whole)
    fallen = whole[:4].mean() - whole[-4:].mean()
    assert abs(half[-4:].mean() - whole[-4:].mean()) < 0.25 * fallen


def test_weight_perturbation_is_seen_within_a_step() -> None:
    """Autocast remembers converted weights as long as it is on."""
    _, plain = train(32, "natural", "bfloat16")
    _, perturbed = train(32, "natural", "bfloat16", awp_gamma=0.2)
    assert perturbed[0] > plain[0]


PASSES = {"natural": "w", "odgq": "cnw", "pgd": "ccw", "trades": "nccww", "fgsm-mep": "ww"}
"""c: crafting, n: no gradient at all, w: weights learn."""


@pytest.mark.parametrize(
    ("precision", "side"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("tf32", "bfloat16"), ("bfloat16", "integer")],
)
@pytest.mark.parametrize("method", PASSES)
def test_passes_on_the_side_have_a_precision_of_their_own(method: str, precision: str, side: str) -> None:
    keys: dict[str, Any] = {"settings": {"steps": 2}} if method in ("pgd", "trades") else {}
    recipe = Recipe(
        name="test",
        method=method,
        epochs=1,
        batch_size=BATCH,
        lr=0.05,
        precision=precision,
        side_precision=side,
        **keys,
    )
    model = network(4).train()
    bound = build_method(
        recipe, model, epsilon=EPSILON, image_shape=(1, 8, 8), samples=IMAGES, device=CPU, seed=3, teacher=None
    )
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    seen: list[tuple[str, torch.dtype]] = []

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        asks = next(layer.parameters()).requires_grad
        seen.append(("n" if not torch.is_grad_enabled() else "w" if asks else "c", output.dtype))

    one, batch = TrainStep(model, bound, recipe), next(split().batches(BATCH, device=CPU))
    one.step(batch, epoch=0)  # before its first, which layers take codes is looked up in a pass of its own
    handle = conv.register_forward_hook(note)
    loss = one.step(batch, epoch=0).loss
    handle.remove()
    assert "".join(kind for kind, _ in seen) == PASSES[method]
    half = {"w": precision == "bfloat16", "c": side == "bfloat16", "n": side == "bfloat16"}
    assert [found == HALF for _, found in seen] == [half[kind] for kind, _ in seen]
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_a_word_passes_on_the_side_are_as_the_others() -> None:
    for precision in ("float32", "bfloat16"):
        for method in ("odgq", "natural"):
            (said, of_said), (silent, of_silent) = (
                train(4, method, precision, side_precision=side) for side in (precision, "same")
            )
            assert torch.equal(of_said, of_silent)
            assert all(torch.equal(a, b) for a, b in zip(said.parameters(), silent.parameters(), strict=True))


def test_whole_numbers_train_as_float32_does() -> None:
    """The images that are crafted differ in few pixels, those whose gradient is next to nothing."""
    made = []
    for side in ("float32", "integer"):
        recipe = Recipe(name="test", method="odgq", epochs=1, batch_size=BATCH, lr=0.05, side_precision=side)
        model, _ = train(4, "natural", "float32")
        method = build_method(
            recipe, model.train(), epsilon=EPSILON, image_shape=(1, 8, 8), samples=IMAGES, device=CPU, seed=3
        )
        entered: list[Tensor] = []
        handle = model.register_forward_pre_hook(lambda _, inputs, entered=entered: entered.append(inputs[0].detach()))
        loss = TrainStep(model, method, recipe).step(next(split().batches(BATCH, device=CPU)), epoch=0).loss
        handle.remove()
        made.append((entered[-1], loss.detach()))
    (images, loss), (by_integers, of_integers) = made
    assert (images != by_integers).float().mean() < 0.02
    # As many pixels moved, by twice epsilon each; and codes that lay on a tie.
    torch.testing.assert_close(of_integers, loss, rtol=0.02, atol=0)


def test_whole_numbers_where_there_is_no_kernel_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_convolution, "is_available", lambda: False)
    (fallen, of_fallen), (whole, of_whole) = (
        train(4, "odgq", "float32", side_precision=side) for side in ("integer", "same")
    )
    assert torch.equal(of_fallen, of_whole)
    assert all(torch.equal(a, b) for a, b in zip(fallen.parameters(), whole.parameters(), strict=True))
    told = advice("integer", CPU, key="side_precision")
    assert told == "torch has no convolutions of whole numbers for this cpu; passes on the side compute in float32"
    monkeypatch.setattr(integer_convolution, "is_available", lambda: True)
    assert advice("integer", CPU, key="side_precision") is None
    assert advice("integer", torch.device("cuda:0"), key="side_precision") is not None


@pytest.mark.parametrize(("bits", "least"), [(32, 0.95), (4, 0.6), (1, 0.4)])
def test_crafting_in_bfloat16_raises_the_loss_as_well(bits: int, least: float) -> None:
    """On a network that has learned something. Rounding turns codes, so that quantized networks answer a little
    otherwise; what is crafted is judged in float32.
    """
    model, _ = train(bits, "natural", "float32")
    model.train()
    batch = next(split().batches(BATCH, device=CPU))

    def loss(x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(x), batch.y)

    raised, gradients = [], []
    for side in ("float32", "bfloat16"):
        with in_precision(model, "float32", side=side), crafting(model, "eval"):
            x = batch.x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(x), x)
        with torch.no_grad(), crafting(model, "eval"):
            raised.append(loss((batch.x + EPSILON * gradient.sign()).clamp(0, 1)) - loss(batch.x))
        gradients.append(gradient)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert not torch.equal(*gradients)
    assert raised[0] > 0.1
    assert raised[1] > least * raised[0]


def test_recipes_name_a_precision_for_passes_on_the_side() -> None:
    assert load_recipe("odgq").side_precision == "same"
    recipe = load_recipe("odgq", ("side_precision=bfloat16",))
    assert recipe.side_precision == "bfloat16" and recipe.to_dict()["side_precision"] == "bfloat16"
    with pytest.raises(
        RecipeError, match="side_precision = 'tf32' is unknown; known: same, float32, bfloat16, integer"
    ):
        load_recipe("odgq", ("side_precision=tf32",))
    with pytest.raises(RecipeError, match="side_precision has no meaning for method 'ptq'"):
        load_recipe("ptq", ("side_precision=bfloat16",))


def test_recipes_name_a_precision() -> None:
    recipe = load_recipe("natural", ("precision=bfloat16",))
    assert recipe.precision == "bfloat16" and recipe.to_dict()["precision"] == "bfloat16"
    assert load_recipe("natural").precision == "float32"
    with pytest.raises(RecipeError, match="precision = 'half' is unknown; known: float32, tf32, bfloat16"):
        load_recipe("natural", ("precision=half",))


def test_a_cpu_without_the_instructions_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_capabilities(**found: Any) -> bool:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
        return advice("bfloat16", CPU) is not None

    assert with_capabilities(architecture="x86_64", avx512_bf16=False, amx_bf16=False)
    assert not with_capabilities(architecture="x86_64", avx512_bf16=True)
    assert not with_capabilities(architecture="x86_64", amx_bf16=True)
    assert not with_capabilities(architecture="aarch64")
    assert advice("float32", CPU) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    told = advice("bfloat16", CPU, key="side_precision")
    assert told == "this processor has no instructions for bfloat16; faster: --set side_precision=float32"


def test_a_cpu_whose_bfloat16_is_slow_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str, **found: Any) -> str | None:
        known = {"architecture": "x86_64", "cpu_name": name, "avx512_bf16": True, **found}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
        return advice("bfloat16", CPU)

    hidden = told("Intel Xeon", avx512_fp16=True, amx_bf16=False)
    assert hidden == "this processor multiplies bfloat16 at half the pace of float32; faster: --set precision=float32"
    assert told("Intel Xeon", avx512_fp16=True, amx_bf16=True) is None
    assert told("Intel Xeon", avx512_fp16=False) is None  # before AMX: Cooper Lake
    assert told("AMD EPYC", avx512_fp16=False) is None
    assert told("AMD EPYC", avx512_fp16=True) is None


@pytest.mark.parametrize(("precision", "allowed"), [("tf32", True), ("float32", False), ("bfloat16", False)])
def test_a_gpu_may_round_within_steps_in_tf32_alone(precision: str, allowed: bool) -> None:
    recipe = load_recipe("odgq", (f"precision={precision}", f"batch_size={BATCH}"))
    model = network(4).train()
    method = build_method(recipe, model, epsilon=EPSILON, image_shape=(1, 8, 8), samples=IMAGES, device=CPU, seed=0)
    seen = []
    forward_hook = model.register_forward_hook(lambda *_: seen.append(flags()))
    backward_hook = model.register_full_backward_hook(lambda *_: seen.append(flags()))
    before = flags()
    TrainStep(model, method, recipe).step(next(split().batches(BATCH, device=CPU)), epoch=0)
    forward_hook.remove()
    backward_hook.remove()
    assert len(seen) >= 5
    assert set(seen) == {(allowed, allowed)}
    assert flags() == before


def test_on_a_cpu_tf32_is_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (rounded, of_rounded), (whole, of_whole) = train(4, "odgq", "tf32"), train(4, "odgq", "float32")
    assert torch.equal(of_rounded, of_whole)
    assert all(torch.equal(a, b) for a, b in zip(rounded.parameters(), whole.parameters(), strict=True))
    assert advice("tf32", CPU) == "only newer GPUs have tf32; cpu computes in float32"
    for capability, missing in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (advice("tf32", torch.device("cuda:0")) is not None) == missing
