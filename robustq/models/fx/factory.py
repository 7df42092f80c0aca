"""From the name of a custom model to the float model: ``torchvision:NAME``, ``timm:NAME``, or the user's function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from robustq.errors import ModelFileError, UsageError, one_line

TORCHVISION, TIMM = "torchvision:", "timm:"
LIBRARIES = (TORCHVISION, TIMM)
"""Prefixes of networks of installed libraries."""


def is_custom(architecture: str) -> bool:
    """Whether ``architecture`` names a custom model: it has a colon."""
    return ":" in architecture


def runs_user_code(architecture: str) -> bool:
    """Whether building ``architecture`` imports a module of the user."""
    return is_custom(architecture) and not architecture.startswith(LIBRARIES)


def plain_name(architecture: str) -> str:
    """``architecture`` without the library's prefix and without a colon: good for a file."""
    for library in LIBRARIES:
        architecture = architecture.removeprefix(library)
    return architecture.replace(":", ".")


def check_permission(architecture: str, named: str | None) -> None:
    """Check that ``named``, the value of ``--model`` or None, allows the code that a model file's architecture needs.

    A file must never decide which code runs. ModelFileError if it needs code that the user did not name, UsageError if
    the user named another model.
    """
    if named is not None and named != architecture:
        raise UsageError(f"--model {named} was given, but the file holds a {architecture}; name that, or leave it out")
    if named is None and runs_user_code(architecture):
        raise ModelFileError(f"was built by {architecture}; add --model {architecture} to run that code")


def float_network(architecture: str, *, classes: int) -> nn.Module:
    """The float model with fresh weights; nothing is downloaded. UsageError for no such model, or its code raises.

    ``architecture`` is ``torchvision:NAME``, ``timm:NAME`` or ``module:function``. The current folder is importable, as
    with ``python -m``; the function is called with ``num_classes=`` or ``classes=`` if it has such a parameter.
    """
    if architecture.startswith(TORCHVISION):
        return _torchvision_network(architecture.removeprefix(TORCHVISION), classes)
    if architecture.startswith(TIMM):
        return _timm_network(architecture.removeprefix(TIMM), classes)
    return _user_network(architecture, classes)


def torchvision_names() -> list[str]:
    """Names of torchvision's image classifiers."""
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
        # Their initialisation takes a minute. Their auxiliary heads are in the published weights, but not traced.
        options = {"aux_logits": True, "init_weights": False}
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return network


def timm_names() -> list[str]:
    """Names of timm's networks without their tags; none where timm is not installed."""
    return list(_timm().list_models()) if importlib.util.find_spec("timm") else []


def timm_normalisation(architecture: str) -> tuple[Sequence[float], Sequence[float]] | None:
    """(mean, std) per channel that timm gives for the published weights of ``timm:NAME``; None for other networks."""
    if not architecture.startswith(TIMM):
        return None
    published = _timm().get_pretrained_cfg(architecture.removeprefix(TIMM))
    return None if published is None else (published.mean, published.std)


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UsageError("timm:NAME needs timm, which is not installed: pip install timm") from error


def _timm_network(name: str, classes: int) -> nn.Module:
    timm = _timm()
    # timm would take other names for places on the net or on the disk.
    plain, _, tag = name.partition(".")
    known, tags = timm_names(), timm.list_pretrained(f"{plain}.*")
    if plain not in known:
        near = ", ".join(difflib.get_close_matches(plain, known, n=3, cutoff=0.0))
        raise UsageError(f"timm has no network '{plain}'; nearest: {near}")
    if tag and name not in tags:
        raise UsageError(f"timm has no weights '{tag}' of {plain}; known: {', '.join(tags) or 'none'}")
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return network


def _user_network(architecture: str, classes: int) -> nn.Module:
    module_name, _, function_name = architecture.partition(":")
    if not module_name or not function_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(
            f"'{architecture}' is not module:function, such as nets.small:build (nets/small.py, function build)"
        )
    module = _import(module_name, architecture)
    try:
        function: Any = operator.attrgetter(function_name)(module)
    except AttributeError as error:
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        advice = f"; nearest: {near[0]}" if near else ""
        raise UsageError(f"{architecture}: {module_name} has no '{function_name}'{advice}") from error
    if not callable(function) or isinstance(function, nn.Module):
        kind = type(function).__name__
        raise UsageError(f"{architecture}: is a {kind}, not a function or class that returns a network")
    try:
        network = function(**_class_argument(function, classes))
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"{architecture}: raised {_described(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{architecture}: returned a {type(network).__name__}; it must return a torch.nn.Module")
    return _unwrapped(network, architecture)


def _unwrapped(network: nn.Module, architecture: str) -> nn.Module:
    """The network inside torch.compile's and DataParallel's modules; UsageError for TorchScript."""
    while True:
        if isinstance(network, torch.jit.ScriptModule):
            raise UsageError(
                f"{architecture}: returned a TorchScript module, which cannot be traced; return the module"
            )
        inner = getattr(network, "_orig_mod", None)  # of torch.compile; importing its class would load the compiler
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = network.module
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def _import(name: str, architecture: str) -> ModuleType:
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if f"{name}.".startswith(f"{missing}."):
            raise UsageError(
                f"{architecture}: no module '{missing}' in the current folder or among the installed packages; "
                "run robustq in the folder that holds it"
            ) from error
        raise UsageError(f"{architecture}: needs the module '{missing}', which is not installed") from error
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(f"{architecture}: importing it raised {_described(error)}") from error
    finally:
        if added:
            sys.path.remove(here)


def _class_argument(function: Any, classes: int) -> dict[str, int]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins and C functions have no signature
        return {}
    return next(({name: classes} for name in ("num_classes", "classes") if name in parameters), {})


def _described(error: Exception) -> str:
    """Class, text and line of an exception of the user's code."""
    name, text = type(error).__name__, one_line(error, longest=160)
    frames = traceback.extract_tb(error.__traceback__)
    line = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return (name if text == name else f"{name}: {text}") + line
