"""The command line: parses, calls, prints. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from robustq.errors import CheckFailedError, RobustqError

app = typer.Typer(
    name="robustq",
    help="Harden low-bit vision models, write the file the device runs, and judge robustness on that very file.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Seed = Annotated[int, typer.Option(help="Decides everything random; the data split never moves.", min=0, max=2**32 - 1)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0. Default: a GPU where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, a FOLDER of images, or FILE.npz "
        "(x_train y_train x_test y_test). Default: what the model or recipe says."
    ),
]
Epsilon = Annotated[
    str | None,
    typer.Option(help="Radius of the attack in [0, 1], such as 8/255. Default: what the model was trained for."),
]
Images = Annotated[int, typer.Option(help="How many test images to use, evenly spaced; 0 for all.", min=0)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one recipe key, e.g. epochs=10 or odgq.domains=2. Repeatable."
    ),
]
RunOut = Annotated[Path | None, typer.Option(help="Run folder to make; must not exist. Default: runs/NAME.")]
BundleOut = Annotated[
    Path | None, typer.Option(help="Export folder to make; must not exist. Default: export-out/NAME.")
]
FileOut = Annotated[Path | None, typer.Option(help="Also write the JSON result to this new file.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"robustq {version('robustq')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Common to all commands."""


@app.command()
def quickstart(
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for all results; must not exist. Default: runs/quickstart.")
    ] = None,
) -> None:
    """Run the whole job once on the embedded digits.

    Trains a float ResNet-8, hardens it to 4 bits, writes three deploy files, and attacks the deployed one beside its
    undefended twins: about two minutes on a CPU.
    """
    from robustq.report.text import quickstart_lines

    def job() -> dict[str, Any]:
        from robustq.workflow.quickstart import quickstart as run

        return run(seed=seed, device=device, out=out)

    _finish(job, as_json, quickstart_lines, shortfall=_shortfalls)


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="Recipe name (see 'robustq recipes') or a .toml file.")] = "natural",
    data: Data = None,
    architecture: Annotated[
        str | None, typer.Option(help="resnet20 or resnet8. Default: what the recipe says.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="32 (float), 8, 4, 3 or 2. Default: what the recipe says, else 32.")
    ] = None,
    overrides: Set = None,
    seed: Seed = 0,
    device: Device = None,
    out: RunOut = None,
    as_json: Json = False,
) -> None:
    """Train a network from scratch by a recipe.

    Example: robustq train --data cifar10 --architecture resnet20
    """
    from robustq.report.text import training_lines

    def job() -> dict[str, Any]:
        from robustq.workflow.training import train_model

        return train_model(
            recipe,
            overrides=tuple(overrides or ()),
            data=data,
            architecture=architecture,
            bits=bits,
            seed=seed,
            device=device,
            out=out,
        )

    _finish(job, as_json, lambda r: training_lines(r, advice=f"robustq harden {r['checkpoint']} --bits 4"))


@app.command()
def harden(
    model: Annotated[
        Path, typer.Argument(help="model.pt that robustq wrote, or a state dict of a known ResNet (add --data).")
    ],
    bits: Annotated[
        int | None, typer.Option(help="Width of weights and activations: 8, 4, 3, 2 (32 stays float).")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe name (see 'robustq recipes') or a .toml file.")] = "odgq",
    data: Data = None,
    epsilon: Epsilon = None,
    overrides: Set = None,
    seed: Seed = 0,
    device: Device = None,
    out: RunOut = None,
    as_json: Json = False,
) -> None:
    """Quantize a trained network and harden it.

    Fine-tunes by a recipe, ODG-Q unless told otherwise.

    Example: robustq harden model.pt --bits 4
    """
    from robustq.report.text import training_lines

    def job() -> dict[str, Any]:
        from robustq.workflow.training import harden_model

        return harden_model(
            model,
            bits=bits,
            recipe=recipe,
            overrides=tuple(overrides or ()),
            data=data,
            epsilon=_radius(epsilon),
            seed=seed,
            device=device,
            out=out,
        )

    _finish(job, as_json, lambda r: training_lines(r, advice="robustq export --format integer"))


@app.command()
def attack(
    model: Annotated[Path, typer.Argument(help="A .pt that robustq wrote, or an export folder.")],
    suite: Annotated[
        str, typer.Option(help="paper: GN, FGSM, PGD-20, BIM-20, TPGD-20. recheck: FGSM, PGD-20, margin-PGD-40.")
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
    seed: Seed = 0,
    device: Device = None,
    out: FileOut = None,
    as_json: Json = False,
) -> None:
    """Count right answers under attack.

    An export folder is judged on its deployed file, a .pt in PyTorch.

    Example: robustq attack export-out/resnet20-w4a4-odgq-integer
    """
    from robustq.report.text import attack_lines

    def job() -> dict[str, Any]:
        from robustq.workflow.attacking import attack_model

        return attack_model(
            model, suite=suite, epsilon=_radius(epsilon), images=images, data=data, seed=seed, device=device
        )

    def shortfall(result: dict[str, Any]) -> str | None:
        if require is not None and result["robust_accuracy"] < require:
            return f"robust accuracy {result['robust_accuracy']:.4f} is below the required {require:.4f}"
        if require is not None and result["flags"]:
            return f"flags raised: {', '.join(result['flags'])}"
        return None

    _finish(job, as_json, attack_lines, out=out, shortfall=shortfall)


@app.command()
def export(
    model: Annotated[
        Path | None, typer.Argument(help="A .pt that robustq wrote. Default: the last hardened model.")
    ] = None,
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="qonnx (FINN, hls4ml), qcdq (any ONNX runtime) or integer (onnxruntime, all layers as integers).",
        ),
    ] = "integer",
    epsilon: Epsilon = None,
    images: Images = 1000,
    recheck: Annotated[
        bool, typer.Option("--recheck/--no-recheck", help="Count accuracy under attack of the written file.")
    ] = True,
    data: Data = None,
    seed: Seed = 0,
    device: Device = None,
    out: BundleOut = None,
    as_json: Json = False,
) -> None:
    """Write the file the device runs, and check it.

    Same answers as PyTorch, integer layers, accuracy under attack; exits with 1 when one falls short.

    Example: robustq export --format qonnx
    """
    from robustq.report.text import export_lines

    def job() -> dict[str, Any]:
        from robustq.workflow.exporting import export_model

        return export_model(
            model,
            format_name=format_name,
            epsilon=_radius(epsilon),
            images=images,
            recheck=recheck,
            data=data,
            seed=seed,
            device=device,
            out=out,
        )

    _finish(job, as_json, export_lines, shortfall=_shortfalls)


@app.command()
def recheck(
    bundle: Annotated[Path, typer.Argument(help="Export folder that 'robustq export' wrote.")],
    epsilon: Epsilon = None,
    images: Images = 1000,
    data: Data = None,
    seed: Seed = 0,
    device: Device = None,
    out: FileOut = None,
    as_json: Json = False,
) -> None:
    """Check an exported file again.

    Same answers as PyTorch, integer layers, accuracy under attack, counted under onnxruntime.
    """
    from robustq.report.text import recheck_lines

    def job() -> dict[str, Any]:
        from robustq.workflow.exporting import recheck_bundle

        return recheck_bundle(bundle, epsilon=_radius(epsilon), images=images, data=data, seed=seed, device=device)

    _finish(job, as_json, recheck_lines, out=out, shortfall=_shortfalls)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe. Default: list them all.")] = None,
    seed: Annotated[int, typer.Option(help="No effect here; taken so that every command takes it.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="No effect here; taken so that every command takes it.")] = None,
    out: FileOut = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one."""

    def job() -> dict[str, Any]:
        from robustq.recipe import load_recipe, recipe_names

        chosen = recipe_names() if name is None else [name]
        return {"recipes": [load_recipe(one).to_dict() for one in chosen]}

    def lines(result: dict[str, Any]) -> list[str]:
        from robustq.report.text import recipe_lines

        return recipe_lines(result["recipes"], whole=name is not None)

    _finish(job, as_json, lines, out=out)


def _radius(text: str | None) -> float | None:
    from robustq.recipe import parse_epsilon

    return None if text is None else parse_epsilon(text)


def _shortfalls(result: dict[str, Any]) -> str | None:
    return "; ".join(result["shortfalls"]) or None


def _finish(
    job: Callable[[], dict[str, Any]],
    as_json: bool,
    lines: Callable[[dict[str, Any]], list[str]],
    *,
    out: Path | None = None,
    shortfall: Callable[[dict[str, Any]], str | None] | None = None,
) -> None:
    """Run ``job`` with stdout kept clean, print its result, and exit with 1 when a check fell short."""
    import contextlib

    from robustq import progress
    from robustq.outputs import check_new, write_text_atomically

    if out is not None:
        check_new(out)
    progress.show(True)
    _settle_libraries()
    # Exporters print to stdout now and then; a JSON document must stand there alone.
    with contextlib.redirect_stdout(sys.stderr):
        result = job()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))
    fault = shortfall(result) if shortfall is not None else None
    if fault is not None:
        raise CheckFailedError(fault)


def _settle_libraries() -> None:
    """Hide warnings of libraries that a user can do nothing about, and keep their threads from spinning."""
    import logging
    import os
    import warnings

    # OpenMP threads that wait by spinning make a step ten times slower as soon as something else uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    warnings.filterwarnings("ignore")
    for name in ("torch.utils.cpp_extension", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> NoReturn:
    """Entry point: every fault is one line on stderr; exit 1 for a check that fell short, 2 for bad input."""
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except CheckFailedError as error:
        _fail(str(error), 1)
    except RobustqError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}; free the place or name another one", 2)
    except Exception as error:
        shown = getattr(error, "format_message", None)  # click's usage errors: unknown option, missing argument
        if shown is None:
            raise
        _fail(f"{shown()}{_given(error)} (robustq --help)", 2)
    if code == 130:  # typer's answer to Ctrl-C
        _fail("stopped; checkpoints written so far stay where they are", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _given(error: Exception) -> str:
    """The value behind a refused option: typer's message names the option, and not always what was typed."""
    names = getattr(getattr(error, "param", None), "opts", [])
    for place, word in enumerate(sys.argv):
        name, equals, value = word.partition("=")
        if name in names and name.startswith("-"):
            typed = value if equals else "".join(sys.argv[place + 1 : place + 2])
            return f", got '{typed}'"
    return ""


def _fail(message: str, code: int) -> NoReturn:
    print(f"robustq: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
