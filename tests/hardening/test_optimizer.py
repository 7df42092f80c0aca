"""The optimiser: torch's own SGD, step for step."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from robustq.hardening.optimization import build_optimizer
from robustq.models.quant.quantizers import learned_thresholds
from robustq.models.spec import build_model
from robustq.recipe import load_recipe
from tests.models.small_nets import small_spec


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        x = torch.rand(8, 1, 8, 8, generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.arange(8) % 10).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_steps_and_state_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours = build_model(small_spec(4)).train()
    theirs = copy.deepcopy(ours)
    recipe = load_recipe("natural", ("lr=0.05", "momentum=0.8", "weight_decay=0.01"))
    optimizer = build_optimizer(ours, recipe)
    thresholds = {id(module.log_threshold) for module in learned_thresholds(theirs).values()}
    decayed = [p for p in theirs.parameters() if id(p) not in thresholds]
    held = [p for p in theirs.parameters() if id(p) in thresholds]
    reference = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.01}, {"params": held, "weight_decay": 0.0}], lr=0.05, momentum=0.8
    )
    assert held
    steps(ours, optimizer, 3)
    steps(theirs, reference, 3)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    ours_state, theirs_state = optimizer.state_dict(), reference.state_dict()
    assert ours_state["param_groups"] == theirs_state["param_groups"]
    assert ours_state["state"].keys() == theirs_state["state"].keys() != set()
    for key, state in ours_state["state"].items():
        assert torch.equal(state["momentum_buffer"], theirs_state["state"][key]["momentum_buffer"])
    # From the state of one to the other, and on.
    optimizer.load_state_dict(copy.deepcopy(theirs_state))
    steps(ours, optimizer, 2)
    steps(theirs, reference, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_step_is_no_part_of_a_graph() -> None:
    weight = nn.Parameter(torch.ones(2))
    model = nn.Module()
    model.weight = weight
    optimizer = build_optimizer(model, load_recipe("natural", ("lr=0.5", "momentum=0", "weight_decay=0")))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2,), 0.5))
    assert weight.requires_grad and weight.grad_fn is None
