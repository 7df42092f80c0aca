"""Files of ``torch.save``, read without running code from them; with it only where the user allows that."""

from __future__ import annotations

import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from robustq.errors import ModelFileError
from robustq.files import check_model_file

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a file by torch before 1.6, a pickled number."""

ADVICE = "save the weights alone: torch.save(model.state_dict(), FILE)"


def read_checkpoint(path: Path, *, trust_pickle: bool = False) -> Any:
    """The result of ``torch.load(weights_only=True)``: tensors and plain containers, never code.

    Args:
        path: the file.
        trust_pickle: load a file that holds more than weights as well. That runs any code it names, so only for files
            from a trusted source; its classes are imported from the working folder too.

    Raises:
        ModelFileError: the file is missing, a folder, empty, truncated, damaged (its checksums differ), not a torch
            file, a TorchScript archive, or a pickle that needs code.
    """
    check_model_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
        if start.startswith(b"PK"):
            _check_archive(path)
        elif not start.startswith(b"\x80"):
            raise pickle.UnpicklingError("neither a zip archive nor a pickle (which torch wrote before 1.6)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write, then refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
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
        raise ModelFileError(f"{path}: is not a torch file (no checkpoint could be read from it)") from error
    except ModelFileError:
        raise
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch.load has no error of its own: IndexError, struct.error, AssertionError, ...
        raise _broken(path, error) from error


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that changed since it was written, or that torch.save did not write."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch ignores the CRC-32 of a record, and so flipped bits
        names = {name.partition("/")[2] for name in archive.namelist()}
    if damaged is not None:
        raise ModelFileError(f"{path}: is damaged (the checksum of {damaged} differs); copy or train it again")
    if "constants.pkl" in names:
        raise ModelFileError(
            f"{path}: is a TorchScript file, which holds a program; save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )


def _read_trusted(path: Path) -> Any:
    try:
        with _working_folder_importable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise ModelFileError(
            f"{path}: needs code that cannot be imported here ({_first_line(error)}); start robustq where that code "
            f"lies, or {ADVICE}"
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
    return ModelFileError(f"{path}: is broken or truncated ({_first_line(error)}); copy or train it again")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
