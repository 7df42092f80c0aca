"""Steps in bfloat16, TF32, integers and compiled code: what computes so, what stays in float32, and that it trains."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from robustq.hardening import optimization
from robustq.hardening.features import FEATURES, FeatureTap
from robustq.hardening.optimization import TrainStep
from robustq.hardening.precision import (
    advice,
    in_precision,
)
from robustq.models.compiled import EXACT_DIVISION, CompiledForward
from robustq.models.quant import integer_convolution
from robustq.models.quant.calibration import calibrate
from robustq.models.quant.quantizers import BranchQuant, QuantReLU, learned_thresholds
from tests.hardening.test_tf32 import flags
from tests.hardening.tiny import BATCH, CPU, build, network, recipe, split

HALF = torch.bfloat16


def types_seen(model: nn.Module) -> dict[str, torch.dtype]:
    """The output type of every layer of one forward pass."""
    found: dict[str, torch.dtype] = {}

    def note(_: nn.Module, __: Any, output: Any, *, name: str) -> None:
        found[name] = output.dtype

    handles = [
        module.register_forward_hook(functools.partial(note, name=name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | qnn.QuantReLU)
    ]
    with torch.no_grad():
        model(first_batch().x)
    for handle in handles:
        handle.remove()
    return found


def first_batch() -> Any:
    return next(split().batches(BATCH, device=CPU))


@pytest.mark.parametrize("bits", [32, 4, 1])
def test_layers_compute_in_bfloat16_and_outputs_are_float32(bits: int) -> None:
    model = network(bits).train()
    before = types_seen(model)
    assert set(before.values()) == {torch.float32}
    with in_precision(model, "bfloat16"):
        inside = types_seen(model)
        for feature in FEATURES:
            assert {each.dtype for each in FeatureTap(model, feature)(torch.rand(2, 1, 8, 8))} == {torch.float32}
    assert set(inside.values()) == {HALF}
    assert types_seen(model) == before
    with in_precision(model, "float32"):
        assert "forward" not in vars(model)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_quantizer_computes_in_float32_whatever_enters(bits: int) -> None:
    """The codes of bfloat16 activations are those of the same numbers in float32."""
    relu = QuantReLU(bit_width=bits)
    (learned,) = learned_thresholds(relu).values()
    learned.set_threshold(0.37)
    x = (torch.randn(4, 8, 20, 20, generator=torch.Generator().manual_seed(0)) / 4).to(HALF)
    assert torch.equal(relu(x), relu(x.float()).to(HALF))
    assert relu(x).dtype == HALF


QUANTIZERS: dict[str, Any] = {f"relu{bits}": functools.partial(QuantReLU, bit_width=bits) for bits in (8, 2)}
QUANTIZERS["branch8"] = functools.partial(qnn.QuantIdentity, act_quant=BranchQuant, return_quant_tensor=False)


@pytest.mark.parametrize("mean", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(32, 8, 16, 16), (64, 40)])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_of_a_quantizer_in_bfloat16(name: str, shape: tuple[int, ...], mean: float) -> None:
    """At calibrated thresholds, where the gradient of a threshold is small beside the numbers that are summed."""
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
    settings = recipe(method, epochs=4, lr=0.05, precision=kind, **keys)
    model = network(bits).train()
    train_step = TrainStep(model, build(settings, model), settings)
    losses = [
        train_step.step(batch, epoch=epoch).loss.detach()
        for epoch in range(4)
        for batch in split().batches(BATCH, device=CPU, seed=7, epoch=epoch)
    ]
    return model, torch.stack(losses)


def assert_same(first: tuple[nn.Module, Tensor], second: tuple[nn.Module, Tensor]) -> None:
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))


@pytest.mark.parametrize("method", ["odgq", "dq"])
def test_every_weight_stays_float32_and_learns(method: str) -> None:
    model, losses = train(4, method, "bfloat16")
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert losses[-4:].mean() < losses[:4].mean()


def test_weight_perturbation_is_seen_within_a_step() -> None:
    """Autocast caches converted weights as long as it is on."""
    _, plain = train(32, "natural", "bfloat16")
    _, perturbed = train(32, "natural", "bfloat16", awp_gamma=0.2)
    assert perturbed[0] > plain[0]


PASSES = {"natural": "w", "odgq": "anw", "pgd": "aaw", "trades": "naaww", "fgsm-mep": "ww"}
"""a: attack generation, n: no gradient at all, w: weights learn."""


@pytest.mark.parametrize(
    ("precision", "side"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("tf32", "bfloat16"), ("bfloat16", "integer")],
)
@pytest.mark.parametrize("method", PASSES)
def test_auxiliary_passes_have_a_precision_of_their_own(method: str, precision: str, side: str) -> None:
    keys: dict[str, Any] = {"settings": {"steps": 2}} if method in ("pgd", "trades") else {}
    settings = recipe(method, precision=precision, side_precision=side, **keys)
    model = network(4).train()
    train_step, batch = TrainStep(model, build(settings, model), settings), first_batch()
    train_step.step(batch, epoch=0)  # before the first step a pass of its own finds the layers that take codes
    seen: list[tuple[str, torch.dtype]] = []

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        trained = next(layer.parameters()).requires_grad
        seen.append(("n" if not torch.is_grad_enabled() else "w" if trained else "a", output.dtype))

    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv.register_forward_hook(note)
    loss = train_step.step(batch, epoch=0).loss
    assert "".join(kind for kind, _ in seen) == PASSES[method]
    half = {"w": precision == "bfloat16", "a": side == "bfloat16", "n": side == "bfloat16"}
    assert [found == HALF for _, found in seen] == [half[kind] for kind, _ in seen]
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_integers_without_a_kernel_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_convolution, "is_available", lambda: False)
    assert_same(train(4, "odgq", "float32", side_precision="integer"), train(4, "odgq", "float32"))
    expected = "torch has no integer convolutions for this cpu; auxiliary passes compute in float32"
    assert advice("integer", CPU, key="side_precision") == expected
    monkeypatch.setattr(integer_convolution, "is_available", lambda: True)
    assert advice("integer", CPU, key="side_precision") is None
    assert advice("integer", torch.device("cuda:0"), key="side_precision") is not None


@pytest.mark.parametrize(("precision", "allowed"), [("tf32", True), ("float32", False), ("bfloat16", False)])
def test_a_gpu_may_round_within_steps_in_tf32_alone(precision: str, allowed: bool) -> None:
    settings = recipe("odgq", precision=precision)
    model = network(4).train()
    train_step = TrainStep(model, build(settings, model), settings)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(flags()))
    model.register_full_backward_hook(lambda *_: seen.append(flags()))
    before = flags()
    train_step.step(first_batch(), epoch=0)
    assert len(seen) >= 5
    assert set(seen) == {(allowed, allowed)}
    assert flags() == before


def test_on_a_cpu_tf32_is_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(train(4, "odgq", "tf32"), train(4, "odgq", "float32"))
    assert advice("tf32", CPU) == "only newer GPUs have tf32; cpu computes in float32"
    for capability, missing in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (advice("tf32", torch.device("cuda:0")) is not None) == missing


Counted = tuple[nn.Module, list[Tensor], list[int]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counted]:
    """Up to two epochs: the network, each step's loss, and how many graphs had been compiled after it."""

    def take(
        method: str, bits: int, *, compiling: bool, backend: str = "eager", count: int = 6, **keys: Any
    ) -> Counted:
        counter = CompileCounterWithBackend(backend)
        monkeypatch.setattr(optimization, "CompiledForward", functools.partial(CompiledForward, backend=counter))
        settings = recipe(method, lr=0.05, compile=compiling, **keys)
        model = network(bits).train()
        bound = build(settings, model)
        train_step = TrainStep(model, bound, settings)
        losses, graphs = [], []
        for epoch in range(2):
            bound.begin_epoch(epoch)
            for batch in split().batches(BATCH, device=CPU, seed=7, epoch=epoch):
                losses.append(train_step.step(batch, epoch=epoch).loss.detach())
                graphs.append(counter.frame_count)
                if len(losses) == count:
                    return model, losses, graphs
        return model, losses, graphs

    return take


CASES = [
    ("natural", 4, {"precision": "bfloat16"}, 1),
    ("odgq", 4, {}, 3),
    ("odgq", 4, {"side_precision": "integer"}, 3),
    ("odgq", 4, {"settings": {"natural_gradient": True, "batch_norm": "train"}}, 2),
    ("fgsm-mep", 4, {}, 2),
    ("natural", 4, {"awp_gamma": 0.01}, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits", "keys", "kinds"), CASES)
def test_steps_are_the_same_and_compile_once_for_each_kind_of_pass(
    steps: Callable[..., Counted], method: str, bits: int, keys: dict[str, Any], kinds: int
) -> None:
    """The graph of torch.compile, run eager: it may sum a threshold's gradient in another order."""
    once, (expected,), (none,) = steps(method, bits, compiling=False, count=1, **keys)
    model, (loss,), _ = steps(method, bits, compiling=True, count=1, **keys)
    assert none == 0
    assert torch.equal(loss, expected)
    state: dict[str, Tensor] = once.state_dict()
    # float32 rounding, times the learning rate; or four units in the last place of gradients up to 0.3 in bfloat16.
    atol = 0.05 * 0.3 * 2.0**-6 if keys.get("precision") == "bfloat16" else 1e-6
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=atol, msg=name)
    model, losses, graphs = steps(method, bits, compiling=True, **keys)
    assert torch.stack(losses).isfinite().all()
    assert graphs == [kinds] * len(graphs)
    assert "forward" not in vars(model)


@pytest.mark.slow
def test_a_batch_of_another_length_runs_eager() -> None:
    model = network(4).train()
    counter = CompileCounterWithBackend("eager")
    forward = CompiledForward(model, batch_size=8, cuda_graphs=False, backend=counter)
    for images, graphs in ((5, 0), (8, 1)):
        with forward.in_place(images):
            model(torch.rand(images, 1, 8, 8))
        assert counter.frame_count == graphs
    model(torch.rand(8, 1, 8, 8))  # outside: the monitor's and every attack's call
    assert "forward" not in vars(model)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_options_of_the_compiler(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(4)
    asked: dict[str, Any] = {}
    begun: list[bool] = []

    def fake(forward: Any, **options: Any) -> Any:
        asked.update(options)
        return forward

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    forward = CompiledForward(model, batch_size=8, cuda_graphs=cuda_graphs)
    for _ in range(2):
        with forward.in_place(8):
            model(torch.rand(8, 1, 8, 8))
    assert asked["options"] == {"eager_numerics.division_rounding": True, "triton.cudagraphs": cuda_graphs}
    assert len(begun) == 2 * cuda_graphs


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's CPU code needs g++")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantizers_keep_their_values_in_compiled_code(bits: int) -> None:
    torch.compiler.reset()
    x = torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(bits))
    relu = QuantReLU(bit_width=bits)
    fast = torch.compile(relu, fullgraph=True, dynamic=False, options={**EXACT_DIVISION})
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.equal(fast(ours), relu(theirs))
    fast(ours).square().sum().backward()
    relu(theirs).square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
