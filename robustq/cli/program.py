"""The command line: commands, and how errors end.

robustq --version: its own version and those that a result depends on, without loading any of them.

The program: the commands by name, and the exit code and one line that each fault ends with.
"""

from __future__ import annotations

import errno
import platform
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, NoReturn

import typer

from robustq.cli.attack import attack
from robustq.cli.export import export, recheck
from robustq.cli.info import info, quickstart, recipes
from robustq.cli.process import Interrupts, Quiet, Verbose, is_verbose, prepare, start
from robustq.cli.train import harden, train
from robustq.errors import CheckFailedError, RobustqError, RunStoppedError

PACKAGES = ("torch", "torchvision", "brevitas", "onnx", "onnxruntime", "qonnx", "numpy")


def version_lines() -> list[str]:
    """Robustq's version, then Python's and those of the packages below it."""
    below = [f"{name} {_version(name)}" for name in PACKAGES]
    return [f"robustq {_version('robustq')}", " · ".join([f"python {platform.python_version()}", *below])]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def show_version(wanted: bool) -> None:
    """The option's callback: print and stop."""
    if wanted:
        typer.echo("\n".join(version_lines()))
        raise typer.Exit


_FULL, _FORBIDDEN = "free the place or name another one", "name a place that may be read and written"
_WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "it is gone; give a path that exists",
}

LONGEST_LINE = 2000
"""Characters of an error's line; a value that was typed may be longer than any terminal."""

app = typer.Typer(
    name="robustq",
    help="Harden low-bit vision models, write the file the device runs, and judge robustness on that very file.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions that a result depends on, and stop.",
            callback=show_version,
            is_eager=True,
        ),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Common to all commands."""


for _command in (quickstart, train, harden, attack, export, recheck, info, recipes):
    app.command()(_command)


_STOPPED = "stopped; nothing half-written is left behind"


def main() -> NoReturn:
    """Entry point: every fault is one line on stderr.

    Exit 1: a check fell short. 2: bad input or usage. 70 (EX_SOFTWARE of sysexits.h): an error that robustq did not
    foresee, with its traceback. 130: stopped by Ctrl-C.
    """
    prepare()
    start()
    interrupts = Interrupts()
    try:
        with interrupts:
            code = app(args=sys.argv[1:] or ["--help"], prog_name="robustq", standalone_mode=False)
    except CheckFailedError as error:
        _fail(str(error), 1)
    except RunStoppedError as error:
        _fail(str(error), 130)
    except RobustqError as error:
        _fail(str(error), 2)
    except OSError as error:
        place = error.filename or "a file"
        _fail(f"{place}: {error.strerror or error}; {_WAYS_OUT.get(error.errno or 0, 'check the path')}", 2)
    except Exception as error:
        shown = getattr(error, "format_message", None)  # click's usage errors: unknown option, missing argument
        if shown is None and interrupts.seen:
            _fail(_STOPPED, 130)
        if shown is None:
            if not is_verbose():
                traceback.print_exc()
            _fail(f"unforeseen {type(error).__name__}: {error}; please report it with the lines above", 70)
        _fail(f"{shown()}{_given(error)} (robustq --help)", 2)
    if code == 130:  # typer's answer to Ctrl-C
        _fail(_STOPPED, 130)
    sys.exit(code if isinstance(code, int) else 0)


def _given(error: Exception) -> str:
    """The value behind a refused option: typer's message names the option, and not always what was typed."""
    names = getattr(getattr(error, "param", None), "opts", [])
    for place, word in enumerate(sys.argv):
        name, equals, value = word.partition("=")
        if name in names and name.startswith("-"):
            typed = value if equals else "".join(sys.argv[place + 1 : place + 2])
            return f", got '{typed}'"
    return ""


def _fail(message: str, code: int) -> NoReturn:
    if is_verbose() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"robustq: {_one_line(message)}", file=sys.stderr)
    sys.exit(code)


def _one_line(text: str) -> str:
    """Printable characters only: a name or a value may hold line breaks, terminal codes or bytes of no encoding."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(text.split())
    )
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:LONGEST_LINE]}..."
