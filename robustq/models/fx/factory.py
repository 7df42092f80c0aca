"""Architecture text -> float network: ``torchvision:NAME``, or ``module:function`` of the user's own code."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from torch import nn

from robustq.errors import ModelFileError, UsageError

TORCHVISION = "torchvision:"

OUR_CODE = "torchvision"
"""The one module name before the colon that needs no permission: it is a library, and only its model list is read."""


def is_custom(architecture: str) -> bool:
    """Whether ``architecture`` names a network that robustq did not write: it has a colon."""
    return ":" in architecture


def runs_user_code(architecture: str) -> bool:
    """Whether building ``architecture`` imports a module that the user must have named on this command line."""
    return is_custom(architecture) and not architecture.startswith(TORCHVISION)


def check_permission(architecture: str, named: str | None) -> None:
    """A model file must never decide which code runs: the user names it again, in every command.

    Args:
        architecture: what the model file says.
        named: what ``--model`` said on this command line; None: nothing.

    Raises:
        ModelFileError: the file needs code that nobody named.
        UsageError: another network was named.
    """
    if named is not None and named != architecture:
        raise UsageError(f"--model {named} was given, but the file holds a {architecture}; name that, or leave it out")
    if named is None and runs_user_code(architecture):
        raise ModelFileError(f"was built by {architecture}; add --model {architecture} to run that code")


def float_network(architecture: str, *, classes: int) -> nn.Module:
    """The float network with fresh weights, as its author wrote it; nothing is downloaded.

    Args:
        architecture: ``torchvision:NAME`` or ``module:function``. The current folder is importable, as with
            ``python -m``; the function is called without arguments, or with ``num_classes=`` or ``classes=`` where it
            has such a parameter.
        classes: number of classes of the data.

    Raises:
        UsageError: no such network, or its code raises.
    """
    if architecture.startswith(TORCHVISION):
        return _torchvision_network(architecture.removeprefix(TORCHVISION), classes)
    return _user_network(architecture, classes)


def torchvision_names() -> list[str]:
    """Names of torchvision's image classifiers, as they stand after ``torchvision:``."""
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def _torchvision_network(name: str, classes: int) -> nn.Module:
    from torchvision import models

    known = torchvision_names()
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
        raise UsageError(f"torchvision has no classifier '{name}'; nearest: {near}")
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their own initialisation spends a minute in scipy. The auxiliary heads, whose weights are in the published
        # files, answer in training only and are not traced.
        options = {"aux_logits": True, "init_weights": False}
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return network


def _user_network(architecture: str, classes: int) -> nn.Module:
    module_name, _, function_name = architecture.partition(":")
    if not module_name or not function_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(
            f"'{architecture}' is not module:function, such as nets.small:build (nets/small.py, function build)"
        )
    module = _import(module_name, architecture)
    try:
        function: Any = module
        for part in function_name.split("."):
            function = getattr(function, part)
    except AttributeError as error:
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        advice = f"; nearest: {near[0]}" if near else ""
        raise UsageError(f"{architecture}: {module_name} has no '{function_name}'{advice}") from error
    if not callable(function) or isinstance(function, nn.Module):
        raise UsageError(
            f"{architecture}: is a {type(function).__name__}, not a function or class that returns a network"
        )
    try:
        network = function(**_class_argument(function, classes))
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"{architecture}: raised {_told(error)}{_place(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{architecture}: returned a {type(network).__name__}; it must return a torch.nn.Module")
    return network


def _import(name: str, architecture: str) -> ModuleType:
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise UsageError(
                f"{architecture}: no module '{missing}' in the current folder or among the installed packages; "
                "run robustq in the folder that holds it"
            ) from error
        raise UsageError(f"{architecture}: needs the module '{missing}', which is not installed") from error
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"{architecture}: importing it raised {_told(error)}{_place(error)}") from error
    finally:
        if added:
            sys.path.remove(here)


def _class_argument(function: Any, classes: int) -> dict[str, int]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins and C functions have no signature
        return {}
    for name in ("num_classes", "classes"):
        if name in parameters:
            return {name: classes}
    return {}


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
