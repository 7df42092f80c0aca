"""Checkpoints: files of ``torch.save``, read without running code from them (with it only where the user allows that),
and of safetensors.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustq.errors import ModelFileError, RobustqWarning, one_line
from robustq.files import check_model_file, open_regular
from robustq.safetensors_file import is_safetensors, read_safetensors
from robustq.seals import check_seal
from robustq.tables import DEEPEST

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a file by torch before 1.6, a pickled number."""

MOST_VALUES = 1_000_000
"""Values in a file: a pickle of a few bytes can hold a list of 2^100, every half of which is the same list."""

SMALLEST_FLOAT = 2
"""Bytes: torch computes nothing with floats of 8 and 4 bits."""

ADVICE = "save the weights alone: torch.save(model.state_dict(), FILE)"


def read_checkpoint(path: Path, *, trust_pickle: bool = False) -> Any:
    """The result of ``torch.load(weights_only=True)``: tensors and plain containers, never code. Of a safetensors file
    the state dict, or the content of a model file of robustq (:func:`robustq.safetensors_file.read_safetensors`).

    Args:
        path: the file.
        trust_pickle: load a file that holds more than weights as well. That runs any code it names, so only for files
            from a trusted source; its classes are imported from the working folder too.

    Raises:
        ModelFileError: the file is missing, a folder, empty, truncated, damaged (its checksums differ), not a torch
            file, a TorchScript archive, a pickle that needs code, or tensors that are not plain (see
            :func:`_check_plain`).

    Warns:
        RobustqWarning: the file is of torch before 1.6, which wrote no checksums.
    """
    check_model_file(path)
    try:
        with open_regular(path) as file:
            start = file.read(len(LEGACY))
        if is_safetensors(path, start):
            content = read_safetensors(path)
            _check_plain(content, path)
            return content
        if start.startswith(b"PK"):
            _check_archive(path)
            check_seal(path, error=ModelFileError)
        elif not start.startswith(b"\x80"):
            raise pickle.UnpicklingError("neither a zip archive nor a pickle (which torch wrote before 1.6)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write, then refuses them
            with torch.serialization.safe_globals(_harmless_types()):
                content = torch.load(path, map_location="cpu", weights_only=True)
        _check_plain(content, path)
        if start == LEGACY:
            found = f"{path}: has no checksum (torch before 1.6 wrote none), so damage goes unnoticed; "
            warnings.warn(found + "save it again with today's torch", RobustqWarning, stacklevel=2)
        return content
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if start.startswith(b"PK") or (start == LEGACY and refused):
            if trust_pickle:
                return _read_trusted(path)
            what = f" ({refused[1]})" if refused else ""
            raise ModelFileError(
                f"{path}: holds more than weights{what}, and loading it would run code; {ADVICE}; or, if you trust "
                "whoever made it: robustq harden FILE --trust-pickle"
            ) from error
        raise ModelFileError(
            f"{path}: is not a torch or safetensors file (no checkpoint could be read from it)"
        ) from error
    except ModelFileError:
        raise
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch.load has no error of its own: IndexError, struct.error, AssertionError, ...
        raise _broken(path, error) from error


def _harmless_types() -> list[Any]:
    """What training scripts save beside the weights, and what cannot run code: numbers and arrays of numpy, paths,
    argparse's options.
    """
    scalars = [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "uint8", "float16", "float32", "float64")]
    rebuilds: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    old_names = [(rebuild, f"numpy.core.multiarray.{rebuild.__name__}") for rebuild in rebuilds]  # of numpy before 2
    paths = [pathlib.PosixPath, pathlib.PurePosixPath]
    return [*scalars, *rebuilds, *old_names, np.dtype, np.ndarray, *paths, argparse.Namespace]


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that changed since it was written, or that torch.save did not write."""
    with zipfile.ZipFile(path) as archive:
        if "constants.pkl" in {name.partition("/")[2] for name in archive.namelist()}:
            raise ModelFileError(
                f"{path}: is a TorchScript file, which holds a program; save its weights alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
            )
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ModelFileError(f"{path}: holds compressed records, which torch.save does not write; {ADVICE}")
        damaged = archive.testzip()  # torch ignores the CRC-32 of a record, and so flipped bits
    if damaged is not None:
        raise ModelFileError(f"{path}: is damaged (the checksum of {damaged} differs); copy or train it again")


def _check_plain(content: Any, path: Path) -> None:
    """Refuse tensors that are sparse, quantized, complex, without values, or larger than their storage; and containers
    that are nested too deeply or too large.
    """
    level, count = [("content", content)], 0
    for _ in range(DEEPEST):
        for name, value in level:
            if isinstance(value, Tensor) and not _is_plain(value):
                raise ModelFileError(f"{path}: {name} is not a dense tensor of real numbers of usual width; {ADVICE}")
        tables = [value for _, value in level if isinstance(value, dict | list | tuple | set | frozenset)]
        count += sum(map(len, tables))
        if count > MOST_VALUES:
            break
        rows = [table.items() if isinstance(table, dict) else enumerate(table) for table in tables]
        level = [(str(name), value) for row in rows for name, value in row]
        if not level:
            return
    raise ModelFileError(f"{path}: holds more than weights (over {MOST_VALUES:,} values, or deep nesting); {ADVICE}")


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        return False
    if tensor.is_floating_point() and tensor.element_size() < SMALLEST_FLOAT:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _read_trusted(path: Path) -> Any:
    try:
        with _working_folder_importable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise ModelFileError(
            f"{path}: needs code that cannot be imported here ({one_line(error, longest=90)}); start robustq where "
            f"that code lies, or {ADVICE}"
        ) from error
    except Exception as error:  # any error of the file's code
        raise _broken(path, error) from error


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    # `python -m` has it on its path, an installed command has not. Last, so that it hides nothing installed.
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _broken(path: Path, error: Exception) -> ModelFileError:
    return ModelFileError(f"{path}: is broken or truncated ({one_line(error, longest=100)}); copy or train it again")
