"""attack: how many images a model still gets right when somebody tries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustq.checkpoint import load_model
from robustq.errors import ModelFileError, UsageError
from robustq.evaluation.evaluate import evaluate
from robustq.evaluation.suites import SUITES
from robustq.export.bundle import open_bundle
from robustq.export.session import OnnxModel
from robustq.inputs import check_attackable
from robustq.models.folding import fold
from robustq.workflow.setting import DEFAULT_EPSILON, data_for, pick_device, tell_evaluation


def attack_model(
    model: Path | str,
    *,
    suite: str = "paper",
    epsilon: float | None = None,
    images: int = 1000,
    data: str | None = None,
    own_model: str | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Attack a model file, or the deployed file of an export folder.

    Args:
        model: a .pt that robustq wrote, or an export folder (attacks are then found on its model.pt and counted on its
            .onnx).
        suite: a key of :data:`robustq.evaluation.suites.SUITES`.
        epsilon: radius; None: what the model was trained for, else 8/255.
        images: test images to use (evenly spaced; 0: all).
        data: over what the model says.
        own_model: the ``module:function`` that built the network, where it is the user's own; without it the code is
            not run.
        skip_bad_images: leave out image files that cannot be read, with a warning.
        seed: of the random starts.
        device: ``cpu``, ``cuda``; None: a GPU where there is one.

    Returns:
        The keys of ``robustq attack --json``.

    Raises:
        RobustqError: bad input.
    """
    if suite not in SUITES:
        raise UsageError(f"unknown suite '{suite}'; known: {', '.join(SUITES)}")
    if images < 0:
        raise UsageError(f"--images {images} is negative; give a number, or 0 for all")
    place = pick_device(device)
    model = check_attackable(Path(model))
    deployed = None
    checkpoint = model
    if model.is_dir() or model.suffix == ".onnx":
        bundle = open_bundle(model)
        if bundle.format == "qonnx":
            raise ModelFileError(
                f"{model}: holds QONNX, which onnxruntime cannot run; attack the same model as --format integer or qcdq"
            )
        deployed, checkpoint = OnnxModel(bundle.onnx), bundle.model
    network, spec, _ = load_model(checkpoint, own_model=own_model)
    loaded = data_for(spec, data, checkpoint, skip_bad_images=skip_bad_images)
    x, y = loaded.test.take(images)
    source = (fold(network, spec) if deployed is not None else network).eval().to(place)
    radius = epsilon if epsilon is not None else DEFAULT_EPSILON if spec.epsilon is None else spec.epsilon
    tell_evaluation(spec, data=loaded, images=len(x), epsilon=radius, seed=seed, device=place)
    found = evaluate(deployed or source, source, x, y, attacks=SUITES[suite], epsilon=radius, device=place, seed=seed)
    return {
        "model": str(model.absolute()),
        "judge": "onnxruntime" if deployed is not None else "pytorch",
        "label": spec.label,
        "data": loaded.name,
        "suite": suite,
        "seed": seed,
        **found.to_dict(),
    }
