"""Faster networks for the attacks of one target: weights quantized once, compiled passes.

Attacks change no weight, so that weights are quantized once. Compiled attack generation uses a copy of the network; the
judge of a model file stays eager.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustq.data import to_float
from robustq.evaluation.target import AS_TRAINED, Target
from robustq.models.compiled import MIN_IMAGES, CompiledNetwork
from robustq.models.quant.shared_weights import SharedWeights
from robustq.progress import note


@contextmanager
def prepared_target(target: Target, network: nn.Module | None, images: Tensor, *, compiled: bool) -> Iterator[Target]:
    """Yield the target with faster networks, which must not change within the block.

    Args:
        network: the network under attack, in eval mode, on its device; None where only its answers are known.
        images: uint8 (N, C, H, W), one or more of the images to attack.
        compiled: compile a copy of the network for the target's gradient models, and for gradient-free attacks on a
            PyTorch judge.
    """
    copied = deepcopy(network) if compiled else None
    others = [*target.surrogates.values(), *([] if target.control is None else [target.control])]
    with ExitStack() as stack:
        for one in {id(one): one for one in (network, copied, *others) if isinstance(one, nn.Module)}.values():
            stack.enter_context(SharedWeights(one).quantized_once())
        if copied is not None:
            if len(images) >= MIN_IMAGES:
                kinds = len(target.gradient_models) + 1
                note(f"note    {kinds} kinds of passes are compiled at their first use, about half a minute each")
            _convolve_codes(copied, images, stack)
            fast = CompiledNetwork(copied)
            rules = {name: fast if name == AS_TRAINED else fast.under_rule(name) for name in target.gradient_models}
            target = replace(target, gradient_models=rules, proxy=fast if target.judge is network else None)
        yield target


def _convolve_codes(network: nn.Module, images: Tensor, stack: ExitStack) -> None:
    device = next(network.parameters()).device
    # Only here: it makes an operator known to torch, which takes a moment.
    from robustq.models.quant.integer_convolution import IntegerConvolutions, is_available

    if device.type == "cpu" and is_available():
        integers = IntegerConvolutions(network, to_float(images[:2]), way_back=torch.float32)
        stack.enter_context(integers.in_place())
