"""train, harden and --resume.

--resume of train and harden: the folder says everything, so nothing else may be said beside it.

robustq train.

robustq harden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.options import (
    ARCHITECTURES,
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
    finish,
    one_of,
    overridden,
    radius,
    shortfalls,
)
from robustq.cli.process import Quiet, Verbose
from robustq.errors import UsageError
from robustq.recipe import UNDEFENDED

Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_FOLDER",
        help="Go on with a run that was stopped or cut off. Its folder says everything; beside it only --device, "
        "--data (where the same data lies now), --model and --json.",
    ),
]

BESIDE = frozenset({"resume", "data", "device", "own_model", "as_json", "quiet", "verbose"})
"""Parameters that may stand beside --resume."""


def resumed(run: Path, *, data: str | None, device: str | None, own_model: str | None) -> dict[str, Any]:
    """Go on with the run in ``run``; the result is the one of the command that began it."""
    from robustq.workflow.resume import resume_run

    return resume_run(run, data=data, device=device, own_model=own_model)


def advice(result: dict[str, Any], own_model: str | None) -> str:
    """The command that usually follows a finished run; a user's own network has to be named in it again."""
    name = "" if own_model is None else f" --model {own_model}"
    if "bits" in result:  # harden's; the model that export takes by itself is the last defended one
        model = f"{result['checkpoint']} " if result["method"] in UNDEFENDED else ""
        return f"robustq export {model}--format integer{name}"
    return f"robustq harden {result['checkpoint']} --bits 4{name}"


def check_alone(context: typer.Context) -> None:
    """Refuse what was typed beside --resume and would have no effect.

    Raises:
        UsageError: names it.
    """
    typed = [
        param.opts[0] if param.opts[0].startswith("-") else param.opts[0].upper()
        for param in context.command.params
        if param.name not in BESIDE
        and getattr(context.get_parameter_source(str(param.name)), "name", "") == "COMMANDLINE"
    ]
    if typed:
        raise UsageError(
            f"{', '.join(typed)} beside --resume: the run folder says it already; leave it out, or start a new run"
        )


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
        from robustq.workflow.train import train_model

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
    from robustq.files import check_model_file
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
        from robustq.workflow.train import harden_model

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
