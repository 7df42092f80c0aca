"""Every error that robustq raises on purpose: one line that says what was wrong, the value received, and what to do."""

from __future__ import annotations


class RobustqError(Exception):
    """Base class; the command line prints the message as one line and exits with 2."""


class UsageError(RobustqError):
    """An option or an argument that makes no sense: a bit width outside the table, an epsilon over 1, an absent GPU."""


class DataError(RobustqError):
    """A data set that cannot be had or read: an unknown name, an empty folder, an .npz without the right arrays."""


class RecipeError(RobustqError):
    """A recipe that does not exist, or holds keys or values that nothing reads."""


class ModelFileError(RobustqError):
    """A model file that is missing, broken, foreign, or does not fit what it is used for."""


class ExportError(RobustqError):
    """A network or a format that cannot be lowered to a deployable file."""


class OutputExistsError(RobustqError):
    """An explicit output path that exists already: nothing is ever overwritten."""


class OutOfMemoryError(RobustqError):
    """Memory that does not suffice for a batch; the message says which batch fits."""


class OutputError(RobustqError):
    """A disk that is full, or a place that cannot be written."""


class RunLockedError(RobustqError):
    """A run folder that another process is writing."""


class RunStoppedError(RobustqError):
    """A run that was asked to stop (Ctrl-C, SIGTERM) and says how to go on; the command line exits with 130."""


class CheckFailedError(RobustqError):
    """A check that fell short (parity, a required accuracy): the command line exits with 1 instead of 2."""


class NotFiniteError(CheckFailedError):
    """NaN or Inf in the loss, the weights or the images of a training run."""


class RobustqWarning(UserWarning):
    """Everything that robustq warns of: the command line shows these and hides those of the libraries below it."""
