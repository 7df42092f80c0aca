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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, a FOLDER of images, or FILE.npz "
        "(x_train y_train x_test y_test). Default: what the model or recipe says.",
        autocompletion=one_of(DATA),
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
RunOut = Annotated[Path | None, typer.Option(help="Run folder to make; must not exist. Default: runs/NAME.")]
BundleOut = Annotated[
    Path | None, typer.Option(help="Export folder to make; must not exist. Default: export-out/NAME.")
]
FileOut = Annotated[Path | None, typer.Option(help="Also write the JSON result to this new file.")]
RecipeName = Annotated[
    str, typer.Option(help="Recipe name (see 'robustq recipes') or a .toml file.", autocompletion=recipe)
]
