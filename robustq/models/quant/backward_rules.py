"""Backward rules: other gradients for the same quantized network, so that attacks do not rely on the trained one.

The derivative of a quantizer is zero, and the one that training uses in its place hides too: the clipped
straight-through gradient is zero wherever an activation is clipped, in a binarised network nearly everywhere. An attack
with a derivative of its own is BPDA (Athalye et al. 2018, arXiv:1802.00420).

    with backward_rule(model, "pass-through"):
        x_adv = apgd(model, x, y, epsilon=8 / 255)

Only the backward pass differs: forward values are the quantizer's own tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from brevitas.core.quant import BinaryQuant, ClampedBinaryQuant
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustq.errors import UsageError
from robustq.models.quant.straight_through import FusedIntQuant

STRAIGHT_THROUGH = "straight-through"
PASS_THROUGH = "pass-through"
SMOOTH = "smooth"

RULES: tuple[str, ...] = (STRAIGHT_THROUGH, PASS_THROUGH, SMOOTH)
"""Every rule by its name.

`straight-through`: the gradient of training: 1 inside the quantizer's range and 0 where it clips; of a sign 2 - 2 |x|
    within 1, and 0 beyond (`robustq.models.quant.binary.FusedSign`).
`pass-through`: 1 everywhere, without a clip mask. A ReLU in front of the quantizer keeps its own derivative.
`smooth`: the derivative of a smooth staircase, `staircase_derivative`; of a sign that of tanh, `sign_derivative`.
"""

Network = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> logits (N, K)."""

Derivative = Callable[[Tensor, tuple[Any, ...]], Tensor | None]
"""(a quantizer's input, its output tuple) -> derivative in the input's shape; None for 1."""

WAVE = 0.5
"""Ripple of the smooth staircase's derivative for up to 4 codes. It falls like 1 / codes beyond: a perturbation then
moves an activation by many codes, and the ripple is only noise in the gradient (docs/results/attacks.md)."""

EDGE = 1 / 16
"""Width of the smooth staircase's ends, as a share of its codes, and at least half a code."""

SIGN_WIDTH = 0.5
"""Width of the smooth sign, as a share of the mean magnitude of its input. Half of it breaks fewer images of a network
with shortcuts, and more of one without (docs/results/attacks.md)."""


@contextmanager
def backward_rule(model: nn.Module, rule: str, *, plain_rounding: bool = True) -> Iterator[None]:
    """Differentiate the activation quantizers of a network by another rule, inside the `with`.

    It covers all activation quantizers of Brevitas. The last two rules also cover plain calls of torch.round, floor,
    ceil, trunc and sign on tensors that autograd records. Comparisons, `detach` and float networks stay as they are.

    Not for training: learned scales get no gradient under the last two rules. Without ``plain_rounding`` the plain
    calls are skipped, for a network that has none (`rounds_plainly`).

    UsageError for an unknown rule, quantizers compiled by TorchScript (BREVITAS_JIT=1), or `smooth` for quantizers that
    are neither integer nor binary.
    """
    _check_rule(rule)
    if rule == STRAIGHT_THROUGH:
        yield
        return
    with ExitStack() as stack:
        # One hook for a quantizer that several layers share: more of them would multiply the derivatives.
        for quantizer, name in {quantizer: name for name, quantizer in activation_quantizers(model).items()}.items():
            hook = partial(_replace_gradient, derivative=_derivative_of(name, quantizer, rule))
            stack.enter_context(quantizer.register_forward_hook(hook))
        if plain_rounding:
            stack.enter_context(_PlainRounding(rule))
        yield


def under_rule(model: nn.Module, rule: str) -> Network:
    """The network as a callable with the gradient of a rule; arguments and errors as of `backward_rule`."""
    _check_rule(rule)

    def ruled(x: Tensor) -> Tensor:
        with backward_rule(model, rule):
            logits: Tensor = model(x)
        return logits

    return ruled


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise UsageError(f"backward rule '{rule}' is unknown; known: {', '.join(RULES)}")


def rounds_plainly(model: nn.Module, x: Tensor) -> bool:
    """Whether the network calls torch.round or its like outside its quantizers; one call with images (N, C, H, W)."""
    watched = _PlainRounding(PASS_THROUGH)
    with torch.enable_grad(), watched:
        model(x.detach().clone().requires_grad_())
    return watched.found


def activation_quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that quantize activations, by name; each maps a tensor to (value, scale, zero point, bit width).

    UsageError for quantizers compiled by TorchScript, whose hooks never run.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ActQuantProxyFromInjectorBase) or not module.is_quant_enabled:
            continue
        fused = module.fused_activation_quant_proxy
        if isinstance(fused, torch.jit.ScriptModule):
            raise UsageError(
                "the quantizers are compiled (BREVITAS_JIT=1), and their gradients fixed; unset BREVITAS_JIT"
            )
        found[f"{name}.fused_activation_quant_proxy.tensor_quant"] = fused.tensor_quant
    return found


def staircase_derivative(codes: Tensor, *, lowest: float, highest: float) -> Tensor:
    """The derivative of a smooth staircase with one step per code, and smooth ends; 0 to 1 + w.

    (1 - w cos(2 pi u)) sigmoid((highest + 1/2 - u) / t) sigmoid((u - lowest + 1/2) / t) with u = `codes`: the soft
    rounding u - w sin(2 pi u) / (2 pi), steepest where a small change flips the code, and ends of width
    t = max((highest - lowest) EDGE, 1/2). w is `WAVE` of up to 4 codes and 4 `WAVE` / codes beyond. Without the last
    factor for an unsigned quantizer (lowest 0): the ReLU in front of it is that end.

    ``codes`` (any shape) are activations in units of the scale before rounding, with the zero point added; ``lowest``
    and ``highest`` are codes of the quantizer.
    """
    wave = WAVE * min(1.0, 4.0 / (highest - lowest + 1.0))
    width = max((highest - lowest) * EDGE, 0.5)
    upper = (1.0 - wave * torch.cos(2.0 * math.pi * codes)) * torch.sigmoid((highest + 0.5 - codes) / width)
    return upper if lowest == 0 else upper * torch.sigmoid((codes - lowest + 0.5) / width)


def sign_derivative(x: Tensor) -> Tensor:
    """The derivative of tanh(x / t), where t is `SIGN_WIDTH` times the mean magnitude of the image's channel.

    (N, C, ...) -> the same shape, (1 - tanh(x / t)^2) / t; zero where a whole channel is. With (N, C) or fewer
    dimensions the mean is over the image or over everything. Like the sign it does not depend on the scale of x: with a
    fixed width, a network whose BatchNorm multiplies by 1,000 would have the same logits and no gradient.
    """
    own = tuple(range(2 if math.prod(x.shape[2:]) > 1 else 1, x.dim()))
    width = SIGN_WIDTH * (x.abs().mean(dim=own, keepdim=True) if own else x.abs().mean())
    derivative = (1.0 - torch.tanh(x / width).square()) / width
    return torch.where(width > 0, derivative, 0.0)


def _derivative_of(name: str, quantizer: nn.Module, rule: str) -> Derivative:
    # Partials of functions: torch.compile would take a closure of each call for another one, and recompile.
    if rule == PASS_THROUGH:
        return _of_identity
    if isinstance(quantizer, BinaryQuant | ClampedBinaryQuant):
        return _of_sign
    if not hasattr(getattr(quantizer, "int_quant", None), "min_int"):
        raise UsageError(f"{name} is a {type(quantizer).__name__}, which has no smooth form here; use '{PASS_THROUGH}'")
    return partial(_of_staircase, quantizer=quantizer)


def _of_identity(x: Tensor, answer: tuple[Any, ...]) -> None:
    """1."""


def _of_sign(x: Tensor, answer: tuple[Any, ...]) -> Any:
    return answer[1] * sign_derivative(x)


def _of_staircase(x: Tensor, answer: tuple[Any, ...], *, quantizer: Any) -> Tensor:
    _, scale, zero_point, bit_width = answer
    if isinstance(quantizer, FusedIntQuant):
        lowest, highest = quantizer.codes
    else:  # stock Brevitas, whose bit width may be learned
        integers = quantizer.int_quant
        lowest, highest = int(integers.min_int(bit_width)), int(integers.max_int(bit_width))
    return staircase_derivative(x / scale + zero_point, lowest=lowest, highest=highest)


def _replace_gradient(
    module: nn.Module, inputs: tuple[Any, ...], answer: tuple[Any, ...], *, derivative: Derivative
) -> tuple[Any, ...]:
    """Forward hook of a quantizer: the same value with another gradient."""
    (x,) = inputs
    if not (torch.is_grad_enabled() and x.requires_grad):
        return answer
    with torch.no_grad():
        factor = derivative(x, answer)
    return (WithGradient.apply(x, answer[0].detach(), factor), *answer[1:])


class WithGradient(torch.autograd.Function):
    """``value``, with the gradient of x times a factor (None for 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: Tensor | None) -> Tensor:
        """Return ``value``."""
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Multiply the gradient by the factor."""
        (factor,) = ctx.saved_tensors
        return (grads[0] if factor is None else grads[0] * factor), None, None


_ROUNDING = frozenset(
    getattr(owner, name) for owner in (torch, Tensor) for name in ("round", "floor", "ceil", "trunc", "fix")
)
_SIGNS = frozenset((torch.sign, Tensor.sign, torch.sgn, Tensor.sgn))


class _PlainRounding(TorchFunctionMode):
    """Gives plain rounding the derivative 1, and plain signs 1 or under the smooth rule that of tanh."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        x = args[0] if args and (func in _ROUNDING or func in _SIGNS) else None
        if not (isinstance(x, Tensor) and torch.is_grad_enabled() and x.requires_grad):
            return answer
        self.found = True
        factor = None
        if self.rule == SMOOTH and func in _SIGNS:
            with torch.no_grad():
                factor = sign_derivative(x)
        return WithGradient.apply(x, answer.detach(), factor)
