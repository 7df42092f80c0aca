"""Options that several commands share: one wording and one meaning each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustq.cli.completion import DATA, DEVICES, one_of, recipe, setting

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
