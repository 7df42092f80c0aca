"""robustq attack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import robustq
from robustq.cli.names import SUITES, one_of, summaries
from robustq.cli.next_step import after_attack, replay_of, with_next
from robustq.cli.options import (
    FileOut,
    Judging,
    Printing,
    Resize,
    Runtime,
    parse_radius,
    rare,
    run_job,
    with_groups,
)
from robustq.errors import OutputError, UsageError


@with_groups
def attack(
    *,
    model: Annotated[Path, typer.Argument(help="A model file of robustq, an export folder, an .onnx or zoo:NAME.")],
    suite: Annotated[
        str,
        typer.Option(
            help=f"{summaries(SUITES)}.",
            autocompletion=one_of(*SUITES),
        ),
    ] = "standard",
    options: Judging,
    runtime: Runtime = None,
    require: Annotated[
        float | None, typer.Option(help="Exit with 1 below this robust accuracy, or on a flag.", min=0, max=1)
    ] = None,
    out: FileOut = None,
    printing: Printing,
    epsilons: Annotated[str | None, rare(metavar="2/255,4/255,...", help="More radii, for a curve.")] = None,
    surrogate: Annotated[
        list[Path] | None, rare(help="Model file of a surrogate for transfer attacks. Repeatable.")
    ] = None,
    control: Annotated[
        Path | None, rare(help="Model file of a natural network on the same data. Default: trained once.")
    ] = None,
    no_surrogates: Annotated[
        bool, rare("--no-surrogates", help="Train no other network; no verdict without --control.")
    ] = False,
    replay: Annotated[Path | None, rare(help="Only count the answers to the images of this .npz.")] = None,
    save_adversarial: Annotated[
        Path | None, rare(help="New .npz for the adversarial images. Default: next to --out.")
    ] = None,
    pixels: Annotated[
        str | None,
        rare("--input", metavar="RANGE", help="Pixels of an .onnx: unit, uint8, imagenet or MEAN/STD."),
    ] = None,
    layout: Annotated[str | None, rare(help="Layout of an .onnx: nchw or nhwc.")] = None,
    resize: Resize = None,
    compiled: Annotated[
        bool,
        rare(
            "--compile/--no-compile",
            help="Compile attack generation, not the count: about 2 minutes first, then 0.3 to 0.75 of the time.",
        ),
    ] = False,
) -> None:
    """Measure accuracy under attack and check for gradient masking.

    An export folder and an .onnx are judged in onnxruntime or in the --runtime, a .pt in PyTorch.

    Examples:
      robustq attack export-out/resnet20-w4a4-odgq-integer
      robustq attack model.pt --suite full --epsilon 8/255 --out found.json
      robustq attack theirs.onnx --data cifar10 --input unit
    """
    from robustq.files import check_attackable, check_model_file, check_new
    from robustq.report.text import attack_lines, mostly_wrong_before
    from robustq.zoo import images_path, model_path

    replay = None if replay is None else images_path(replay)
    model = model_path(model)
    check_attackable(model)
    keywords = options.keywords()
    radii = [one for one in (parse_radius(text) for text in (epsilons or "").split(",") if text) if one is not None]
    for path in [*(surrogate or []), *([] if control is None else [control])]:
        check_model_file(path)
    if replay is not None:
        unused: dict[str, object] = {"--epsilon": options.epsilon, "--epsilons": epsilons, "--surrogate": surrogate}
        unused |= {"--control": control, "--save-adversarial": save_adversarial, "--compile": compiled}
        typed = [name for name, value in unused.items() if value]
        if typed:
            raise UsageError(f"{typed[0]} has no effect with --replay; leave it out")
    elif save_adversarial is None and out is not None and out.suffix != ".npz":
        save_adversarial = check_new(check_new(out).with_suffix(".npz"))
    if out is not None and out.suffix == ".npz":
        raise UsageError(f"--out {out} is a JSON file, and the images are saved next to it as .npz; name it .json")

    def job() -> Mapping[str, Any]:
        if replay is not None:
            shared = {name: keywords[name] for name in ("data", "custom_model", "skip_bad_images", "device")}
            return robustq.replay_images(
                model, replay, pixels=pixels, layout=layout, resize=resize, runtime=runtime, **shared
            )
        return robustq.attack_model(
            model,
            suite=suite,
            epsilons=radii,
            surrogates=surrogate or [],
            control=control,
            train_surrogates=not no_surrogates,
            save_adversarial=save_adversarial,
            compiled=compiled,
            pixels=pixels,
            layout=layout,
            runtime=runtime,
            resize=resize,
            **keywords,
        )

    def failure(result: Mapping[str, Any]) -> str | None:
        if save_adversarial is not None and result["adversarial"] is None:
            raise OutputError(f"{save_adversarial}: cannot be written; free space or name another place")
        if require is None:
            return None
        if result["robust_accuracy"] < require:
            return f"robust accuracy {result['robust_accuracy']:.4f} is below the required {require:.4f}"
        if replay is not None and mostly_wrong_before(result):
            return (
                f"--require {require:g}: {result['wrong_before']} of {result['images']} images of {replay} were wrong "
                "before any attack and are clean, so that they prove nothing; replay the images of an attack on a "
                "model that is mostly right"
            )
        if result.get("file_failures"):
            return f"the file failed a check of its export: {result['file_failures'][0]}"
        return f"flags raised: {', '.join(flag['name'] for flag in result['flags'])}" if result["flags"] else None

    def lines(result: Mapping[str, Any]) -> list[str]:
        again = replay_of(
            result, options, form={"--input": pixels, "--layout": layout, "--resize": resize, "--runtime": runtime}
        )
        shown = attack_lines(result) + ([] if again is None else [f"again   {again}"])
        return with_next(shown, after_attack(result, options))

    run_job(job, printing.as_json, lines, out=out, failure=failure)
