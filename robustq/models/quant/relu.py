"""A ReLU and its quantizer as one function: the codes begin at 0, so that clipping to them is the ReLU already.

Two layers that are run one after the other write what lies between them to memory, and autograd does so again on the
way back; in a small network that is a tenth of a training step (docs/results/training-cost.md).
"""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from robustq.models.quant.fused import FusedIntQuant
from robustq.models.quant.quantizers import ActQuant


class _Rectified(nn.Module):
    """What stands in the place of Brevitas' FusedActivationQuantProxy, with its names.

    Args:
        activation_impl: the ReLU; exporters and calibration find it here.
        tensor_quant: the quantizer behind it, of codes from 0 on.
    """

    def __init__(self, activation_impl: nn.ReLU, tensor_quant: FusedIntQuant) -> None:
        super().__init__()
        self.activation_impl = activation_impl
        self.tensor_quant = tensor_quant

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(...) float -> the quantized tensor of the same shape, its scale, zero point and bit width."""
        answer: tuple[Tensor, Tensor, Tensor, Tensor]
        observed = _is_watched(self.activation_impl) or _is_watched(self.tensor_quant)
        if observed or not isinstance(self.tensor_quant, FusedIntQuant):
            # A backward rule wants to stand between the two, or Brevitas has compiled the quantizer.
            bare = torch.compiler.is_compiling() and not _is_watched(self.activation_impl)
            answer = self.tensor_quant(_Relu.apply(x) if bare else self.activation_impl(x))
        else:
            answer = self.tensor_quant.rectified(x)
        return answer


class _Relu(torch.autograd.Function):
    """relu(x), to be compiled: without the truth value that torch's own keeps of each element for the way back
    (see :func:`robustq.models.quant.fused._inside_compiled_on_cpu`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        g: Tensor = grads[0] * y.sign()
        return g


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class QuantReLU(qnn.QuantReLU):  # type: ignore[misc]
    """Brevitas' QuantReLU over ``ActQuant``: the same values and gradients of finite numbers, one function.

    Args:
        bit_width: of the codes.
        return_quant_tensor: whether the answer carries its scale.
    """

    def __init__(self, *, bit_width: int, return_quant_tensor: bool = False) -> None:
        super().__init__(act_quant=ActQuant, bit_width=bit_width, return_quant_tensor=return_quant_tensor)

    def forward(self, x: Any) -> Any:
        """(...) float -> the same shape, quantized."""
        # Not once for all: Brevitas makes a quantizer anew with every state dict that is loaded, and for another width.
        proxy: Any = self.act_quant
        separate = proxy.fused_activation_quant_proxy
        if not isinstance(separate, _Rectified) and isinstance(separate.tensor_quant, FusedIntQuant):
            joined = _Rectified(separate.activation_impl, separate.tensor_quant)
            proxy.fused_activation_quant_proxy = joined.train(separate.training)
        return super().forward(x)
