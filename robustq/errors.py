"""The exceptions of robustq: one line with the error, the value received, and the remedy."""

from __future__ import annotations

STOPPED = "stopped; nothing half-written is left behind"
"""The line after Ctrl-C."""


def one_line(error: BaseException, *, longest: int | None = None) -> str:
    """The text of an exception on one line, cut to ``longest`` characters; its class name where it has no text."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def printable(line: str) -> str:
    """One line for a terminal: line breaks, terminal codes and marks of text direction become visible codes."""
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in line)


class RobustqError(Exception):
    """Base class; the command line prints the message as one line and exits with 2."""


class UsageError(RobustqError):
    """An invalid option or argument: an unknown bit width, an epsilon over 1, an absent GPU."""


class DataError(RobustqError):
    """A data set that cannot be loaded: an unknown name, an empty folder, an .npz without the right arrays."""


class RecipeError(RobustqError):
    """A recipe that does not exist, or has unknown keys or invalid values."""


class ModelFileError(RobustqError):
    """A model file that is missing, broken, unknown, or unfit for its use."""


class ExportError(RobustqError):
    """A network that cannot be lowered to the wanted format."""


class OutputExistsError(RobustqError):
    """An explicit output path that exists: nothing is ever overwritten."""


class OutOfMemoryError(RobustqError):
    """Too little memory for a batch; the message names the batch size that fits."""


class OutputError(RobustqError):
    """A full disk, or a path that cannot be written."""


class RunLockedError(RobustqError):
    """A run folder that another process is using."""


class RunStoppedError(RobustqError):
    """A run that was stopped (Ctrl-C, SIGTERM) and can be resumed; the command line exits with 130."""


class CheckFailedError(RobustqError):
    """A failed check (parity, a required accuracy); the command line exits with 1 instead of 2."""


class NotFiniteError(CheckFailedError):
    """NaN or Inf in the loss, the weights or the images of a training run."""


class RobustqWarning(UserWarning):
    """All warnings of robustq; the command line shows these and hides those of other libraries."""
