"""Compiled passes of a network under attack: its own answers and gradients, one graph for any number of images."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config

from robustq.attacks.base import input_gradient, input_gradients
from robustq.attacks.losses import cross_entropy, margin
from robustq.errors import UsageError
from robustq.models.compiled import MIN_IMAGES, CompiledNetwork, check_compiler, compile_forward
from robustq.models.quant.backward_rules import (
    RULES,
    STRAIGHT_THROUGH,
    backward_rule,
    rounds_plainly,
    under_rule,
)
from robustq.models.quant.quantizers import BranchQuant
from robustq.models.quant.shared_weights import SharedWeights
from tests.models.test_backward_rules import logits_and_gradient, network

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's CPU code needs g++")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


def small() -> tuple[nn.Module, Tensor]:
    """A network that torch traces in no time, and images for it."""
    torch.manual_seed(0)
    quantizer = qnn.QuantIdentity(act_quant=BranchQuant, bit_width=4, return_quant_tensor=False)
    return nn.Sequential(quantizer, nn.Flatten(), nn.Linear(64, 10)).eval(), torch.rand(40, 1, 8, 8)


CASES = [
    pytest.param("resnet8-4", "smooth", marks=pytest.mark.slow),
    ("resnet8-32", "straight-through"),
    pytest.param("folded-8", "pass-through", marks=pytest.mark.slow),
    pytest.param("resnet8-1", "smooth", marks=pytest.mark.slow),
    pytest.param("own-4", "pass-through", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_answers_and_gradients_are_the_networks_own_from_one_graph_each(name: str, rule: str) -> None:
    """The graphs that torch.compile finds, run as they are."""
    model, x = network(name)
    counter = CompileCounterWithBackend("eager")
    with SharedWeights(model).quantized_once():
        fast = CompiledNetwork(model, backend=counter)
        asked = fast if rule == STRAIGHT_THROUGH else fast.under_rule(rule)
        for count in (40, 39, 23, MIN_IMAGES):
            images = x[:count].clone()
            logits, gradient = logits_and_gradient(under_rule(model, rule), images)
            ours = logits_and_gradient(asked, images)
            assert torch.equal(ours[0], logits)
            assert torch.equal(ours[1], gradient)
            assert gradient.any()
            with torch.no_grad():
                assert torch.equal(asked(images), model(images))
        assert counter.frame_count == 2


def test_plain_rounding_is_watched_where_there_is_any() -> None:
    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = (x * 8.0).round().flatten(1)[:, :10]
            return logits

    model, x = Rounding(), torch.rand(MIN_IMAGES, 1, 8, 8)
    counter = CompileCounterWithBackend("eager")
    fast = CompiledNetwork(model, backend=counter)
    assert not logits_and_gradient(fast, x.clone())[1].any()
    assert torch.equal(
        logits_and_gradient(fast.under_rule("pass-through"), x.clone())[1],
        logits_and_gradient(under_rule(model, "pass-through"), x)[1],
    )
    assert logits_and_gradient(fast.under_rule("pass-through"), x.clone())[1].any()
    assert rounds_plainly(model, x)
    assert not rounds_plainly(network("resnet8-4")[0], network("resnet8-4")[1][:2])


def test_a_network_that_cannot_be_had_in_one_piece_is_refused() -> None:
    """Behind a break torch would find one rule's layers again under another."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant = qnn.QuantIdentity(act_quant=BranchQuant, bit_width=4, return_quant_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.quant(x)
            torch._dynamo.graph_break()
            logits: Tensor = self.quant(y * 2.0).flatten(1)[:, :10]
            return logits

    model = Broken().eval()
    for rule in RULES:
        with pytest.raises(UsageError, match=r"does not work here .*; attack without it: --no-compile"):
            logits_and_gradient(
                CompiledNetwork(model, backend="eager").under_rule(rule), torch.rand(MIN_IMAGES, 1, 8, 8)
            )


def test_a_network_that_changes_in_every_call_runs_eagerly_in_the_end() -> None:
    class Restless(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            logits: Tensor = x.flatten(1)[:, :10] * float(self.calls)
            return logits

    model = Restless()
    fast = CompiledNetwork(model, backend="eager")
    x = torch.rand(MIN_IMAGES, 1, 8, 8)
    for number in range(1, 15):
        with torch.no_grad():
            assert torch.equal(fast(x), x.flatten(1)[:, :10] * float(number))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8-4", "folded-4"])
def test_several_gradients_of_one_pass_in_compiled_code(name: str) -> None:
    """As FAB takes them; and the compiler that the command tries first."""
    check_compiler(torch.device("cpu"))
    model, x = network(name)
    # The same graph as torch compiles and keeps it by default, whose second gradient would be garbage.
    forgetful = compile_forward(model.forward, dynamic=None, fullgraph=True)
    with (
        functorch_config.patch(donated_buffer=True),
        torch.compiler.config.patch(cache_key_tag=""),  # type: ignore[attr-defined]
        backward_rule(model, "smooth", plain_rounding=False),
    ):
        leaf = x.clone().requires_grad_()
        torch._dynamo.mark_dynamic(leaf, 0)
        torch.autograd.grad(forgetful(leaf).sum(), leaf)
    y = torch.arange(len(x)) % 10
    objectives = [partial(margin, y=y), partial(cross_entropy, y=y)]
    fast = CompiledNetwork(model).under_rule("smooth")
    ours = list(input_gradients(fast, x.clone(), objectives))
    theirs = list(input_gradients(under_rule(model, "smooth"), x, objectives))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.gradient.sign() == other.gradient.sign()).float().mean() > 0.98


def test_logits_without_a_gradient_are_the_attacks_to_refuse() -> None:
    class Detached(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)[:, :10]

    with pytest.raises(UsageError, match="gives logits without a gradient"):
        input_gradient(
            CompiledNetwork(Detached(), backend="eager"), torch.rand(MIN_IMAGES, 1, 8, 8), lambda y: y.sum(1)
        )


def test_a_backward_pass_that_does_not_compile_is_one_line_too() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("C++ compile error")

    model, x = small()
    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=broken)
    with pytest.raises(UsageError, match=r"does not work here .*; attack without it: --no-compile"):
        logits_and_gradient(CompiledNetwork(model, backend=backend), x.clone())
