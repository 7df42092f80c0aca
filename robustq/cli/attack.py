"""robustq attack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.completion import SUITES, one_of
from robustq.cli.finish import finish, radius
from robustq.cli.loudness import Quiet, Verbose
from robustq.cli.options import Data, Device, Epsilon, FileOut, Images, Json, OwnModel, Seed, SkipBadImages


def attack(
    model: Annotated[Path, typer.Argument(help="A .pt that robustq wrote, or an export folder.")],
    suite: Annotated[
        str,
        typer.Option(
            help="paper: GN, FGSM, PGD-20, BIM-20, TPGD-20. recheck: FGSM, PGD-20, margin-PGD-40.",
            autocompletion=one_of(SUITES),
        ),
    ] = "paper",
    epsilon: Epsilon = None,
    images: Images = 1000,
    data: Data = None,
    require: Annotated[
        float | None,
        typer.Option(
            help="Exit with 1 when robust accuracy is below this fraction, or a flag is raised.", min=0, max=1
        ),
    ] = None,
    own_model: OwnModel = None,
    skip_bad_images: SkipBadImages = False,
    seed: Seed = 0,
    device: Device = None,
    out: FileOut = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Count right answers under attack.

    An export folder is judged on its deployed file, a .pt in PyTorch.

    Example: robustq attack export-out/resnet20-w4a4-odgq-integer
    """
    from robustq.inputs import check_attackable
    from robustq.report.text import attack_lines

    check_attackable(model)
    wanted_epsilon = radius(epsilon)

    def job() -> dict[str, Any]:
        from robustq.workflow.attacking import attack_model

        return attack_model(
            model,
            suite=suite,
            epsilon=wanted_epsilon,
            images=images,
            data=data,
            own_model=own_model,
            skip_bad_images=skip_bad_images,
            seed=seed,
            device=device,
        )

    def shortfall(result: dict[str, Any]) -> str | None:
        if require is not None and result["robust_accuracy"] < require:
            return f"robust accuracy {result['robust_accuracy']:.4f} is below the required {require:.4f}"
        if require is not None and result["flags"]:
            return f"flags raised: {', '.join(result['flags'])}"
        return None

    finish(job, as_json, attack_lines, out=out, shortfall=shortfall)
