"""Options that several commands share, and the end of a command: run the job, print the result, set the exit code."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from robustq.cli.names import ARCHITECTURES, DATA, RUNTIMES, complete_recipe, complete_setting, one_of
from robustq.cli.process import Quiet, Verbose, console_output
from robustq.errors import CheckFailedError, printable


def rare(*names: str, **settings: Any) -> Any:
    """An option that the help lists under a heading of its own."""
    return typer.Option(*names, rich_help_panel="Rare options", **settings)


RecipeName = Annotated[
    str, typer.Option(help="Recipe (see 'robustq recipes') or .toml file.", autocompletion=complete_recipe)
]
Data = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(DATA)}, an image folder or an .npz file. Default: as in the model or recipe.",
        autocompletion=one_of(*DATA),
    ),
]
CustomModel = Annotated[
    str | None,
    rare(
        "--model",
        metavar="MODULE:FUNCTION",
        help="Custom model: a function that returns a torch.nn.Module. Allows its code to run; its files need it too.",
    ),
]
SkipBadImages = Annotated[bool, rare("--skip-bad-images", help="Skip image files that cannot be read, with a warning.")]
Resize = Annotated[
    str | None,
    rare(
        metavar="HOW",
        help="Non-square images: short-side (centre), short-side:256 or squash.",
        autocompletion=one_of("short-side", "squash"),
    ),
]
Epsilon = Annotated[
    str | None, typer.Option(help="Attack radius in [0, 1], such as 8/255. Default: as the model was trained.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random draws.", min=0, max=2**32 - 1)]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or cuda:0. Default: a GPU if there is one.", autocompletion=one_of("cpu", "cuda", "cuda:0")
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        help=f"Judge of the file: {', '.join(RUNTIMES)}. Default: the first.",
        autocompletion=one_of(*RUNTIMES),
    ),
]
FileOut = Annotated[Path | None, typer.Option(help="Also write the JSON result to this new file.")]
_UNUSED = "Not used by this command."


@dataclass(frozen=True, kw_only=True)
class Printing:
    """How every command prints; Quiet and Verbose act when they are parsed."""

    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False
    quiet: Quiet = False
    verbose: Verbose = False


@dataclass(frozen=True, kw_only=True)
class Reading(Printing):
    """Options of a command that only reads: ``seed`` and ``device`` are accepted, and not used."""

    out: FileOut = None
    seed: Annotated[int, rare(help=_UNUSED, min=0)] = 0
    device: Annotated[str | None, rare(help=_UNUSED)] = None


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Keywords that the jobs of attack, export and recheck share."""

    epsilon: Epsilon = None
    images: Annotated[int, typer.Option(help="Number of test images, evenly spaced; 0: all.", min=0)] = 1000
    data: Data = None
    custom_model: CustomModel = None
    skip_bad_images: SkipBadImages = False
    seed: Seed = 0
    device: Device = None

    def keywords(self) -> dict[str, Any]:
        """For the job, with ``epsilon`` as a number."""
        return {**vars(self), "epsilon": parse_radius(self.epsilon)}


@dataclass(frozen=True, kw_only=True)
class Network:
    """Keywords that the jobs of train and harden share."""

    data: Data = None
    architecture: Annotated[
        str | None,
        typer.Option(
            "--architecture",
            "--arch",
            help=f"{', '.join(ARCHITECTURES)}, torchvision:NAME or timm:NAME. Default: as in the recipe or file.",
            autocompletion=one_of(*ARCHITECTURES, "torchvision:", "timm:"),
        ),
    ] = None
    bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of weights and activations: 8, 4, 3, 2, 1 or 32 (float). Default: as in the recipe or model."
        ),
    ] = None
    out: Annotated[Path | None, typer.Option(help="New run folder. Default: runs/NAME.")] = None
    seed: Seed = 0
    device: Device = None
    custom_model: CustomModel = None
    feature_layer: Annotated[
        str | None, rare(help="Layer whose inputs are aligned. Default: the last global pooling.")
    ] = None
    weight_bits: Annotated[int | None, rare(help="Bits of the weights; overrides --bits.")] = None
    act_bits: Annotated[int | None, rare(help="Bits of the activations; overrides --bits.")] = None
    bits_per_layer: Annotated[Path | None, rare(help='TOML file of bits per layer, such as "layer1.0.conv1" = 8.')] = (
        None
    )
    normalisation: Annotated[
        str | None,
        rare(
            help="Input normalisation inside the model: imagenet, none or MEAN/STD, such as "
            "0.49,0.48,0.45/0.25,0.24,0.26."
        ),
    ] = None
    resize: Resize = None
    skip_bad_images: SkipBadImages = False


@dataclass(frozen=True, kw_only=True)
class Training(Network):
    """Options that train and harden share."""

    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a recipe key: epochs=10, odgq.domains=2. Repeatable.",
            autocompletion=complete_setting,
        ),
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN_FOLDER", help="Resume a run; takes only --device, --data, --model, --json."),
    ] = None
    compiled: Annotated[
        bool | None,
        rare(
            "--compile/--no-compile",
            help="Compile the training steps with torch.compile: slow first step; results differ by rounding. "
            "Default: as in the recipe (off).",
        ),
    ] = None
    tensorboard: Annotated[
        bool, rare("--tensorboard", help="Also write metrics for TensorBoard (needs its package).")
    ] = False

    def keywords(self) -> dict[str, Any]:
        """For the job; recipe keys that have an option of their own come after those of ``--set``."""
        added = ["tensorboard=true"] if self.tensorboard else []
        if self.compiled is not None:
            added.append(f"compile={str(self.compiled).lower()}")
            added += [] if self.compiled else ["cuda_graphs=false"]  # CUDA graphs need compiled code
        overrides = (*(self.settings or ()), *added)
        return {"overrides": overrides, **{field.name: getattr(self, field.name) for field in fields(Network)}}


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter that is a dataclass of options by these options, which Typer then reads."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
            )
            for field in fields(groups[name])
        ]

    @wraps(command)
    def expanded(**typed: Any) -> None:
        built = {
            name: kind(**{field.name: typed.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**typed, **built)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def typed_options(context: typer.Context, *, but: frozenset[str]) -> list[str]:
    """The options and arguments on the command line, as typed, without those whose parameters ``but`` names."""
    return [
        param.opts[0] if param.opts[0].startswith("-") else param.opts[0].upper()
        for param in context.command.params
        if param.name not in but and getattr(context.get_parameter_source(str(param.name)), "name", "") == "COMMANDLINE"
    ]


def parse_radius(text: str | None) -> float | None:
    """An ``--epsilon`` as a number in [0, 1]; None stays None."""
    from robustq.recipe import parse_epsilon

    return None if text is None else parse_epsilon(text)


def failed_checks(result: Mapping[str, Any]) -> str | None:
    """The checks that failed, in one line; None when all passed."""
    return "; ".join(result["shortfalls"]) or None


def run_job(
    job: Callable[[], Mapping[str, Any]],
    as_json: bool,
    lines: Callable[[Mapping[str, Any]], list[str]],
    *,
    out: Path | None = None,
    failure: Callable[[Mapping[str, Any]], str | None] = lambda _: None,
) -> None:
    """Run ``job`` with stdout kept clean; print its result as JSON or as ``lines``, and write the JSON to ``out``.

    Raises:
        CheckFailedError: ``failure`` names a failed check of the result.
    """
    import contextlib

    from robustq.files import check_new
    from robustq.outputs import write_new

    if out is not None:
        check_new(out)
    # Some exporters print to stdout, which must hold the JSON document alone.
    with console_output(), contextlib.redirect_stdout(sys.stderr):
        result = job()
    document = json.dumps(dict(result), indent=2)
    try:
        if out is not None:
            with console_output():
                write_new(out, lambda file: file.write(f"{document}\n".encode()))
    finally:  # a full disk does not lose the result
        _print(document if as_json else "\n".join(map(printable, lines(result))))
    failed = failure(result)
    if failed is not None:
        raise CheckFailedError(failed)


def _print(text: str) -> None:
    try:
        typer.echo(text)
    except BrokenPipeError as error:
        # The reader has closed the pipe (robustq recipes | head -1): exit as the shell's own tools do, without Python's
        # complaint at its end. Typer alone would exit with 1, which means a failed check.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(128 + 13) from error
    except OSError as error:  # a full disk behind it
        error.filename = "stdout"
        raise
