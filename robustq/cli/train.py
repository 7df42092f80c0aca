"""robustq train."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from robustq.cli.completion import ARCHITECTURES, one_of
from robustq.cli.finish import finish, shortfalls
from robustq.cli.loudness import Quiet, Verbose
from robustq.cli.options import (
    ActBits,
    Bits,
    BitsPerLayer,
    Compile,
    Data,
    Device,
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


def train(
    context: typer.Context,
    recipe: RecipeName = "natural",
    data: Data = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            "--architecture",
            "--arch",
            help=f"{', '.join(ARCHITECTURES)}, or torchvision:NAME. Default: what the recipe says.",
            autocompletion=one_of(ARCHITECTURES),
        ),
    ] = None,
    own_model: OwnModel = None,
    feature_layer: FeatureLayer = None,
    bits: Bits = None,
    weight_bits: WeightBits = None,
    act_bits: ActBits = None,
    bits_per_layer: BitsPerLayer = None,
    normalisation: Normalisation = None,
    overrides: Set = None,
    compiling: Compile = None,
    tensorboard: TensorBoard = False,
    skip_bad_images: SkipBadImages = False,
    seed: Seed = 0,
    device: Device = None,
    out: RunOut = None,
    resume: Resume = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a network from scratch by a recipe.

    Example: robustq train --data cifar10 --architecture resnet20
    After Ctrl-C or a crash: robustq train --resume runs/resnet20-float-natural
    """
    from robustq.recipe import check_name
    from robustq.report.text import training_lines

    if resume is not None:
        check_alone(context)
    check_name(recipe)

    def job() -> dict[str, Any]:
        if resume is not None:
            return resumed(resume, data=data, device=device, own_model=own_model)
        from robustq.workflow.training import train_model

        return train_model(
            recipe,
            overrides=overridden(overrides, tensorboard=tensorboard, compiling=compiling),
            data=data,
            architecture=architecture,
            own_model=own_model,
            feature_layer=feature_layer,
            bits=bits,
            weight_bits=weight_bits,
            act_bits=act_bits,
            bits_per_layer=bits_per_layer,
            normalisation=normalisation,
            skip_bad_images=skip_bad_images,
            seed=seed,
            device=device,
            out=out,
        )

    finish(job, as_json, lambda r: training_lines(r, advice=advice(r, own_model)), shortfall=shortfalls)
