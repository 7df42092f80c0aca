"""The networks that attacks find images on: faster, and the judge untouched."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robustq
from robustq.data import to_float
from robustq.evaluation.target import Target
from robustq.models.compiled import CompiledNetwork
from robustq.models.quant.integer_convolution import is_available
from robustq.models.quant.straight_through import RULES, under_rule
from robustq.workflow import attack as crafting
from robustq.workflow.attack import WORTH_COMPILING, prepared_target, suggest_compiling
from robustq.workflow.open_model import Opened, open_attackable
from tests.models.small_nets import digits
from tests.models.test_backward_rules import input_slope

CPU = torch.device("cpu")


@pytest.fixture
def opened(digits_w4a4: Path) -> Opened:
    return open_attackable(digits_w4a4, device=CPU)


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(crafting, "CompiledNetwork", functools.partial(CompiledNetwork, backend="eager"))


def images() -> Tensor:
    return digits()[0][:40]


def changed(model: nn.Module) -> set[str]:
    """What stands in the place of layers' own methods."""
    names = {"quant_weight", "inner_forward_impl", "forward"}
    return {name for module in model.modules() for name in vars(module) if name in names}


def test_sources_are_another_network_than_the_judge(opened: Opened) -> None:
    target, x = opened.target(), to_float(images())
    answers = opened.judge(x)
    expected = [input_slope(under_rule(opened.source, rule), x) for rule in RULES]
    with prepared_target(target, opened.source, images(), compiled=True) as fast:
        assert fast.judge is target.judge is opened.source
        assert changed(opened.source) == {"quant_weight"}  # weights quantized once: the same answers
        assert torch.equal(fast.judge(x), answers)
        assert fast.guide is not None and torch.equal(fast.guide(x.clone()), answers)
        assert fast.sources.keys() == target.sources.keys()
        for source, (logits, slope) in zip(fast.sources.values(), expected, strict=True):
            ours = input_slope(source, x.clone())
            torch.testing.assert_close(ours[0], logits, rtol=0.0, atol=1e-4)
            assert (ours[1].sign() == slope.sign()).float().mean() > 0.99
    assert changed(opened.source) == set()


def test_without_it_weights_are_quantized_once_for_every_network(opened: Opened, digits_w4a4: Path) -> None:
    other = open_attackable(digits_w4a4, device=CPU).source
    target = Target(opened.source, opened.target().sources, surrogates={"other": other}, control=other)
    with prepared_target(target, opened.source, images(), compiled=False) as fast:
        assert fast is target
        assert changed(other) == changed(opened.source) == {"quant_weight"}
    assert changed(other) == changed(opened.source) == set()


@pytest.mark.skipif(not is_available(), reason="a CPU with VNNI instructions")
def test_codes_are_convolved_in_whole_numbers_and_come_back_in_float32(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = []

    def seen(network: nn.Module) -> CompiledNetwork:
        networks.append(network)
        return CompiledNetwork(network, backend="eager")

    monkeypatch.setattr(crafting, "CompiledNetwork", seen)
    with prepared_target(opened.target(), opened.source, images(), compiled=True):
        (copied,) = networks
        assert copied is not opened.source
        placed = [
            vars(module)["inner_forward_impl"] for module in copied.modules() if "inner_forward_impl" in vars(module)
        ]
        assert {layer._way_back for layer in placed} == {torch.float32}
        assert len(placed) == 9
    assert changed(copied) == set()


def test_another_judge_is_asked_itself(opened: Opened) -> None:
    """As onnxruntime is of a deployed file."""
    target = Target(lambda x: opened.source(x), opened.target().sources)
    with prepared_target(target, opened.source, images(), compiled=True) as fast:
        assert fast.guide is None and fast.asked is target.judge


@pytest.mark.parametrize("seconds", [0.0, WORTH_COMPILING])
def test_a_long_attack_ends_with_what_compiling_saves(
    digits_w4a4: Path, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(crafting, "note", said.append)
    monkeypatch.setattr(crafting, "WORTH_COMPILING", seconds)
    robustq.attack_model(digits_w4a4, suite="recheck", images=20, device="cpu")
    assert [line for line in said if "--compile" in line] == said
    assert len(said) == (seconds == 0.0)


def test_what_compiling_saves_is_said_where_it_is_known() -> None:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(crafting, "note", said.append)
        suggest_compiling(WORTH_COMPILING - 1.0, CPU)
        suggest_compiling(1e6, torch.device("cuda"))
        assert not said
        suggest_compiling(WORTH_COMPILING, CPU)
    assert len(said) == 1
