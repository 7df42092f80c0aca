"""A judge for any model in memory: a torch module, a callable or an onnxruntime session, in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustq.attacks.ball import LEVEL_TOLERANCE
from robustq.attacks.base import Model
from robustq.errors import UsageError
from robustq.evaluation.run_suite import check_radius, find_suite, run_suite
from robustq.evaluation.target import AS_TRAINED, Target
from robustq.models.quant.backward_rules import (
    RULES,
    STRAIGHT_THROUGH,
    activation_quantizers,
    rounds_plainly,
    under_rule,
)
from robustq.recipe import parse_epsilon
from robustq.report.text import attack_lines
from robustq.workflow.attack import RobustnessResult
from robustq.workflow.prepared_target import prepared_target

Answering = Callable[[Tensor], Any]
"""Images (B, C, H, W) float32 in [0, 1] -> logits (B, K), a tensor or an array; or an onnxruntime.InferenceSession."""


def evaluate(
    model: Answering,
    images: Tensor | np.ndarray[Any, Any],
    labels: Tensor | np.ndarray[Any, Any],
    *,
    epsilon: float | str,
    suite: str = "standard",
    gradient_model: Answering | None = None,
    surrogates: Mapping[str, Answering] | None = None,
    control: Answering | None = None,
    name: str = "model",
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    show: bool = True,
) -> RobustnessResult:
    """Measure the accuracy of a model under attack and check for gradient masking, as ``robustq attack`` does.

    Args:
        model: the judge. A torch module is put into eval mode for the call. A session takes float32 images in [0, 1],
            or uint8 pixels, and answers with logits first.
        images, labels: (N, C, H, W), uint8 or k/255 as float; (N,) integers from 0.
        epsilon: radius of the L-infinity ball in [0, 1], such as ``8 / 255`` or ``"8/255"``.
        suite: a key of :data:`robustq.evaluation.suites.SUITES`.
        gradient_model: a differentiable model with the same answers, for attacks with gradients; None: the model
            itself. Where it gives no gradient, attacks without gradients run, and no verdict is given.
        surrogates: by name, other models for the same classes, whose adversarial images may transfer.
        control: a naturally trained model on the same data without defence; without it no verdict is given.
        name: of the model in the result.
        batch_size: images per call of an attack.
        seed: of everything random.
        device: of images and models; None: that of the gradient model's parameters, or the CPU.
        show: print the lines of ``robustq attack``.

    Returns:
        Counts, interval, flags and verdict, and the adversarial images as proof: the keys of ``robustq attack --json``.

    Raises:
        UsageError: images that are not uint8 pixels, labels that do not fit, an unknown suite, a model that cannot take
            the images, or a suite of gradient attacks alone for a model without gradients.
    """
    chosen = find_suite(suite)
    radius = parse_epsilon(epsilon)
    check_radius(radius)
    differentiable = model if gradient_model is None else gradient_model
    place = torch.device(device) if device is not None else _device_of(differentiable)
    pixels, classes = _pixels(images), torch.as_tensor(labels).to(torch.int64)
    networks = [model, differentiable, *(surrogates or {}).values(), control]
    start = time.perf_counter()
    with _eval_mode([one for one in networks if isinstance(one, nn.Module)]):
        others = {key: _answers(one) for key, one in (surrogates or {}).items()}
        target = Target(
            judge=_answers(model),
            gradient_models={} if _is_session(differentiable) else _rules(differentiable, pixels[:1], place),
            surrogates=others if control is None else {**others, "the control": _answers(control)},
            control=None if control is None else _answers(control),
        )
        network = differentiable if isinstance(differentiable, nn.Module) else None
        with prepared_target(target, network, pixels, compiled=False) as prepared:
            found = run_suite(
                prepared, pixels, classes, suite=chosen, epsilon=radius, device=place, batch_size=batch_size, seed=seed
            )
    result = RobustnessResult(
        model=name,
        judge=_kind(model),
        label=name,
        data="images in memory",
        suite=suite,
        seed=seed,
        file_failures=(),
        compiled=False,
        evaluation=found,
        curve=(),
        surrogates=tuple(target.surrogates),
        control=control is not None,
        adversarial=None,
        seconds=time.perf_counter() - start,
    )
    if show:
        print("\n".join(attack_lines(result)))
    return result


def _pixels(images: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """uint8 (N, C, H, W) on the CPU."""
    found = torch.as_tensor(images).detach().cpu()
    if found.ndim != 4:
        raise UsageError(f"images have shape {tuple(found.shape)}; give (images, channels, height, width)")
    if found.dtype == torch.uint8:
        return found
    levels = found.double() * 255.0
    # Written so that NaN fails as well.
    if not found.is_floating_point() or not bool(
        ((levels - levels.round()).abs() <= LEVEL_TOLERANCE).all() and (levels >= 0).all() and (levels <= 255).all()
    ):
        raise UsageError(
            f"images are {str(found.dtype).removeprefix('torch.')} and not uint8 pixels; give uint8, or float pixels "
            "divided by 255 without other normalisation"
        )
    return levels.round().to(torch.uint8)


def _answers(model: Answering) -> Model:
    """The model with logits as a tensor; a module as it is."""
    if isinstance(model, nn.Module):
        return model
    if _is_session(model):
        return _session(model)

    def logits(x: Tensor) -> Tensor:
        found = model(x)
        return found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found), dtype=torch.float32)

    return logits


def _session(session: Any) -> Model:
    (source, *rest) = session.get_inputs()
    if rest or source.type not in ("tensor(float)", "tensor(uint8)"):
        raise UsageError("the session does not have one input of float32 or uint8 images; give a callable around it")
    # A fixed batch size is filled up with black images.
    batch = source.shape[0] if source.shape and isinstance(source.shape[0], int) else None

    def logits(x: Tensor) -> Tensor:
        pixels = x.detach().cpu()
        array = ((pixels * 255).round().to(torch.uint8) if source.type == "tensor(uint8)" else pixels).numpy()
        size = batch or max(len(array), 1)
        parts = []
        for first in range(0, len(array), size):
            part = array[first : first + size]
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            parts.append(np.asarray(session.run(None, {source.name: filled})[0])[: len(part)])
        return torch.as_tensor(np.concatenate(parts), dtype=torch.float32)

    return logits


def _rules(model: Answering, images: Tensor, device: torch.device) -> dict[str, Model]:
    """The model, and a torch module that rounds under the other backward rules."""
    found: dict[str, Model] = {AS_TRAINED: _answers(model)}
    if isinstance(model, nn.Module) and len(images):
        rounds = bool(activation_quantizers(model))
        if not rounds:
            try:
                rounds = rounds_plainly(model, images.to(device).float() / 255.0)
            except Exception:  # images that it cannot take are refused with a reason later
                return found
        if rounds:
            found |= {rule: under_rule(model, rule) for rule in RULES if rule != STRAIGHT_THROUGH}
    return found


def _is_session(model: object) -> bool:
    return hasattr(model, "get_inputs") and hasattr(model, "run")


def _kind(model: object) -> str:
    return "onnxruntime" if _is_session(model) else "pytorch" if isinstance(model, nn.Module) else "callable"


def _device_of(model: object) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def _eval_mode(networks: list[nn.Module]) -> Iterator[None]:
    """Within it the networks are in eval mode; afterwards each of their modules is as before."""
    before = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
