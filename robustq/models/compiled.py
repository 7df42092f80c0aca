"""Forward and backward passes by torch.compile, for training and attack generation; never for the final count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustq.errors import RobustqError, UsageError
from robustq.models.quant.backward_rules import Network, backward_rule, rounds_plainly

MIN_IMAGES = 16
"""Smaller batches run eagerly: torch would compile further graphs for them, each as slow as the first."""

EXACT_DIVISION = {"eager_numerics.division_rounding": True}
"""Inductor's option that keeps the values of quantizers: a GPU's compiled division is approximate by default, and a
quotient beside a rounding tie would get another code."""

ADVICE = "attack without it: --no-compile"

_CACHE_TAG = " robustq, donated_buffer=False"


class CompiledNetwork:
    """A network with compiled forward and backward passes for any batch size, eager below :data:`MIN_IMAGES` images.

    Each kind of pass is compiled at its first call, in about half a minute for a small network. The model is in eval
    mode; its hooks, weights and modes must not change, but the arithmetic of its layers may
    (:mod:`robustq.models.quant.integer_convolution`).
    """

    def __init__(self, model: nn.Module, *, backend: Any = "inductor") -> None:
        self._model = model
        self._backend = backend
        self._plain_rounding: bool | None = None
        self._straight_through = self._compile()

    def __call__(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K), with the network's own gradient; UsageError if it does not compile."""
        return self._straight_through(x)

    def under_rule(self, rule: str) -> Network:
        """The same network under a backward rule of :mod:`robustq.models.quant.backward_rules`."""
        # A compilation of its own: torch caches by code and ignores the hooks of a rule.
        forward = self._compile()

        def ruled(x: Tensor) -> Tensor:
            if not (x.requires_grad and torch.is_grad_enabled()):
                return self._straight_through(x)
            if self._plain_rounding is None:
                # Asked eagerly: the compiler cannot trace the watch where QuantTensors go from layer to layer.
                self._plain_rounding = rounds_plainly(self._model, x[:1])
            with backward_rule(self._model, rule, plain_rounding=self._plain_rounding):
                return forward(x)

        return ruled

    def _compile(self) -> Network:
        # fullgraph: after a graph break torch may reuse code that was compiled for another backward rule.
        forward = compile_forward(self._model.forward, dynamic=None, fullgraph=True, backend=self._backend)
        compiled: set[bool] = set()  # whether the passes that were compiled are differentiated

        def run(x: Tensor) -> Tensor:
            logits: Tensor | None = None
            if len(x) >= MIN_IMAGES:
                differentiated = x.requires_grad and torch.is_grad_enabled()
                first = differentiated not in compiled
                with compiler_errors(advice=ADVICE, first=first):
                    logits = _call(forward, x, backward=differentiated and first)
                compiled.add(differentiated)
            answer: Tensor = self._model(x) if logits is None else logits
            return answer

        return run


class CompiledForward:
    """The compiled forward pass of one network, for batches of one size.

    It is compiled once for every kind of pass (attack generation, clean features, training), a minute or more each. A
    short last batch is not worth that and runs eager.

    Args:
        model: on its device; its modules must stay the same objects.
        batch_size: images of a compiled batch.
        cuda_graphs: on a GPU, record the kernels of a pass once and replay them together.
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, *, batch_size: int, cuda_graphs: bool, backend: Any = "inductor") -> None:
        self._model = model
        self._batch_size = batch_size
        self._cuda_graphs = cuda_graphs
        self._forward = compile_forward(model.forward, dynamic=False, cuda_graphs=cuda_graphs, backend=backend)

    @contextmanager
    def in_place(self, images: int) -> Iterator[None]:
        """Within it every call of the network is compiled, if ``images`` is the compiled batch size.

        Raises:
            UsageError: torch.compile does not work on this machine.
        """
        if images != self._batch_size:
            yield
            return
        if self._cuda_graphs:
            # Outputs of the last step's replays are not read any more.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with replaced_forward(self._model, self._forward), compiler_errors(advice="train without it: --no-compile"):
            yield


@contextmanager
def replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it calls of ``model`` run ``forward``."""
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward  # the instance's attribute; the method of its class is visible again
        if own is not None:
            model.forward = own


def _call(forward: Network, x: Tensor, *, backward: bool) -> Tensor | None:
    """Logits of the compiled network; None once torch has reached its limit of recompilations.

    ``backward`` runs the backward pass too, so that it is compiled here and not in the middle of an attack.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._functorch import config as functorch_config

    # FAB differentiates a graph once for each class, but by default compiled backward code overwrites saved tensors.
    # torch reads the setting at compilation and at every backward pass, so it is set for the process; it only costs
    # memory. The disk cache of compiled code ignores it (torch 2.15), and a second gradient would be garbage: hence the
    # tag in the cache key.
    functorch_config.donated_buffer = False
    if _CACHE_TAG not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += _CACHE_TAG
    torch._dynamo.mark_dynamic(x, 0)
    try:
        logits = forward(x)
        if backward and logits.requires_grad:
            torch.autograd.grad(logits.sum(), x, retain_graph=True, allow_unused=True)
    except FailOnRecompileLimitHit:
        return None
    return logits


def compile_forward(
    forward: Callable[..., Any],
    *,
    dynamic: bool | None,
    fullgraph: bool = False,
    cuda_graphs: bool = False,
    backend: Any = "inductor",
) -> Callable[..., Any]:
    """A module's forward pass that is compiled at its first call, with arguments of torch.compile.

    ``cuda_graphs`` records the kernels of a pass on a GPU once and replays them together.
    """

    def own(*inputs: Any, **named: Any) -> Any:
        return forward(*inputs, **named)

    # torch.compile caches by code and ignores hooks: it would reuse the code of another network of the same class, and
    # miss the feature hooks of ODG-Q.
    own.__code__ = own.__code__.replace()
    options: Any = {**EXACT_DIVISION, "triton.cudagraphs": cuda_graphs} if backend == "inductor" else None
    compiled: Callable[..., Any] = torch.compile(
        own, backend=backend, dynamic=dynamic, fullgraph=fullgraph, options=options
    )
    return compiled


def check_compiler(device: torch.device, *, backend: Any = "inductor") -> None:
    """Compile a sum of two numbers; UsageError if torch.compile does not work on this machine."""
    with compiler_errors(advice=ADVICE, first=True):
        compile_forward(lambda x: x + x, dynamic=False, backend=backend)(torch.ones(1, device=device))


@contextmanager
def compiler_errors(*, advice: str, first: bool = False) -> Iterator[None]:
    """Turn errors of the compiler inside the `with` into a UsageError of one line that ends with ``advice``.

    ``first`` means that the `with` holds only a first call; then every error is the compiler's.
    """
    # Imported here: loading the compiler takes seconds.
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except (RobustqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not (first or isinstance(error, TorchDynamoException)):
            raise
        cause: BaseException = getattr(error, "inner_exception", None) or error
        first_line = [*str(cause).strip().splitlines(), type(cause).__name__][0].rstrip(".")
        raise UsageError(f"torch.compile does not work here ({first_line}); {advice}") from error
