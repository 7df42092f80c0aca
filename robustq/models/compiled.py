"""Networks as torch.compile makes their passes, for the steps of training and of attacks; nothing is judged by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustq.errors import UsageError
from robustq.models.backward_rules import Network, backward_rule, rounds_plainly

FEWEST = 16
"""Images for which a network of any number of them is compiled: torch makes further graphs for fewer, each in as many
seconds as the first."""

EXACT = {"eager_numerics.division_rounding": True}
"""What inductor is asked for, so that quantizers keep their values: a GPU's compiled division is approximate by
default, and a quotient beside a rounding tie would get another code."""


class CompiledNetwork:
    """One network whose answers and gradients are found by compiled passes, for any number of images.

    Each kind of pass is compiled when it is first asked for, in half a minute or so for a small network. Fewer than
    :data:`FEWEST` images go through the network as it is written.

    Args:
        model: in eval mode; it must stay as it is, with its hooks, weights and modes, but for what stands in the place
            of a layer's arithmetic (:mod:`robustq.models.integer_convolution`).
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, *, backend: Any = "inductor") -> None:
        self._model = model
        self._backend = backend
        self._rounding: bool | None = None
        self._own = self._sized()

    def __call__(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K), differentiated as the network itself is.

        Raises:
            UsageError: torch.compile does not work on this machine.
        """
        return self._own(x)

    def under_rule(self, rule: str) -> Network:
        """The same, differentiated by a rule of :mod:`robustq.models.backward_rules`."""
        # Compiled apart: what torch finds again it finds by code, whatever hooks a rule has put up.
        forward = self._sized()

        def asked(x: Tensor) -> Tensor:
            if not (x.requires_grad and torch.is_grad_enabled()):
                return self._own(x)
            with backward_rule(self._model, rule, plain_rounding=self._rounds_plainly(x)):
                return forward(x)

        return asked

    def _rounds_plainly(self, x: Tensor) -> bool:
        # The compiler can watch it in our layers, and not where Brevitas' own tensors go from one to the next.
        if self._rounding is None:
            self._rounding = rounds_plainly(self._model, x[:1])
        return self._rounding

    def _sized(self) -> Network:
        forward = compile_forward(self._model.forward, dynamic=None, backend=self._backend)

        def sized(x: Tensor) -> Tensor:
            logits: Tensor
            if len(x) < FEWEST:
                logits = self._model(x)
                return logits
            with in_one_line(instead="attack without it: --no-compile"):
                torch._dynamo.mark_dynamic(x, 0, min=FEWEST)
                logits = forward(x)
            return logits

        return sized


def compile_forward(
    forward: Callable[..., Any], *, dynamic: bool | None, cuda_graphs: bool = False, backend: Any = "inductor"
) -> Callable[..., Any]:
    """A network's forward pass, compiled when it is called first.

    Args:
        forward: a module's.
        dynamic, backend: of torch.compile.
        cuda_graphs: on a GPU, record the kernels of a pass once and replay them together.
    """
    options: dict[str, Any] | None = None
    if backend == "inductor":
        options = {**EXACT, "triton.cudagraphs": cuda_graphs}
    compiled: Callable[..., Any] = torch.compile(
        _of_its_own(forward), backend=backend, dynamic=dynamic, options=options
    )
    return compiled


@contextmanager
def in_one_line(*, instead: str) -> Iterator[None]:
    """Turn the compiler's failures within it into one line that says what to do ``instead``.

    Raises:
        UsageError: torch.compile does not work on this machine.
    """
    # Only here: loading the compiler takes seconds.
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise UsageError(f"torch.compile does not work here ({_first_line(error)}); {instead}") from error


def _of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code that no other network has.

    torch.compile keeps what it has compiled by code, and takes it for another network of the same class whatever hooks
    that one has: the features of ODG-Q would be missed.
    """

    def own(*inputs: Any, **named: Any) -> Any:
        return forward(*inputs, **named)

    own.__code__ = own.__code__.replace()
    return own


def _first_line(error: Exception) -> str:
    cause: BaseException = getattr(error, "inner_exception", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0].rstrip(".")
