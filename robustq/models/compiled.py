"""Networks as torch.compile makes their passes, for the steps of training and of attacks; nothing is judged by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustq.errors import RobustqError, UsageError
from robustq.models.quant.straight_through import Network, backward_rule, rounds_plainly

FEWEST = 16
"""Images for which a network of any number of them is compiled: torch makes further graphs for fewer, each in as many
seconds as the first."""

EXACT = {"eager_numerics.division_rounding": True}
"""What inductor is asked for, so that quantizers keep their values: a GPU's compiled division is approximate by
default, and a quotient beside a rounding tie would get another code."""

INSTEAD = "attack without it: --no-compile"

_KEPT = " robustq, donated_buffer=False"


class CompiledNetwork:
    """One network whose answers and gradients are found by compiled passes, for any number of images.

    Each kind of pass is compiled when it is first asked for, in half a minute or so for a small network. Fewer than
    :data:`FEWEST` images go through the network as it is written.

    Args:
        model: in eval mode; it must stay as it is, with its hooks, weights and modes, but for what stands in the place
            of a layer's arithmetic (:mod:`robustq.models.quant.integer_convolution`).
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
            UsageError: torch.compile does not work on this machine, or cannot take the network in one piece.
        """
        return self._own(x)

    def under_rule(self, rule: str) -> Network:
        """The same, differentiated by a rule of :mod:`robustq.models.quant.straight_through`."""
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
        # In one piece: what stands behind a break torch finds again by the code of a layer, under whichever rule that
        # was compiled first, and the gradient would be that rule's without a word.
        forward = compile_forward(self._model.forward, dynamic=None, fullgraph=True, backend=self._backend)
        gone: set[bool] = set()

        def sized(x: Tensor) -> Tensor:
            differentiated = x.requires_grad and torch.is_grad_enabled()
            logits: Tensor | None = None
            if len(x) >= FEWEST:
                with in_one_line(instead=INSTEAD, first=differentiated not in gone):
                    logits = _called(forward, x, back=differentiated and differentiated not in gone)
                gone.add(differentiated)
            if logits is None:
                logits = self._model(x)
            return logits

        return sized


def _called(forward: Network, x: Tensor, *, back: bool) -> Tensor | None:
    """The compiled network's logits; None where torch has given it up after too many kinds of calls.

    Args:
        back: go the way back too, which is compiled when that is done first, and would be within an attack.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit

    _keep_what_is_differentiated()
    torch._dynamo.mark_dynamic(x, 0)
    try:
        logits = forward(x)
        if back and logits.requires_grad:
            torch.autograd.grad(logits.sum(), x, retain_graph=True, allow_unused=True)
    except FailOnRecompileLimitHit:
        return None
    return logits


def _keep_what_is_differentiated() -> None:
    """Some attacks differentiate a pass more than once, as FAB does for each class; compiled code writes over what it
    has gone back through, unless it is told not to.

    torch reads this when it compiles and again on every way back, so that it holds for the process; all it costs is
    memory. Code that was kept on disk is found again without a look at it (torch 2.15), and a second gradient would be
    garbage without a word: hence the tag, by which only code of this kind is found.
    """
    from torch._functorch import config

    config.donated_buffer = False
    if _KEPT not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += _KEPT


def compile_forward(
    forward: Callable[..., Any],
    *,
    dynamic: bool | None,
    fullgraph: bool = False,
    cuda_graphs: bool = False,
    backend: Any = "inductor",
) -> Callable[..., Any]:
    """A network's forward pass, compiled when it is called first.

    Args:
        forward: a module's.
        dynamic, fullgraph, backend: of torch.compile.
        cuda_graphs: on a GPU, record the kernels of a pass once and replay them together.
    """
    options: dict[str, Any] | None = None
    if backend == "inductor":
        options = {**EXACT, "triton.cudagraphs": cuda_graphs}
    compiled: Callable[..., Any] = torch.compile(
        _of_its_own(forward), backend=backend, dynamic=dynamic, fullgraph=fullgraph, options=options
    )
    return compiled


def check_compiler(device: torch.device, *, backend: Any = "inductor") -> None:
    """Compile a sum of two numbers.

    Raises:
        UsageError: torch.compile does not work on this machine.
    """

    def double(x: Tensor) -> Tensor:
        return x + x

    with in_one_line(instead=INSTEAD, first=True):
        compile_forward(double, dynamic=False, backend=backend)(torch.ones(1, device=device))


@contextmanager
def in_one_line(*, instead: str, first: bool = False) -> Iterator[None]:
    """Turn the compiler's failures within it into one line.

    Args:
        instead: what to do instead.
        first: nothing but a first call lies within it, all of whose failures are the compiler's.

    Raises:
        UsageError: torch.compile does not work on this machine, or with this network.
    """
    # Only here: loading the compiler takes seconds.
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (RobustqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not (first or isinstance(error, TorchDynamoException)):
            raise
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
