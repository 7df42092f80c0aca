"""The pretended device finds what it is there to find."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from tests.gpu_pretend.device import BlockingCopyError, HostWaitError, MixedDevicesError, counting, pretended


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended() as device:
        yield device


def test_a_training_step_gives_the_values_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 8, 8), torch.randint(0, 5, (4,))
    results = []
    for place in ("cpu", device):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        model.to(place).to(memory_format=torch.channels_last)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(x.to(place)), y.to(place))
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(model.parameters(), gradients, strict=True):
                    weight.sub_(0.1 * gradient)
        results.append([value.cpu() for value in model.state_dict().values()])
    for one, other in zip(*results, strict=True):
        # float32 sums over up to 144 products, in another order where torch chooses another CPU kernel.
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_operations_on_both_devices_raise(device: torch.device) -> None:
    here, there = torch.ones(2), torch.ones(2, device=device)
    cases: tuple[Callable[[], object], ...] = (
        lambda: here + there,
        lambda: there.add_(here),
        lambda: here.add_(there),
        lambda: torch.cat([here, there]),
        lambda: torch.stack([there[0], here[0]]),
        lambda: nn.functional.linear(there, here),
        lambda: here[there.long()],
        lambda: torch.rand(2, device=device, generator=torch.Generator()),
        lambda: torch.randperm(2, device=device, generator=torch.Generator()),
        lambda: there.normal_(generator=torch.Generator()),
    )
    for number, case in enumerate(cases):
        with pytest.raises(MixedDevicesError):
            case()
            pytest.fail(f"case {number} did not raise")
    # What CUDA allows.
    assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0]
    assert torch.rand(2, device=device, generator=torch.Generator(device=device)).device == device


def test_host_waits(device: torch.device) -> None:
    x = torch.tensor([1.0, -1.0], device=device)
    waiting: tuple[Callable[[], object], ...] = (
        lambda: x[0].item(),
        lambda: bool((x > 0).all()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x.masked_select(x > 0),
        lambda: torch.equal(x, x),
        lambda: torch.zeros(2).copy_(x),
        lambda: x.__setitem__(x > 0, x[:1]),
    )
    for number, case in enumerate(waiting):
        with pytest.raises(HostWaitError), counting(strict=True):
            case()
            pytest.fail(f"case {number} did not wait")
    with counting(strict=True) as counts:
        torch.where(x > 0, x, 0.0).sum()
        x[x > 0] = 3.0  # a masked fill
        x[torch.argsort(x)]
    assert not counts.waits and not counts.copies


def test_copies_to_the_device(device: torch.device) -> None:
    x, index = torch.ones(2, device=device), torch.tensor([0])
    copying: tuple[Callable[[], object], ...] = (
        lambda: torch.ones(2).to(device),
        lambda: torch.tensor(1.0, device=device),
        lambda: torch.ones(1).type_as(x),
        lambda: x[index],
    )
    for case in copying:
        with pytest.raises(BlockingCopyError), counting(strict=True):
            case()
    with counting(strict=True) as counts:
        torch.ones(2).to(device, non_blocking=True)
        torch.full((2,), 3.0, device=device)
        x.fill_(2.0)
    assert not counts.copies


def test_kernels_are_operations_that_are_no_views(device: torch.device) -> None:
    x = torch.ones(2, 3, device=device)
    with counting() as counts:
        x.t().reshape(6).view(2, 3)[0]  # the reshape copies
        (x + 1).sum()
        x.mul_(2)
    assert counts.kernels == 4


def test_no_thread_keeps_children_from_differentiating(device: torch.device) -> None:
    torch.ones(1, device=device, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
    child = os.fork()
    if not child:
        try:
            torch.ones(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
