"""robustq attack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.options import (
    SUITES,
    Data,
    Device,
    Epsilon,
    FileOut,
    Images,
    Json,
    OwnModel,
    Seed,
    SkipBadImages,
    finish,
    one_of,
    radius,
)
from robustq.cli.process import Quiet, Verbose


def attack(
    model: Annotated[Path, typer.Argument(help="A .pt that robustq wrote, or an export folder.")],
    suite: Annotated[
        str,
        typer.Option(
            help="standard: five stages and the hunt for masking. full: the same with AutoAttack's four attacks, 5,000 "
            "queries and a hard-label attack. paper: GN, FGSM, PGD-20, BIM-20, TPGD-20, also by transfer. recheck: "
            "FGSM, PGD-20, margin-PGD-40.",
            autocompletion=one_of(SUITES),
        ),
    ] = "standard",
    epsilon: Epsilon = None,
    epsilons: Annotated[
        str | None,
        typer.Option(metavar="2/255,4/255,...", help="More radii, for a curve of robust accuracy."),
    ] = None,
    images: Images = 1000,
    data: Data = None,
    require: Annotated[
        float | None,
        typer.Option(
            help="Exit with 1 when robust accuracy is below this fraction, or a flag is raised.", min=0, max=1
        ),
    ] = None,
    surrogate: Annotated[
        list[Path] | None,
        typer.Option(help="Model file of another network for the same task, to transfer from. Repeatable."),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(help="Model file of a naturally trained network on the same data. Default: trained once, kept."),
    ] = None,
    no_surrogates: Annotated[
        bool,
        typer.Option("--no-surrogates", help="Make and train no other network; without a control nothing is judged."),
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(help="Attack nothing: count the answers to the adversarial images of this .npz."),
    ] = None,
    save_adversarial: Annotated[
        Path | None,
        typer.Option(help="New .npz for the adversarial images. Default: beside --out, with its name."),
    ] = None,
    compiling: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Let torch.compile make the passes that find the images: half a minute for each kind, then 0.3 "
            "to 0.75 of the time where it was measured. What counts them is not compiled.",
        ),
    ] = False,
    own_model: OwnModel = None,
    skip_bad_images: SkipBadImages = False,
    seed: Seed = 0,
    device: Device = None,
    out: FileOut = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Count right answers under attack, and look for gradient masking.

    An export folder is judged on its deployed file, a .pt in PyTorch.

    Example: robustq attack export-out/resnet20-w4a4-odgq-integer
    """
    from robustq.errors import UsageError
    from robustq.files import check_attackable, check_model_file, check_new
    from robustq.report.text import attack_lines

    check_attackable(model)
    wanted_epsilon = radius(epsilon)
    wanted_epsilons = [one for one in (radius(text) for text in (epsilons or "").split(",") if text) if one is not None]
    for path in [*(surrogate or []), *([] if control is None else [control])]:
        check_model_file(path)
    pictures = save_adversarial
    if replay is not None:
        chosen: dict[str, object] = {"--epsilon": epsilon, "--epsilons": epsilons, "--surrogate": surrogate}
        chosen |= {"--control": control, "--save-adversarial": save_adversarial, "--compile": compiling}
        named = [name for name, value in chosen.items() if value]
        if named:
            raise UsageError(f"--replay attacks nothing, so that {named[0]} has no meaning; leave it out")
    elif pictures is None and out is not None and out.suffix != ".npz":
        pictures = check_new(check_new(out).with_suffix(".npz"))
    if out is not None and out.suffix == ".npz":
        raise UsageError(f"--out {out} is a JSON file, and the images lie beside it as .npz; name it .json")

    def job() -> dict[str, Any]:
        if replay is not None:
            from robustq.workflow.replay import replay_pictures

            return replay_pictures(
                model, replay, data=data, own_model=own_model, skip_bad_images=skip_bad_images, device=device
            )
        from robustq.workflow.attack import attack_model

        return attack_model(
            model,
            suite=suite,
            epsilon=wanted_epsilon,
            epsilons=wanted_epsilons,
            images=images,
            data=data,
            surrogates=surrogate or [],
            control=control,
            train_surrogates=not no_surrogates,
            save_adversarial=pictures,
            own_model=own_model,
            skip_bad_images=skip_bad_images,
            compiled=compiling,
            seed=seed,
            device=device,
        )

    def shortfall(result: dict[str, Any]) -> str | None:
        if require is not None and result["robust_accuracy"] < require:
            return f"robust accuracy {result['robust_accuracy']:.4f} is below the required {require:.4f}"
        if require is not None and result.get("file_failures"):
            return f"the file did not pass its export: {result['file_failures'][0]}"
        if require is not None and result["flags"]:
            return f"flags raised: {', '.join(flag['name'] for flag in result['flags'])}"
        return None

    finish(job, as_json, attack_lines, out=out, shortfall=shortfall)
