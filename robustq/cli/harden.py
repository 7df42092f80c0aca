"""robustq harden."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.finish import finish, radius, shortfalls
from robustq.cli.loudness import Quiet, Verbose
from robustq.cli.options import (
    ActBits,
    Bits,
    BitsPerLayer,
    Compile,
    Data,
    Device,
    Epsilon,
    FeatureLayer,
    Json,
    Normalisation,
    OwnModel,
    RecipeName,
    RunOut,
    Seed,
    Set,
    SkipBadImages,
    TensorBoard,
    WeightBits,
    overridden,
)
from robustq.cli.resume import Resume, advice, check_alone, resumed
from robustq.errors import UsageError


def harden(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Argument(
            help="model.pt that robustq wrote, or a state dict (add --data, and --arch where it is no ResNet of ours)."
        ),
    ] = None,
    bits: Bits = None,
    weight_bits: WeightBits = None,
    act_bits: ActBits = None,
    bits_per_layer: BitsPerLayer = None,
    normalisation: Normalisation = None,
    recipe: RecipeName = "odgq",
    data: Data = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            "--architecture", "--arch", help="torchvision:NAME, for a state dict of a network that is none of ours."
        ),
    ] = None,
    own_model: OwnModel = None,
    feature_layer: FeatureLayer = None,
    epsilon: Epsilon = None,
    overrides: Set = None,
    compiling: Compile = None,
    tensorboard: TensorBoard = False,
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--trust-pickle",
            help="Load a whole torch.save(model) file too. That runs whatever code it names: only where you trust its "
            "maker.",
        ),
    ] = False,
    skip_bad_images: SkipBadImages = False,
    seed: Seed = 0,
    device: Device = None,
    out: RunOut = None,
    resume: Resume = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a trained network and harden it.

    Fine-tunes by a recipe, ODG-Q unless told otherwise.

    Example: robustq harden model.pt --bits 4
    After Ctrl-C or a crash: robustq harden --resume runs/resnet20-w4a4-odgq
    """
    from robustq.inputs import check_model_file
    from robustq.recipe import check_name
    from robustq.report.text import training_lines

    if resume is not None:
        check_alone(context)
    elif model is None:
        raise UsageError("harden needs the MODEL to start from, a model.pt; or --resume RUN_FOLDER to go on with a run")
    else:
        check_model_file(model)
    check_name(recipe)
    wanted_epsilon = radius(epsilon)

    def job() -> dict[str, Any]:
        if resume is not None:
            return resumed(resume, data=data, device=device, own_model=own_model)
        assert model is not None  # refused above
        from robustq.workflow.training import harden_model

        return harden_model(
            model,
            bits=bits,
            weight_bits=weight_bits,
            act_bits=act_bits,
            bits_per_layer=bits_per_layer,
            normalisation=normalisation,
            recipe=recipe,
            overrides=overridden(overrides, tensorboard=tensorboard, compiling=compiling),
            data=data,
            architecture=architecture,
            own_model=own_model,
            feature_layer=feature_layer,
            epsilon=wanted_epsilon,
            trust_pickle=trust_pickle,
            skip_bad_images=skip_bad_images,
            seed=seed,
            device=device,
            out=out,
        )

    finish(job, as_json, lambda r: training_lines(r, advice=advice(r, own_model)), shortfall=shortfalls)
