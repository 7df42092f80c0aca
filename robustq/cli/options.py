"""Options that several commands take, and how a command ends.

What the shell may complete. Written down here where the rooms that know would load torch: a key press cannot wait.

tests/cli/test_completion.py compares these names with the rooms' own.

What every command ends with: run the job with stdout kept clean, print the result, fail when a check fell short.

Options that several commands share: one wording and one meaning each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from robustq.cli.process import applied
from robustq.errors import CheckFailedError

ARCHITECTURES = ("resnet8", "resnet20", "resnet20-a", "resnet18")
FORMATS = ("qonnx", "qcdq", "integer", "packed", "float")
PIXELS = ("float", "uint8")
BATCH_NORM = ("fold", "keep")
CONSUMERS = ("finn", "hls4ml")
SUITES = ("paper", "recheck", "standard", "full")
DATA = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagenet")
DEVICES = ("cpu", "cuda", "cuda:0")

Complete = Callable[[str], list[str]]


def one_of(names: tuple[str, ...]) -> Complete:
    """A completer of fixed names; where none fits, the shell goes on with files."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def recipe(incomplete: str) -> list[str]:
    """Names of the recipes that come with robustq."""
    from robustq.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def setting(incomplete: str) -> list[str]:
    """Keys of a recipe, as --set takes them."""
    from robustq.recipe.schema import KEYS

    return [f"{key}=" for key in KEYS if key.startswith(incomplete) and "=" not in incomplete]


def radius(text: str | None) -> float | None:
    """An ``--epsilon`` as typed, as a number in [0, 1]; None stays None."""
    from robustq.recipe import parse_epsilon

    return None if text is None else parse_epsilon(text)


def shortfalls(result: dict[str, Any]) -> str | None:
    """What a result says did not hold, in one line; None when all held."""
    return "; ".join(result["shortfalls"]) or None


def finish(
    job: Callable[[], dict[str, Any]],
    as_json: bool,
    lines: Callable[[dict[str, Any]], list[str]],
    *,
    out: Path | None = None,
    shortfall: Callable[[dict[str, Any]], str | None] | None = None,
) -> None:
    """Run ``job`` with stdout kept clean, print its result, and exit with 1 when a check fell short."""
    import contextlib

    from robustq.files import check_new, write_text_atomically

    if out is not None:
        check_new(out)
    # Exporters print to stdout now and then; a JSON document must stand there alone.
    with applied(), contextlib.redirect_stdout(sys.stderr):
        result = job()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, json.dumps(result, indent=2) + "\n")
    _print(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))
    fault = shortfall(result) if shortfall is not None else None
    if fault is not None:
        raise CheckFailedError(fault)


def _print(text: str) -> None:
    try:
        typer.echo(text)
    except BrokenPipeError as error:
        # Whoever read our output has seen enough (robustq recipes | head -1): exit as the shell's own tools do, and
        # keep Python from complaining when it ends. Left to typer, this would be exit 1, a check that fell short.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(128 + 13) from error


Seed = Annotated[int, typer.Option(help="Decides everything random; the data split never moves.", min=0, max=2**32 - 1)]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:0. Default: a GPU where there is one.", autocompletion=one_of(DEVICES)),
]
_IDLE = "No effect here; taken so that every command takes it."
NoSeed = Annotated[int, typer.Option("--seed", help=_IDLE, min=0)]
NoDevice = Annotated[str | None, typer.Option("--device", help=_IDLE)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, a FOLDER of images, or FILE.npz "
        "(x_train y_train x_test y_test). Default: what the model or recipe says.",
        autocompletion=one_of(DATA),
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="Your own network: a function in a module of the current folder that returns a torch.nn.Module. Every "
        "command on its files needs it again, since it lets that code run.",
    ),
]
FeatureLayer = Annotated[
    str | None,
    typer.Option(
        help="Layer that the features enter which hardening aligns. Default: the last global pooling, looked for."
    ),
]
SkipBadImages = Annotated[
    bool, typer.Option("--skip-bad-images", help="Leave out image files that cannot be read; a warning names them.")
]
Epsilon = Annotated[
    str | None,
    typer.Option(help="Radius of the attack in [0, 1], such as 8/255. Default: what the model was trained for."),
]
Images = Annotated[int, typer.Option(help="How many test images to use, evenly spaced; 0 for all.", min=0)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one recipe key, e.g. epochs=10 or odgq.domains=2. Repeatable.",
        autocompletion=setting,
    ),
]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard", help="Write the metrics for TensorBoard too: tensorboard --logdir runs. Needs its package."
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Let torch.compile make the training steps: minutes before the first one, other last bits. Default: what "
        "the recipe says, which is no unless it is a file that says yes.",
    ),
]
RunOut = Annotated[Path | None, typer.Option(help="Run folder to make; must not exist. Default: runs/NAME.")]
BundleOut = Annotated[
    Path | None, typer.Option(help="Export folder to make; must not exist. Default: export-out/NAME.")
]
FileOut = Annotated[Path | None, typer.Option(help="Also write the JSON result to this new file.")]
RecipeName = Annotated[
    str, typer.Option(help="Recipe name (see 'robustq recipes') or a .toml file.", autocompletion=recipe)
]
Bits = Annotated[
    int | None,
    typer.Option(
        help="Width of weights and activations: 8, 4, 3, 2 or 1 (32 is float). Default: what recipe or model says."
    ),
]
WeightBits = Annotated[int | None, typer.Option(help="Width of the weights alone, over --bits.")]
ActBits = Annotated[int | None, typer.Option(help="Width of the activations alone, over --bits.")]
BitsPerLayer = Annotated[
    Path | None,
    typer.Option(help='TOML file of layers with a width of their own, lines such as "layer1.0.conv1" = 8.'),
]
Normalisation = Annotated[
    str | None,
    typer.Option(
        help="Mean and deviation inside the model: imagenet (as torchvision's weights expect), none, or MEAN/STD such "
        "as 0.49,0.48,0.45/0.25,0.24,0.26."
    ),
]


def overridden(typed: list[str] | None, *, tensorboard: bool, compiling: bool | None) -> tuple[str, ...]:
    """What was typed after ``--set``, and after it the recipe keys that have an option of their own."""
    said = ["tensorboard=true"] if tensorboard else []
    if compiling is not None:
        said.append(f"compile={str(compiling).lower()}")
        # Nothing is recorded of what is not compiled.
        said += [] if compiling else ["cuda_graphs=false"]
    return (*(typed or ()), *said)
