"""What the shell may complete. Written down here where the rooms that know would load torch: a key press cannot wait.

tests/cli/test_completion.py compares these names with the rooms' own.
"""

from __future__ import annotations

from collections.abc import Callable

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
    from robustq.recipe_faults import KEYS

    return [f"{key}=" for key in KEYS if key.startswith(incomplete) and "=" not in incomplete]
