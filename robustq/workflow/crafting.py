"""The networks that attacks find their images on, made ready for thousands of passes each.

No attack changes a weight, so that weights are quantized once. Compiled, the network under attack is a copy of its own:
the judge of a model file stays as it is written. Its convolutions of codes are exact sums, which is what a float32
convolution rounds and what the deployed file computes; on the way back they stay in float32.
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
from robustq.models.compiled import FEWEST, CompiledNetwork
from robustq.models.shared_weights import SharedWeights
from robustq.progress import note

WORTH_COMPILING = 300.0
"""Seconds of an attack on a CPU that was not compiled, of which compiling would have been a quarter, and all in all
saved a third and more where it was measured (docs/results/training-cost.md)."""


@contextmanager
def crafted_fast(target: Target, source: nn.Module, images: Tensor, *, compiled: bool) -> Iterator[Target]:
    """Within it the target's networks must stay as they are, and answer faster.

    Args:
        target: of ``source``.
        source: the network under attack, in eval mode, on its device.
        images: uint8 (N, C, H, W), one or more of those that will be attacked.
        compiled: compile the passes through a copy of the network: all that the target's ``sources`` answer, and what
            attacks without gradient ask of a PyTorch judge.

    Yields:
        The target to attack.
    """
    copied = deepcopy(source) if compiled else None
    others = [*target.surrogates.values(), *([] if target.control is None else [target.control])]
    with ExitStack() as stack:
        for network in {id(one): one for one in (source, copied, *others) if isinstance(one, nn.Module)}.values():
            stack.enter_context(SharedWeights(network).quantized_once())
        if copied is not None:
            if len(images) >= FEWEST:
                kinds = len(target.sources) + 1
                note(f"note    {kinds} kinds of passes compile when first asked for, in half a minute or so each")
            _convolve_codes(copied, images, stack)
            target = _compiled(target, copied, judged=target.judge is source)
        yield target


def tell_what_compiling_saves(seconds: float, device: torch.device) -> None:
    """One line, after an attack that was not compiled and so long that its like should be; nothing where nothing is
    known, as of GPUs.
    """
    if device.type == "cpu" and seconds >= WORTH_COMPILING:
        note("note    so long an attack may take two thirds of the time with --compile, which takes a C++ compiler")


def _compiled(target: Target, network: nn.Module, *, judged: bool) -> Target:
    fast = CompiledNetwork(network)
    sources = {name: fast if name == AS_TRAINED else fast.under_rule(name) for name in target.sources}
    return replace(target, sources=sources, guide=fast if judged else None)


def _convolve_codes(network: nn.Module, images: Tensor, stack: ExitStack) -> None:
    device = next(network.parameters()).device
    # Only here: it makes an operator known to torch, which takes a moment.
    from robustq.models.integer_convolution import IntegerConvolutions, is_available

    if device.type == "cpu" and is_available():
        integers = IntegerConvolutions(network, to_float(images[:2]), way_back=torch.float32)
        stack.enter_context(integers.in_place())
