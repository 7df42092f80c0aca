"""Other gradients for the same quantized network, so that an attack does not hang on the one it was trained with.

A quantizer has no useful derivative of its own, and the one that training puts in its place also hides: the clipped
straight-through gradient is zero wherever an activation is clipped, which in a binarised network may be nearly
everywhere. Answering a defence by a derivative of one's own is BPDA (Athalye et al. 2018, arXiv:1802.00420).

    with backward_rule(model, "pass-through"):
        x_adv = apgd(model, x, y, epsilon=8 / 255)

Only the backward pass differs: every forward value is the very tensor that the quantizer computed.
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
from robustq.models.quant.fused import FusedIntQuant

STRAIGHT_THROUGH = "straight-through"
PASS_THROUGH = "pass-through"
SMOOTH = "smooth"

RULES: tuple[str, ...] = (STRAIGHT_THROUGH, PASS_THROUGH, SMOOTH)
"""Every rule by its name.

`straight-through`: as the network was trained: 1 inside the quantizer's range and 0 where it clips; of a sign within 1
    the slope 2 - 2 |x|, and 0 beyond (`robustq.models.quant.binary.FusedSign`).
`pass-through`: 1 everywhere, that is no clip mask. A ReLU in front of the quantizer keeps its own derivative.
`smooth`: the derivative of a smooth staircase, `staircase_slope`; of a sign that of tanh, `sign_slope`.
"""

Network = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> logits (N, K)."""

WAVE = 0.5
"""How much steeper the smooth staircase of up to 4 codes is half-way between two codes than on average, and flatter at
the codes; with more codes it falls like 1 / codes. A perturbation moves a finely quantized activation by many codes,
and there the ripple is nothing but noise in the gradient (docs/results/attacks.md)."""

EDGE = 1 / 16
"""Width of the smooth staircase's ends, as a share of its codes, and at least half a code."""

SIGN_WIDTH = 0.5
"""Width of the smooth sign, as a share of the mean magnitude of what enters it: on a network with shortcuts half as
wide ones break less, on one without them more (docs/results/attacks.md)."""


@contextmanager
def backward_rule(model: nn.Module, rule: str, *, plain_rounding: bool = True) -> Iterator[None]:
    """Differentiate the activation quantizers of a network by another rule, inside the `with`.

    It covers all activation quantizers of Brevitas (ours, folded or not, and those in a user's own network), and under
    the last two rules also plain calls of torch.round, floor, ceil, trunc and sign on tensors that autograd watches,
    whose own derivative is zero. Comparisons and `detach` stay as they are. A float network stays as it is.

    Not for training: learned scales get no gradient under the last two rules. Afterwards everything is as before.

    Args:
        model: the network; changed in nothing but its backward pass.
        rule: one of `RULES`.
        plain_rounding: False for a network that is known to make none of those plain calls (`rounds_plainly`), which
            are then not looked for.

    Raises:
        UsageError: an unknown rule, quantizers compiled by TorchScript (BREVITAS_JIT=1), or `smooth` for a quantizer
            that is neither of integers nor of one bit.
    """
    if rule not in RULES:
        raise UsageError(f"backward rule '{rule}' is unknown; known: {', '.join(RULES)}")
    if rule == STRAIGHT_THROUGH:
        yield
        return
    with ExitStack() as stack:
        # A quantizer that several layers share gets one hook: each further one would multiply the slopes.
        for quantizer, name in {quantizer: name for name, quantizer in activation_quantizers(model).items()}.items():
            slope = _slope_of(name, quantizer, rule)
            stack.enter_context(quantizer.register_forward_hook(partial(_reattach, slope=slope)))
        if plain_rounding:
            stack.enter_context(_WatchedRounding(rule))
        yield


def under_rule(model: nn.Module, rule: str) -> Network:
    """The network as a callable whose gradient follows a rule; a call leaves the network itself as it was.

    Args and errors are those of `backward_rule`.
    """
    if rule not in RULES:
        raise UsageError(f"backward rule '{rule}' is unknown; known: {', '.join(RULES)}")

    def ruled(x: Tensor) -> Tensor:
        with backward_rule(model, rule):
            logits: Tensor = model(x)
        return logits

    return ruled


def rounds_plainly(model: nn.Module, x: Tensor) -> bool:
    """Whether the network calls torch.round or its like itself, outside its quantizers, on its way from these images.

    Args:
        model: the network; it is called once.
        x: (N, C, H, W) images.
    """
    watched = _WatchedRounding(PASS_THROUGH)
    with torch.enable_grad(), watched:
        model(x.detach().clone().requires_grad_())
    return watched.found


def activation_quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that quantize activations, by name; each maps a tensor to (value, scale, zero point, bit width).

    Raises:
        UsageError: quantizers compiled by TorchScript, whose hooks never run.
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


def staircase_slope(codes: Tensor, *, lowest: float, highest: float) -> Tensor:
    """The derivative of a smooth staircase with one step per code, and smooth ends.

    (1 - w cos(2 pi u)) sigmoid((highest + 1/2 - u) / t) sigmoid((u - lowest + 1/2) / t) with u = `codes`: the first
    factor is the derivative of the soft rounding u - w sin(2 pi u) / (2 pi), largest where a small change flips the
    code, with w = `WAVE` of up to 4 codes and 4 `WAVE` / codes beyond; the others let the gradient fade out where the
    quantizer clips, over t = max((highest - lowest) EDGE, 1/2) codes. From 0 on, an unsigned quantizer has no lower
    end: the ReLU in front of it is that end.

    Args:
        codes: any shape, the activations in units of the scale, before rounding (zero point added).
        lowest, highest: codes of the quantizer.

    Returns:
        The same shape, 0 to 1 + w.
    """
    wave = WAVE * min(1.0, 4.0 / (highest - lowest + 1.0))
    width = max((highest - lowest) * EDGE, 0.5)
    slope = (1.0 - wave * torch.cos(2.0 * math.pi * codes)) * torch.sigmoid((highest + 0.5 - codes) / width)
    return slope if lowest == 0 else slope * torch.sigmoid((codes - lowest + 0.5) / width)


def sign_slope(x: Tensor) -> Tensor:
    """The derivative of tanh(x / t), where t is `SIGN_WIDTH` times the mean magnitude of the image's channel.

    A sign does not see the scale of what enters it, and so neither may its slope: with a fixed width, a network whose
    BatchNorm multiplies by 1,000 has the same answers and no gradient.

    Args:
        x: (N, C, ...), or (N, C) or fewer dimensions, where it is the mean of the image or of everything.

    Returns:
        The same shape, (1 - tanh(x / t)^2) / t; zero where a whole channel is.
    """
    own = tuple(range(2 if math.prod(x.shape[2:]) > 1 else 1, x.dim()))
    width = SIGN_WIDTH * (x.abs().mean(dim=own, keepdim=True) if own else x.abs().mean())
    slope = (1.0 - torch.tanh(x / width).square()) / width
    return torch.where(width > 0, slope, 0.0)


Slope = Callable[[Tensor, tuple[Any, ...]], Tensor | None]
"""(entering activations, the quantizer's answer) -> derivative, of the activations' shape; None for 1."""


def _slope_of(name: str, quantizer: nn.Module, rule: str) -> Slope:
    if rule == PASS_THROUGH:
        return _one
    if isinstance(quantizer, BinaryQuant | ClampedBinaryQuant):
        return _of_sign
    if isinstance(quantizer, FusedIntQuant):
        return partial(_of_staircase, codes=quantizer.codes)
    integers = getattr(quantizer, "int_quant", None)
    if integers is None or not hasattr(integers, "min_int"):
        raise UsageError(f"{name} is a {type(quantizer).__name__}, which has no smooth form here; use '{PASS_THROUGH}'")
    return partial(_of_stock_staircase, integers=integers)


def _one(x: Tensor, answer: tuple[Any, ...]) -> None:
    """The derivative of the identity."""


def _of_sign(x: Tensor, answer: tuple[Any, ...]) -> Tensor:
    """That of scale * tanh(x / t)."""
    slope: Tensor = answer[1] * sign_slope(x)
    return slope


def _of_staircase(x: Tensor, answer: tuple[Any, ...], *, codes: tuple[int, int]) -> Tensor:
    _, scale, zero_point, _ = answer
    return staircase_slope(x / scale + zero_point, lowest=codes[0], highest=codes[1])


def _of_stock_staircase(x: Tensor, answer: tuple[Any, ...], *, integers: Any) -> Tensor:
    """Whose width may be learned."""
    bit_width = answer[3]
    codes = (int(integers.min_int(bit_width)), int(integers.max_int(bit_width)))
    return _of_staircase(x, answer, codes=codes)


def _reattach(module: nn.Module, inputs: tuple[Any, ...], answer: tuple[Any, ...], *, slope: Slope) -> tuple[Any, ...]:
    """Forward hook of a quantizer: the same value, with another way back."""
    (x,) = inputs
    if not (torch.is_grad_enabled() and x.requires_grad):
        return answer
    with torch.no_grad():
        factor = slope(x, answer)
    return (_Reattached.apply(x, answer[0].detach(), factor), *answer[1:])


class _Reattached(torch.autograd.Function):
    """The second argument, with the gradient of the first one times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return (grads[0] if factor is None else grads[0] * factor), None, None


_ROUNDING = frozenset(
    getattr(owner, name) for owner in (torch, Tensor) for name in ("round", "floor", "ceil", "trunc", "fix")
)
_SIGNS = frozenset((torch.sign, Tensor.sign, torch.sgn, Tensor.sgn))


class _WatchedRounding(TorchFunctionMode):
    """Gives plain rounding the derivative 1, and signs 1 or under the smooth rule that of tanh."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and put the other gradient behind its value."""
        answer = func(*args, **(kwargs or {}))
        if (func not in _ROUNDING and func not in _SIGNS) or not args or not isinstance(args[0], Tensor):
            return answer
        x = args[0]
        if not (torch.is_grad_enabled() and x.requires_grad):
            return answer
        self.found = True
        factor = None
        if self.rule == SMOOTH and func in _SIGNS:
            with torch.no_grad():
                factor = sign_slope(x)
        return _Reattached.apply(x, answer.detach(), factor)
