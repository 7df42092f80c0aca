"""robustq train and robustq harden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import robustq
from robustq.cli.next_step import after_training
from robustq.cli.options import (
    Epsilon,
    Printing,
    RecipeName,
    Training,
    failed_checks,
    parse_radius,
    rare,
    run_job,
    typed_options,
    with_groups,
)
from robustq.errors import UsageError

WITH_RESUME = frozenset({"resume", "data", "device", "custom_model", "as_json", "quiet", "verbose"})
"""Parameters that may be given together with --resume."""


@with_groups
def train(context: typer.Context, *, recipe: RecipeName = "natural", options: Training, printing: Printing) -> None:
    """Train a network from scratch by a recipe.

    Examples:
      robustq train --data cifar10 --architecture resnet20
      robustq train --resume runs/resnet20-float-natural
    """
    _run(context, options, recipe, lambda: robustq.train_model(recipe, **options.keywords()), as_json=printing.as_json)


@with_groups
def harden(
    context: typer.Context,
    *,
    model: Annotated[
        Path | None,
        typer.Argument(help="A model of robustq, zoo:NAME, or a state dict (with --data, and --arch if not ours)."),
    ] = None,
    recipe: RecipeName = "odgq",
    epsilon: Epsilon = None,
    options: Training,
    printing: Printing,
    weights: Annotated[
        str | None, rare(metavar="KEY", help="Of several sets of weights in MODEL, such as state_dict_ema.")
    ] = None,
    trust_pickle: Annotated[
        bool,
        rare(
            "--trust-pickle",
            help="Also load a torch.save(model) file. It can run any code: use it only if you trust its author.",
        ),
    ] = False,
    checks: Annotated[
        bool,
        rare(
            "--checks/--no-checks",
            help="Check weights and export before training.",
        ),
    ] = True,
) -> None:
    """Quantize a trained network and harden it by a recipe (default: ODG-Q).

    Examples:
      robustq harden model.pt --bits 4
      robustq harden --resume runs/resnet20-w4a4-odgq
    """
    from robustq.files import check_model_file
    from robustq.zoo import model_path

    if options.resume is None and model is None:
        raise UsageError("harden needs the MODEL to start from, a model.pt; or --resume RUN_FOLDER")
    if options.resume is None and model is not None:
        model = check_model_file(model_path(model))
    radius = parse_radius(epsilon)

    def job() -> Mapping[str, Any]:
        assert model is not None  # checked above
        return robustq.harden_model(
            model,
            recipe=recipe,
            epsilon=radius,
            weights=weights,
            trust_pickle=trust_pickle,
            checks=checks,
            **options.keywords(),
        )

    _run(context, options, recipe, job, as_json=printing.as_json)


def _run(
    context: typer.Context, options: Training, recipe: str, job: Callable[[], Mapping[str, Any]], *, as_json: bool
) -> None:
    """Run ``job``, or resume the run that ``options`` name."""
    from robustq.recipe import check_name
    from robustq.report.text import training_lines

    check_resume_options(context, options.resume)
    check_name(recipe)

    def begin_or_resume() -> Mapping[str, Any]:
        if options.resume is None:
            return job()
        return robustq.resume_run(
            options.resume, data=options.data, device=options.device, custom_model=options.custom_model
        )

    def lines(result: Mapping[str, Any]) -> list[str]:
        moved = None if options.resume is None else options.data
        return training_lines(
            result, next_command=after_training(result, custom_model=options.custom_model, data=moved)
        )

    run_job(begin_or_resume, as_json, lines, failure=failed_checks)


def check_resume_options(context: typer.Context, run: Path | None) -> None:
    """Refuse options that have no effect on a run that is resumed (UsageError)."""
    typed = typed_options(context, but=WITH_RESUME)
    if run is not None and typed:
        raise UsageError(
            f"{', '.join(typed)} cannot be changed with --resume; leave it out, or start a new run without --resume"
        )
