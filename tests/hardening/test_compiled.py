"""Compiled training steps: the same numbers, compiled once for each kind of pass, never where results are judged."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from robustq.errors import RecipeError, UsageError
from robustq.hardening import optimization as descent
from robustq.hardening.methods.registry import build_method
from robustq.hardening.optimization import TrainStep
from robustq.hardening.precision import (
    WORTH_COMPILING,
    CompiledForward,
    compile_hint,
    compile_notes,
    compile_pays_off,
)
from robustq.models.compiled import EXACT
from robustq.models.quant.relu import QuantReLU
from robustq.recipe import Recipe, load_recipe
from tests.hardening.test_trainer import BATCH, CPU, EPSILON, IMAGES, network, split

Counted = tuple[nn.Module, list[Tensor], list[int]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counted]:
    """Up to two epochs: the network, each step's loss, and how many graphs had been compiled after it."""

    def take(
        method: str, bits: int, *, compiling: bool, backend: str = "eager", count: int = 6, **keys: Any
    ) -> Counted:
        counter = CompileCounterWithBackend(backend)
        monkeypatch.setattr(descent, "CompiledForward", functools.partial(CompiledForward, backend=counter))
        recipe = Recipe(name="test", method=method, epochs=2, batch_size=BATCH, lr=0.05, compile=compiling, **keys)
        model = network(bits).train()
        bound = build_method(
            recipe, model, epsilon=EPSILON, image_shape=(1, 8, 8), samples=IMAGES, device=CPU, seed=3, teacher=None
        )
        one = TrainStep(model, bound, recipe)
        losses, graphs = [], []
        for epoch in range(2):
            bound.begin_epoch(epoch)
            for batch in split().batches(BATCH, device=CPU, seed=7, epoch=epoch):
                losses.append(one.step(batch, epoch=epoch).loss.detach())
                graphs.append(counter.frame_count)
                if len(losses) == count:
                    return model, losses, graphs
        return model, losses, graphs

    return take


CASES = [
    ("odgq", 4, {}, 3),
    ("natural", 4, {"precision": "bfloat16"}, 1),
    ("odgq", 4, {"side_precision": "integer"}, 3),
]
MORE = [
    ("natural", 32, {}, 1),
    ("odgq", 1, {"settings": {"features": "conv"}}, 3),
    ("odgq", 4, {"settings": {"batch_norm": "joint"}}, 2),
    ("odgq", 4, {"settings": {"natural_gradient": True, "batch_norm": "train"}}, 2),
    ("pgd", 4, {"settings": {"steps": 2}}, 2),
    ("trades", 4, {"settings": {"steps": 2}}, 3),
    ("fgsm-mep", 4, {}, 2),
    ("dq", 4, {}, 1),
    ("natural", 4, {"awp_gamma": 0.01}, 2),
    ("odgq", 4, {"side_precision": "bfloat16"}, 3),
    ("pgd", 2, {"settings": {"steps": 2}, "side_precision": "integer"}, 2),
]


@pytest.mark.parametrize(
    ("method", "bits", "keys", "kinds"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_steps_are_the_same_and_compile_once_for_each_kind_of_pass(
    steps: Callable[..., Counted], method: str, bits: int, keys: dict[str, Any], kinds: int
) -> None:
    """The graph that torch.compile finds, run as it is: it may add a threshold's gradient up in another order."""
    once, (expected,), (none,) = steps(method, bits, compiling=False, count=1, **keys)
    model, (loss,), _ = steps(method, bits, compiling=True, count=1, **keys)
    assert none == 0
    assert torch.equal(loss, expected)
    state: dict[str, Tensor] = once.state_dict()
    # As in test_descent.py; or four units in the last place of gradients up to 0.3 in bfloat16, times the learning
    # rate.
    atol = 0.05 * 0.3 * 2.0**-6 if keys.get("precision") == "bfloat16" else 1e-6
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=atol, msg=name)
    model, losses, graphs = steps(method, bits, compiling=True, **keys)
    assert torch.stack(losses).isfinite().all()
    assert graphs == [kinds] * len(graphs)
    assert "forward" not in vars(model)


def test_a_network_does_not_take_what_was_compiled_for_another_of_its_class(steps: Callable[..., Counted]) -> None:
    """The one has no hook where the other's features are caught, and torch.compile does not look."""
    _, (expected,), _ = steps("odgq", 4, compiling=False, count=1)
    steps("natural", 4, compiling=True, count=1)
    _, (loss,), (graphs,) = steps("odgq", 4, compiling=True, count=1)
    assert torch.equal(loss, expected)
    assert graphs == 3


def test_a_batch_of_another_length_runs_as_it_is_written() -> None:
    model = network(4).train()
    counter = CompileCounterWithBackend("eager")
    forward = CompiledForward(model, batch_size=8, cuda_graphs=False, backend=counter)
    with forward.in_place(5):
        model(torch.rand(5, 1, 8, 8))
    assert counter.frame_count == 0
    with forward.in_place(8):
        model(torch.rand(8, 1, 8, 8))
    assert counter.frame_count == 1
    model(torch.rand(8, 1, 8, 8))  # the monitor's and every attack's call
    assert "forward" not in vars(model)


def test_a_compiler_that_fails_is_one_line_and_the_network_as_it_was() -> None:
    torch.compiler.reset()
    model = network(4).train()

    def broken(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand a long story")

    forward = CompiledForward(model, batch_size=8, cuda_graphs=False, backend=broken)
    with pytest.raises(UsageError) as caught, forward.in_place(8):
        model(torch.rand(8, 1, 8, 8))
    assert str(caught.value) == (
        "torch.compile does not work here (No working C++ compiler found); train without it: --no-compile"
    )
    assert "forward" not in vars(model)


def test_other_errors_of_a_step_stay_what_they_are() -> None:
    model = network(4).train()
    forward = CompiledForward(model, batch_size=8, cuda_graphs=False, backend="eager")
    with pytest.raises(KeyError), forward.in_place(8):
        raise KeyError
    assert "forward" not in vars(model)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_what_the_compiler_is_asked_for(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
    fast = torch.compile(relu, fullgraph=True, dynamic=False, options={**EXACT})
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.equal(fast(ours), relu(theirs))
    fast(ours).square().sum().backward()
    relu(theirs).square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 1])
def test_a_step_in_compiled_code(steps: Callable[..., Counted], bits: int) -> None:
    """The first loss; later ones follow other last bits, where a sign or a rounding turns."""
    _, expected, _ = steps("odgq", bits, compiling=False)
    _, losses, _ = steps("odgq", bits, compiling=True, backend="inductor")
    torch.testing.assert_close(losses[0], expected[0], rtol=1e-3, atol=1e-3)
    assert torch.stack(losses).isfinite().all()


def test_what_a_person_is_told() -> None:
    (line,) = compile_notes(CPU, cuda_graphs=False)
    assert (
        line == "the first step of each kind compiles, which takes a minute or so each; a step was a fifth shorter then"
    )
    assert "a fifth shorter with --compile," in compile_hint(integers=False)
    assert "a third shorter with --compile --set side_precision=integer," in compile_hint(integers=True)
    assert compile_pays_off(CPU, seconds=WORTH_COMPILING)
    assert not compile_pays_off(CPU, seconds=WORTH_COMPILING - 1.0)
    assert not compile_pays_off(torch.device("cuda"), seconds=1e6)
    assert compile_notes(CPU, cuda_graphs=True)[1] == "cpu has no CUDA graphs; cuda_graphs has no effect"
    assert compile_notes(torch.device("cuda"), cuda_graphs=True) == [
        "the first step of each kind compiles, which takes a minute or more"
    ]


def test_graphs_are_recorded_of_compiled_passes_only() -> None:
    with pytest.raises(RecipeError, match="cuda_graphs needs compile = true"):
        load_recipe("natural", ("cuda_graphs=true",))
    assert load_recipe("natural", ("compile=true", "cuda_graphs=true")).cuda_graphs
