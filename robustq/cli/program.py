"""The program ``robustq``: its commands, its help, and the exit code and message of each error."""

from __future__ import annotations

import errno
import platform
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from robustq.cli.attack import attack
from robustq.cli.bench import bench
from robustq.cli.export import export, recheck
from robustq.cli.info import info, quickstart, recipes, zoo
from robustq.cli.limited import watch_for_crashes
from robustq.cli.process import Quiet, Verbose, is_verbose, prepare, recorded_interrupts, reset_printing
from robustq.cli.train import harden, train
from robustq.errors import STOPPED, CheckFailedError, RobustqError, RunStoppedError, printable
from robustq.memory import caused_by_memory, out_of_memory

PACKAGES = ("torch", "torchvision", "brevitas", "onnx", "onnxruntime", "qonnx", "numpy")


def show_version(wanted: bool) -> None:
    """The option's callback: print the versions of robustq, Python and the packages, without importing them."""
    if not wanted:
        return
    found = {}
    for name in ("robustq", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    typer.echo(f"robustq {found.pop('robustq')}")
    typer.echo(" · ".join(f"{name} {one}" for name, one in {"python": platform.python_version(), **found}.items()))
    raise typer.Exit


_FULL, _FORBIDDEN = "free space or name another place", "name a place that can be read and written"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "give a path that exists",
}

LONGEST_LINE = 2000
"""Characters of an error message, which may contain a typed value."""


WITHOUT_TORCH = ("recipes", "zoo")
"""Commands that need little memory."""


class Command(TyperCommand):
    """A command, watched under a limit of memory. Its help has a section for each help panel; examples, one a line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, watched where memory is limited."""
        if ctx.info_name not in WITHOUT_TORCH:
            watch_for_crashes()
        return super().invoke(ctx)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the text, then the lines below "Examples:" as they are."""
        text, _, examples = (self.help or "").partition("Examples:\n")
        for paragraph in text.strip().split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(" ".join(paragraph.split()))
        if examples:
            with formatter.section("Examples"):
                for line in examples.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options, and the options of each panel."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            usual = "Arguments" if param.param_type_name == "argument" else "Options"
            if record is not None:
                sections.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


app = typer.Typer(
    name="robustq",
    help="Harden low-bit vision models, write the file the device runs, and judge robustness on that very file.",
    add_completion=True,
    context_settings={"max_content_width": 100},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the versions that results depend on.", callback=show_version, is_eager=True
        ),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Common to all commands."""


for _command in (quickstart, train, harden, attack, export, recheck, bench, info, recipes, zoo):
    app.command(cls=Command)(_command)


def main() -> NoReturn:
    """Entry point: every error is one line on stderr.

    Exit 1: a check failed. 2: bad input or usage. 70 (EX_SOFTWARE of sysexits.h): an unexpected error, with its
    traceback. 130: stopped by Ctrl-C.
    """
    prepare()
    reset_printing()
    interrupts: list[int] = []
    try:
        with recorded_interrupts(interrupts):
            code = app(args=sys.argv[1:] or ["--help"], prog_name="robustq", standalone_mode=False)
    except CheckFailedError as error:
        _fail(str(error), 1)
    except RunStoppedError as error:
        _fail(str(error), 130)
    except RobustqError as error:
        _fail(str(error), 2)
    except Exception as error:
        if caused_by_memory(error):
            _fail(out_of_memory(error), 2)
        if isinstance(error, OSError):
            place = error.filename or "a file"
            _fail(f"{place}: {error.strerror or error}; {_ADVICE.get(error.errno or 0, 'check the path')}", 2)
        shown = getattr(error, "format_message", None)  # click's usage errors: unknown option, missing argument
        if shown is None and interrupts:
            _fail(STOPPED, 130)
        if shown is None:
            if not is_verbose():
                traceback.print_exc()
            _fail(f"unexpected {type(error).__name__}: {error}; please report it with the lines above", 70)
        _fail(f"{shown()}{_typed_value(error)} (robustq --help)", 2)
    if code == 130:  # typer's code for Ctrl-C
        _fail(STOPPED, 130)
    sys.exit(code if isinstance(code, int) else 0)


def _typed_value(error: Exception) -> str:
    """The value of a refused option, which typer's message does not always contain."""
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
    """Printable characters only: a typed value may hold line breaks, terminal codes or undecodable bytes."""
    shown = printable(" ".join(text.split()))
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:LONGEST_LINE]}..."
